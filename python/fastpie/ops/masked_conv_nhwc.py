"""The CUDA kernel of masked convolution on channels-last tensors, of one model or of two.

No operator: the engine calls it on buffers of its own. The twin is `reference.masked_conv_nhwc`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native
from fastpie.ops.packing import ACTIVATIONS

__all__ = ["ACTIVATIONS", "masked_conv_nhwc_cuda", "tiles"]

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def tiles() -> list[str]:
    """What each `tile` of `masked_conv_nhwc_cuda` is on the current device, in words."""
    return [
        f"{filters}x{pixels}x{depth}, {warps} warps, {stages} stages"
        for filters, pixels, depth, warps, stages, *_ in _C.masked_conv_nhwc_tiles()
    ]


def masked_conv_nhwc_cuda(
    inputs: Sequence[Tensor],  # of each model [N, groups * C, *spatial]
    weight: Tensor,  # [K, *kernel, C]
    masks: Sequence[Tensor | None],  # int32 [K, taps, words], see reference.pack_mask
    scales: Sequence[Tensor | None],  # fp32 [K]
    biases: Sequence[Tensor | None],  # fp32 [K]
    residuals: Sequence[Tensor | None],  # as the outputs
    outputs: Sequence[Tensor],  # of each model [N, K, *output spatial]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: tuple[str, float] = ("none", 0.0),
    tile: int = 0,
) -> None:
    """Enqueue one layer of one or two models on the current stream; nothing waits for the device.

    Equivalent to::

        results = fastpie.ops.reference.masked_conv_nhwc(
            inputs, weight, masks, scales, biases, residuals, stride, padding, dilation, groups,
            activate,
        )
        for output, result in zip(outputs, results):
            output.copy_(result)

    with fp32 sums. Every list has one entry for each model. Activations have torch's order of
    dimensions and lie channels-last: in memory [N, *spatial, channels], dense ([N, C] for a linear
    layer). `weight` and masks are contiguous. Where both models get the same input, give the same
    tensor twice: it is then read once.

    Args:
        inputs: of each model, bf16 or fp16.
        weight: of both models, of the same type as all activations.
        masks: bits of the kept weights, or None: all are kept.
        scales: of each filter (a folded BatchNorm), or None: 1.
        biases: of each filter, or None: 0.
        residuals: added before the activation, or None.
        outputs: written in full; they overlap nothing else.
        stride: of each spatial dimension.
        padding: before the image. What lies behind it follows from the sizes of the outputs, so
            that uneven padding is possible.
        dilation: of each spatial dimension.
        groups: of channels and filters.
        activation: a name of `fastpie.ops.packing.ACTIVATIONS`, and the slope of leaky_relu.
        tile: index into the `tiles()` of the tensors' device; each computes any layer.

    Raises:
        FastpieError: where tensors do not fit together, or the kernel cannot be used here.
    """
    sizes, counts = _check(
        inputs, weight, masks, scales, biases, residuals, outputs, stride, padding, dilation, groups
    )
    name, slope = activation
    if name not in ACTIVATIONS:
        raise FastpieError(
            f"Expected `activation` to be one of {sorted(ACTIVATIONS)}, but got {name!r}."
        )
    columns = zip(inputs, masks, scales, biases, residuals, outputs, strict=True)
    models = [tuple(0 if t is None else t.data_ptr() for t in model) for model in columns]
    on_gpu = weight.device.type == "cuda"
    with torch.cuda.device(weight.device) if on_gpu else contextlib.nullcontext():
        if not 0 <= tile < (count := len(_C.masked_conv_nhwc_tiles())):
            raise FastpieError(f"Expected `tile` to be from 0 to {count - 1}, but got {tile!r}.")
        _native.call(
            _C.masked_conv_nhwc_cuda,
            models,
            weight.data_ptr(),
            counts,
            sizes,
            _DTYPES[weight.dtype],
            ACTIVATIONS[name],
            slope,
            tile,
            _native.cuda_stream(weight) if on_gpu else 0,
        )


def _check(
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
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, int, int, int]]:
    """What the binding takes: sizes in three dimensions, and (images, channels, filters, groups)."""
    _check_device(weight)
    count = len(inputs)
    lists = {"masks": masks, "scales": scales, "biases": biases, "residuals": residuals}
    if count not in (1, 2) or any(len(v) != count for v in (*lists.values(), outputs)):
        lengths = {k: len(v) for k, v in {"inputs": inputs, **lists, "outputs": outputs}.items()}
        raise FastpieError(f"Expected one entry for each of 1 or 2 models, but got {lengths}.")
    rank = weight.ndim - 2
    if not 0 <= rank <= 3 or any(len(v) != rank for v in (stride, padding, dilation)):
        raise FastpieError(
            "Expected `weight` to be [K, *kernel, C] with at most three dimensions of the kernel, "
            f"and as many strides, paddings and dilations, but got {list(weight.shape)}, "
            f"{list(stride)}, {list(padding)} and {list(dilation)}."
        )
    if weight.dtype not in _DTYPES:
        raise FastpieError(f"Expected bfloat16 or float16, but got {weight.dtype}.")
    filters, channels = weight.shape[0], weight.shape[-1]
    kernel = weight.shape[1:-1]
    if min(stride, default=1) < 1 or min(dilation, default=1) < 1 or min(padding, default=0) < 0:
        raise FastpieError(
            "Expected strides and dilations of at least 1 and no negative padding, but got "
            f"{list(stride)}, {list(dilation)} and {list(padding)}."
        )
    if groups < 1 or filters % groups or channels < 1:
        raise FastpieError(
            f"Expected `groups` to divide the {filters} filters, and channels, but got {groups} "
            f"groups and {channels} channels."
        )
    images, input_size = inputs[0].shape[0], inputs[0].shape[2:]
    output_size = outputs[0].shape[2:]
    _check_tensor("weight", weight, weight.shape, weight.dtype, weight)
    taps, words = math.prod(kernel), -(-channels // 32)
    for m in range(count):
        of_input = (images, groups * channels, *input_size)
        of_output = (images, filters, *output_size)
        half = weight.dtype
        for name, tensor, shape, dtype in (
            ("inputs", inputs[m], of_input, half),
            ("outputs", outputs[m], of_output, half),
            ("residuals", residuals[m], of_output, half),
            ("masks", masks[m], (filters, taps, words), torch.int32),
            ("scales", scales[m], (filters,), torch.float32),
            ("biases", biases[m], (filters,), torch.float32),
        ):
            if tensor is not None:
                if len(shape) != rank + 2 and dtype is half:
                    raise FastpieError(
                        f"Expected `{name}[{m}]` to have {rank + 2} dimensions, but got "
                        f"{list(tensor.shape)}."
                    )
                _check_tensor(f"{name}[{m}]", tensor, shape, dtype, weight)
    in_three = [
        (*[1] * (3 - rank), *values)
        for values in (input_size, output_size, kernel, stride, padding, dilation)
    ]
    in_three[4] = (*[0] * (3 - rank), *padding)
    return tuple(in_three), (images, channels, filters, groups)


def _check_device(weight: Tensor) -> None:
    if weight.device.type == "cuda":
        reason = _native.cuda_unusable_reason()
    elif weight.device.type == "cpu" and _C.cuda_emulated:
        reason = None  # in tests
    else:
        reason = f"the tensors are on {weight.device}"
    if reason is not None:
        raise FastpieError(f"Expected a GPU that the CUDA kernels run on, but {reason}.")


def _check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, like: Tensor
) -> None:
    if tensor.dtype is not dtype or tensor.device != like.device or tensor.shape != tuple(shape):
        raise FastpieError(
            f"Expected `{name}` to be {dtype} {list(shape)} on {like.device}, but got "
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}."
        )
    activations = name.startswith(("inputs", "outputs", "residuals"))
    if not (tensor.movedim(1, -1) if activations else tensor).is_contiguous():
        wanted = "channels-last in memory" if activations else "contiguous"
        raise FastpieError(
            f"Expected `{name}` to be {wanted}, but got {list(tensor.shape)} with strides "
            f"{tensor.stride()}."
        )
