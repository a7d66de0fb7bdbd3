# Every target sets up what it needs: .venv in this folder, torch pinned by constraints.txt.
.PHONY: install demo test test-faults sanitize emulate bench bench-mining bench-quality bench-learning bench-peers peers bench-report lint format gpu-check clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Built and installed again when a source changed; the build folder makes that incremental.
# Folders count too: their time changes when a file goes.
SOURCES := $(shell find csrc python triton_kernels -not -name '*.pyc' -not -name __pycache__) CMakeLists.txt pyproject.toml constraints.txt
NATIVE := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
INSTALLED := $(VENV)/.installed

install: $(INSTALLED)

$(VENV)/.build-tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt "scikit-build-core>=0.11" "pybind11>=2.13" \
	  "cmake>=3.21" "ninja>=1.10" torch
	touch $@

$(INSTALLED): $(VENV)/.build-tools $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --config-settings=cmake.define.FASTPIE_WERROR=ON '.[test,lint]'
	cd $(VENV) && bin/python -c "import fastpie"
	touch $@

demo: install
	$(BIN)/fastpie demo --out demo-run

# Triton reads TRITON_INTERPRET when it is imported: interpreted and compiled tests need processes
# of their own.
test: install
	$(BIN)/python -m pytest -m "not triton_interpreter and not triton_compile and not cuda \
	  and not cuda_emulated and not faults"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton_interpreter tests/triton_kernels
	$(BIN)/python -m pytest -m triton_compile tests/triton_kernels

# Runs of mine() killed at random instants, alone and under torchrun, signalled, in shards. The
# seed of a failure is shown: FASTPIE_FAULTS_SEED=seed makes its instants again.
test-faults: install
	$(BIN)/python -m pytest -m faults tests/faults

# Tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer (of GCC); the first
# finding ends the run. Only the kernels are instrumented, in a package of their own; tensors have
# red zones all the same, since torch takes their memory from malloc. The C++ library is loaded
# along, because the sanitizer looks for its __cxa_throw at the start. Python leaks by design.
SANITIZED := build/sanitize
sanitize: install
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=g++ -DFASTPIE_SANITIZE=ON -DFASTPIE_CUDA=OFF \
	  -DFASTPIE_WERROR=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/site && mkdir $(SANITIZED)/site
	cp -r python/fastpie $(SANITIZED)/site && cp -r triton_kernels $(SANITIZED)/site/fastpie
	cp $(SANITIZED)/_C.*.so $(SANITIZED)/site/fastpie
	PYTHONPATH=$(CURDIR)/$(SANITIZED)/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest --capture=sys -m "not cuda and not cuda_emulated" tests/ops \
	  --ignore tests/ops/test_dual_conv.py  # torch's operators alone on the CPU

# The CUDA kernels on the CPU (tests/csrc/cuda_emulator), with both sanitizers: each against its twin
# on every machine, with or without a GPU. The emulator has one thread, and torch's own would wait
# beside it.
EMULATED := build/emulate
emulate: install
	$(BIN)/cmake -S . -B $(EMULATED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=g++ -DFASTPIE_SANITIZE=ON \
	  -DFASTPIE_EMULATE_CUDA=ON -DFASTPIE_WERROR=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(EMULATED)
	rm -rf $(EMULATED)/site && mkdir $(EMULATED)/site
	cp -r python/fastpie $(EMULATED)/site && cp -r triton_kernels $(EMULATED)/site/fastpie
	cp $(EMULATED)/_C.*.so $(EMULATED)/site/fastpie
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(EMULATED)/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest --capture=sys -m cuda_emulated \
	  $$(grep -rl --include="*.py" "mark\.cuda_emulated" tests)

bench: install
	$(BIN)/python -m benchmarks.bench_disagreement
	$(BIN)/python -m benchmarks.bench_segmentation_disagreement
	$(BIN)/python -m benchmarks.bench_embedding_disagreement
	$(BIN)/python -m benchmarks.bench_analysis
	$(BIN)/python -m benchmarks.bench_attention --samples 1024 --repeats 5 --variants default bf16 "guard of the dense model"
	$(BIN)/python -m benchmarks.bench_sdclr --scope global --repeats 7
	$(BIN)/python -m benchmarks.bench_masked_training --seconds 15 --repeats 7
	$(BIN)/python -m benchmarks.bench_demo
	$(BIN)/python -m pytest benchmarks/test_operations.py --short --benchmark-max-time=0.3 \
	  --benchmark-columns=min,median,rounds

# Long runs: decoding and its cache, what mine() adds, taking up, selecting. Alone on the machine, with
# 5 GB free in /tmp; a quarter of an hour.
bench-mining: install
	$(BIN)/python -m benchmarks.bench_decode
	$(BIN)/python -m benchmarks.bench_mining
	$(BIN)/python -m benchmarks.bench_select

# How well each score finds what was planted: trains for an hour on one core, and goes on where it was.
bench-quality: install
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.quality.segmentation

# Which recipe makes the better model: every recipe on every set with five seeds. Hours on one core, and goes
# on where it was; several processes with --train and other --seeds share the work.
bench-learning: install
	$(BIN)/python -m benchmarks.quality.learning

# The goals table of the CPU engine against everybody else; for hours, alone on the machine.
# Parts of it: python -m benchmarks.bench_dual --help
bench-peers: peers
	FASTPIE_PEERS=$(PEERS) $(BIN)/python -m benchmarks.bench_dual --networks resnet50 densenet121 \
	  --batches 1 8 16 32
	FASTPIE_PEERS=$(PEERS) $(BIN)/python -m benchmarks.bench_dual --precision bf16 --batches 1 8 16 32
	$(BIN)/python -m benchmarks.bench_dual --ladder --peers fastpie compile eager

# Two environments of their own: the extra `peers` over the packages of .venv, and DeepSparse, whose
# last release wants Python 3.11 and an older numpy.
PEERS := $(or $(FASTPIE_PEERS),/tmp/fastpie-peers)
peers: $(PEERS)/.installed

$(PEERS)/.installed: pyproject.toml | install
	$(PYTHON) -m venv $(PEERS)/onnx
	$(PEERS)/onnx/bin/python -m pip --disable-pip-version-check install --quiet \
	  $$($(BIN)/python -c "from importlib import metadata as m; print(*(r.split(';')[0].replace(' ', '') for r in m.requires('fastpie') if 'peers' in r))")
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(PEERS)/onnx/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/fastpie.pth
	python3.11 -m venv $(PEERS)/deepsparse
	$(PEERS)/deepsparse/bin/python -m pip --disable-pip-version-check install --quiet \
	  --only-binary :all: deepsparse==1.8.0
	touch $@

bench-report: install
	$(BIN)/python -m benchmarks.report

# All four tools run, so that one that complains does not hide the others.
lint: install
	@failed=; for check in "ruff check ." "ruff format --check ." mypy \
	  "clang-format --dry-run --Werror $(NATIVE)"; do \
	  echo "$$check" | cut -c1-60; $(BIN)/$$check || failed=1; done; test -z "$$failed"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# On a machine with a CUDA GPU: build, every GPU test, GPU benchmarks. Uses that machine's python3.
gpu-check:
	bash benchmarks/gpu_check.sh

clean:
	rm -rf build $(VENV) demo-run train-run
