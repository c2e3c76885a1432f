# `make demo` is the first thing to run; `make help` lists the rest.
#
# PYTHON      the interpreter that makes the virtual environment (3.11 or newer)
# VENV        where the virtual environment goes
# TORCH_SPEC  the torch to install, before everything else
# TORCH_INDEX where torch comes from: `auto` takes PyTorch's CPU wheels when there is no NVIDIA driver and their
#             index answers; empty takes whatever pip is set up with (on Linux: the CUDA build); or give a URL
# ARGS        more options for the command, e.g. make demo ARGS="--seed 7"
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?= auto
ARGS ?=

CPU_WHEELS := https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full test test-slow lint format types bench clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(RUN_READY) ## virtual environment, pinned dependencies, models and corpus

demo: $(RUN_READY) ## 500 documents: ingest, first answer, short adaptation, scored set
	@$(BIN)/mbc demo $(ARGS)

demo-full: $(RUN_READY) ## all 10,033 documents, without the adaptation
	@$(BIN)/mbc demo --full $(ARGS)

test: lint types ## lint, types and the tests that take less than ten seconds each
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

test-slow: $(DEV_READY) ## the longer tests: kills, races, many lives, the real models; about half an hour
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(DEV_READY) ## ruff: lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_READY) ## ruff: fix and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_READY) ## mypy --strict on mbc_core and schemas
	$(BIN)/mypy

bench: $(DEV_READY) ## benchmarks; prints their figures, asserts nothing about speed
	$(BIN)/python -m pytest -q -s tests/bench -o python_files='bench_*.py' $(ARGS)

clean: ## remove caches and demo banks; keeps the environment and the downloaded models
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-bank demo-bank-full
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environment
	rm -rf $(VENV)

# --- the environment; each sentinel is written last, so that an interrupted set-up is taken up again ---

$(VENV)/.ready-torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mbc needs Python 3.11 or newer; $(PYTHON) is older. Fix: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) lacks venv or pip. Fix: install your system's python3-venv package."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; size='about 3 GB of downloads and 6 GB of disk (the CUDA build)'; \
	if [ "$$index" = auto ]; then index=''; \
	  if [ "$$(uname -s)" != Linux ]; then size='about 0.1 GB of downloads and 0.5 GB of disk'; \
	  elif ! command -v nvidia-smi >/dev/null 2>&1; then \
	    if $(PYTHON) -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=4)' \
	      $(CPU_WHEELS) 2>/dev/null; then index=$(CPU_WHEELS); \
	    else size="$$size; no NVIDIA driver found: make TORCH_INDEX=$(CPU_WHEELS) … would take 0.2 GB"; fi; fi; fi; \
	if [ "$$index" = $(CPU_WHEELS) ]; then size='about 0.2 GB of downloads and 0.8 GB of disk (the CPU build)'; fi; \
	echo "Set-up, once. What it takes:"; \
	echo "  torch            $$size"; \
	echo "  other packages   about 0.3 GB of downloads and 1.1 GB of disk, in $(VENV)"; \
	echo "  models, corpus   0.18 GB of downloads and 0.65 GB of disk, in a per-user cache (MBC_CACHE moves it)"; \
	set -x; $(PIP) install -q $${index:+--index-url "$$index"} '$(TORCH_SPEC)'
	@touch $@

$(RUN_READY): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e .
	$(BIN)/python -m mbc_core.assets
	@touch $@

$(DEV_READY): $(VENV)/.ready-torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m mbc_core.assets
	@touch $@
