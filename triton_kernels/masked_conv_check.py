"""Whether a tile of the masked convolution computes the right thing on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .masked_conv import TileConfig, masked_conv_nhwc
from .masked_conv_parts import ACTIVATIONS

__all__ = ["activation_function", "check_config"]

# Largest error by dtype, of a value plus the standard deviation of all: the rounding of the result,
# doubled, and that of the sums. What a miscompiled tile gives is beyond all of them.
_TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2.0**-14}
_TF32_TOLERANCE = 2.0**-8


def activation_function(activation: tuple[str, float]) -> Callable[[Tensor], Tensor]:
    """An activation of the kernels as torch computes it."""
    name, slope = activation
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "relu": torch.relu,
        "relu6": functional.relu6,
        "leaky_relu": lambda x: functional.leaky_relu(x, slope),
        "hardswish": functional.hardswish,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    assert set(functions) == set(ACTIVATIONS)
    return functions[name]


def _expected(
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    activation: tuple[str, float],
) -> Tensor:
    """The layer of one model in plain torch, fp64."""
    rank, channels = len(window[0]), weight.shape[-1]
    kept = weight.double()
    if words is not None:
        bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
        kept = kept * bits.flatten(2)[..., :channels].reshape(kept.shape)
    if rank:
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        y = convolve(x.double(), kept.movedim(-1, 1), None, *window)
    else:
        y = functional.linear(x.double(), kept)
    shape = (-1, *(1,) * rank)
    y = y if scale is None else y * scale.view(shape)
    y = y if bias is None else y + bias.view(shape)
    y = y if residual is None else y + residual
    return activation_function(activation)(y)


def check_config(
    config: TileConfig,
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

    operands = (new_inputs, new_masks, new_scales, new_biases, new_residuals)
    expected = [
        _expected(x, new_weight, words, scale, bias, residual, window, activation)
        for x, words, scale, bias, residual in zip(*operands, strict=True)
    ]
    results = []
    for _ in range(2):
        new_outputs = [random(o, batch=True).fill_(torch.nan) for o in outputs]
        masked_conv_nhwc(
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
