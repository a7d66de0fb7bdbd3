"""Class activation maps: which layers they are read from, and how much two maps overlap.

For a head that is global average pooling and a linear layer, the map of a class is the sum of the
features `A` [n, K, ...] weighted by the class's row of that layer: Zhou et al., CVPR 2016, arXiv
1512.04150. For other heads there is `fastpie.dual.grad_cam`, whose weights are gradients; with the
head above it gives the same map over the number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpie.dual.inputs import as_arguments
from fastpie.dual.modes import evaluating
from fastpie.dual.output import entry_of
from fastpie.errors import FastpieError

__all__ = [
    "CamLayers",
    "cam_layers",
    "class_activation_map",
    "hard_overlap",
    "resized_map",
    "scaled_map",
    "soft_overlap",
]


_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class CamLayers:
    """The layers of a classifier whose logits are `head(mean(features))`.

    Attributes:
        features: name of the module whose output [n, K, ...] is averaged: what `DualModel(model,
            masks, features=...)` takes.
        head: name of the linear layer behind it; None if the channels are the classes' own.
        relu: whether a ReLU that is no module lies between them, as in DenseNet.
    """

    features: str
    head: str | None
    relu: bool = False


def class_activation_map(
    features: Tensor,  # [n, K, ...]
    weights: Tensor,  # [n, K]
) -> Tensor:  # [n, ...]
    """`sum_k w_k A_k`, in fp32 or the wider type of the features.

    Raises:
        FastpieError: if the shapes do not fit together or the features have no positions.
    """
    if features.ndim < 3 or weights.shape != features.shape[:2]:
        raise FastpieError(
            f"Expected `features` [n, K, ...] and `weights` [n, K], but got {list(features.shape)} "
            f"and {list(weights.shape)}."
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("nkp,nk->np", features.to(dtype).flatten(2), weights.to(dtype)).reshape(
            features.shape[0], *features.shape[2:]
        )


def scaled_map(cam: Tensor) -> Tensor:  # [n, ...] -> [n, ...] in [0, 1]
    """The positive part over its maximum; zero throughout where nothing is positive."""
    positive = cam.relu()
    if not positive.numel():
        return positive
    highest = positive.flatten(1).amax(1).clamp_min(torch.finfo(cam.dtype).tiny)
    return positive / highest.reshape(-1, *(1,) * (cam.ndim - 1))


def resized_map(cam: Tensor, size: Sequence[int]) -> Tensor:  # [n, ...] -> [n, *size]
    """Interpolated linearly to that size, the images' say.

    Raises:
        FastpieError: if maps and size have different numbers of dimensions, or not 1 to 3.
    """
    mode = _INTERPOLATION.get(len(size))
    if mode is None or cam.ndim - 1 != len(size):
        raise FastpieError(
            f"Expected a size of {cam.ndim - 1} dimensions (1 to 3), as the maps have, but got "
            f"{list(size)}."
        )
    if not len(cam):
        return cam.new_zeros((0, *size))
    return nn.functional.interpolate(cam.unsqueeze(1), list(size), mode=mode).squeeze(1)


def soft_overlap(
    first: Tensor,  # [n, ...], at least 0
    second: Tensor,  # [n, ...], at least 0
) -> Tensor:  # [n]
    """Soft IoU: sum of the lower over sum of the higher of both maps; 1 where both are zero."""
    lower = torch.minimum(first, second).flatten(1).sum(1)
    higher = torch.maximum(first, second).flatten(1).sum(1)
    nothing = higher < 1e-30
    return torch.where(nothing, torch.ones_like(lower), lower / higher.masked_fill(nothing, 1))


def hard_overlap(
    first: Tensor,  # [n, ...]
    second: Tensor,  # [n, ...]
    fraction: float = 0.2,
) -> Tensor:  # [n]
    """IoU of where each map is above `fraction` of its maximum; 1 where both are zero, NaN of NaN."""
    both = [scaled_map(cam) for cam in (first, second)]
    unknown = torch.stack([cam.flatten(1).isnan().any(1) for cam in both]).any(0)
    overlap = soft_overlap(*((cam > fraction).to(cam.dtype) for cam in both))
    return overlap.masked_fill(unknown, torch.nan)


def cam_layers(model: nn.Module, x: Any, *, output: str | int | None = None) -> CamLayers:
    """Find the layers that class activation maps can be read from, by checking that they add up.

    Args:
        model: a classifier; it is run once, in eval mode, and left as it was.
        x: an example input; a tuple is spread over the model's positional arguments.
        output: key or index of the logits [n, C] in a dict or tuple output, or None.

    Raises:
        FastpieError: if the logits are not those of a linear layer on averaged feature maps: take
            Grad-CAM then.
    """
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        calls: dict[str, list[Tensor]] = {}

        def keep(name: str, result: Any) -> None:
            if isinstance(result, Tensor) and result.ndim >= 3 and result[0, 0].numel() > 1:
                # A copy: the next operation may write into it.
                calls.setdefault(name, []).append(result.clone())

        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda module, args, result, name=name: keep(name, result)
            )
            stack.callback(hook.remove)
        logits = entry_of(model(*as_arguments(x)), output)
        if logits.ndim != 2:
            raise FastpieError(
                f"Expected a classifier with logits [n, C], but got {list(logits.shape)}."
            )
        heads: dict[str | None, nn.Linear | None] = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        heads[None] = None
        for head, layer in reversed(heads.items()):
            for name, results in reversed(calls.items()):
                for relu in (False, True):
                    if name and len(results) == 1 and _adds_up(results[0], layer, relu, logits):
                        return CamLayers(name, head, relu)
    raise FastpieError(
        f"Expected a classifier whose logits are a linear layer on averaged feature maps, but "
        f"{type(model).__name__} is none. Use Grad-CAM, with the name of a module."
    )


def _adds_up(features: Tensor, head: nn.Linear | None, relu: bool, logits: Tensor) -> bool:
    width = logits.shape[1] if head is None else head.in_features
    if features.shape[:2] != (logits.shape[0], width):
        return False
    pooled = (features.relu() if relu else features).flatten(2).float().mean(2)
    if head is not None:
        weight = head.weight.float()
        bias = None if head.bias is None else head.bias.float()
        pooled = nn.functional.linear(pooled, weight, bias)
    if pooled.shape != logits.shape:
        return False
    # Half precision rounds what is averaged here in fp32.
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    error = (pooled - logits.float()).abs().max()
    return bool(error <= tolerance * logits.float().abs().max())
