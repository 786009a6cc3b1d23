# Every target works from a fresh clone: the first one that runs makes .venv from the lock, once.
#
#   make demo         a real model down to 3 bits, perplexity before and after
#   make test         the whole gate (format, lint, types, import contract, tests, documentation snippets)
#   make check        the same as test
#   make fix          format and apply the safe lint fixes
#   make docs         only the documentation: snippets run, links resolve
#   make bench        the recorded figures (benchmarks/quality/quality.py, slow): make bench MODEL=folder [BENCH='options']
#   make test-latest  the gate on the newest packages that pyproject.toml allows, in .venv-latest, made anew each time;
#                     LATEST='transformers==5.23.*' narrows what is new
#   make lock         resolve requirements/*.txt anew from pyproject.toml

SHELL   := /bin/bash
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
WORKERS ?= 2
LATEST  ?=

# Locked by version, without an index: torch's build for a processor or a CUDA version is the index's choice.
LOCK := requirements/$(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu).txt

# The first interpreter that runs and is new enough; a pyenv shim may exist and not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-compile

.PHONY: demo test check fix docs bench test-latest lock

demo: $(STAMP)
	$(BIN)/python demo/demo.py

test: check

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs

bench: $(STAMP)
	@test -n "$(MODEL)" || { echo "usage: make bench MODEL=folder [BENCH='--seeds 0 --max-tokens 65536 ...']" >&2; exit 2; }
	$(BIN)/python benchmarks/quality/quality.py '$(MODEL)' $(BENCH)

# The newest packages; style and types belong to the pinned ruff and mypy, which are the same in both.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-compile $(if $(LATEST),'$(LATEST)') -e '.[dev]'
	.venv-latest/bin/python -m pip --disable-pip-version-check list | grep -iE '^(torch|transformers|compressed-tensors|datasets|accelerate|tokenizers|numpy) '
	$(MAKE) check VENV=.venv-latest STAMP=pyproject.toml

lock: $(STAMP)
	bash requirements/lock.sh $(abspath $(BIN))/uv

$(STAMP): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one or say make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) and $(LOCK) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $(STAMP)
