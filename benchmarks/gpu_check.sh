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
LOGS=${OUT:-$BUILD}
mkdir -p "$BUILD" "$LOGS"

step() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
left() { echo $((${SECONDS_IN_ALL:-540} - SECONDS)); }

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
"$PYTHON" -m pytest -q -p no:cacheprovider tests/csrc/test_cuda_build.py

step "GPU"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "No GPU here: torch.cuda.is_available() is False. Built and checked up to the first launch."
  exit 1
fi
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'

# Everything below runs even if one part fails: a machine with a GPU is dear.
failed=()

step "tests"
# Only the files with such tests: others import packages that a GPU machine need not have.
grep -rl --include='*.py' 'mark\.cuda' tests | sort \
  | xargs timeout 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda 2>&1 \
  | tee "$LOGS/gpu-tests.log" || failed+=("tests")

step "compute-sanitizer"
driver=$LOGS/sanitize.py
cat > "$driver" <<'PYTHON_CODE'
"""A few launches of every CUDA kernel; torch's caching allocator would hide accesses outside."""

import torch
from fastpie import ops
from fastpie.ops.sparse24 import pack_sparse24, sparse24_conv_cuda
from fastpie.ops.masked_conv_nhwc import masked_conv_nhwc_cuda, tiles

for classes in (1, 12, 20, 30, 50, 100, 129, 1000, 16384):
    for task in ("multiclass", "multilabel"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dense = torch.randn(5, classes, device="cuda", dtype=dtype)
            pruned = torch.randn(2, 5, classes, device="cuda", dtype=dtype)
            labels = torch.tensor([0, -1, classes, 2**62, 0], device="cuda")
            if task == "multilabel":
                labels = (torch.rand(5, classes, device="cuda") < 0.5).float()
            ops.disagreement(dense, pruned, labels, task)
ops.null(torch.randn(1001, device="cuda"))
for shape in ((5, 33), (64, 40, 3, 3)):
    ops.pack_mask(torch.randint(0, 5, shape, device="cuda", dtype=torch.uint8), 2)
for counts in ([0, 9, 30_000], range(1, 30_000, 150)):  # few histograms, and more than a block has
    weights = [torch.randn(n, device="cuda").mul(50).round() for n in (1, 30_000, 0, 1025)]
    ops.magnitude_levels([*weights, weights[1].half(), weights[3].bfloat16()], counts)
for shape in ((2, 3, 5, 7), (2, 3, 8, 8)):  # single elements, and vectors
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        images = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
        ops.normalize_uint8(images, *torch.rand(2, 3, device="cuda"), dtype)
        ops.normalize_uint8(images, *torch.rand(2, 3, device="cuda"), dtype, 8)
for k in (1, 100, 4096):
    values = torch.full((k,), -torch.inf, device="cuda")
    ids = torch.full((k,), -1, device="cuda")
    for count in (3, 5000):
        ops.top_k_update(values, ids, torch.randn(2, count, device="cuda"))
for rows, tile in ((64, 64), (64, 128), (128, 64), (128, 128)):
    weight = torch.randn(rows + 6, 3, 3, 64, device="cuda").half()
    packed = pack_sparse24(weight, torch.rand(weight.shape) < 0.4, rows)
    x = torch.randn(3, 9, 9, 64, device="cuda").half().movedim(-1, 1)
    y = torch.empty(3, 9, 9, rows + 6, device="cuda").half().movedim(-1, 1)
    ones = ((1, 1),) * 3
    sparse24_conv_cuda(x, packed, None, None, y.clone(), y, *ones, tile_pixels=tile)
# Read 16 bytes at a time, by elements, and without tensor cores; with filters and pixels left over.
for channels, groups, filters in ((40, 1, 136), (5, 1, 9), (1, 24, 24)):
    for tile in range(len(tiles())):
        x, y = (
            torch.randn(2, 9, 11, c, device="cuda").half().movedim(-1, 1)
            for c in (channels * groups, filters)
        )
        mask = torch.rand(filters, channels, 3, 3, device="cuda") < 0.3
        words = ops.reference.pack_mask(mask)
        weight = torch.randn(filters, 3, 3, channels, device="cuda").half()
        scale = torch.rand(filters, device="cuda")
        masked_conv_nhwc_cuda(
            [x, x.clone()], weight, [None, words], [scale, None], [None, scale], [None, y],
            [torch.empty_like(y), torch.empty_like(y)], (1, 1), (1, 1), (1, 1), groups,
            ("silu", 0.0), tile,
        )
torch.cuda.synchronize()
print("launched")
PYTHON_CODE
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null \
  | head -n 1 || true)
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer is not here: not checked."
else
  for tool in memcheck racecheck; do
    log=$LOGS/$tool.log
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 "$sanitizer" --tool "$tool" \
        --error-exitcode 9 "$PYTHON" "$driver" > "$log" 2>&1; then
      echo "$tool: $(tail -n 1 "$log")"
    elif grep -q -i "not supported\|LibraryNotLoaded" "$log"; then
      echo "$tool: this machine does not let the tool in (see $log): not checked."
    else
      echo "$tool: FAILED"
      tail -n 20 "$log"
      failed+=("$tool")
    fi
  done
fi

# bench NAME LEAST COMMAND...: run unless fewer than LEAST seconds are left.
bench() {
  local name=$1 least=$2
  shift 2
  step "benchmark: $name"
  if [ "$(left)" -lt "$least" ]; then
    echo "left out: $(left) s are left, it may take $least"
    return
  fi
  timeout "$(left)" "$PYTHON" -m "$@" 2> "$LOGS/$name.log" \
    || { tail -n 30 "$LOGS/$name.log"; failed+=("$name"); }
}
# The short ones first; the table of the last is what the end of the output shows.
bench agreement 60 benchmarks.gpu_agreement
bench disagreement 40 benchmarks.bench_disagreement_gpu
bench top-k 20 benchmarks.bench_top_k_gpu
bench dual-forward 90 benchmarks.bench_dual_gpu --batches 256 --providers fastpie own-dense eager
# torch.compile(max-autotune) may take minutes; the engine's choices are remembered by now.
bench dual-forward-compile 120 benchmarks.bench_dual_gpu --batches 256

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\ngpu-check passed\n'
