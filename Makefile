# Two commands on a fresh machine: `make demo` and `make test`. Both create and reuse .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.core
	$(BIN)/inplace-ttt demo

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.core: .venv/.python pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

.venv/.dev: .venv/.python pyproject.toml
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ .venv/.core

clean:
	rm -rf .venv build dist
