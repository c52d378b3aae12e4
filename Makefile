# make demo              the whole demonstration study into runs/demo, with its report (minutes)
# DEMO=smoke make demo   the same study, shortened, into runs/smoke (under a minute): does everything run?
# make test              ruff, mypy and the tests that are not slow, one process per core (JOBS=1: one after the other)
# make test-slow         the slow tests too
# make bench             images per second and memory, against a plain loop (docs/benchmarks.md)
# make lint              ruff and mypy alone
# make clean             remove the environment, runs and caches
#
# Needs make and Python 3.11 or newer; another one is named with PYTHON=python3.12. Everything is installed into .venv at the
# versions of constraints.txt, and again whenever pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= full
JOBS ?= auto

SHELL := /bin/sh
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt

DEMO_OUT_full := runs/demo
DEMO_OUT_smoke := runs/smoke
DEMO_SET_smoke := --set gan.rounds=3 --set gan.steps_per_round=4 --set classifier.rounds=2
DEMO_OUT := $(DEMO_OUT_$(DEMO))
ifeq ($(DEMO_OUT),)
$(error DEMO is '$(DEMO)': it must be full or smoke)
endif

.PHONY: help demo test test-slow bench lint clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.xfed-run
	$(BIN)/xfed-sim run configs/demo.yaml --out $(DEMO_OUT) $(DEMO_SET_$(DEMO))
	@echo "Open the report in a browser: $(CURDIR)/$(DEMO_OUT)/report.html"

test: lint
	$(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.xfed-dev
	$(BIN)/python -m pytest -q -m slow

bench: $(VENV)/.xfed-run
	$(BIN)/python -m xfed.simulations.benchmarks.speed
	$(BIN)/python -m xfed.simulations.benchmarks.memory

lint: $(VENV)/.xfed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find common client server simulations configs tests -name __pycache__ -type d -exec rm -rf {} +

# The stamps: one per step, each after the one before, so that two goals at once never run pip at once.
$(VENV)/.xfed-venv:
	@command -v $(PYTHON) >/dev/null || { echo "xfed needs Python 3.11 or newer, and there is no '$(PYTHON)' here: install it, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "xfed needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' lacks the venv module: install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.xfed-run: $(VENV)/.xfed-venv pyproject.toml constraints.txt
	@echo "Installing xfed into $(VENV) (the first time takes some minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/.xfed-dev: $(VENV)/.xfed-run
	$(PIP) -e '.[dev,ray,dicom]'
	@touch $@
