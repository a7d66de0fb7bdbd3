"""The disagreement kernels on a GPU: CUDA, Triton, and the same scores in PyTorch.

The floor is one read of both logit tensors and one write of the scores. PyTorch computes in fp32,
as the kernels do, and ranks by sorting; it is timed as written and under torch.compile. Run:
`python -m benchmarks.bench_disagreement_gpu` on a machine with a GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.torch_scores import torch_scores
from fastpie import _C
from fastpie.ops import _native
from fastpie.ops.disagreement import _kernel_arguments

CASES = ((65536, 20), (65536, 1000), (4096, 10_000))
# Bytes read and written by a large device-to-device copy on an H200, measured (KERNELS.md).
COPY_BYTES_PER_SECOND = 4.3e12
# Inputs rotate among sets of at least this size together, several times the 60 MB of L2.
ROTATION_BYTES = 512 * 2**20
REPEATS = 25
BASELINE = "the same scores in PyTorch (fp32), eager"

Provider = Callable[[Tensor, Tensor, str], Tensor]


def cuda_scores(dense: Tensor, pruned: Tensor, task: str) -> Tensor:
    """The CUDA kernel, whatever the operator would choose."""
    out, arguments, _alive = _kernel_arguments(dense, pruned, None, task)
    _native.call(_C.disagreement_cuda, *arguments, _native.cuda_stream(dense))
    return out


def triton_scores(dense: Tensor, pruned: Tensor, task: str) -> Tensor:
    """The Triton kernel, whatever the operator would choose."""
    return _native.triton_kernels().disagreement(dense, pruned, None, task)


def providers() -> dict[str, Provider]:
    """What can be timed here, by name."""
    found: dict[str, Provider] = {}
    if (reason := _native.cuda_unusable_reason()) is None:
        found["fastpie, CUDA"] = cuda_scores
    else:
        print(f"CUDA kernels left out: {reason}", file=sys.stderr)
    if (reason := _native.triton_unusable_reason()) is None:
        found["fastpie, Triton"] = triton_scores
    else:
        print(f"Triton kernels left out: {reason}", file=sys.stderr)
    compiled = torch.compile(torch_scores, dynamic=False)
    found["the same scores in PyTorch (fp32), torch.compile"] = compiled
    found[BASELINE] = torch_scores
    return found


def time_gpu(
    calls: dict[str, Provider], inputs: list[tuple[Tensor, Tensor]], task: str
) -> dict[str, dict[str, float]]:
    """Seconds of each call by CUDA events, the calls interleaved and the inputs rotating."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            call(*inputs[0], task)
        torch.cuda.synchronize()
        print(f"  warm: {name}", file=sys.stderr)
    for repeat in range(REPEATS):
        for name, call in calls.items():
            dense, pruned = inputs[repeat % len(inputs)]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The launch itself takes tens of microseconds; behind this the events see the GPU only.
            torch.cuda._sleep(1_000_000)
            begin.record()
            call(dense, pruned, task)
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {
        name: {
            **{f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)},
            "repeats": len(values),
        }
        for name, values in times.items()
    }


def measure(rows: int, classes: int, task: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of the results file for one shape."""
    element = torch.finfo(dtype).bits // 8
    read = 2 * rows * classes * element
    sets = min(64, max(2, math.ceil(ROTATION_BYTES / read)))
    inputs = []
    for _ in range(sets):
        dense = 3 * torch.randn(rows, classes, device="cuda")
        pruned = dense + torch.randn_like(dense)
        inputs.append((dense.to(dtype), pruned.to(dtype)[None]))
    calls = providers()
    _agree(calls, inputs[0], task)
    timings = time_gpu(calls, inputs, task)
    torch.compiler.reset()
    moved = read + 11 * 4 * rows
    case = {
        "rows": rows,
        "classes": classes,
        "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
        "task": task,
    }
    results = []
    for name in calls:
        result = harness.row(case, timings, name, BASELINE)
        rate = moved / timings[name]["p50"]
        result["gigabytes_per_second"] = round(rate / 1e9, 1)
        result["fraction_of_copy"] = round(rate / COPY_BYTES_PER_SECOND, 4)
        results.append(result)
    return results


def _agree(calls: dict[str, Provider], inputs: tuple[Tensor, Tensor], task: str) -> None:
    """A wrong kernel is not worth timing."""
    # Not the flips: argmax may return any of equal logits, which bf16 has many of.
    compared = [0, 1, 2, 3, 5, 6, 7]
    expected = torch_scores(*inputs, task)[compared].mean(-1)
    for name, call in calls.items():
        got = call(*inputs, task)[compared].mean(-1)
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def main() -> int:
    """Measure, write the JSON, print the table last."""
    if not torch.cuda.is_available():
        print("No GPU here: torch.cuda.is_available() is False. Nothing was measured.")
        return 1
    torch.manual_seed(0)
    rows = []
    for count, classes in CASES:
        for task in ("multiclass", "multilabel"):
            for dtype in (torch.float32, torch.bfloat16):
                print(f"[{count}, {classes}] {task} {dtype}", file=sys.stderr)
                rows += measure(count, classes, task, dtype)
    path = harness.write_results("disagreement-gpu", rows)
    print(path)
    print(
        f"{'shape':>14} {'task':>10} {'type':>4} {'ms':>9} {'GB/s':>7} {'of copy':>7} {'ratio':>6}"
    )
    for r in rows:
        shape = f"[{r['rows']}, {r['classes']}]"
        print(
            f"{shape:>14} {r['task']:>10} {r['precision']:>4} {r['seconds']['p50'] * 1e3:>9.3f} "
            f"{r['gigabytes_per_second']:>7.0f} {r['fraction_of_copy']:>7.3f} {r['ratio']:>6} "
            f"{r['provider']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
