"Time and cost of a large map: bounds that hold for all of them, and the rate of a model on this machine"
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.maps import statistics, untrained_model
from rtsseg.cost import CostReport, Machines, MapWork, cost_report, map_cost, measure_rate
from rtsseg.fleet import MapOptions
from rtsseg.infer import VIEWS

works = st.builds(MapWork, tiles=st.integers(1, 10**8), overlap=st.sampled_from([0., .25, .5]),
                  views=st.sampled_from(list(VIEWS)), members=st.integers(1, 5), shard=st.integers(1, 10**4))
machines = st.builds(Machines, rate=st.floats(1, 1000), gpus=st.integers(1, 1000), price=st.floats(0, 10),
                     store=st.floats(1e6, 1e12), deaths=st.sampled_from([0., .01, .1]))

@given(work=works, at=machines)
def test_a_map_is_as_slow_as_its_slowest_part(work, at):
    found = map_cost(work, at)
    seconds = found.hours * 3600
    assert seconds >= work.forwards / at.rate / at.gpus * (1 - 1e-6)
    assert seconds >= work.forwards / at.rate / work.shards * (1 - 1e-6)
    assert seconds >= work.traffic / at.store * (1 - 1e-6)
    assert math.isclose(found.compute, found.hours * at.gpus * at.price)

@given(tiles=st.integers(1, 10**4), rounds=st.integers(1, 50), gpus=st.integers(1, 500), rate=st.floats(.1, 1000))
def test_twice_the_gpus_need_half_the_time_at_the_same_cost(tiles, rounds, gpus, rate):
    "Where rounds of shards come out even, and the store has no limit"
    work = MapWork(tiles * rounds * 2 * gpus, shard=tiles)
    some, twice = (map_cost(work, Machines(rate, count, price=1.)) for count in (gpus, 2 * gpus))
    assert math.isclose(twice.hours, some.hours / 2)
    assert math.isclose(twice.compute, some.compute)

@given(work=works, at=machines)
def test_more_gpus_are_never_slower(work, at):
    hours = [one.hours for one in CostReport(work, at, '').costs]
    assert hours == sorted(hours, reverse=True)

@pytest.mark.parametrize('bands', [(), ('ndvi', 'slope')])
def test_a_rate_is_measured_with_what_the_model_sees(tmp_path, bands):
    model = untrained_model(tmp_path/'model', statistics(bands))
    found = measure_rate(MapOptions(str(model), device='cpu', views='minimal'), seconds=0)
    assert found.forwards > 0 and found.side == 64
    report = cost_report(MapWork(1e6), Machines(0), model, 'cpu', seconds=0)
    assert report.work.side == 64
    assert 'measured on this machine' in str(report)
