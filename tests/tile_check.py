"""Whether a tile of the Triton convolution computes the right thing, interpreted or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpie.dual.program import Activation, activate
from fastpie.ops import _native, reference

__all__ = ["activation_function", "check_config"]

# Largest error by dtype, of a value plus the standard deviation of all: the rounding of the result,
# doubled, and that of the sums. What a miscompiled tile gives is beyond all of them.
_TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-14}
_TF32_TOLERANCE = 2.0**-8


def activation_function(activation: tuple[str, float]) -> Callable[[Tensor], Tensor]:
    """An activation of the kernels as torch computes it."""
    name, slope = activation
    ends = None if name == "none" else Activation(name, slope)  # type: ignore[arg-type]
    return lambda y: activate(y, ends, lambda tensor: y)


def check_config(
    config: Any,
    inputs: Sequence[Tensor],
    weight: Tensor,
    masks: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    residuals: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: tuple[str, float] = ("none", 0.0),
    allow_tf32: bool = False,
    images: int = 2,
) -> str | None:
    """What is wrong with a tile for a layer, or None where its results are right.

    Computes `images` images of random numbers, twice, into outputs full of NaN, and compares with
    torch in fp64 and with each other. Waits for the device.

    Args:
        config: the tile.
        inputs: as for `masked_conv_nhwc`, which takes the same from here to `allow_tf32`; read are
            only their shapes, dtypes, devices and strides of batches, and which are None or the
            same tensor. Nothing is written.
        weight: likewise.
        masks: likewise.
        scales: likewise.
        biases: likewise.
        residuals: likewise.
        outputs: likewise.
        stride: the layer's.
        padding: the layer's.
        dilation: the layer's.
        groups: the layer's.
        activation: the layer's.
        allow_tf32: the layer's.
        images: how many, at most as many as `inputs` has.
    """
    generator = torch.Generator(weight.device).manual_seed(0)

    def random(like: Tensor, batch: bool) -> Tensor:
        shape = [min(images, like.shape[0]), *like.shape[1:]] if batch else like.shape
        if batch and stride:  # channels-last
            shape = [shape[0], *shape[2:], shape[1]]
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device=like.device)
        x = x.to(like.dtype)
        return x.movedim(-1, 1) if batch and stride else x

    def words(like: Tensor) -> Tensor:
        shape = like.shape
        return torch.randint(
            -(2**31), 2**31, shape, generator=generator, dtype=torch.int32, device=like.device
        )

    new_inputs = [random(inputs[0], batch=True)]
    if len(inputs) == 2:
        new_inputs.append(
            new_inputs[0] if inputs[1] is inputs[0] else random(inputs[1], batch=True)
        )
    new_weight = random(weight, batch=False) / weight[0].numel() ** 0.5
    new_masks = [None if m is None else words(m) for m in masks]
    new_scales = [None if s is None else random(s, batch=False) for s in scales]
    new_biases = [None if b is None else random(b, batch=False) for b in biases]
    new_residuals = [None if r is None else random(r, batch=True) for r in residuals]
    window = (stride, padding, dilation, groups)

    def double(tensors: Sequence[Tensor | None]) -> list[Any]:
        return [None if t is None else t.double() for t in tensors]

    expected = reference.masked_conv_nhwc(
        double(new_inputs), new_weight.double(), new_masks, double(new_scales),
        double(new_biases), double(new_residuals), *window, activation_function(activation),
    )  # fmt: skip
    results = []
    for _ in range(2):
        new_outputs = [random(o, batch=True).fill_(torch.nan) for o in outputs]
        _native.triton_kernels().masked_conv_nhwc(
            new_inputs,
            new_weight,
            new_masks,
            new_scales,
            new_biases,
            new_residuals,
            new_outputs,
            *window,
            activation,
            config,
            allow_tf32,
        )
        results.append(new_outputs)
    tolerance = _TF32_TOLERANCE if allow_tf32 else 0.0
    tolerance = max(tolerance, _TOLERANCE[weight.dtype])
    for model, (once, twice, right) in enumerate(zip(*results, expected, strict=True)):
        error = (once.double() - right).abs() / (right.abs() + right.std())
        worst = float(error.max()) if bool(error.isfinite().all()) else float("nan")
        if not worst <= tolerance:
            return f"{config} is off by {worst:.3g} in model {model}, more than {tolerance:.3g}."
        if not torch.equal(once, twice):
            return f"{config} gives other bits the second time in model {model}."
    return None
