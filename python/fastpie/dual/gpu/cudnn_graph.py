"""Convolutions through cuDNN's graph API: bias, residual and any activation in one kernel.

Of the extra `fastpie[cudnn]` (nvidia-cudnn-frontend). torch's own operators reach only the fusions
with ReLU, and inductor computes bias and activation in a kernel of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.gpu.kernels import Candidate, Operand, Run
from fastpie.dual.gpu.layers import GpuLayer
from fastpie.dual.program import Convolution
from fastpie.dual.states import fold
from fastpie.dual.tensor_steps import channels_last

__all__ = ["CudnnGraph", "unusable_reason"]

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}


def unusable_reason() -> str | None:
    """Why cuDNN's graph API cannot be used here, or None where it can."""
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed (pip install 'fastpie[cudnn]')"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no CUDA device"
    return None


@dataclass(frozen=True)
class _Graph:
    """A built graph and its tensors."""

    graph: Any
    image: Any
    weight: Any
    bias: Any
    residual: Any
    result: Any


class CudnnGraph:
    """See Family; one model at a time."""

    def __init__(self) -> None:
        """Load the library; a handle is made with the first kernel."""
        self._cudnn = importlib.import_module("cudnn")
        self._handle: Any = None

    def candidates(self, layer: GpuLayer, models: Sequence[int]) -> Iterator[Candidate]:
        """See Family."""
        step = layer.step
        if len(models) != 1 or layer.rank not in (2, 3) or layer.dtype not in _DTYPES:
            return
        if not layer.fusible or not isinstance(step, Convolution):
            return
        name = None if layer.activation is None else layer.activation.name
        if name == "hardswish":  # no such node
            return
        (model,) = models
        yield Candidate("cudnn graph", lambda: self._prepare(layer, step, model))

    def _prepare(self, layer: GpuLayer, step: Convolution, model: int) -> Run:
        folded = fold(step, layer.states[model])
        weight = channels_last(folded.dense(layer.dtype))
        bias = folded.bias
        if bias is not None:  # fp32, as the sums are
            bias = bias.view(1, -1, *(1,) * layer.rank).contiguous()
        if self._handle is None:
            self._handle = self._cudnn.create_handle()
        built: dict[int, tuple[_Graph, Tensor]] = {}

        def run(inputs: Sequence[Tensor], residuals: Operand, outputs: Operand) -> list[Tensor]:
            x, residual = inputs[0], residuals[0]
            images = len(x)
            if images not in built:  # of micro-batches there may be a smaller last one
                made = self.graph(layer, images, with_bias=bias is not None, handle=self._handle)
                made.graph.build([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
                size = max(1, made.graph.get_workspace_size())
                built[images] = (made, torch.empty(size, dtype=torch.uint8, device=x.device))
            made, workspace = built[images]
            result = outputs[0] if outputs[0] is not None else layer.empty(images)
            tensors = {made.image: x, made.weight: weight, made.result: result}
            if bias is not None:
                tensors[made.bias] = bias
            if residual is not None:
                tensors[made.residual] = residual
            stream = torch.cuda.current_stream(x.device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
            made.graph.execute(tensors, workspace, handle=self._handle)
            return [result]

        return run

    def graph(self, layer: GpuLayer, images: int, *, with_bias: bool, handle: Any = None) -> _Graph:
        """The layer as a graph of cuDNN, not built yet."""
        cudnn, step = self._cudnn, layer.step
        assert isinstance(step, Convolution)
        io = getattr(cudnn.data_type, _DTYPES[layer.dtype])
        graph = cudnn.pygraph(
            io_data_type=io,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )

        def tensor(name: str, shape: Sequence[int], dtype: Any = io) -> Any:
            strides = _channels_last_strides(shape)
            return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=dtype)

        taps = layer.states[0].tensors[step.weight].shape
        image = tensor("image", (images, *layer.input_size))
        weight = tensor("weight", tuple(taps))
        y = graph.conv_fprop(
            image=image,
            weight=weight,
            pre_padding=list(step.padding),
            post_padding=list(step.padding_behind or step.padding),
            stride=list(step.stride),
            dilation=list(step.dilation),
            compute_data_type=cudnn.data_type.FLOAT,
        )
        bias = residual = None
        if with_bias:
            bias = tensor("bias", (1, layer.filters, *(1,) * layer.rank), cudnn.data_type.FLOAT)
            y = graph.bias(input=y, bias=bias)
        if step.residual is not None:
            residual = tensor("residual", (images, *layer.output_size))
            y = graph.add(a=y, b=residual)
        y = self._activated(graph, y, layer)
        y.set_output(True).set_data_type(io)
        y.set_dim([images, *layer.output_size])
        y.set_stride(_channels_last_strides((images, *layer.output_size)))
        return _Graph(graph, image, weight, bias, residual, y)

    def _activated(self, graph: Any, y: Any, layer: GpuLayer) -> Any:
        activation = layer.activation
        if activation is None:
            return y
        if activation.name == "relu6":
            return graph.relu(input=y, lower_clip=0.0, upper_clip=6.0)
        if activation.name == "leaky_relu":
            return graph.relu(input=y, negative_slope=float(activation.slope))
        node = {"relu": "relu", "silu": "swish", "gelu": "gelu", "gelu_tanh": "gelu_approx_tanh"}
        return getattr(graph, node[activation.name])(input=y)


def _channels_last_strides(shape: Sequence[int]) -> list[int]:
    """Strides of [N, C, *spatial] with channels innermost."""
    _, channels, *spatial = shape
    strides = [channels * math.prod(spatial[d + 1 :]) for d in range(len(spatial))]
    return [channels * math.prod(spatial), 1, *strides]
