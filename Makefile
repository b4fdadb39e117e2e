# `make demo` and `make test` do all their own set-up. Everything lives in .venv; remove it to start anew.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test check format format-check lint types imports bench clean

help:
	@echo "make demo    evaluate a shipped agent at six precisions"
	@echo "make test    the fast tests"
	@echo "make check   what CI runs: format, lint, types, import rules, all tests that need no GPU"
	@echo "make format  format and fix the code"
	@echo "make bench   speed against peers, side by side"

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.base
	$(BIN)/rlquant evaluate ppo-lunarlander --episodes 100 --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

check: format-check lint types imports
	$(BIN)/python -m pytest -n auto -m "not gpu"

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/evaluate.py

clean:
	rm -rf $(VENV) dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
