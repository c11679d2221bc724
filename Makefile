# `make serve` runs the main job, `make test` runs the tests; both set up what they need, again and again alike.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=
WORKERS ?= 2

.PHONY: help setup dev serve test check format nightly bench clean

help:
	@echo "make serve    set up and serve the embedded model on http://127.0.0.1:8000 (ARGS='--port 9000')"
	@echo "make test     set up and run the tests, two files at a time (WORKERS=4)"
	@echo "make check    lint, types, room contracts, house sizes"
	@echo "make nightly  the slow tests too"
	@echo "make format   format the code"

# torch goes first, from whatever index pip is set up with: the CPU build is enough to serve the embedded model.
$(VENV)/.engine: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine]'
	touch $@

$(VENV)/.dev: $(VENV)/.engine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,train,plot,lab,otel,forest,dev]'
	touch $@

setup: $(VENV)/.engine

dev: $(VENV)/.dev

serve: setup
	$(BIN)/penstock serve $(MODEL) $(ARGS)

test: dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

nightly: dev
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_house.py

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
