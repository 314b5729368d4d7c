# What people and CI run. Needs python3 (3.11 or newer) and make; everything else is installed from
# requirements-lock.txt into $(VENV).
#
#   make demo   tune a model on the bundled digits data, report in reports/
#   make test   format, lint, types, layers, docs and the whole suite: what CI runs
#   make lint | docs | bench | lock
#
# PYTHON=python3.12 picks the interpreter, EXTRAS=cuda13 adds an extra (here: JAX for CUDA 13),
# PYTEST_ARGS="-m 'not slow'" and BENCH_ARGS="..." are handed on, JOBS=4 sets the test processes;
# PYTEST_ARGS=--thorough runs every case of every sweep, and optimised programs, as before a release.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
EXTRAS ?=
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
LOCK := requirements-lock.txt
BIN := $(VENV)/bin
PIP = -m pip install --quiet --disable-pip-version-check --constraint $(LOCK)

comma := ,
CORE := $(VENV)/.installed-core$(subst $(comma),-,$(EXTRAS))
DEV := $(VENV)/.installed-dev$(subst $(comma),-,$(EXTRAS))
BENCH := $(BENCH_VENV)/.installed$(subst $(comma),-,$(EXTRAS))

# OpenBLAS threads fight with XLA's own over the cores and make small factorisations ~100x slower.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help demo test lint format docs bench lock

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(CORE)
	$(BIN)/curvax tune digits

test: lint docs
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BENCH)
	$(BENCH_VENV)/bin/python benchmarks/run.py $(BENCH_ARGS)

# The newest versions that the lower bounds of pyproject.toml (and its [tool.uv]) allow.
lock: $(DEV)
	@printf '%s\n' '# Exact versions for reproducible runs, used as pip constraints. Made by: make lock' > $(LOCK).new
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --upgrade \
	  --extra docs --extra sparse --extra ode --extra benchmarks --extra cuda13 --group dev --group build \
	  --no-header --no-annotate >> $(LOCK).new
	mv $(LOCK).new $(LOCK)

# ---- environments: made once, brought up to date when the lock or pyproject.toml changes ----

# $(call venv,FOLDER): an environment with the pip and the build backend of the lock.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Curvax needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(1) || { \
	  echo "'$(PYTHON) -m venv $(1)' failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	$(1)/bin/python $(PIP) --upgrade pip
	$(1)/bin/python $(PIP) hatchling editables
	@touch $@
endef

$(VENV)/.made: $(LOCK)
	$(call venv,$(VENV))

$(BENCH_VENV)/.made: $(LOCK)
	$(call venv,$(BENCH_VENV))

$(CORE): $(VENV)/.made pyproject.toml
	$(BIN)/python $(PIP) --no-build-isolation --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(DEV): $(CORE)
	$(BIN)/python $(PIP) --no-build-isolation --editable '.[docs,sparse,ode$(if $(EXTRAS),$(comma)$(EXTRAS))]' --group dev
	@touch $@

# With the peers in PyTorch, whose CUDA libraries are not the lock's; with JAX for CUDA (EXTRAS) without those peers.
$(BENCH): $(BENCH_VENV)/.made pyproject.toml
	grep -v '^nvidia' $(LOCK) > $(BENCH_VENV)/constraints.txt
	$(BENCH_VENV)/bin/python $(if $(EXTRAS),$(PIP),$(subst $(LOCK),$(BENCH_VENV)/constraints.txt,$(PIP))) \
	  --no-build-isolation --editable '.[benchmarks,$(or $(EXTRAS),peers)]'
	@touch $@
