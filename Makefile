SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

MODEL ?= organism-a
N ?= 100
VARIANTS ?= rare_names unseen_places passive double_io hospital space third_name extra_subject
RANDOM_CIRCUITS ?= 19
POSITIONS ?= listed
OUT ?= results/$(MODEL)-ioi
WORKERS ?= 2
EXPERIMENTS ?= $(basename $(notdir $(wildcard experiments/*.ipynb)))

BIN := .venv/bin
INSTALLED := .venv/.installed
# One thread a worker: the workers already fill the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)

.PHONY: help run test experiments benchmarks benchmarks-peers lab nbs clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/' | expand -t 14
	@echo 'Variables of `make run`: MODEL=$(MODEL) N=$(N) VARIANTS="$(VARIANTS)" (empty: all 33) RANDOM_CIRCUITS=$(RANDOM_CIRCUITS) POSITIONS=$(POSITIONS) OUT=$(OUT); of `make test` and `make nbs`: WORKERS=$(WORKERS); of `make experiments`: EXPERIMENTS="$(EXPERIMENTS)"'

# Built once; rebuilt only when one of these files changes.
$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@python=; \
	for candidate in python3.11 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo 'make: Python 3.11 or newer is needed, as python3.11 or python3' >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

run: $(INSTALLED)  ## Score the IOI circuit of an embedded model on all four axes, two variants each, into results/
	$(BIN)/circuit-gen measure --model $(MODEL) --task ioi --axes lexical syntactic domain adversarial \
	  $(if $(VARIANTS),--variants $(VARIANTS)) --n-prompts $(N) --n-random $(RANDOM_CIRCUITS) --positions $(POSITIONS) --seed 0 --out $(OUT)

test: $(INSTALLED)  ## Lint, then run every test and every notebook
	$(BIN)/ruff check .
	$(TEST)/python -m pytest -q -n $(WORKERS) -m 'not slow'
	$(TEST)/python -m pytest -q -n $(WORKERS) -m slow
	$(TEST)/nbdev-test --n-workers $(WORKERS) --flags slow --timing
	@echo 'make test: all passed (lint, fast tests, slow tests, notebooks)'

experiments: $(INSTALLED)  ## Run the experiments again (some hours), into experiments/ and results/
	for name in $(EXPERIMENTS); do \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 experiments/$$name.ipynb; done
	$(BIN)/nbdev-clean --fname experiments

benchmarks: $(INSTALLED)  ## Time the engine against what one would use today (about half an hour), into results/benchmarks/
	$(BIN)/python experiments/benchmarks/engine.py

benchmarks-peers: $(INSTALLED)  ## Time it against pyvene and AutoCircuit, each installed in its own environment under .peers/ (20 minutes)
	$(BIN)/python experiments/benchmarks/peers.py

lab: $(INSTALLED)  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab

nbs: $(INSTALLED)  ## Export the notebooks to the package, clean them, and test them
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	[ ! -d experiments ] || $(BIN)/nbdev-clean --fname experiments
	$(TEST)/nbdev-test --n-workers $(WORKERS) --timing

clean:  ## Remove .venv, caches and build leftovers
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
	find . -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
