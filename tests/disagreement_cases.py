"""Cases that the GPU kernels of `disagreement` are tried on, and how near the twin they must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie.ops import reference
from fastpie.ops.disagreement import SCORES

KINDS = [
    "plain",
    "near",
    "identical",
    "ties",
    "constant",
    "1e4",
    "tiny",
    "largest",
    "special",
    "-inf",
    "far from -inf",
]


def logits(
    kind: str, levels: int, rows: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [N, C], [L, N, C]
    """Fresh random logits of one kind; the levels lie ever further from the dense model."""
    distance = torch.logspace(-2, 0.5, levels)[:, None, None]
    dense = 3 * torch.randn(rows, classes)
    pruned = dense + distance * torch.randn(levels, rows, classes)
    if kind == "near":
        pruned = dense + 1e-3 * torch.randn(levels, rows, classes)
    elif kind == "identical":
        pruned = dense.expand(levels, rows, classes).clone()
    elif kind == "ties":
        dense, pruned = dense.round(), pruned.round()
        pruned = torch.where(pruned == 0, -0.0, pruned)
    elif kind == "constant":
        dense = dense[:, :1].expand(rows, classes).clone()
    elif kind == "1e4":
        dense, pruned = 1e4 * dense, 1e4 * pruned
    elif kind == "tiny":
        dense, pruned = 1e-20 * dense, 1e-13 * pruned
    elif kind == "largest":
        # Not the largest float itself: a KL that rounds to it may as well round to infinity.
        values = torch.finfo(dtype).max * torch.tensor([0.97, -0.91, 0.62, -0.23, 0.0, 1e-38])
        dense = values[torch.randint(0, len(values), (rows, classes))]
        pruned = values[torch.randint(0, len(values), (levels, rows, classes))]
    elif kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for logits in (dense, pruned):
            hit = torch.rand(logits.shape) < 0.5 / classes
            logits[hit] = values[torch.randint(0, 3, (int(hit.sum()),))]
    elif kind in ("-inf", "far from -inf"):
        if kind != "-inf":  # shares of the probability that are zero in fp32 or in fp64
            dense, pruned = 300 * dense, 300 * pruned
        for logits in (dense, pruned):
            logits[torch.rand(logits.shape) < 0.3] = -torch.inf
    return dense.to(dtype), pruned.to(dtype)


def labels_of(task: str, rows: int, classes: int) -> Tensor:
    """Labels of which a fifth is wrong (multiclass) or unknown (multilabel)."""
    hit = torch.rand(rows) < 0.2
    if task == "multiclass":
        wrong = torch.tensor([-1, classes, -(2**63), 2**62])[torch.randint(0, 4, (rows,))]
        return torch.where(hit, wrong, torch.randint(0, classes, (rows,)))
    targets = (torch.rand(rows, classes) < 0.3).float()
    targets[torch.rand(rows, classes) < 0.2] = torch.nan
    targets[hit] = torch.tensor([torch.nan, 0.0, 1.0])[torch.randint(0, 3, (rows,))][hit, None]
    return targets


def assert_close_to_twin(
    scores: Tensor,  # [11, L, N]
    dense: Tensor,
    pruned: Tensor,
    labels: Tensor | None,
    task: str,
) -> None:
    """Against the fp64 twin: the same NaN and infinities, and fp32 accuracy elsewhere."""
    scores, dense, pruned = scores.cpu(), dense.cpu().double(), pruned.cpu().double()
    if labels is not None:
        labels = labels.cpu() if task == "multiclass" else labels.cpu().double()
    expected = reference.disagreement(dense, pruned, labels, task).float()
    torch.testing.assert_close(scores.isnan(), expected.isnan(), rtol=0, atol=0)
    # (relative, absolute): KL and JS are sums of non-negative terms, and so accurate also where
    # tiny; the margins are exact; drift and damage are differences of rounded numbers.
    tolerance = dict.fromkeys(SCORES, (1e-5, 1e-6))
    tolerance |= dict.fromkeys(("js", "kl", "kl_reverse"), (2e-4, 1e-11))
    tolerance |= dict.fromkeys(("flip", "margin_dense", "margin_pruned"), (0.0, 0.0))
    losses = torch.cat([expected[8:10], torch.ones_like(expected[:1])]).nan_to_num(0, 0, 0)
    tolerance["damage"] = (1e-5, 1e-6 * float(losses.max()))
    for name, got, wanted in zip(SCORES, scores, expected, strict=True):
        relative, absolute = tolerance[name]
        torch.testing.assert_close(
            got,
            wanted,
            rtol=relative,
            atol=absolute,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
