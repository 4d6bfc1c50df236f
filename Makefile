# make demo     the whole job on the toy world, ending in a report
# make seeds    the same for three seeds, and one report over them
# make test     every check: style, generated files, notebooks, tests
# make quick    under a minute: the house rules, and the chapters that differ from main
# make soak     hours of faults: each command killed and starved again and again, and files changed at random
# make bench    the benchmarks, and the table in benchmarks/README.md
# make docs     the site (needs Quarto 1.7)
# make check-docs  whether every local link of the site leads somewhere
# make sync     write everything that is generated from notebooks and tests
# make lock     write requirements.txt from settings.ini; versions in it stay where they still fit
# make clean    remove what the above made, except .venv, data and runs
#
# make install TORCH=cpu   a PyTorch without CUDA, from the package index that TORCH_INDEX names
SHELL  := /bin/bash
CONFIG ?= configs/toy.yaml
SEEDS  ?= 42 43 44
TORCH  ?=
TORCH_INDEX ?=
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
STAMP  := .venv/.installed
PIP    := .venv/bin/pip
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export NO_ALBUMENTATIONS_UPDATE := 1
export OMP_WAIT_POLICY := passive
export PYTHONHASHSEED := 42
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo seeds test style synced notebooks pytest quick soak bench docs check-docs sync readme lock clean
install: $(STAMP)

# The lock names the CUDA libraries that PyTorch's default wheel needs. A CPU wheel needs none of them.
ifeq ($(TORCH),cpu)
LOCK := .venv/requirements-cpu.txt
else
LOCK := requirements.txt
endif

$(STAMP): requirements.txt setup.py settings.ini pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; found: $(or $(PYTHON),no python3)."; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(PIP) || "$(PYTHON)" -m venv .venv
	$(if $(filter cpu,$(TORCH)),$(MAKE) --no-print-directory $(LOCK))
	$(PIP) install --require-hashes -r $(LOCK)
	$(PIP) install --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

.venv/requirements-cpu.txt: requirements.txt
	awk '/^[a-z]/ {wanted = !/^(nvidia|cuda|triton)/} wanted' $< > $@
	$(if $(TORCH_INDEX),PIP_INDEX_URL="$(TORCH_INDEX)") $(PIP) install --no-deps $$(grep -oE '^(torch|torchvision)==[^ ]+' $<)

demo: $(STAMP)
	@./demo.sh $(CONFIG)

seeds: $(STAMP)
	@set -e; for seed in $(SEEDS); do \
	   echo; echo "seed $$seed"; \
	   rtsseg-train --config $(CONFIG) --seed $$seed; \
	   rtsseg-evaluate --config $(CONFIG) --seed $$seed --split val --views none,minimal; \
	   rtsseg-calibrate --config $(CONFIG) --seed $$seed; \
	   rtsseg-evaluate --config $(CONFIG) --seed $$seed --split test; \
	 done
	@echo; rtsseg-report --config $(CONFIG) --seeds "$(SEEDS)"

test: $(STAMP)
	@$(MAKE) --no-print-directory style synced notebooks pytest

style: $(STAMP)
	@echo "style …"
	@ruff check

synced: $(STAMP)
	@echo "notebooks, and all files that are generated from them …"
	@TIMEFORMAT="    %0R s"; time python sync.py --check

notebooks: $(STAMP)
	@echo "the tests inside the notebooks …"
	@TIMEFORMAT="    %0R s"; time OMP_NUM_THREADS=1 timeout 1800 nbdev_test --n_workers 2

pytest: $(STAMP)
	@echo "pytest …"
	@OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 30

# On main itself: the chapters that differ from the last commit
CHANGED = { git diff --name-only --diff-filter=d main -- 'nbs/*.ipynb' 2>/dev/null || git diff --name-only --diff-filter=d HEAD -- 'nbs/*.ipynb'; }
quick: $(STAMP)
	@OMP_NUM_THREADS=1 python -m pytest -q -x -n 2 -m "not slow" tests/test_house.py
	@set -e; for chapter in $$($(CHANGED)); do \
	   echo "$$chapter"; OMP_NUM_THREADS=1 nbdev_test --path $$chapter; \
	 done

soak: $(STAMP)
	RTSSEG_SOAK=7 RTSSEG_KILLS=100 OMP_NUM_THREADS=1 python -m pytest -q -s -n 0 tests/faults \
	  -k "killed or kernel or fills_up or at_once or test_47"
	python sync.py

bench: $(STAMP)
	python benchmarks/run.py $(SCRIPTS)

docs: $(STAMP)
	$(if $(shell command -v quarto),,$(error the site needs Quarto 1.7 or later: `.venv/bin/pip install quarto-cli` \
	  fetches it where the network allows; or https://quarto.org/docs/get-started))
	@touch README.md   # else nbdev writes its own
	rm -rf _proc       # nbdev keeps pages there that it made with another reference.py
	PYTHONPATH=. nbdev_docs
	@echo "_docs/index.html"

check-docs: $(STAMP)
	python pages.py --check _docs

sync readme: $(STAMP)
	@.venv/bin/python sync.py

# without crf, which the index has as source alone: it would need a compiler on each machine; without cupy, which
# needs a GPU
LOCKED := search track export ray wandb sam webdataset series dicom map notebooks dev
lock:
	uv pip compile setup.py $(LOCKED:%=--extra %) --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.txt

clean:
	rm -rf _proc _docs build dist nbs/nbdev.yml nbs/mlruns nbs/mlflow.db
	find . -path ./.venv -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache -o -name .hypothesis -o -name .ruff_cache \) \
	  -type d -print0 | xargs -0 rm -rf
