# Everything is installed into .venv. PYTHON=python3.12 make … picks the interpreter it is made with.
#
# Without a GPU the CPU build of torch is installed. TORCH_INDEX=URL names another package index for torch
# alone, TORCH=torch==… another version.

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell .venv/bin/python -c 'print(".venv/bin/python")' 2>/dev/null || echo python3)
endif
# An interpreter that already has everything: no set-up, as on a GPU machine without package registries.
ifdef INTERPRETER
RUN := $(INTERPRETER)
else
RUN := .venv/bin/python
endif
export TORCH TORCH_INDEX

.PHONY: help setup demo test check bench test-gpu sanitize kernels clean

help:
	@echo 'make demo       both services, the demo model, real pictures, answers, a page to look at; then stops everything'
	@echo 'make test       make check, and all tests that need no GPU'
	@echo 'make check      lint, format, types, import rules, protos, compose file, Dockerfile, kernels'
	@echo 'make bench      benchmarks'
	@echo 'make test-gpu   the tests that need a GPU'
	@echo 'make sanitize   every kernel under compute-sanitizer, on a machine with a GPU'
	@echo 'make kernels    compiles the CUDA kernels for all architectures'
	@echo 'make setup      .venv alone: every target above does this first'
	@echo 'make clean      back to a fresh clone'
	@echo 'PYTHON=python3.12 picks the interpreter; INTERPRETER=python3 uses one that has everything, without set-up'

setup:
ifndef INTERPRETER
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Diptych needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": PYTHON=python3.12 make ...")'
	@$(PYTHON) tools/environments.py develop
endif

demo: setup
	@$(RUN) -m demo.run

check: setup
	@$(RUN) tools/check.py

test: check
	@$(RUN) tools/run_tests.py

bench: setup
	@$(RUN) -m benchmarks

test-gpu: setup
	@$(RUN) tools/require_gpu.py
	@$(RUN) -m pytest -m gpu

sanitize: setup
	@$(RUN) tools/sanitize.py

kernels:
	@$(PYTHON) tools/kernels.py

clean:
	@rm -rf .venv build dist *.egg-info diptych/v1 demo/output executor_service/kernels/cubin
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
