# Every target does its own set-up: a venv, the build, and what it needs beside it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: help demo test stress lint clean

help:
	@echo 'make demo    the main job on real programs: what is true of it is printed'
	@echo 'make test    every test, on both event loops and every backend of this kernel'
	@echo 'make stress  the long ones: 100,000 spawns, AddressSanitizer'
	@echo 'make lint    formatting, style and types; C with gcc and clang, warnings as errors'

demo: $(VENV)/.built
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(BIN)/python tests/in_thread.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info aioreap/*.so

$(VENV)/.checked:
	@sh tools/check-system $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.built: $(VENV)/.checked pyproject.toml aioreap/_clone.c aioreap/_spawn.c aioreap/_spawn.h
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@
