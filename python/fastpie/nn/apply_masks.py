"""Masks of a whole model: plain layers become masked ones, and back."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastpie.errors import FastpieError
from fastpie.nn.masked_layers import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from fastpie.pruning import Masks

__all__ = ["apply_masks", "remove_masks"]

_MASKED_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.Linear: MaskedLinear,
}
_DENSE_OF = {masked: dense for dense, masked in _MASKED_OF.items()}


def apply_masks(model: nn.Module, masks: Masks, *, density: float = 1.0) -> list[str]:
    """Let the layers of a model compute, and give gradients, with the kept weights alone.

    The removed weights are set to zero, which masks all that reads them. Beside that every layer that
    is exactly a `torch.nn.Conv1d`, `Conv2d`, `Conv3d` or `Linear` turns, in place, into the masked
    layer of `fastpie.nn` of the same name, whose kernels skip removed weights in both passes where that
    is faster. It stays the same object with the same parameters, hooks and settings, and its mask
    is not part of the `state_dict`: optimizers, checkpoints, DDP and code that holds the layer go on.
    Subclasses are left as they are (their forward may be another), those inside of
    `nn.MultiheadAttention` among them, and layers whose weight something computes.

    Masks of later calls replace those of earlier ones.

    Args:
        model: that the masks were made for.
        masks: of a ladder those of the highest level.
        density: layers that keep this fraction of the weights, or more, stay plain; by default those
            that keep all.

    Returns:
        The names of the layers that are masked ones now.

    Raises:
        FastpieError: if the masks are those of another model.
    """
    if not density >= 0:  # NaN fails too
        raise FastpieError(f"Expected `density` of at least 0, but got {density}.")
    masks.apply_(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # By weight: tied layers share the one mask that names either of them.
    keep: dict[int, Tensor] = {id(parameters[name]): masks[name] for name in masks}
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        mask = keep.get(id(weight))
        if weight is None or mask is None:
            continue
        if type(module) in _DENSE_OF:
            cast(Tensor, module.mask).copy_(mask)
        elif type(module) in _MASKED_OF and mask.sum() < density * mask.numel():
            mask = mask.to(weight.device, copy=True)
            module.register_buffer("mask", mask, persistent=False)
            module.__class__ = _MASKED_OF[type(module)]
        else:
            continue
        names.append(name)
    return names


def remove_masks(model: nn.Module) -> list[str]:
    """Turn the masked layers of `fastpie.nn` back into torch's, in place; weights stay as they are.

    Returns:
        The names of the layers that were masked ones.
    """
    names = []
    for name, module in model.named_modules():
        if type(module) in _DENSE_OF:
            module.__class__ = _DENSE_OF[type(module)]
            del module.mask
            names.append(name)
    return names
