"""Contrastive loss of two views."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastpie.errors import FastpieError

__all__ = ["nt_xent"]


def nt_xent(
    a: Tensor,  # [n, d]
    b: Tensor,  # [n, d]
    temperature: float = 0.2,
    *,
    gather: bool = True,
) -> Tensor:  # [n]
    """Normalised temperature-scaled cross entropy (SimCLR, arXiv 2002.05709, equation 1).

    With ``z`` the embeddings at length 1, an anchor and its positive are the two views of a sample,
    and the negatives both views of all other samples::

        l(z, positive) = -log(exp(<z, positive> / t) / sum over all but z itself of exp(<z, .> / t))
        loss[i] = (l(a[i], b[i]) + l(b[i], a[i])) / 2

    so that the mean over the batch is the loss as published.

    Where torch.distributed is initialised, the negatives come from all processes, and gradients go
    back to them: the mean over the processes of their mean losses, and its gradient as
    `DistributedDataParallel` averages it, are those of one process with the whole batch. Every
    process must call it, with as many samples.

    Args:
        a: embeddings of the first views, of any length above 0.
        b: of the second views of the same samples.
        temperature: above 0; .2 in SDCLR on CIFAR, .3 on ImageNet-100-LT.
        gather: whether the negatives come from all processes.

    Returns:
        The loss of each sample of this process in nats, fp32 (fp64 for fp64 embeddings), under
        autocast too. NaN in one embedding makes all losses NaN, since it is everyone's negative.

    Raises:
        FastpieError: for embeddings of other shapes, or a temperature that is not above 0.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise FastpieError(
            "Expected the embeddings of both views to have one shape [n, d], but got "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    if not temperature > 0:
        raise FastpieError(f"Expected `temperature` to be above 0, but got {temperature!r}.")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        views = torch.stack([a.to(dtype), b.to(dtype)])  # [2, n, d]
        views = functional.normalize(views, dim=2)
        everyone, rank = views, 0
        if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = _Gathered.apply(views)  # type: ignore[no-untyped-call]
            rank = dist.get_rank()
        n, total = views.shape[1], everyone.shape[1]
        logits = views.flatten(0, 1) @ everyone.flatten(0, 1).t() / temperature  # [2 n, 2 total]
        own = torch.arange(rank * n, rank * n + n, device=a.device)
        itself = torch.cat([own, own + total])
        logits = logits.scatter(1, itself.unsqueeze(1), -torch.inf)
        losses = functional.cross_entropy(logits, itself.roll(n), reduction="none")
        return losses.view(2, n).mean(0)


class _Gathered(torch.autograd.Function):
    """Samples of all processes side by side, [2, n, d] to [2, processes * n, d], with gradient.

    Its own, since what torch has is deprecated or in private modules, and for `all_gather` and
    `all_reduce` alone, which every backend has.
    """

    @staticmethod
    def forward(ctx: Any, views: Tensor) -> Tensor:
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views)
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process's losses depend on everyone's embeddings.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), 1)[dist.get_rank()]
