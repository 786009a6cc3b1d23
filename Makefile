# Every target works from a fresh clone: the first one that runs makes .venv, once.
#
#   make demo    a real model down to 3 bits, perplexity before and after
#   make test    the whole gate (format, lint, types, import contract, tests, documentation snippets)
#   make check   the same as test
#   make fix     format and apply the safe lint fixes
#   make docs    only the documentation: snippets run, links resolve
#   make bench   the recorded figures (benchmarks/quality.py, slow): make bench MODEL=folder [BENCH='options']

SHELL   := /bin/bash
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
WORKERS ?= 2

# Without an NVIDIA GPU this exact torch goes in before anything else: an open range would pull gigabytes of CUDA.
TORCH_CPU ?= torch==2.13.0
TORCH_GPU ?= torch
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),$(TORCH_GPU),$(TORCH_CPU))

# The first interpreter that runs and is new enough; a pyenv shim may exist and not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off

.PHONY: demo test check fix docs bench

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
	$(BIN)/python benchmarks/quality.py '$(MODEL)' $(BENCH)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one or say make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) and $(TORCH) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@$(PIP) -e '.[dev]'
	@touch $(STAMP)
