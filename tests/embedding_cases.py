"""Cases that the kernels of `embedding_disagreement` are tried on, and how near the twin they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie.ops import reference

KINDS = ["plain", "near", "nearer", "identical", "opposite", "zeros", "tiny", "largest", "special"]


def embeddings(
    kind: str, levels: int, rows: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [N, D], [L, N, D]
    """Fresh random embeddings of one kind."""
    dense = torch.randn(rows, size)
    pruned = dense + 0.3 * torch.randn(levels, rows, size)
    if kind in ("near", "nearer"):
        pruned = dense * (1 + (1e-3 if kind == "near" else 1e-6) * torch.randn(levels, rows, size))
    elif kind == "identical":
        pruned = dense.expand(levels, rows, size).clone()
    elif kind == "opposite":
        pruned = -2 * dense.expand(levels, rows, size)
    elif kind == "zeros":
        dense[::2], pruned[:, ::3] = 0, 0
    elif kind == "tiny":  # squares below the range of fp32, rows shorter than 1e-12
        dense, pruned = 1e-14 * dense, 1e-25 * pruned
    elif kind == "largest":  # squares above it
        dense, pruned = (
            torch.finfo(dtype).max * torch.rand(x.shape).copysign(x) for x in (dense, pruned)
        )
    elif kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for tensor in (dense, pruned):
            hit = torch.rand(tensor.shape) < 0.3 / max(size, 1)
            tensor[hit] = values[torch.randint(0, 3, (int(hit.sum()),))]
    return dense.to(dtype), pruned.to(dtype)


def assert_close_to_twin(drift: Tensor, dense: Tensor, pruned: Tensor) -> None:
    """Against the fp64 twin: the same NaN, and all digits of fp32 however small the drift is."""
    want = reference.embedding_disagreement(dense.cpu().double(), pruned.cpu().double())
    drift = drift.cpu().double()
    torch.testing.assert_close(drift, want, rtol=1e-7, atol=1e-15, equal_nan=True)
