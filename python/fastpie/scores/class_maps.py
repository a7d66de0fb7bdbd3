"""Activation maps of the classes of a batch's samples, for one run of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastpie.dual.grad_cam import feature_maps_of, grad_cam
from fastpie.dual.inputs import as_arguments
from fastpie.dual.output import entry_of
from fastpie.errors import FastpieError
from fastpie.scores.cam import CamLayers, class_activation_map

__all__ = ["class_maps", "class_pairs", "grad_cams", "logits_of"]


def logits_of(out: Any, output: str | int | None) -> Tensor:  # [n, C]
    """The logits in what a classifier returns.

    Raises:
        FastpieError: if they are none.
    """
    logits = entry_of(out, output)
    if logits.ndim != 2:
        raise FastpieError(
            f"Expected a classifier with logits [n, C], but got {list(logits.shape)}."
        )
    return logits


def class_pairs(logits: Tensor, labels: Any = None) -> tuple[Tensor, Tensor]:
    """Each sample with each of its classes.

    Args:
        logits: [n, C].
        labels: int64 [n], or [n, C] with 1 for each class of a sample. A sample without a known one,
            or all without labels: the class with the highest logit.

    Returns:
        Samples and classes, int64 [P] each.

    Raises:
        FastpieError: for labels of another shape.
    """
    count, classes = logits.shape
    rows = torch.arange(count, device=logits.device)
    top = logits.detach().argmax(1) if count else rows
    if labels is None:
        return rows, top
    labels = torch.as_tensor(labels).detach().to(logits.device)
    if labels.shape == (count, classes):
        chosen = labels == 1
        likeliest = nn.functional.one_hot(top, classes).bool()
        chosen = torch.where(chosen.any(1, keepdim=True), chosen, likeliest)
        sample, klass = chosen.nonzero(as_tuple=True)
        return sample, klass
    if labels.numel() != count:
        raise FastpieError(
            f"Expected labels [{count}] or [{count}, {classes}], but got {list(labels.shape)}."
        )
    labels = labels.reshape(count)
    known = (labels >= 0) & (labels < classes)
    return rows, torch.where(known, labels, top).long()


def class_maps(
    features: Tensor,  # [n, K, ...]
    weight: Tensor | None,  # [C, K]
    layers: CamLayers,
    pairs: tuple[Tensor, Tensor],
) -> Tensor:  # [P, ...]
    """CAM of each pair: the head's weights of the class times the features of the sample.

    Args:
        features: output of the module `layers.features`.
        weight: of the head; None where the channels are the classes' own.
        layers: that the maps are read from.
        pairs: from `class_pairs`.
    """
    rows, classes = pairs
    features = features.relu() if layers.relu else features
    if weight is None:
        return features[rows, classes].to(torch.promote_types(features.dtype, torch.float32))
    return class_activation_map(features[rows], weight[classes])


def grad_cams(
    run: Callable[[tuple[Any, ...]], Any],
    model: nn.Module,
    images: Any,
    module: str,
    pairs: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    output: str | int | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Grad-CAM (its positive part) at a module in one run of a model: put it into eval mode before.

    Args:
        run: calls the model with its positional arguments.
        model: that `run` calls.
        images: its input; a tuple is spread.
        module: name of the module whose output [n, K, ...] is looked at, that of its last call.
        pairs: gives samples and classes from the logits: `class_pairs`.
        output: key or index of the logits in a dict or tuple output.

    Returns:
        The pairs and the map of each, [P, ...], without a graph.

    Raises:
        FastpieError: if there is no such module, it is not called, or the logits do not depend on its
            output.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        feature_maps_of(model, module) as seen,
    ):
        # The input asks for a gradient, so that a frozen model has a graph, too.
        args = pytree.tree_map_only(
            Tensor,
            lambda x: x.detach().clone().requires_grad_(x.is_floating_point()),
            as_arguments(images),
        )
        logits = logits_of(run(args), output)
        if not seen:
            raise FastpieError(f"Expected the model to call its module {module!r}.")
        features = seen[-1]
        rows, classes = pairs(logits)
        dtype = torch.promote_types(features.dtype, torch.float32)
        maps = features.new_zeros((len(rows), *features.shape[2:]), dtype=dtype)
        # One backward pass for the first class of each sample, one for the second, ...
        place = _place_among_equals(rows)
        for turn in range(int(place.max()) + 1 if len(rows) else 0):
            these = place == turn
            score = logits[rows[these], classes[these]].sum()
            cam = grad_cam(score, features, retain_graph=True).detach()
            maps[these] = cam[rows[these]].relu()
    return (rows, classes), maps


def _place_among_equals(rows: Tensor) -> Tensor:  # ascending
    """0 for the first of its value, 1 for the second, ..."""
    at = torch.arange(len(rows), device=rows.device)
    return at - torch.searchsorted(rows, rows)
