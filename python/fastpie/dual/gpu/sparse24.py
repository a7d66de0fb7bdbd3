"""The pruned model's layers on sparse tensor cores, two of four columns; see fastpie.ops.sparse24."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpie.dual.gpu.kernels import Candidate, Launcher, Operand, Run
from fastpie.dual.gpu.layers import GpuLayer
from fastpie.ops.packing import ACTIVATIONS
from fastpie.ops.sparse24 import Sparse24, pack_sparse24, sparse24_conv_cuda

__all__ = ["SparseTensorCores"]

_ROWS = (64, 128)  # filters of a tile: fewer spill less, more read the activations less often
_CHANNELS = 32  # a step of `mma.sp`
_DENSEST = 0.5  # above, there is more to spill than a step can save


class SparseTensorCores:
    """See Family; one masked model at a time."""

    def __init__(self, launch: Launcher = sparse24_conv_cuda) -> None:
        """With a stand-in for the kernel in a test."""
        self._launch = launch

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """See Family."""
        activation = layer.activation
        name = "none" if activation is None else activation.name
        if len(models) != 1 or not 0.0 < layer.density(models[0]) <= _DENSEST:
            return
        if layer.dtype not in (torch.bfloat16, torch.float16) or layer.rank == 1:
            return
        if layer.channels % _CHANNELS or layer.window[3] != 1:
            return
        if not layer.fusible or name not in ACTIVATIONS:
            return
        slope = 0.0 if activation is None else float(activation.slope)
        (model,) = models
        for rows in _ROWS:
            if rows == min(_ROWS) or layer.filters >= rows:
                yield Candidate(
                    f"sparse24 {rows}",
                    lambda rows=rows: self._prepare(layer, model, rows, (name, slope)),  # type: ignore[misc]
                )

    def _prepare(
        self, layer: GpuLayer, model: int, rows: int, activation: tuple[str, float]
    ) -> Run:
        packed = _packed(layer, model, rows)
        own = layer.of_model(model)
        stride, padding, dilation, _ = layer.window

        def run(inputs: Sequence[Tensor], residuals: Operand, outputs: Operand) -> list[Tensor]:
            given = outputs[0]
            result = layer.empty(len(inputs[0])) if given is None else given
            operands: list[Tensor | None] = [inputs[0], residuals[0], result]
            if layer.rank == 0:  # [..., C] as rows
                operands = [None if t is None else t.reshape(-1, t.shape[-1]) for t in operands]
            x, residual, y = operands
            self._launch(
                x, packed, own.scale, own.bias, residual, y, stride, padding, dilation,
                activation=activation,
            )  # fmt: skip
            return [result]

        return run


def _packed(layer: GpuLayer, model: int, rows: int) -> Sparse24:
    """The layer's weights, packed on the CPU, where they lie."""
    weight = layer.weight()
    keep = layer.states[model].keep[layer.step.weight].movedim(1, -1).contiguous()
    return pack_sparse24(weight.cpu(), keep.cpu(), rows=rows).to(weight.device)
