"""The scores of `disagreement` in plain fp32 PyTorch: the peer of the kernels' benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["torch_drift", "torch_ious", "torch_scores"]


def torch_scores(dense: Tensor, pruned: Tensor, task: str) -> Tensor:
    """Every score without labels in plain fp32 PyTorch, as one would write it for speed."""
    z, y = dense.float().expand(pruned.shape), pruned.float()
    if task == "multiclass":
        log_p, log_q = functional.log_softmax(z, -1), functional.log_softmax(y, -1)
        js, kl, kl_reverse = _divergences(log_p, log_q)
        flip = z.argmax(-1) != y.argmax(-1)
    else:
        there = _divergences(functional.logsigmoid(z), functional.logsigmoid(y))
        absent = _divergences(functional.logsigmoid(-z), functional.logsigmoid(-y))
        js, kl, kl_reverse = ((a + b) / z.shape[-1] for a, b in zip(there, absent, strict=True))
        flip = ((z > 0) != (y > 0)).any(-1)
    rank_z, rank_y = _centred_ranks(z), _centred_ranks(y)
    squares = rank_z.square().sum(-1) * rank_y.square().sum(-1)
    spearman = (rank_z * rank_y).sum(-1) / squares.sqrt()
    difference = functional.normalize(z, dim=-1) - functional.normalize(y, dim=-1)
    drift = torch.linalg.vector_norm(difference, dim=-1)
    margins = [t[..., 0] - t[..., 1] for t in (z.topk(2, -1).values, y.topk(2, -1).values)]
    unknown = torch.full_like(js, math.nan)
    scores = [js, kl, kl_reverse, spearman, flip.float(), *margins, drift, *[unknown] * 3]
    return torch.stack(scores)


def torch_ious(dense: Tensor, pruned: Tensor) -> Tensor:  # [N, C, ...], [L, N, C, ...] -> [2, L, N]
    """Hard and soft IoU of the foreground in plain fp32 PyTorch, as one would write it for speed."""
    z, y = dense.float().flatten(2), pruned.float().flatten(3)
    bad = z.isnan().flatten(1).any(-1) | y.isnan().flatten(2).any(-1)
    if z.shape[1] == 1:
        p, q = z.sigmoid(), y.sigmoid()
        of_dense, of_pruned = (z > 0).squeeze(1).long(), (y > 0).squeeze(2).long()
    else:
        p, q = z.softmax(1)[:, 1:], y.softmax(2)[:, :, 1:]
        of_dense, of_pruned = z.argmax(1), y.argmax(2)
    lower = torch.minimum(p, q).flatten(2).sum(-1)
    upper = torch.maximum(p, q).flatten(2).sum(-1)
    both = ((of_dense == of_pruned) & (of_dense > 0)).sum(-1)
    either = (of_dense > 0).sum(-1) + (of_pruned > 0).sum(-1) - both
    soft = torch.where(upper > 0, lower / upper, 1.0)
    hard = torch.where(either > 0, both / either, 1.0)
    return torch.where(bad, torch.nan, torch.stack([hard, soft]))


def torch_drift(dense: Tensor, pruned: Tensor) -> Tensor:  # [N, D], [L, N, D] -> [L, N]
    """Drift of embeddings in plain fp32 PyTorch."""
    z, y = functional.normalize(dense.float(), dim=-1), functional.normalize(pruned.float(), dim=-1)
    drift: Tensor = torch.linalg.vector_norm(z - y, dim=-1)
    return drift


def _divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp(min=1e-38).log()
    js = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
    return js, (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)


def _centred_ranks(z: Tensor) -> Tensor:
    z = z.contiguous()
    ordered = z.sort(-1).values
    less = torch.searchsorted(ordered, z)
    return (less + torch.searchsorted(ordered, z, right=True) - z.shape[-1]).float()
