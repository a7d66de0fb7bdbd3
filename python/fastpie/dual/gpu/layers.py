"""One convolution or linear layer of all models, as the kernels on channels-last tensors want it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpie import ops
from fastpie.dual.program import Activation, Convolution, Linear, Program, TensorName
from fastpie.dual.states import ModelState, fold
from fastpie.dual.tensor_steps import known_slope

__all__ = ["GpuLayer"]

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class _OfModel:
    """What one model adds to the weights that all share; see masked_conv_nhwc.h."""

    mask: Tensor | None  # int32 [K, taps, words]
    scale: Tensor | None  # fp32 [K]
    bias: Tensor | None  # fp32 [K]


class GpuLayer:
    """The step and its tensors, made when a kernel asks for them and then kept.

    Attributes:
        step: a convolution or a linear layer.
        dtype: computed in.
        states: of all models.
        input_size: [C, *spatial] of one image; for a linear layer [..., C] of one image.
        output_size: likewise, of the result.
        window: stride, padding, dilation (empty for a linear layer) and groups.
        activation: with a slope that is a number, or None.
        fusible: whether the kernels' epilogue can end the step.
    """

    def __init__(
        self,
        program: Program,
        step: Convolution | Linear,
        states: Sequence[ModelState],
        dtype: torch.dtype,
    ) -> None:
        """See the class."""
        self.step, self.states, self.dtype = step, states, dtype
        self.input_size = tuple(int(n or 0) for n in program.meta[step.input].shape[1:])
        self.output_size = tuple(int(n or 0) for n in program.meta[step.result].shape[1:])
        self.window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] = ((), (), (), 1)
        if isinstance(step, Convolution):
            self.window = (step.stride, step.padding, step.dilation, step.groups)
        self.activation: Activation | None = known_slope(step.activation, states[0])
        slope = None if self.activation is None else self.activation.slope
        self.fusible = not isinstance(slope, TensorName)
        self._weight: Tensor | None = None
        self._of_model: dict[int, _OfModel] = {}

    @property
    def rank(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        return len(self.window[0])

    @property
    def filters(self) -> int:
        """Output channels of all groups."""
        return int(self.states[0].tensors[self.step.weight].shape[0])

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return int(self.states[0].tensors[self.step.weight].shape[1])

    def shares_weights(self, models: Sequence[int]) -> bool:
        """Whether these models differ in masks alone; the copies of a committee do not."""
        weight = self.states[0].tensors[self.step.weight]
        return all(self.states[model].tensors[self.step.weight] is weight for model in models)

    def weight(self) -> Tensor:
        """The weights of all models, not masked: [K, *kernel, C] in `dtype`."""
        if self._weight is None:
            weight = self.states[0].tensors[self.step.weight].to(self.dtype)
            self._weight = weight.movedim(1, -1).contiguous()
        return self._weight

    def of_model(self, model: int) -> _OfModel:
        """Mask, scale and bias of one model."""
        if model not in self._of_model:
            folded = fold(self.step, self.states[model])
            self._of_model[model] = _OfModel(
                None if folded.keep is None else ops.pack_mask(folded.keep),
                folded.scale,
                folded.bias,
            )
        return self._of_model[model]

    def density(self, model: int) -> float:
        """Fraction of the weights that a model keeps."""
        keep = self.states[model].keep.get(self.step.weight)
        return 1.0 if keep is None else keep.sum().item() / max(1, keep.numel())

    def empty(self, images: int) -> Tensor:
        """Memory for the result of some images, channels innermost."""
        return torch.empty(
            (images, *self.output_size),
            dtype=self.dtype,
            device=self.states[0].tensors[self.step.weight].device,
            memory_format=_FORMATS.get(self.rank, torch.contiguous_format),
        )

    def laid_out(self, x: Tensor) -> Tensor:
        """The same with channels innermost, as every kernel wants it; a copy only if it is not."""
        return x.contiguous(memory_format=_FORMATS.get(self.rank, torch.contiguous_format))

    def work(self) -> tuple[int, int]:
        """Multiply-adds for one image of a dense model, and bytes of its input and output."""
        outputs = math.prod(self.output_size)
        taps = self.states[0].tensors[self.step.weight][0].numel()
        read = math.prod(self.input_size) + (outputs if self.step.residual else 0)
        return outputs * taps, (read + outputs) * self.dtype.itemsize
