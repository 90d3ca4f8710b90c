# Every target does its own set-up: a venv, the build, and what it needs beside it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
C_SOURCES := aioreap/_clone.c aioreap/_spawn.c
C_WARNINGS := -std=c11 -O2 -Wall -Wextra -Werror

.PHONY: help demo test test-kernel always stress lint clean

help:
	@echo 'make demo    the main job on real programs: what is true of it is printed'
	@echo 'make test    every test, on both event loops and every backend of this kernel'
	@echo 'make test-kernel  the same on emulated kernels, 7.x with CLONE_AUTOREAP and 6.1 without exit'
	@echo '             info, and the C alone on aarch64; as root on Debian. KERNEL=7 or 6.1: one of'
	@echo '             them; ARCH=aarch64, riscv64 or x86_64: the C alone there'
	@echo 'make stress  the long ones: 100,000 spawns, AddressSanitizer'
	@echo 'make lint    formatting, style and types; C with gcc and clang, warnings as errors'
	@echo
	@echo 'PYTHON=python3.13 takes another interpreter, VENV=.venv313 another place for the set-up.'

demo: $(VENV)/.built $(VENV)/.demo
	@sh tools/check-system program gzip find
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.built $(VENV)/.test
	@sh tools/check-system program gzip strace
	$(BIN)/python -m pytest --ignore=tests/stress $(PYTEST_ARGS)
	$(BIN)/python tests/in_thread.py --ignore=tests/stress $(PYTEST_ARGS)

# What runs where: all of it, or with KERNEL or ARCH one part.
test-kernel: $(VENV)/.built $(VENV)/.test
ifdef ARCH
	$(PYTHON) tests/kernel/bare.py --architecture $(ARCH) $(if $(KERNEL),--kernel $(KERNEL))
else ifdef KERNEL
	$(call boot,$(KERNEL))
else
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target boot-7 boot-6.1 bare-aarch64
endif

boot-%: always
	$(call boot,$*)

bare-%: always
	$(PYTHON) tests/kernel/bare.py --architecture $*

boot = $(PYTHON) tests/kernel/boot.py --kernel $(1) --time-limit 1800 -- $(BIN)/python -m pytest \
	--ignore=tests/stress -p no:cacheprovider -o faulthandler_timeout=600 $(PYTEST_ARGS)

stress: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest tests/stress $(PYTEST_ARGS)
	AIOREAP_HOSTILE_COUNT=10000 $(BIN)/python -m pytest tests/test_hostile.py $(PYTEST_ARGS)

lint: $(VENV)/.built $(VENV)/.lint
	@sh tools/check-system program gcc clang
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy aioreap examples
	$(BIN)/mypy --no-strict-equality --implicit-reexport tests  # failures are injected into what our modules import
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	for compiler in gcc clang; do for source in $(C_SOURCES); do \
		echo "$$compiler $(C_WARNINGS) $$source"; \
		$$compiler $(C_WARNINGS) -I"$$include" -fPIC -c -o /dev/null $$source || exit 1; \
	done; done

clean:
	rm -rf $(VENV) build dist *.egg-info aioreap/*.so

$(VENV)/.checked:
	@sh tools/check-system python $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.built: $(VENV)/.checked pyproject.toml $(C_SOURCES) aioreap/_spawn.h
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable .
	@touch $@

# The demo shows one loop where there is no uvloop for this machine, and says so.
$(VENV)/.demo: $(VENV)/.built
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --only-binary uvloop --editable '.[uvloop]' || \
		echo 'no uvloop for this interpreter: the demo runs on the loop of asyncio alone' >&2
	@touch $@

$(VENV)/.test: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@
