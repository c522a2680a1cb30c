# Two commands set everything up on a machine that has only Python 3.11+ and make:
#   make demo    creates .venv, runs the main job, writes build/compare.html
#   make test    creates .venv, passes the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIN := requirements/pinned.txt
ROOT := $(CURDIR)
# an environment with CUDA's compiler, apart: its plugin would look for a driver on every import
CUDA_VENV := build/venv-cuda
# the newest JAX, on whatever Python 3.12+ there is, and the same with CUDA's compiler
NEWEST_VENV := build/venv-newest
CUDA_NEWEST_VENV := build/venv-cuda-newest
JAX_VERSION := $(shell sed -n 's/^jax==//p' $(PIN))
JAX_NEWEST := $(shell sed -n 's/^jax==//p' requirements/newest.txt)

# a test module keeps its compiled programs, so it stays with one process
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# packages hold many times the modules that are imported, and the first import compiles those
export PIP_COMPILE := 0
export JAX_PLATFORMS ?= cpu

.PHONY: help demo notebook test test-all test-newest check format bench bench-newest gpu gpu-compile clean
# the parts of gpu-compile
.PHONY: gpu-compile-mosaic gpu-compile-triton gpu-compile-ampere

help:
	@echo "make demo         methods compared on a language model: a table, build/compare.html"
	@echo "make notebook     run the notebooks' scripts, write examples/*.ipynb"
	@echo "make test         the tests; make test-all adds the slow ones"
	@echo "make test-newest  on the newest JAX what depends on its version (needs Python 3.12 or"
	@echo "                  newer); SLOW=1 runs all tests on it"
	@echo "make check        lint, types, import contracts"
	@echo "make format       rewrite the code in the house format"
	@echo "make bench        time attention on this CPU against torch, and what choosing costs; draw"
	@echo "                  the figures; make bench-newest: attention, on the newest JAX"
	@echo "make gpu-compile  compile every GPU kernel for its chips, without a GPU, and compare"
	@echo "                  with benchmarks/results/gpu_compile*.json; UPDATE=1 writes those instead"
	@echo "                  (also needs Python 3.12 or newer, for the chips before Hopper)"
	@echo "make gpu          numerics and timings on this machine's GPU"
	@echo "make clean        remove what the others made, .venv included"
	@echo
	@echo "Each makes .venv first where it needs it; PYTHON=python3.12 says from which Python."

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("jsparse needs Python 3.11 or newer; this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml $(PIN)
	$(BIN)/python -m pip install --quiet --constraint $(PIN) --editable '.[report]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml $(PIN)
	$(BIN)/python -m pip install --quiet --constraint $(PIN) --editable '.[report,test,lint]'
	@touch $(VENV)/.demo $@

# where pip knows a CPU build of torch it takes that; any torch from 2.8 on will do
$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet 'torch==2.13.0' || $(BIN)/python -m pip install --quiet 'torch>=2.8'
	@touch $@

$(NEWEST_VENV)/.bench: $(NEWEST_VENV)/.test
	$(NEWEST_VENV)/bin/python -m pip install --quiet 'torch==2.13.0' || $(NEWEST_VENV)/bin/python -m pip install --quiet 'torch>=2.8'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m examples.compare

notebook: $(VENV)/.test
	$(BIN)/python -m examples.notebook examples/choose_what_to_compute.py
	$(BIN)/python -m examples.notebook examples/train_with_native_sparse_attention.py

test: $(VENV)/.test
	$(BIN)/python -m pytest tests $(PARALLEL)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest tests --slow $(PARALLEL)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.neighborhood
	$(BIN)/python -m benchmarks.kin
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.kin_scorers
	$(BIN)/python -m benchmarks.kin_rows
	$(BIN)/python -m benchmarks.kin_paged
	$(BIN)/python -m benchmarks.trainable
	$(BIN)/python -m benchmarks.plots

bench-newest: $(NEWEST_VENV)/.bench $(VENV)/.demo
	$(NEWEST_VENV)/bin/python -m benchmarks.attention --output benchmarks/results/attention_cpu_newest.json
	$(BIN)/python -m benchmarks.plots

$(NEWEST_VENV)/.test: pyproject.toml requirements/newest.txt
	sh .ci/find-python.sh > /dev/null
	"$$(sh .ci/find-python.sh)" -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --constraint requirements/newest.txt --editable '.[report,test]'
	@touch $@

test-newest: $(NEWEST_VENV)/.test
	$(NEWEST_VENV)/bin/python -m pytest tests $(PARALLEL) $(if $(SLOW),--slow)

$(CUDA_VENV)/.compile: pyproject.toml $(PIN)
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --constraint $(PIN) --editable .
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps jax-cuda13-plugin==$(JAX_VERSION) jax-cuda13-pjrt==$(JAX_VERSION)
	$(CUDA_VENV)/bin/python -m pip install --quiet --constraint requirements/cuda.txt nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

# kernels for Ampere need what JAX has since 0.11
$(CUDA_NEWEST_VENV)/.compile: pyproject.toml requirements/newest.txt
	sh .ci/find-python.sh > /dev/null
	"$$(sh .ci/find-python.sh)" -m venv $(CUDA_NEWEST_VENV)
	$(CUDA_NEWEST_VENV)/bin/python -m pip install --quiet --constraint requirements/newest.txt --editable .
	$(CUDA_NEWEST_VENV)/bin/python -m pip install --quiet --no-deps jax-cuda13-plugin==$(JAX_NEWEST) jax-cuda13-pjrt==$(JAX_NEWEST)
	$(CUDA_NEWEST_VENV)/bin/python -m pip install --quiet --constraint requirements/cuda.txt nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

# each takes one core: make -j2 gpu-compile
gpu-compile: gpu-compile-mosaic gpu-compile-triton gpu-compile-ampere

gpu-compile-mosaic: $(CUDA_VENV)/.compile
	$(CUDA_VENV)/bin/python -m benchmarks.gpu_compile $(if $(UPDATE),--update)

gpu-compile-triton: $(CUDA_VENV)/.compile
	$(CUDA_VENV)/bin/python -m benchmarks.gpu_compile_triton $(if $(UPDATE),--update)

gpu-compile-ampere: $(CUDA_NEWEST_VENV)/.compile
	$(CUDA_NEWEST_VENV)/bin/python -m benchmarks.gpu_compile_ampere $(if $(UPDATE),--update)

gpu:
	JAX_PLATFORMS= $(PYTHON) -m benchmarks.gpu; first=$$?; \
	JAX_PLATFORMS= $(PYTHON) -m benchmarks.gpu_kin && exit $$first

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .import_linter_cache jsparse.egg-info
