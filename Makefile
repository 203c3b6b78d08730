# A fresh machine needs Python 3.11, make, git and a package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-oldest lint format

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/installed  ## build .venv and install the project into it (about 6 GB with CUDA libraries)

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup  ## pretrain on scikit-learn's digits, probe, classify: a minute and a half on two cores, no download
	$(BIN)/python scripts/pretrain.py --recipe quickstart
	$(BIN)/python scripts/linear_probe.py runs/quickstart
	$(BIN)/python scripts/linear_probe.py runs/quickstart --mode cached

test: setup lint  ## lint, types and tests
	$(BIN)/pytest --quiet --numprocesses 2 --dist loadfile

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
