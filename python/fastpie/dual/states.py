"""The tensors of each model of a dual forward, where two models are the same, and BatchNorm folded.

Model 0 is the dense one, model 1 + l the pruned one at level l.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastpie.dual.program import Convolution, Linear, Norm, Program, Value

__all__ = [
    "FoldedWeights",
    "ModelState",
    "Models",
    "fold",
    "norm_scale_shift",
    "owners",
    "states_of",
]


class Models(Protocol):
    """What is read of a `DualModel`: the dense model, and what its pruned selves differ in."""

    model: nn.Module

    @property
    def sparsities(self) -> list[float]:
        """Of each level."""

    def levels(self) -> Iterable[tuple[str, Tensor]]:
        """Level codes by parameter name."""

    def statistics(self, level: int) -> dict[str, Tensor]:
        """Normalisation buffers of one level."""


@dataclass(frozen=True)
class ModelState:
    """What one model computes with.

    Attributes:
        tensors: parameters, buffers and constants by name, weights as stored (not masked).
        keep: masks of the weights from which something is removed.
    """

    tensors: Mapping[str, Tensor]
    keep: Mapping[str, Tensor]

    def lookup(self, name: str) -> Tensor:
        """The tensor that the model computes with: masked where it has a mask."""
        tensor = self.tensors[name]
        return tensor * self.keep[name] if name in self.keep else tensor

    def same(self, other: ModelState, names: Sequence[str]) -> bool:
        """Whether both models compute with the same values of these tensors."""
        for name in names:
            mine, theirs = self.keep.get(name), other.keep.get(name)
            if (mine is None) != (theirs is None):
                return False
            if mine is not None and theirs is not None and not torch.equal(mine, theirs):
                return False
            a, b = self.tensors[name], other.tensors[name]
            if a is not b and not torch.equal(a, b):
                return False
        return True


def states_of(dual: Models, program: Program) -> list[ModelState]:
    """One state for the dense model and one for each level, sharing what they have in common.

    The tensors are copies: later changes of the model do not show in them.
    """
    copies: dict[int, Tensor] = {}  # by the tensor's id: one copy of what several modules share

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        return copies[id(tensor)]

    tensors = {str(name): copied(tensor) for name, tensor in program.constants.items()}
    for name, tensor in (
        *dual.model.named_parameters(remove_duplicate=False),
        *dual.model.named_buffers(remove_duplicate=False),
    ):
        tensors[name] = copied(tensor)
    states = [ModelState(tensors, {})]
    for level in range(len(dual.sparsities)):
        keep = {name: codes > level for name, codes in dual.levels()}
        keep = {name: mask for name, mask in keep.items() if not mask.all()}
        own = {name: copied(tensor) for name, tensor in dual.statistics(level).items()}
        states.append(ModelState({**tensors, **own}, keep))
    return states


def owners(program: Program, states: Sequence[ModelState]) -> dict[Value, list[int]]:
    """For each value and model the first model that has the same value.

    Two models have the same result of a step if they have the same inputs and the same tensors:
    all that lies before the first masked layer, and everything under an all-ones mask.
    """
    first = {value: [0] * len(states) for value in program.inputs}
    for step in program.steps:
        inputs, names = step.values(), step.tensors()
        result: list[int] = []
        for model, state in enumerate(states):
            twin = next(
                (
                    earlier
                    for earlier in range(model)
                    if result[earlier] == earlier
                    and all(first[v][earlier] == first[v][model] for v in inputs)
                    and states[earlier].same(state, names)
                ),
                model,
            )
            result.append(twin)
        first[step.result] = result
    return first


@dataclass(frozen=True)
class FoldedWeights:
    """Weights of a convolution or linear layer with its BatchNorm folded in.

    The layer computes with weight * keep * scale, row by row, and bias.

    Attributes:
        weight: as stored, fp32 contiguous.
        keep: bool, or None where all weights are kept.
        scale: fp32 [rows], or None.
        bias: fp32 [rows], or None.
    """

    weight: Tensor
    keep: Tensor | None
    scale: Tensor | None
    bias: Tensor | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The product weight * keep * scale."""
        weight = self.weight
        if self.keep is not None:
            weight = weight * self.keep
        if self.scale is not None:
            weight = weight * self.scale.view(-1, *(1,) * (weight.ndim - 1))
        return weight.to(dtype)

    def density(self) -> float:
        """Fraction of the weights that is kept."""
        if self.keep is None or self.keep.numel() == 0:
            return 1.0
        return self.keep.sum().item() / self.keep.numel()


def fold(step: Convolution | Linear, state: ModelState) -> FoldedWeights:
    """Weights of a step in one model, BatchNorm folded: gamma / sqrt(var + eps), in fp64."""
    scale = None
    bias = None if step.bias is None else state.lookup(step.bias).float()
    if step.norm is not None:
        factor, shift = norm_scale_shift(step.norm, state)
        if bias is not None:
            shift = shift + bias.double() * factor
        scale, bias = factor.float(), shift.float()
    keep = state.keep.get(step.weight)
    return FoldedWeights(
        state.tensors[step.weight].float().contiguous(),
        None if keep is None else keep.contiguous(),
        scale,
        None if bias is None else bias.contiguous(),
    )


def norm_scale_shift(norm: Norm, state: ModelState) -> tuple[Tensor, Tensor]:
    """BatchNorm as x * scale + shift, both fp64 [channels]."""
    var = state.lookup(norm.var).double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * state.lookup(norm.weight).double()
    shift = -state.lookup(norm.mean).double() * scale
    if norm.bias is not None:
        shift = shift + state.lookup(norm.bias).double()
    return scale, shift
