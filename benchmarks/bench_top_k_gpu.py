"""The running top-k on a GPU: CUDA, Triton, and torch.topk of the state and the batch together.

The state has seen a million samples, so few of a batch enter, as in most of a run. Each timed call
starts from that state. Run: `python -m benchmarks.bench_top_k_gpu` on a machine with a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from fastpie import _C
from fastpie.ops import _native, reference
from fastpie.ops.top_k import native_arguments

SEEN = 1_000_000
CASES = tuple((k, n) for k in (100, 4096) for n in (64, 1024, 65536))
REPEATS = 25
BASELINE = "torch.topk of state and batch"

Update = Callable[[Tensor, Tensor, Tensor, int], None]


def cuda_update(values: Tensor, ids: Tensor, scores: Tensor, first_id: int) -> None:
    """The CUDA kernel, whatever the operator would choose."""
    arguments, _alive = native_arguments(values, ids, scores, None, first_id)
    _native.call(_C.top_k_update_cuda, *arguments, _native.cuda_stream(values))


def triton_update(values: Tensor, ids: Tensor, scores: Tensor, first_id: int) -> None:
    """The Triton kernel, whatever the operator would choose."""
    _native.triton_kernels().top_k_update(values, ids, scores, None, first_id)


def torch_update(values: Tensor, ids: Tensor, scores: Tensor, first_id: int) -> None:
    """What one writes in PyTorch: equal scores in any order, no NaN, one level."""
    batch_ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device)
    top = torch.topk(torch.cat([values, scores[0]]), len(values))
    values.copy_(top.values)
    ids.copy_(torch.cat([ids, batch_ids])[top.indices])


def providers() -> dict[str, Update]:
    """What can be timed here, by name."""
    found: dict[str, Update] = {}
    if (reason := _native.cuda_unusable_reason()) is None:
        found["fastpie, CUDA"] = cuda_update
    else:
        print(f"CUDA kernels left out: {reason}", file=sys.stderr)
    if (reason := _native.triton_unusable_reason()) is None:
        found["fastpie, Triton"] = triton_update
    else:
        print(f"Triton kernels left out: {reason}", file=sys.stderr)
    return found | {BASELINE: torch_update}


def seconds_on_gpu(call: Callable[[], None]) -> float:
    """Of one call, by CUDA events, behind a wait that hides the launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(
    k: int,
    n: int,
    calls: dict[str, Update],
    device: str = "cuda",
    seconds: Callable[[Callable[[], None]], float] = seconds_on_gpu,
) -> dict[str, dict[str, float]]:
    """Seconds of each call on batches of n, the calls interleaved; each is checked first."""
    empty = torch.full((k,), -torch.inf), torch.full((k,), -1)
    seen = reference.top_k_update(*empty, torch.randn(1, SEEN), None, 0)
    state = tuple(x.to(device) for x in seen)
    batches = [torch.randn(1, n, device=device) for _ in range(REPEATS)]
    hard = 3 + torch.randn(1, n)  # of the batch that is checked, many enter
    expected = reference.top_k_update(*seen, hard, None, SEEN)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat, batch in enumerate([hard.to(device), *batches]):
        for name, update in calls.items():
            values, ids = (x.clone() for x in state)
            taken = seconds(lambda u=update, v=values, i=ids, b=batch: u(v, i, b, SEEN))
            if repeat > 0:
                times[name].append(taken)
                continue
            if not torch.equal(values.cpu(), expected[0]):  # a wrong kernel is not worth timing
                raise RuntimeError(f"{name}: not the {k} highest values")
            if name != BASELINE and not torch.equal(ids.cpu(), expected[1]):
                raise RuntimeError(f"{name}: not the ids of the {k} highest values")
    return {
        name: {
            **{f"p{q}": float(np.percentile(taken, q)) for q in (20, 50, 80)},
            "repeats": len(taken),
        }
        for name, taken in times.items()
    }


def main() -> int:
    """Measure, write the JSON, print the table last."""
    if not torch.cuda.is_available():
        print("No GPU here: torch.cuda.is_available() is False. Nothing was measured.")
        return 1
    torch.manual_seed(0)
    calls = providers()
    rows = []
    for k, n in CASES:
        timings = measure(k, n, calls)
        case = {"k": k, "size": [n], "seen": SEEN, "precision": "fp32"}
        rows += [harness.row(case, timings, name, BASELINE) for name in calls]
    print(harness.write_results("top-k-gpu", rows))
    print(f"{'k':>6} {'batch':>7} {'us':>9} {'ratio':>6}")
    for r in rows:
        microseconds = r["seconds"]["p50"] * 1e6
        print(f"{r['k']:>6} {r['size'][0]:>7} {microseconds:>9.1f} {r['ratio']:>6} {r['provider']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
