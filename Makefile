# One environment in .venv, made from the system's Python; everything else runs in it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# another index to take packages from as well, such as https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help train test test-all test-gpu lint clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilestack needs Python 3.11 or newer; name another: make PYTHON=python3.12 train")'
	@echo "Installing into $(VENV), once; torch is large"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[train,dev]' "$(TORCH)"
	@touch $@

train: $(VENV)/installed   ## train a small Qwen3-MoE on this machine, GPU or not
	$(BIN)/python train.py

test: $(VENV)/installed    ## the tests that CI runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/installed ## every test, the slow ones too
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: $(VENV)/installed ## the grid on the GPU at hand
	$(BIN)/python -m pytest tests/kernels tests/compat
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/kernels/test_*_sm90*.py

lint: $(VENV)/installed    ## format and lint
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:           ## remove the environment
	rm -rf $(VENV)
