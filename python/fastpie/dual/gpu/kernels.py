"""Families of kernels that can compute a layer on a GPU, for one model or for two at once.

A family offers candidates; the planner checks each against `Torch`, times it and takes the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpie.dual.gpu.layers import GpuLayer
from fastpie.dual.program import Value
from fastpie.dual.states import fold
from fastpie.dual.tensor_steps import channels_last, tensor_step

__all__ = ["Candidate", "ChannelsLast", "Cudnn", "Family", "Run", "Torch"]


Operand = Sequence[Tensor | None]
Run = Callable[[Sequence[Tensor], Operand, Operand], list[Tensor]]
"""(inputs, residuals, outputs), one of each for each model; gives the results.

Inputs and residuals are channels-last. An output that is not None is a channels-last tensor that the
result may be written to; who calls looks whether it was.
"""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a layer for some models together.

    Attributes:
        name: of the kernel, for plans and reports.
        prepare: makes what the kernel needs, and gives the call.
    """

    name: str
    prepare: Callable[[], Run]


class Family(Protocol):
    """A source of candidates."""

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """The family's ways to compute a layer for one model or for two together."""


class Torch:
    """torch's own operators: cuDNN and cuBLAS, then residual and activation one by one."""

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """See Family."""
        if len(models) != 1:
            return
        (model,) = models

        def prepare() -> Run:
            step = layer.step
            _, compute = tensor_step(step, layer.states[model], dtype=layer.dtype, prepack=False)

            def run(inputs: Sequence[Tensor], residuals: Operand, outputs: Operand) -> list[Tensor]:
                values: dict[Value, Any] = {step.input: inputs[0]}
                if step.residual is not None:
                    values[step.residual] = residuals[0]
                return [compute(values)]

            return run

        yield Candidate("torch", prepare)


class Cudnn:
    """cuDNN's fused convolution, bias, residual and ReLU, as torch's operators offer it."""

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """See Family."""
        step, activation = layer.step, layer.activation
        if len(models) != 1 or layer.rank not in (2, 3) or step.padding_behind is not None:  # type: ignore[union-attr]
            return
        if activation is None or activation.name != "relu":
            return
        (model,) = models

        def prepare() -> Run:
            folded = fold(step, layer.states[model])
            weight = channels_last(folded.dense(layer.dtype))
            bias = None if folded.bias is None else folded.bias.to(layer.dtype)

            def run(inputs: Sequence[Tensor], residuals: Operand, outputs: Operand) -> list[Tensor]:
                x = inputs[0]
                if residuals[0] is None:
                    return [torch.cudnn_convolution_relu(x, weight, bias, *layer.window)]
                operands = (x, weight, residuals[0], 1.0, bias)
                return [torch.cudnn_convolution_add_relu(*operands, *layer.window)]

            return run

        yield Candidate("cudnn fused", prepare)


Launcher = Callable[..., None]
"""As `fastpie.triton_kernels.masked_conv_nhwc`: (inputs, weight, masks, scales, biases, residuals,
outputs, stride, padding, dilation, groups, activation=(name, slope), **config)."""


@dataclass(frozen=True)
class ChannelsLast:
    """Kernels with the contract of csrc/include/fastpie/masked_conv_nhwc.h.

    The only ones that compute a layer of two models in one launch, and that hold the weights once.

    Attributes:
        name: "triton" or "cuda".
        launch: see Launcher.
        configs: name and keywords of each configuration that suits a layer.
        dtypes: that it computes in.
        activations: that its epilogue knows.
    """

    name: str
    launch: Launcher
    configs: Callable[[GpuLayer, int], Sequence[tuple[str, dict[str, Any]]]]
    dtypes: frozenset[torch.dtype]
    activations: frozenset[str]

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """See Family."""
        activation = layer.activation
        name = "none" if activation is None else activation.name
        if layer.dtype not in self.dtypes or not layer.fusible or name not in self.activations:
            return
        if layer.rank == 1:  # torch has no channels-last format of one dimension
            return
        if not layer.shares_weights(models):
            return
        slope = 0.0 if activation is None else float(activation.slope)
        for label, config in self.configs(layer, len(models)):

            def prepare(config: dict[str, Any] = config) -> Run:
                return self._prepare(layer, models, (name, slope), config)

            yield Candidate(f"{self.name} {label}", prepare)

    def _prepare(
        self,
        layer: GpuLayer,
        models: Sequence[int],
        activation: tuple[str, float],
        config: dict[str, Any],
    ) -> Run:
        weight = layer.weight()
        own = [layer.of_model(m) for m in models]
        masks, scales = [m.mask for m in own], [m.scale for m in own]
        biases = [m.bias for m in own]
        linear = layer.rank == 0

        def run(inputs: Sequence[Tensor], residuals: Operand, outputs: Operand) -> list[Tensor]:
            results = [
                layer.empty(len(x)) if output is None else output
                for x, output in zip(inputs, outputs, strict=True)
            ]
            operands = (inputs, residuals, results)
            if linear:  # [..., C] as rows
                operands = tuple([_rows(t) for t in group] for group in operands)  # type: ignore[assignment]
            x, residual, result = operands
            self.launch(
                x, weight, masks, scales, biases, residual, result, *layer.window,
                activation=activation, **config,
            )  # fmt: skip
            return results

        return run


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])
