"""The drift of embeddings against the same in PyTorch, on the CPU. Run: `make bench`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness
from benchmarks.torch_scores import torch_drift
from fastpie import ops

# Levels, rows, size: a batch of ResNet-50's features, a gallery of faces, the default ladder.
CASES = ((1, 64, 2048), (1, 100_000, 512), (4, 4096, 512))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(levels: int, rows: int, size: int, precision: str) -> list[dict[str, Any]]:
    """Against PyTorch, eager and compiled."""
    torch.manual_seed(0)
    dense = torch.randn(rows, size)
    pruned = (dense + 0.1 * torch.randn(levels, rows, size)).to(DTYPES[precision])
    dense = dense.to(DTYPES[precision])
    compiled = torch.compile(torch_drift, dynamic=False)
    providers = {
        "fastpie": lambda: ops.embedding_disagreement(dense, pruned),
        "the same in PyTorch (fp32), eager": lambda: torch_drift(dense, pruned),
        "the same in PyTorch (fp32), torch.compile": lambda: compiled(dense, pruned),
    }
    ours, *others = providers
    for other in others:
        torch.testing.assert_close(providers[other](), providers[ours](), rtol=1e-4, atol=1e-4)
    timings = harness.interleave(providers, repeats=9, seconds=10)
    torch.compiler.reset()
    case = {"size": [levels, rows, size], "precision": precision, "task": "embedding"}
    return [harness.row(case, timings, ours, other) for other in others]


def main() -> None:
    """Measure, write the JSON, print the ratios."""
    rows = []
    for case in CASES:
        for precision in DTYPES:
            rows += measure(*case, precision)
            for r in rows[-2:]:
                print(
                    f"{r['size']} {precision}: {r['seconds']['p50'] * 1e3:.3f} ms, {r['ratio']}x "
                    f"faster than {r['baseline']}",
                    flush=True,
                )
    print(harness.write_results("embedding-disagreement", rows))


if __name__ == "__main__":
    main()
