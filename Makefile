# Every target works alone from a fresh clone: it makes .venv first, and again when the requirements change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
TEST_STAMP := $(VENV)/.installed-test
SLOW_STAMP := $(VENV)/.installed-slow
CORE := .venv-core
OLDEST := .venv-oldest

# make train
ENV ?= Humanoid-v5
STEPS ?= 400000
SEED ?= 0
LOGS ?= logs

# make test
WORKERS ?= 2

# pip leaves byte code to the first import. Without it, each process that a test starts would compile everything again.
export PYTHONDONTWRITEBYTECODE :=

SOURCES := $(wildcard .ci sb3_trpo_ext tests benchmarks examples docs)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test coverage test-slow test-core test-oldest lint format type docs commit-checks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[docs]"
	touch $@

# A gigabyte, which training does not need
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[brax,export,playground]"
	touch $@

$(SLOW_STAMP): $(TEST_STAMP)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[tracking]"
	touch $@

train: $(STAMP) ## Train and evaluate an agent: ENV=Humanoid-v5 STEPS=400000 SEED=0 LOGS=logs
	$(BIN)/sb3-trpo train --env $(ENV) -n $(STEPS) --seed $(SEED) -f $(LOGS) -P --verbose 0
	$(BIN)/sb3-trpo report --env $(ENV) -f $(LOGS)

# One thread per worker: the networks of the tests are small, and workers that each use all cores slow each other down.
test: $(TEST_STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

coverage: $(TEST_STAMP) ## Run the tests and show the coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report term

test-slow: $(SLOW_STAMP) ## Run the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

test-core: ## Check what works with the core dependencies alone
	$(PYTHON) -m venv --clear $(CORE)
	$(CORE)/bin/python -m pip install --no-compile -c constraints.txt .
	$(CORE)/bin/python .ci/core.py

# Needs Python 3.11, for which all of these versions have wheels.
test-oldest: ## Run the tests with the oldest versions that pyproject.toml admits
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --no-compile -c $(OLDEST)/constraints.txt -e ".[atari,mujoco,zoo]" hatchling pytest pytest-xdist
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(STAMP) ## Format the code and sort the imports
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

type: $(STAMP) ## Check the types
	$(BIN)/mypy

docs: $(DOCS_STAMP) ## Build the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

commit-checks: format lint type docs test ## Everything to run before a commit

clean: ## Remove the environments, the caches and the built distributions
	rm -rf $(VENV) $(CORE) $(OLDEST) build dist site .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find sb3_trpo_ext tests -name __pycache__ -type d -prune -exec rm -rf {} +
