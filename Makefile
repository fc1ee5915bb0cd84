# From nothing but Python 3.11 or newer and make. The environment .venv is made once, from pyproject.toml and
# constraints.txt, and brought up to date when one of the two changes.
#
#   make demo PYTHON=python3.12    with another interpreter
#   make demo TORCH=torch          with another build of torch than the tested one: any requirement, pip options allowed
#
# Both are read when the environment is made; `make clean` first to change them.

PYTHON ?= python3
TESTED := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(TESTED)
# Another torch brings a triton of its own.
LOOSE := ^torch==$(if $(filter-out $(TESTED),$(TORCH)),\|^triton==)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo 'make demo    train a sparse autoencoder on the embedded language model and show what it learned'
	@echo 'make test    lint, types and tests'
	@echo 'make lint    ruff and pyright alone'
	@echo 'make clean   remove the environment and caches (runs/ stays)'

demo: $(STAMP)
	$(BIN)/sae-kit demo

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, alone: whichever build is there then becomes a constraint of its own, so that nothing
# that depends on torch can replace it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "sae_kit needs Python 3.11 or newer, but '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "Name another interpreter, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make environments: its modules venv and ensurepip are missing." >&2; \
	  echo "On Debian and Ubuntu they are the package python3-venv: apt install python3-venv" >&2; exit 1; }
	@echo 'Installing into $(VENV): a minute or two, and again only when pyproject.toml or constraints.txt changes'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@grep -v '$(LOOSE)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@
