# Everything this project does, on a machine that has Python 3.10+, make and a way to install Python packages.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# What may be set: make run-all PROFILE=digits JOBS=4
PYTHON ?= python3
PROFILE ?=
JOBS ?=
ONLY ?=
SEEDS ?=
LAUNCH ?=
export LAUNCH
ifdef SRLIB_DATA
export SRLIB_DATA
endif

BIN := .venv/bin
READY := .venv/ready
PIPELINE := $(BIN)/python papermill_runs/pipeline.py
# run-all computes the quick preview unless told otherwise; book and serve show the results that are committed.
RUN_PROFILE := $(or $(PROFILE),quick)
BOOK_PROFILE := $(or $(PROFILE),digits)
WITH_SEEDS := $(if $(SEEDS),--seeds '$(SEEDS)')

.PHONY: help setup run-all book serve test fault-test test-gpu bench lint lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PROFILE=quick|digits|reference|paper|confirmation|confirmation-reference  which runs (run-all: quick; book, serve: digits)"
	@echo "JOBS=N  runs at a time (default: the cores)      SEEDS=0,1,2  instead of the seeds in the run matrix"
	@echo 'ONLY="NAME ..."  these runs and chapters alone, as named in papermill_runs/PROFILE.yaml (bench: these parts)'
	@echo 'LAUNCH="srun --gres=gpu:1"  put before each run  SRLIB_DATA=DIR  where the images are   PYTHON=python3.12'

setup: $(READY)  ## a virtual environment in .venv with the exact versions of requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.x")'
	@echo "Setting up .venv (only this once; PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.lock \
	  | awk -v all=$$(grep -c == requirements.lock) '/^Collecting/ {if (++n % 20 == 0) {print "  " n " of at most " all " packages looked up"; fflush()}} \
	      /^Installing collected/ {print "  installing"; fflush()}'
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

run-all: $(READY)  ## execute every run and chapter of PROFILE (resumes; repeats only what changed), then build the book
	@$(PIPELINE) run $(RUN_PROFILE) $(if $(JOBS),--jobs $(JOBS)) $(if $(ONLY),--only $(ONLY)) $(WITH_SEEDS)
	@$(PIPELINE) book $(RUN_PROFILE) $(WITH_SEEDS)

book: $(READY)  ## build the HTML book from the results of PROFILE, running nothing
	@$(PIPELINE) book $(BOOK_PROFILE) $(WITH_SEEDS)

serve: book  ## build the book and show it at http://localhost:8000
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", 8000)).close()' 2>/dev/null || \
	  { echo "port 8000 is taken: stop what uses it, or open book/_build/$(BOOK_PROFILE)/html/index.html in a browser"; exit 1; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory book/_build/$(BOOK_PROFILE)/html 8000

test: $(READY)  ## all tests, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not cuda"

fault-test: $(READY)  ## kill, damage and misuse everything, less than 20 minutes; the book's page on tests tells the counts
	@$(BIN)/python tests/faults/everything.py

test-gpu: $(READY)  ## the tests that have a GPU version, on the GPU
	@$(BIN)/python -m pytest -q -m cuda

bench: $(READY)  ## measure speed and memory, less than 10 minutes on a quiet machine; the book's page on it draws the results
	@$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY))

lint: $(READY)  ## style and common mistakes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lock: $(READY)  ## bring requirements.lock up to date with pyproject.toml (delete it first to take newer versions)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

clean:  ## remove the virtual environment, caches and the built books; results stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis book/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
