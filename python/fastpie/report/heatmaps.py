"""Where the dense and the pruned model look: Grad-CAM of both, on one sample at a time.

Grad-CAM: Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from fastpie.dual import DualModel
from fastpie.dual.grad_cam import grad_cam
from fastpie.dual.inputs import as_arguments
from fastpie.errors import FastpieError

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
    args = pytree.tree_map(lambda x: _leaf(x, device) if isinstance(x, Tensor) else x, args)
    model = dual.model
    if module is not None and module not in dict(model.named_modules()):
        raise FastpieError(f"Expected `module` to name a module of the model, but got {module!r}.")
    with _evaluating(dual), torch.enable_grad():
        maps: list[np.ndarray] = []
        names: list[str] = []
        for state in ({}, dual.pruned_state(level)):
            with _watched(model, module or (names[0] if names else None)) as seen:
                logits = _logits(dual.run_pruned(state, args), output)
                if not maps:
                    chosen = _class(logits, klass)
                if not seen:
                    raise FastpieError(
                        "Expected a module with feature maps of shape [N, K, H, W], but found none."
                    )
                name, features = list(seen.items())[-1]
                names.append(name)
                maps.append(_cam(logits[chosen], features))
    return HeatMap(chosen, maps[0], maps[1], dual.sparsities[level], names[0])


def _cam(score: Tensor, features: Tensor) -> np.ndarray:
    cam = grad_cam(score, features).detach().relu()
    if max(cam.shape[1:]) > _MOST_CELLS:
        height, width = (min(s, _MOST_CELLS) for s in cam.shape[1:])
        cam = nn.functional.adaptive_avg_pool2d(cam, (height, width))
    cam = torch.nan_to_num(cam[0].float())
    result: np.ndarray = (cam / cam.max().clamp_min(torch.finfo(torch.float32).tiny)).cpu().numpy()
    return result


def _logits(out: Any, output: str | int | None) -> Tensor:
    if output is not None:
        out = out[output]
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 1:
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise FastpieError(f"Expected logits of shape [1, C], but got {shape}.")
    return out.as_subclass(Tensor)[0]


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


def _leaf(x: Tensor, device: torch.device) -> Tensor:
    """The input on the model's device; it asks for a gradient, so that a frozen model has one too."""
    x = x.detach().as_subclass(Tensor).to(device)
    return x.clone().requires_grad_(x.is_floating_point())


@contextmanager
def _evaluating(dual: DualModel) -> Iterator[None]:
    modes = [(module, module.training) for module in dual.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _watched(model: nn.Module, wanted: str | None) -> Iterator[dict[str, Tensor]]:
    """Outputs that are feature maps, by module name, the last one last."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and (wanted or out[0, 0].numel() > 1):
                seen.pop(name, None)
                seen[name] = out

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if (name == wanted if wanted else name and not _NO_FEATURES.search(type(module).__name__))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
