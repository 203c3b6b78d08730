# A fresh machine needs Python 3.11, make, git and a package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOCKED := requirements.lock

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-slow test-oldest lint format

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/installed  ## build .venv and install the project into it (about 6 GB with CUDA libraries)

.venv/installed: setup.py $(LOCKED)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --requirement $(LOCKED)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# For every system and Python from 3.11 on. What is locked stays where setup.py allows it; delete the file for newer versions.
lock: setup  ## write requirements.lock after a change of setup.py: every version with its hashes
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --extra dev \
		--default-index https://pypi.org/simple --custom-compile-command 'make lock' --output-file $(LOCKED) setup.py

demo: setup  ## pretrain on scikit-learn's digits, probe, classify: a minute and a half on two cores, no download
	$(BIN)/python scripts/pretrain.py --recipe quickstart
	$(BIN)/python scripts/linear_probe.py runs/quickstart
	$(BIN)/python scripts/linear_probe.py runs/quickstart --mode cached

# Three processes on two cores: some tests wait for the processes that they start. Threads of one would take another's core.
test: setup lint  ## lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses 3 --dist loadfile

test-slow: setup  ## what takes minutes: a run killed twenty times, a requeued job, memory, pairs of processes
	$(BIN)/pytest --quiet -m slow -rP

test-oldest: .venv-oldest/installed  ## the tests with the oldest versions that setup.py allows (another 6 GB)
	.venv-oldest/bin/pytest --quiet --numprocesses 2 --dist loadfile

# uv, because pip installs the newest versions only.
.venv-oldest/installed: setup.py
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[dev]'
	touch $@

lint: setup  ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## put the code in its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
