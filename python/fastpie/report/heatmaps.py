"""Where the dense and the pruned model look: Grad-CAM of both, on one sample at a time.

Grad-CAM: Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from fastpie.dual import DualModel
from fastpie.dual.inputs import as_arguments
from fastpie.dual.modes import evaluating
from fastpie.errors import FastpieError
from fastpie.scores.cam import scaled_map
from fastpie.scores.class_maps import grad_cams

__all__ = ["HeatMap", "heat_map"]

_MOST_CELLS = 32  # of a side; finer maps are averaged, what is shown is interpolated anyway
# What lies behind these is a summary or attention's weights, not features with a place in the image.
_NO_FEATURES = re.compile("pool|dropout|softmax|flatten", re.IGNORECASE)


@dataclass(frozen=True)
class HeatMap:
    """How much each place of an image speaks for a class, in both models.

    Attributes:
        klass: the class.
        dense: fp32 [h, w] in [0, 1], 1 at its highest place; zero throughout where nothing does.
        pruned: likewise.
        sparsity: of the pruned model.
        module: name of the module whose output was looked at.
    """

    klass: int
    dense: np.ndarray
    pruned: np.ndarray
    sparsity: float
    module: str

    @property
    def overlap(self) -> float | None:
        """Sum of the lower over sum of the higher of both maps: 1 alike, 0 apart; None of nothing."""
        union = float(np.maximum(self.dense, self.pruned).sum())
        return float(np.minimum(self.dense, self.pruned).sum()) / union if union > 0 else None


def heat_map(
    dual: DualModel,
    image: Any,
    klass: int | Sequence[int] | None = None,
    *,
    module: str | None = None,
    sparsity: float | None = None,
    output: str | int | None = None,
) -> HeatMap:
    """Grad-CAM of a class in the dense and in the pruned model.

    `relu(sum_k mean(dy/dA_k) A_k)` of the feature maps `A` and the logit `y` of the class, divided by
    its maximum. Both models are run in eval mode on copies of their buffers; the dual model, its
    gradients among it, is left as it was.

    Args:
        dual: a classifier of 2D images and its pruned self.
        image: one item's image, as for `fastpie.mine`: without a batch dimension.
        klass: index of the class; of several, the one that the dense model is surest of; by default
            of all.
        module: name of the module whose output is looked at; by default the last one whose output is
            [1, K, H, W] with more than one place and that does not pool.
        sparsity: level of the pruned model; by default the highest.
        output: key or index of the logits in a dict or tuple output.

    Raises:
        FastpieError: if there is no such module, level or class, or the outputs are no logits of a
            classifier.
    """
    level = _level(dual, sparsity)
    device = next(dual.model.parameters()).device
    batch = default_collate([image])
    args = as_arguments(tuple(batch) if isinstance(batch, list) else batch)
    args = pytree.tree_map(lambda x: _plain(x).to(device) if isinstance(x, Tensor) else x, args)
    chosen: list[int] = []

    def pairs(logits: Tensor) -> tuple[Tensor, Tensor]:
        if not chosen:  # the dense model chooses
            chosen.append(_class(_plain(logits)[0], klass))
        return torch.tensor([0], device=device), torch.tensor(chosen, device=device)

    with evaluating(dual):
        name = (
            _last_maps(dual.model, partial(dual.run_pruned, {}, args)) if module is None else module
        )
        maps = [
            grad_cams(
                partial(dual.run_pruned, state), dual.model, args, name, pairs, output=output
            )[1]
            for state in ({}, dual.pruned_state(level))
        ]
    dense, pruned = (_cells(cam) for cam in maps)
    return HeatMap(chosen[0], dense, pruned, dual.sparsities[level], name)


def _cells(cam: Tensor) -> np.ndarray:  # [1, H, W] -> fp32 [h, w]
    if cam.ndim != 3:
        raise FastpieError(f"Expected maps of an image, [1, H, W], but got {list(cam.shape)}.")
    height, width = (min(side, _MOST_CELLS) for side in cam.shape[1:])
    cam = nn.functional.adaptive_avg_pool2d(cam.float(), (height, width))
    cells: np.ndarray = scaled_map(torch.nan_to_num(cam))[0].cpu().numpy()
    return cells


def _class(logits: Tensor, wanted: int | Sequence[int] | None) -> int:
    if wanted is None:
        return int(logits.argmax())
    classes = [wanted] if isinstance(wanted, int) else list(wanted)
    if not classes or not all(0 <= c < len(logits) for c in classes):
        raise FastpieError(f"Expected classes below {len(logits)}, but got {wanted}.")
    return max(classes, key=lambda c: logits[c].item())


def _level(dual: DualModel, sparsity: float | None) -> int:
    levels = dual.sparsities
    if sparsity is None:
        return len(levels) - 1
    for place, value in enumerate(levels):
        if abs(value - sparsity) <= 1e-9:
            return place
    raise FastpieError(f"Expected `sparsity` to be one of {levels}, but got {sparsity}.")


def _plain(x: Tensor) -> Tensor:
    """Without a graph, and no subclass, such as MONAI's MetaTensor."""
    return x.detach().as_subclass(Tensor)


def _last_maps(model: nn.Module, run: Callable[[], Any]) -> str:
    """The name of the last module that gives feature maps."""
    last = ""

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, out: Any) -> None:
            nonlocal last
            if isinstance(out, Tensor) and out.ndim == 4 and out[0, 0].numel() > 1:
                last = name

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name and not _NO_FEATURES.search(type(module).__name__):
                stack.callback(module.register_forward_hook(watch(name)).remove)
        run()
    if not last:
        raise FastpieError(
            "Expected a module with feature maps of shape [N, K, H, W], but found none."
        )
    return last
