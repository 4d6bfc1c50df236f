# make demo   the main job on the toy world, ending in a report        make test   everything that is checked
# make seeds  the job for three seeds, and the report over them        make docs   the site (needs Quarto)
# make soak   what a kill costs a run: nothing
# make sync   all that is made from notebooks and tests anew         make clean  what the above made, but not .venv, data or runs
SHELL  := /bin/bash
CONFIG ?= configs/toy.yaml
SEEDS  ?= 42 43 44
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
STAMP  := .venv/.installed
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export NO_ALBUMENTATIONS_UPDATE := 1
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo seeds test soak docs sync readme clean
install: $(STAMP)

$(STAMP): requirements.txt setup.py settings.ini
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 is needed, and $(or $(PYTHON),no python3) is not it. Install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	test -x .venv/bin/pip || "$(PYTHON)" -m venv .venv
	.venv/bin/pip install -r requirements.txt
	.venv/bin/pip install --no-deps --no-build-isolation --use-pep517 --config-settings editable_mode=compat -e .
	@touch $@

demo: $(STAMP)
	@./demo.sh $(CONFIG)

seeds: $(STAMP)
	@for seed in $(SEEDS); do echo; echo "seed $$seed"; \
	   rtsseg-train --config $(CONFIG) --seed $$seed && rtsseg-evaluate --config $(CONFIG) --seed $$seed --split val && \
	   rtsseg-calibrate --config $(CONFIG) --seed $$seed && rtsseg-evaluate --config $(CONFIG) --seed $$seed --split test || exit 1; done
	@echo; rtsseg-report --config $(CONFIG) --seeds "$(SEEDS)"

test: $(STAMP)
	@echo "1/3 notebooks, modules and all that is made from them in step …"; TIMEFORMAT="    %0R s"; time python sync.py --check
	@echo "2/3 the tests inside the notebooks …"; TIMEFORMAT="    %0R s"; time OMP_NUM_THREADS=1 timeout 600 nbdev_test --n_workers 2
	@echo "3/3 pytest …"; OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -o tmp_path_retention_policy=failed   # else gigabytes stay

soak: $(STAMP)   # a real run, killed 200 times
	RTSSEG_KILLS=200 OMP_NUM_THREADS=1 python -m pytest -q -s tests/faults/test_run_time.py -k killed_at_random

docs: $(STAMP)
	$(if $(shell command -v quarto),,$(error the site is rendered by Quarto 1.7 or later, which is not installed: https://quarto.org/docs/get-started))
	@touch README.md   # else nbdev writes its own
	nbdev_docs && echo "_docs/index.html"

sync readme: $(STAMP)
	@.venv/bin/python sync.py

clean:
	rm -rf _proc _docs build dist nbs/nbdev.yml nbs/sidebar.yml nbs/mlruns nbs/mlflow.db
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache -o -name .hypothesis \) -type d -print0 | xargs -0 rm -rf
