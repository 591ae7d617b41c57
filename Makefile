# Two commands matter: `make run` brings up a node, `make test` runs every test that this machine can run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SUBPACKAGES := dashboard discovery node partition transport
ARGS ?=

.PHONY: run test lint format links bench clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.installed ## start a node with the default model (ARGS="--memory 4GB" passes options)
	@exec $(BIN)/swarmd $(ARGS)

test: $(VENV)/.dev-installed ## all tests that need neither a GPU nor what is missing here (those skip, with the reason)
	$(BIN)/python -m pytest $(ARGS)
	@if [ -d dashboard/web/node_modules ]; then PATH="$(CURDIR)/$(BIN):$$PATH" npm --prefix dashboard/web test; fi

lint: $(VENV)/.dev-installed links ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.dev-installed ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev-installed ## measurements, one table each
	$(BIN)/python bench/help_time.py
	$(BIN)/python bench/link_latency.py
	$(BIN)/python bench/discovery_time.py
	$(BIN)/python bench/decode_speed.py

links: ## build/links/swarmd -> the root's folders, for type checkers and editors
	@mkdir -p build/links/swarmd
	@for part in $(SUBPACKAGES); do ln -sfn ../../../$$part build/links/swarmd/$$part; done

clean: ## forget everything that was built
	rm -rf $(VENV) build dist *.egg-info dashboard/static dashboard/web/node_modules .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swarmd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing swarmd into $(VENV) (the first time this brings PyTorch and takes some minutes)"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
