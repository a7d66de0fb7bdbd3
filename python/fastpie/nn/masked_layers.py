"""Masked layers: torch's convolutions and linear layer, each with a mask."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastpie.errors import FastpieError
from fastpie.ops import masked_conv1d, masked_conv2d, masked_conv3d, masked_linear

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MaskedConv1d", "MaskedConv2d", "MaskedConv3d", "MaskedLinear"]


class _Masked(nn.Module):
    """What the masked layers share: the mask, and how to come from a dense layer."""

    _dense: ClassVar[type[nn.Module]]
    weight: Tensor
    mask: Tensor

    def _set_mask(self, mask: Tensor | None) -> None:
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise FastpieError(f"Expected `mask` to be a bool tensor, but got {found}.")
        if mask.shape != self.weight.shape:
            raise FastpieError(
                f"Expected `mask` to have the weight's shape {list(self.weight.shape)}, but got "
                f"{list(mask.shape)}."
            )
        # A copy: load_state_dict writes into buffers, and the mask may belong to a Masks.
        self.register_buffer("mask", mask.to(self.weight.device, copy=True))

    @classmethod
    def from_dense(cls, module: nn.Module, mask: Tensor) -> Self:
        """The masked layer of a dense one; both share the parameters, none is copied.

        Args:
            module: torch's layer of this name (not a subclass: its forward may be another). Hooks,
                training mode and settings come along.
            mask: bool tensor of the weight's shape, True = kept.

        Raises:
            FastpieError: for another type of module, one whose weight is no parameter (pruned or
                normalised by hooks), or a mask that does not fit.
        """
        if type(module) not in (cls._dense, cls):
            raise FastpieError(
                f"Expected a {cls._dense.__name__} to make a {cls.__name__} of, but got "
                f"{type(module).__name__}."
            )
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise FastpieError(
                "Expected `weight` to be a parameter of the module, but something computes it "
                "(torch.nn.utils.prune or a normalisation of weights); remove that first."
            )
        masked = cls.__new__(cls)
        # A shallow copy whose parameters, buffers and hooks are registered in its own dictionaries.
        for name, value in module.__dict__.items():
            masked.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        masked._set_mask(mask)
        return masked

    def extra_repr(self) -> str:
        """The dense layer's text and the sparsity."""
        text = super().extra_repr()
        if self.mask.is_meta or not self.mask.numel():
            return text
        return f"{text}, sparsity={1 - self.mask.double().mean().item():.4g}"


class MaskedConv1d(_Masked, nn.Conv1d):
    """`torch.nn.Conv1d` that computes with the kept weights alone; see `MaskedConv2d`."""

    _dense = nn.Conv1d

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Take the arguments of `torch.nn.Conv1d` and a mask [K, C / groups, kw]."""
        super().__init__(*args, **kwargs)
        self._set_mask(mask)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (weight, self.mask, bias, self.stride, padding, self.dilation, self.groups)
        return masked_conv1d(input, *args)


class MaskedConv2d(_Masked, nn.Conv2d):
    """`torch.nn.Conv2d` that computes with the kept weights alone.

    Constructor, forward and parameters are those of `torch.nn.Conv2d`; `mask` is a buffer, bool, of
    the weight's shape, True = kept, all True by default. It may be changed at any time, in place or by
    assignment. The weight keeps its values at masked places: they take no part in the output and
    their gradient is zero (an optimizer's weight decay or momentum can still move them;
    `fastpie.training.masking.masked.MaskedTraining` keeps them at zero).

    The mask is part of the `state_dict`. A dense layer's checkpoint has none: load it with
    ``strict=False``, which leaves the mask as it is (or make the layer with `from_dense`).

    Speed and exactness: `fastpie.ops.masked_conv2d`.

    Example::

        masks = fastpie.prune(model, 0.9)
        model.conv = fastpie.nn.MaskedConv2d.from_dense(model.conv, masks["conv.weight"])
    """

    _dense = nn.Conv2d

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Take the arguments of `torch.nn.Conv2d` and a mask [K, C / groups, kh, kw]."""
        super().__init__(*args, **kwargs)
        self._set_mask(mask)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (weight, self.mask, bias, self.stride, padding, self.dilation, self.groups)
        return masked_conv2d(input, *args)


class MaskedConv3d(_Masked, nn.Conv3d):
    """`torch.nn.Conv3d` that computes with the kept weights alone; see `MaskedConv2d`."""

    _dense = nn.Conv3d

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Take the arguments of `torch.nn.Conv3d` and a mask [K, C / groups, kd, kh, kw]."""
        super().__init__(*args, **kwargs)
        self._set_mask(mask)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (weight, self.mask, bias, self.stride, padding, self.dilation, self.groups)
        return masked_conv3d(input, *args)


class MaskedLinear(_Masked, nn.Linear):
    """`torch.nn.Linear` that computes with the kept weights alone; see `MaskedConv2d`."""

    _dense = nn.Linear

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        """Take the arguments of `torch.nn.Linear` and a mask [K, C]."""
        super().__init__(*args, **kwargs)
        self._set_mask(mask)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the kept weights and add the bias."""
        return masked_linear(input, self.weight, self.mask, self.bias)


def _padded(layer: Any, input: Tensor) -> tuple[Tensor, Any]:
    """What torch's layers do with a padding that is not of zeros: pad first, then none."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    amounts = layer._reversed_padding_repeated_twice
    return functional.pad(input, amounts, mode=layer.padding_mode), 0
