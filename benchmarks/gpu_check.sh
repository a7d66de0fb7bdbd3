#!/usr/bin/env bash
# What `make gpu-check` runs on a machine with a CUDA GPU: build with that machine's python3 and
# nvcc, run every test that needs a GPU, look for bad memory accesses and races, benchmark.
#
# Needs no network: torch, Triton, scikit-build-core, pybind11, CMake, ninja, nvcc and pytest are
# there. Packages that are not (MONAI, whose networks are benchmarked; cuDNN's graph API) are taken
# from wheels in the folder .whl. Without a GPU it builds, checks what the module links, says so and
# exits with 1. Results go to $OUT where that is set, else to benchmarks/results.
#
# It ends within $SECONDS_IN_ALL (default 540) or a little later: the last benchmarks are left out, and
# named, where the time is up.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-$PWD/build/gpu-check}
SITE=$BUILD/site
LOGS=$BUILD/logs
mkdir -p "$BUILD" "$LOGS"

step() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
left() { echo $((${SECONDS_IN_ALL:-540} - SECONDS)); }
# capped N: N seconds, or fewer where less is left.
capped() {
  local seconds
  seconds=$(left)
  echo $((seconds < $1 ? (seconds > 5 ? seconds : 5) : $1))
}
# All logs as one file: the machine may give back few.
trap 'tar -czf "${OUT:-$BUILD}/gpu-check-logs.tgz" -C "$LOGS" .' EXIT
failed=()

step "build into $SITE"
rm -rf "$SITE"
# --no-deps: what is installed there already is what must work.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  --no-index --target "$SITE" --config-settings=cmake.define.FASTPIE_WERROR=ON \
  --config-settings=build-dir="$BUILD/cmake" .
if ls .whl/*.whl >/dev/null 2>&1; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
    --target "$SITE" .whl/*.whl
fi
export PYTHONPATH="$SITE" PYTHONUNBUFFERED=1 FASTPIE_CACHE_DIR="$BUILD/cache"
"$PYTHON" - <<'PYTHON_CODE'
import torch
import fastpie
from fastpie import _C

assert _C.cuda_architectures is not None, "built without CUDA kernels: is nvcc on the PATH?"
print(f"fastpie of {fastpie.__file__}")
print(f"torch {torch.__version__}, kernels for {_C.cuda_architectures} by CUDA {_C.cuda_version}")
PYTHON_CODE
"$PYTHON" -m pytest -q -p no:cacheprovider tests/csrc/test_cuda_build.py || failed+=("cuda build")

step "GPU"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No GPU here: torch.cuda.is_available() is False. Built and checked up to the first launch."
  exit 1
fi
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'

# Everything below runs even if one part fails: a machine with a GPU is dear.
step "tests"
# Compiling engines is the CPU's work.
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 6 -p no:benchmark); fi
# Only the files with such tests: others import packages that a GPU machine need not have.
grep -rl --include='*.py' 'mark\.cuda' tests | sort \
  | xargs timeout "$(capped 200)" "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda "${parallel[@]}" 2>&1 \
  | tee "$LOGS/gpu-tests.log" || failed+=("tests")

# bench NAME LEAST COMMAND...: run unless fewer than LEAST seconds are left.
bench() {
  local name=$1 least=$2
  shift 2
  step "benchmark: $name"
  if [ "$(left)" -lt "$least" ]; then
    echo "left out: $(left) s are left, it may take $least"
    return
  fi
  local status=0
  timeout "$(left)" "$PYTHON" -m "$@" 2> "$LOGS/$name.log" || status=$?
  case $status in
    0) ;;
    124) echo "stopped: the time is up" ;;
    *) tail -n 30 "$LOGS/$name.log"; failed+=("$name") ;;
  esac
}
# The short ones first; the table of the last is what the end of the output shows.
bench agreement 60 benchmarks.gpu_agreement
bench disagreement 40 benchmarks.bench_disagreement_gpu
bench top-k 20 benchmarks.bench_top_k_gpu
# Without Triton first, whose kernels take minutes to compile; then everything, if there is time.
bench dual-forward 60 benchmarks.bench_dual_gpu --batches 256 --backend cuda \
  --providers fastpie own-dense eager
step "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null \
  | head -n 1 || true)
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer is not here: not checked."
else
  for tool in memcheck racecheck; do
    log=$LOGS/$tool.log
    quiet=()
    # torch and the driver ask for symbols that need not exist.
    if [ "$tool" = memcheck ]; then quiet=(--report-api-errors no); fi
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(capped 90)" "$sanitizer" --tool "$tool" \
        "${quiet[@]}" \
        --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_launches > "$log" 2>&1; then
      echo "$tool: $(tail -n 1 "$log")"
    elif grep -q -i "not supported\|LibraryNotLoaded" "$log"; then
      echo "$tool: this machine does not let the tool in (see $log): not checked."
    elif [ "$(left)" -lt 1 ]; then
      echo "$tool: the time is up: not checked."
    else
      echo "$tool: FAILED"
      tail -n 20 "$log"
      failed+=("$tool")
    fi
  done
fi

bench dual-forward-all 150 benchmarks.bench_dual_gpu --batches 256

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\ngpu-check passed\n'
