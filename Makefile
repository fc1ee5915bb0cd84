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

# A second environment has TransformerLens 3, which has other hosts for an SAE, and takes everything else from the first.
OLD := .venv-tl3
OLD_LENS := transformer-lens==3.9.0 better-abc==0.0.3
OLD_STAMP := $(OLD)/.installed
PACKAGES := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
OLD_TESTS := tests/data/test_capture.py tests/data/test_families.py tests/data/test_models.py tests/data/test_sites.py \
  tests/test_hooked.py tests/test_splicing.py tests/test_splicing_refusals.py tests/test_splicing_transcoders.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-tl3 lint clean

help:
	@echo 'make demo      train a sparse autoencoder on the embedded language model and show what it learned'
	@echo 'make test      lint, types and tests'
	@echo 'make test-tl3  the tests of models and splices with TransformerLens 3.9'
	@echo 'make lint      ruff and pyright alone'
	@echo 'make clean     remove the environments and caches (runs/ stays)'

demo: $(STAMP)
	$(BIN)/sae-kit demo

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-tl3: $(OLD_STAMP)
	$(OLD)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(OLD_TESTS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(OLD) dist site .pytest_cache .ruff_cache
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

# addsitedir, unlike a path on PYTHONPATH, also reads the line with which sae_kit itself is installed. What is installed
# on top comes earlier in sys.path, and what is pinned stays pinned.
$(OLD_STAMP): $(STAMP) Makefile
	@echo 'Installing TransformerLens 3 into $(OLD), on top of $(VENV)'
	@$(BIN)/python -m venv --clear --without-pip $(OLD)
	@echo "import site; site.addsitedir('$$($(BIN)/$(PACKAGES))')" > "$$($(OLD)/bin/$(PACKAGES))/first.pth"
	@grep -v '^transformer-lens==' $(VENV)/constraints.txt > $(OLD)/constraints.txt
	$(OLD)/bin/python -m pip --disable-pip-version-check --no-input install --constraint $(OLD)/constraints.txt $(OLD_LENS)
	@$(OLD)/bin/python -c 'from transformer_lens import HookedTransformer'  # which only TransformerLens 3 has
	@touch $@
