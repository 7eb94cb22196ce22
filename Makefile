# A fresh machine with Python 3.11 (its venv and pip) and make needs nothing else: every target sets up what it uses.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# `pip install --group` came with pip 25.1; this one is known to work.
PIP := pip==26.3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Tests start hundreds of processes: what Python has compiled once is kept, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install check format test soak demo bench clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything in it, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'no python3.11 or python3 on the PATH'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet '$(PIP)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[all]'
	touch $@

check: install ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff put the tree in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: check ## check, then all tests but the long ones: the quick ones, of which some sleep, then those that start a Ray; three at a time
	$(BIN)/pytest -n 3 -m 'not ray and not long'
	$(BIN)/pytest -n 3 --maxschedchunk 1 -m 'ray and not long'

test-long: install ## faults in real processes, and Ray nodes in network namespaces (root, iproute2, nftables)
	$(BIN)/pytest -n 0 -m long

soak: install ## 200,000 simulated runs of mixed faults, on all cores; ARGS='--runs 20000' for fewer
	$(BIN)/python tests/world_soak.py --output benchmarks/results/soak.json $(ARGS)

demo: install ## watch a policy learn in simulators on this machine; ARGS='--help' lists its options
	$(BIN)/rllink-zmq demo $(ARGS)

bench: install ## run each benchmarks/bench_*.py, one after the other
	for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

clean: ## remove build output and caches (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
