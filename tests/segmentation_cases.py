"""Cases that the kernels of `segmentation_disagreement` are tried on, and how near the twin they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie.ops import reference

KINDS = [
    "plain",
    "near",
    "identical",
    "ties",
    "background",
    "faint",
    "largest",
    "special",
    "-inf",
]


def logits(
    kind: str, levels: int, images: int, classes: int, size: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [N, C, *size], [L, N, C, *size]
    """Fresh random logits of one kind."""
    shape = (images, classes, *size)
    dense = 3 * torch.randn(shape)
    pruned = dense + torch.randn(levels, *shape)
    if kind == "near":
        pruned = dense + 1e-3 * torch.randn(levels, *shape)
    elif kind == "identical":
        pruned = dense.expand(levels, *shape).clone()
    elif kind == "ties":
        dense, pruned = dense.round(), pruned.round()
        pruned = torch.where(pruned == 0, -0.0, pruned)
    elif kind in ("background", "faint"):
        # Nobody sees any foreground; its probabilities are zero in fp32, or tiny and not alike.
        for tensor in (dense, pruned):
            foreground = tensor if classes == 1 else tensor.movedim(-len(size) - 1, 0)[1:]
            foreground -= 300 if kind == "background" else 40
    elif kind == "largest":
        values = torch.finfo(dtype).max * torch.tensor([1.0, -1.0, 0.62, -0.23, 0.0, 1e-38])
        dense = values[torch.randint(0, len(values), dense.shape)]
        pruned = values[torch.randint(0, len(values), pruned.shape)]
    elif kind in ("special", "-inf"):
        values = torch.tensor(
            [torch.nan, torch.inf, -torch.inf] if kind == "special" else [-torch.inf]
        )
        share = 0.5 / dense[0].numel() if kind == "special" else 0.3
        for tensor in (dense, pruned):
            hit = torch.rand(tensor.shape) < share
            tensor[hit] = values[torch.randint(0, len(values), (int(hit.sum()),))]
    return dense.to(dtype), pruned.to(dtype)


def assert_close_to_twin(scores: Tensor, dense: Tensor, pruned: Tensor) -> None:
    """Against the fp64 twin: the same NaN, hard IoU to the bit, soft IoU as the contract says."""
    want = reference.segmentation_disagreement(dense.cpu().double(), pruned.cpu().double())
    scores = scores.cpu()
    torch.testing.assert_close(scores[0], want[0].float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores[1].double(), want[1], rtol=1e-5, atol=0, equal_nan=True)
