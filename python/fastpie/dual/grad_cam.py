"""Grad-CAM: where in its feature maps a network finds what speaks for a class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpie.errors import FastpieError

__all__ = ["feature_maps_of", "grad_cam"]


def grad_cam(
    score: Tensor,  # []
    features: Tensor,  # [n, K, ...]
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Tensor:  # [n, ...]
    """`sum_k mean(dy/dA_k) A_k` of the score `y` and the feature maps `A`, the mean over positions.

    Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391, before their ReLU, which is left to
    the caller. Differentiable in the features, and with `create_graph` in the weights as well.

    Args:
        score: a logit; of several images the sum of one logit each.
        features: what the score was computed from, any number of spatial dimensions.
        retain_graph: whether the graph is still needed afterwards.
        create_graph: whether the weights `mean(dy/dA_k)` belong to the graph, or are constants.

    Returns:
        fp32, fp64 for fp64 features.

    Raises:
        FastpieError: if the score does not depend on the features.
    """
    slope = None
    if score.requires_grad and features.requires_grad:
        (slope,) = torch.autograd.grad(
            score,
            features,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    if slope is None:
        raise FastpieError("Expected logits that depend on the module, but they do not.")
    if features.dtype is not torch.float64:  # sums of many small numbers
        slope, features = slope.float(), features.float()
    weights = slope.flatten(2).mean(2).view(*slope.shape[:2], *[1] * (slope.ndim - 2))
    return (weights * features).sum(1)


@contextmanager
def feature_maps_of(model: nn.Module, module: str) -> Iterator[list[Tensor]]:
    """Collect what a module of the model gives, call by call, while the block runs.

    The tensors are those that the model goes on with (an operation in place changes them too), so a
    gradient with respect to them exists, also where no parameter before them is trained.

    Raises:
        FastpieError: if there is no such module, or it does not give maps [n, K, ...].
    """
    seen: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim < 3:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise FastpieError(
                f"Expected module {module!r} to give feature maps [n, K, ...], but got {shape}."
            )
        maps: Tensor = output
        if not maps.requires_grad and torch.is_grad_enabled():
            # The copy of a leaf: an operation in place may follow, which no leaf allows.
            maps = maps.detach().requires_grad_().clone()
        seen.append(maps)
        return maps

    modules = dict(model.named_modules(remove_duplicate=False))
    if not module or module not in modules:
        raise FastpieError(
            f"Expected the name of a module of {type(model).__name__}, but it has no module {module!r}."
        )
    handle = modules[module].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
