"""Tensors of the shapes of masked weights, set to zero where those are removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MaskedTensors"]


class MaskedTensors:
    """Zeroes weights, gradients and optimizer state at removed places, many tensors in one kernel.

    The masks are kept where the tensors are, in their dtype and strides, as multi-tensor kernels ask
    for: with bool masks these fall back to a kernel a tensor.
    """

    def __init__(self, weights: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
        """Join weights with their masks, bool, True = kept."""
        self._weights = list(weights)
        # A mask that removes nothing costs nothing.
        self._keep = {index: mask for index, mask in enumerate(keep) if not mask.all()}
        self._factors: dict[Any, Tensor] = {}

    def zero_weights(self, optimizer: Optimizer | None) -> None:
        """Zero the weights, and what an optimizer keeps in their shape."""
        self._zero((index, self._weights[index]) for index in self._keep)
        if optimizer is None:
            return
        states = ((i, optimizer.state.get(self._weights[i], {})) for i in self._keep)
        self._zero(
            (index, value)
            for index, state in states
            for value in state.values()
            # Whole numbers of this shape may be codes of quantised moments, in which 0 is not zero.
            if isinstance(value, Tensor)
            and value.shape == self._weights[index].shape
            and value.is_floating_point()
        )

    def zero_gradients(self) -> None:
        """Zero the gradients of the weights that have one."""
        gradients = ((index, self._weights[index].grad) for index in self._keep)
        self._zero((index, g) for index, g in gradients if g is not None)

    def zero_others(self, tensors: Sequence[Tensor]) -> None:
        """Zero tensors that belong to the weights, in their order."""
        self._zero((index, tensors[index]) for index in self._keep)

    def _zero(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        # Multi-tensor kernels take one device and one dtype.
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for index, tensor in tensors:
            kind = (tensor.device, tensor.dtype)
            key = (index, *kind, tensor.stride())
            factor = self._factors.get(key)
            if factor is None:
                factor = torch.empty_like(tensor, requires_grad=False).copy_(self._keep[index])
                self._factors[key] = factor
            into, by = groups.setdefault(kind, ([], []))
            into.append(tensor)
            by.append(factor)
        with torch.no_grad():
            for into, by in groups.values():
                torch._foreach_mul_(into, by)
