# Every target does its own set-up: a venv, the build, and what it needs beside it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# By a path, not by an import hook, which would be half of an interpreter's start.
EDITABLE := --config-settings editable_mode=compat --editable
C_SOURCES := aioreap/_clone.c aioreap/_output.c aioreap/_spawn.c
C_HEADERS := aioreap/_output.h aioreap/_python.h aioreap/_spawn.h
C_WARNINGS := -std=c11 -O2 -Wall -Wextra -Werror

.PHONY: help demo test test-dev test-pythons test-kernel bytecode always stress bench bench-kernel bench-plot
.PHONY: lint types docs wheel clean

help:
	@echo 'make demo    the main job on real programs: what is true of it is printed'
	@echo 'make test    every test, on both event loops and every backend of this kernel'
	@echo 'make test-dev  the same in Python development mode, and with every warning an error'
	@echo "make test-pythons  CPython's own suites about child processes, on Python 3.11 to 3.15, both"
	@echo '             loops, this kernel and an emulated 7.x; as root on Debian'
	@echo 'make test-kernel  the same on emulated kernels, 7.x with CLONE_AUTOREAP and 6.1 without exit'
	@echo '             info, and the C alone on aarch64; as root on Debian. KERNEL=7 or 6.1: one of'
	@echo '             them; ARCH=aarch64, riscv64 or x86_64: the C alone there'
	@echo 'make stress  the long ones: 100,000 spawns, AddressSanitizer'
	@echo 'make bench   aioreap beside its peers, in ten minutes on an idle machine; QUICK=1: small, in one'
	@echo 'make bench-kernel  the same in small on an emulated kernel with CLONE_AUTOREAP, for its ratios'
	@echo 'make bench-plot  the plot and the tables of docs/performance.md, from the last make bench;'
	@echo '             RESULTS=benchmarks/results/quick.json: from another'
	@echo 'make lint    formatting, style and types; C with gcc and clang, warnings as errors'
	@echo 'make types   the types of the public API: that they are whole, and what two checkers make of them'
	@echo 'make docs    the documentation, in build/docs; warnings are errors'
	@echo 'make wheel   the sdist and a wheel, in dist; that wheel is tried on each Python of this machine,'
	@echo '             or on those named: VERSIONS="3.12 3.13"'
	@echo
	@echo 'PYTHON=python3.13 takes another interpreter, VENV=.venv313 another place for the set-up.'

demo: $(VENV)/.built $(VENV)/.demo
	@sh tools/check-system program gzip find
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/run.py

test: $(VENV)/.built $(VENV)/.test
	@sh tools/check-system program gzip strace
	$(BIN)/python -m pytest --ignore=tests/stress $(PYTEST_ARGS)
	$(BIN)/python tests/in_thread.py --ignore=tests/stress $(PYTEST_ARGS)

test-pythons: $(VENV)/.built $(VENV)/.wheel
	PYTHONPATH=tools:tests/kernel $(BIN)/python tests/public/table.py
# The environment, not options: the Pythons that the tests start are to have it too.
test-dev: $(VENV)/.built $(VENV)/.test
	PYTHONDEVMODE=1 PYTHONWARNINGS=error $(MAKE) --no-print-directory test

# What runs where: all of it, or with KERNEL or ARCH one part.
test-kernel: $(VENV)/.built $(VENV)/.test bytecode
ifdef ARCH
	$(PYTHON) tests/kernel/bare.py --architecture $(ARCH) $(if $(KERNEL),--kernel $(KERNEL))
else ifdef KERNEL
	$(call boot,$(KERNEL))
else
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target boot-7 boot-6.1 bare-aarch64
endif

# What this machine compiles, an emulated one need not, at a twentieth of the speed.
bytecode: always
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --ignore=tests/stress -p no:cacheprovider \
		--collect-only --quiet >/dev/null

boot-%: always
	$(call boot,$*)

bare-%: always
	$(PYTHON) tests/kernel/bare.py --architecture $*

boot = $(PYTHON) tests/kernel/boot.py --kernel $(1) --time-limit 1800 -- $(BIN)/python -m pytest \
	--ignore=tests/stress -p no:cacheprovider -o faulthandler_timeout=600 $(PYTEST_ARGS)

stress: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest tests/stress $(PYTEST_ARGS)
	AIOREAP_HOSTILE_COUNT=10000 $(BIN)/python -m pytest tests/test_hostile.py $(PYTEST_ARGS)

# In a venv of its own, of the Python named, or 3.13, or the newest.
bench bench-kernel bench-plot: always
	@python='$(BENCH_PYTHON)'; $(MAKE) --no-print-directory run-$@ PYTHON="$$python" \
		VENV=.venv-bench$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

BENCH_PYTHON = $(if $(filter file,$(origin PYTHON)),$(shell $(PYTHON) tools/pythons.py | \
	awk '{found[$$1] = newest = $$2} END {print ("3.13" in found) ? found["3.13"] : newest}'),$(PYTHON))

run-bench: $(VENV)/.built $(VENV)/.bench
	@sh tools/check-system program gcc
	@sh tools/check-system program go node || echo 'the report will be without them' >&2
	$(BIN)/python -m benchmarks.run $(if $(QUICK),--scale quick)

run-bench-kernel: $(VENV)/.built $(VENV)/.bench
	@sh tools/check-system program gcc
	@mkdir -p build benchmarks/results
	$(PYTHON) tests/kernel/boot.py --kernel 7 --time-limit 3600 -- sh -c '$(BIN)/python -m benchmarks.run \
		--scale emulated --json 2>/tmp/said || { cat /tmp/said; exit 1; }' >build/emulated.json
	mv build/emulated.json benchmarks/results/emulated.json

run-bench-plot: $(VENV)/.built $(VENV)/.plot
	$(BIN)/python -m benchmarks.publish $(RESULTS)

lint: $(VENV)/.built $(VENV)/.lint
	@sh tools/check-system program gcc clang
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy aioreap benchmarks docs examples tools
	$(BIN)/mypy --no-strict-equality --implicit-reexport tests  # failures are injected into what our modules import
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	for compiler in gcc clang; do for source in $(C_SOURCES) benchmarks/*.c; do \
		echo "$$compiler $(C_WARNINGS) $$source"; \
		$$compiler $(C_WARNINGS) -I"$$include" -fPIC -c -o /dev/null $$source || exit 1; \
	done; done

# From a folder without our sources, with its Python first on PATH: what is read is what was installed.
types: $(VENV)/installed/.done $(VENV)/.lint
	cd $(VENV)/installed && export PATH="$$PWD/bin:$$PATH" && \
	$(abspath $(BIN))/pyright --verifytypes aioreap --ignoreexternal && \
	$(abspath $(BIN))/mypy --strict --python-executable bin/python $(CURDIR)/tests/typing/api.py && \
	$(abspath $(BIN))/pyright $(CURDIR)/tests/typing/api.py

docs: $(VENV)/.built $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --fresh-env --quiet -d build/doctrees docs build/docs

wheel: $(VENV)/.wheel
	@sh tools/check-system program gzip find
	$(BIN)/python tools/wheel.py $(VERSIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info aioreap/*.so

$(VENV)/.checked:
	@sh tools/check-system python $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.built: $(VENV)/.checked pyproject.toml $(C_SOURCES) $(C_HEADERS)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet $(EDITABLE) .
	@touch $@

# The demo shows one loop where there is no uvloop for this machine, and says so.
$(VENV)/.demo: $(VENV)/.built
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --only-binary uvloop $(EDITABLE) '.[uvloop]' || \
		echo 'no uvloop for this interpreter: the demo runs on the loop of asyncio alone' >&2
	@touch $@

$(VENV)/.test: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/.bench: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group bench
	@touch $@

$(VENV)/.plot: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group plot
	@touch $@

$(VENV)/.lint: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@

$(VENV)/.docs: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@

$(VENV)/.wheel: $(VENV)/.checked pyproject.toml
	$(BIN)/python -m pip install --quiet --group wheel
	@touch $@

$(VENV)/installed/.done: $(VENV)/.checked pyproject.toml $(C_SOURCES) $(C_HEADERS) $(wildcard aioreap/*.py aioreap/py*)
	rm -rf build/lib*  # setuptools would install what is no longer in the sources
	$(PYTHON) -m venv --clear --without-pip $(@D)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip --python $(@D) install --quiet '.[uvloop]'
	@echo '{}' >$(@D)/pyrightconfig.json  # else pyright takes the folder of pyproject.toml, with its sources
	@touch $@
