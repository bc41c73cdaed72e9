# make train   the first figure of the first paper: trains, prints the numbers, draws the figure (two minutes of CPU)
# make test    the linter and the tests
# PYTHON=python3.12 make test   with another interpreter; each has its own virtual environment

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python
SUPPORTED := 3.11 3.12 3.13

.PHONY: train test test-all lint

train: $(VENV)/.installed
	$(RUN) scripts/reproduce.py icl/preconditioned_gd/figure1 --scale=cpu --results=runs/results

test: $(VENV)/.installed-dev lint
	$(RUN) -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.installed-dev lint
	$(RUN) -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/bin/python:
	@$(if $(filter $(VERSION),$(SUPPORTED)),,echo "Python $(VERSION) ($(PYTHON)) is not supported; use PYTHON=python3.11, python3.12 or python3.13" && exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
