"""IoU of two segmentations against the same scores in PyTorch, on the CPU. Run: `make bench`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import harness
from benchmarks.torch_scores import torch_ious
from fastpie import ops

# Levels, images, classes, size: lesions, organs of a slice, a volume, street scenes; the default ladder.
CASES = (
    (1, 16, 1, (256, 256)),
    (1, 16, 2, (256, 256)),
    (4, 16, 2, (256, 256)),
    (1, 8, 5, (512, 512)),
    (1, 1, 4, (128, 128, 128)),
    (1, 2, 21, (512, 512)),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(
    levels: int, images: int, classes: int, size: tuple[int, ...], precision: str
) -> list[dict[str, Any]]:
    """Against PyTorch, eager and compiled."""
    torch.manual_seed(0)
    shape = (images, classes, *size)
    dense = 3 * torch.randn(shape)
    pruned = (dense + torch.randn(levels, *shape)).to(DTYPES[precision])
    dense = dense.to(DTYPES[precision])
    compiled = torch.compile(torch_ious, dynamic=False)
    providers = {
        "fastpie": lambda: ops.segmentation_disagreement(dense, pruned),
        "the same scores in PyTorch (fp32), eager": lambda: torch_ious(dense, pruned),
        "the same scores in PyTorch (fp32), torch.compile": lambda: compiled(dense, pruned),
    }
    ours, *others = providers
    for other in others:
        torch.testing.assert_close(providers[other](), providers[ours](), rtol=1e-4, atol=1e-4)
    timings = harness.interleave(providers, repeats=9, seconds=10)
    torch.compiler.reset()
    case = {"size": [levels, *shape], "precision": precision, "task": "segmentation"}
    return [harness.row(case, timings, ours, other) for other in others]


def main() -> None:
    """Measure, write the JSON, print the ratios."""
    rows = []
    for case in CASES:
        for precision in DTYPES:
            rows += measure(*case, precision)
            for r in rows[-2:]:
                print(
                    f"{r['size']} {precision}: {r['seconds']['p50'] * 1e3:.2f} ms, {r['ratio']}x "
                    f"faster than {r['baseline']}",
                    flush=True,
                )
    print(harness.write_results("segmentation-disagreement", rows))


if __name__ == "__main__":
    main()
