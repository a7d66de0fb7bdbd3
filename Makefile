# Every target sets up what it needs: .venv in this folder, torch pinned by constraints.txt.
.PHONY: install demo test bench bench-report lint format gpu-check clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Built and installed again when a source changed; the build folder makes that incremental.
SOURCES := $(shell find csrc python triton_kernels -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml constraints.txt
INSTALLED := $(VENV)/.installed

install: $(INSTALLED)

$(VENV)/.build-tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt "scikit-build-core>=0.10" "pybind11>=2.13" \
	  "cmake>=3.21" "ninja>=1.10" torch
	touch $@

$(INSTALLED): $(VENV)/.build-tools $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --config-settings=cmake.define.FASTPIE_WERROR=ON '.[test,lint]'
	touch $@

demo: install
	$(BIN)/fastpie demo --out demo-run

# Triton reads TRITON_INTERPRET when it is imported: interpreted and compiled tests need processes
# of their own.
test: install
	$(BIN)/python -m pytest -m "not triton_interpreter and not triton_compile and not cuda"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton_interpreter tests/triton_kernels
	$(BIN)/python -m pytest -m triton_compile tests/triton_kernels

bench: install
	$(BIN)/python -m benchmarks.bench_disagreement

bench-report: install
	$(BIN)/python -m benchmarks.report

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run --Werror

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format -i

# On a machine with a CUDA GPU: build, every GPU test, GPU benchmarks. Uses that machine's python3.
gpu-check:
	bash benchmarks/gpu_check.sh

clean:
	rm -rf build $(VENV) demo-run
