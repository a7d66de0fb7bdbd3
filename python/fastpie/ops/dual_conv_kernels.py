"""The operators behind `dual_conv`, on Triton kernels; imported on first use, as Triton is slow.

Three operators, each linear in two operands: the convolutions of both models, the gradients of
their inputs and the gradient of the weight that they share. The derivatives of each are the other
two, so that any order of derivative exists. The number of strides is the number of spatial
dimensions; without any it is a linear layer. `pruned` is None where both models have one input.

`torch.library.triton_op` lets torch.compile look into them: they consist of torch's operators and
of kernels alone. What no kernel serves (another device, another dtype, groups of few channels
backwards) is computed by torch, here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fastpie.ops import _native, masked_conv

__all__ = ["dual_conv", "dual_conv_input_gradient", "dual_conv_weight_gradient", "is_served"]

triton_kernels: Any = _native.triton_kernels()

_LEAST_CHANNELS = 16  # of a group, for the gradients' kernels: below, most of a tile is padding
_LONGEST_KERNEL = 62  # sizes of a kernel, added up: a bit for each in a word of 64


def is_served(dense: Tensor, weight: Tensor) -> bool:
    """Whether kernels compute a layer of tensors of one dtype."""
    return (
        dense.device.type == "cuda"
        and dense.dtype in (torch.bfloat16, torch.float16)
        and min(*dense.shape, *weight.shape) > 0
        and sum(weight.shape[2:]) <= _LONGEST_KERNEL
    )


def _gradients_are_served(gradient: Tensor, size: list[int], mask: Tensor, groups: int) -> bool:
    smallest = min(mask.shape[1], mask.shape[0] // groups)
    return is_served(gradient, mask) and min(size) > 0 and smallest >= _LEAST_CHANNELS


def _channels_last(x: Tensor, rank: int) -> Tensor:
    """The same values, the channels beside each other; [rows, C] of a linear layer's [..., C]."""
    if rank == 0:
        return x.reshape(-1, x.shape[-1]).contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _new(like: Tensor, shape: list[int], rank: int) -> Tensor:
    """An empty tensor in the layout of the kernels."""
    if rank == 0:
        return like.new_empty(shape)
    return like.new_empty([shape[0], *shape[2:], shape[1]]).movedim(-1, 1)


def _pair(dense: Tensor, pruned: Tensor | None, rank: int) -> list[Tensor]:
    first = _channels_last(dense, rank)
    return [first, first if pruned is None else _channels_last(pruned, rank)]


# ---------------------------------------------------------------------------- the convolutions


@triton_op("fastpie::dual_conv", mutates_args=())
def dual_conv(
    dense: Tensor,
    pruned: Tensor | None,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Both models' results; on kernels in channels-last memory."""
    window = (stride, padding, dilation, groups)
    if not is_served(dense, weight):
        other = dense if pruned is None else pruned
        return (
            masked_conv._dense(dense, weight, bias, *window),
            masked_conv._dense(other, weight * mask, bias, *window),
        )
    rank = len(stride)
    if rank:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                dense.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        shape = [dense.shape[0], weight.shape[0], *size]
    else:
        shape = [*dense.shape[:-1], weight.shape[0]]
    outputs = [_new(dense, shape, rank) for _ in range(2)]
    sums = None if bias is None else bias.float()
    triton_kernels.masked_conv_nhwc(
        _pair(dense, pruned, rank),
        weight.movedim(1, -1).contiguous() if rank else weight.contiguous(),
        [None, triton_kernels.pack_mask(mask, wrap_triton)],
        [None, None],
        [sums, sums],
        [None, None],
        outputs if rank else [y.view(-1, y.shape[-1]) for y in outputs],
        *window,
        wrap=wrap_triton,
    )
    return outputs[0], outputs[1]


def _keep_for_dual_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dense, pruned, weight, mask, _, *ctx.window = inputs
    ctx.save_for_backward(dense, pruned, weight, mask)


def _dual_conv_backward(ctx: Any, of_dense: Tensor, of_pruned: Tensor) -> tuple[Any, ...]:
    dense, pruned, weight, mask = ctx.saved_tensors
    gradients = (of_dense, of_pruned)
    wanted = ctx.needs_input_grad
    inputs = [None, None]
    of_weight = of_bias = None
    if wanted[0] or wanted[1]:
        inputs = _of_inputs(gradients, weight, mask, dense, pruned, ctx.window)
    if wanted[2]:
        of_weight = dual_conv_weight_gradient(*gradients, dense, pruned, mask, *ctx.window)
    if wanted[4]:
        total = of_dense + of_pruned
        of_bias = total.sum(
            [d for d in range(total.ndim) if d != (1 if ctx.window[0] else total.ndim - 1)]
        )
    return *inputs, of_weight, None, of_bias, None, None, None, None


def _of_inputs(
    gradients: Any, weight: Tensor, mask: Tensor, dense: Tensor, pruned: Tensor | None, window: Any
) -> list[Any]:
    """Gradients of `dense` and `pruned`; that of an input of both models is their sum."""
    both = dual_conv_input_gradient(*gradients, weight, mask, list(dense.shape), *window)
    return [both[0] + both[1], None] if pruned is None else list(both)


# ---------------------------------------------------------------------------- gradient of the inputs


@triton_op("fastpie::dual_conv_input_gradient", mutates_args=())
def dual_conv_input_gradient(
    of_dense: Tensor,
    of_pruned: Tensor,
    weight: Tensor,
    mask: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of both models' inputs, of shape `size`."""
    window = (stride, padding, dilation, groups)
    rank = len(stride)
    if not _gradients_are_served(of_dense, size, mask, groups):
        results = []
        for gradient, kept in ((of_dense, weight), (of_pruned, weight * mask)):
            if rank:
                like = gradient.new_empty(size)  # only its shape is read
                results.append(
                    masked_conv._dense_gradient(gradient, like, kept, *window, of_weight=False)
                )
            else:
                results.append(torch.matmul(gradient, kept))
        return results[0], results[1]
    outputs = [_new(of_dense, size, rank) for _ in range(2)]
    triton_kernels.masked_conv_input_gradient(
        [_channels_last(of_dense, rank), _channels_last(of_pruned, rank)],
        weight.movedim(1, -1).contiguous() if rank else weight.contiguous(),
        [None, triton_kernels.pack_mask(mask, wrap_triton)],
        outputs if rank else [y.view(-1, y.shape[-1]) for y in outputs],
        *window,
        wrap=wrap_triton,
    )
    return outputs[0], outputs[1]


def _keep_for_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    of_dense, of_pruned, weight, mask, _, *ctx.window = inputs
    ctx.save_for_backward(of_dense, of_pruned, weight, mask)


def _input_gradient_backward(ctx: Any, dense: Tensor, pruned: Tensor) -> tuple[Any, ...]:
    of_dense, of_pruned, weight, mask = ctx.saved_tensors
    results: tuple[Any, Any] = (None, None)
    of_weight = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        results = dual_conv(dense, pruned, weight, mask, None, *ctx.window)
    if ctx.needs_input_grad[2]:
        of_weight = dual_conv_weight_gradient(of_dense, of_pruned, dense, pruned, mask, *ctx.window)
    return *results, of_weight, None, None, None, None, None, None


# ---------------------------------------------------------------------------- gradient of the weight


@triton_op("fastpie::dual_conv_weight_gradient", mutates_args=())
def dual_conv_weight_gradient(
    of_dense: Tensor,
    of_pruned: Tensor,
    dense: Tensor,
    pruned: Tensor | None,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Gradient of the weight: the dense model's, and of the pruned model's what the mask keeps."""
    window = (stride, padding, dilation, groups)
    rank = len(stride)
    if not _gradients_are_served(of_dense, list(dense.shape), mask, groups):
        results = []
        for gradient, x in ((of_dense, dense), (of_pruned, dense if pruned is None else pruned)):
            if rank:
                like = x.new_empty(mask.shape)  # only its shape is read
                results.append(
                    masked_conv._dense_gradient(gradient, x, like, *window, of_weight=True)
                )
            else:
                rows = gradient.reshape(-1, mask.shape[0])
                results.append(rows.t() @ x.reshape(-1, mask.shape[1]))
        return results[0] + results[1] * mask
    of_weight: Tensor = triton_kernels.masked_conv_weight_gradient(
        [_channels_last(of_dense, rank), _channels_last(of_pruned, rank)],
        _pair(dense, pruned, rank),
        [None, triton_kernels.pack_mask(mask, wrap_triton)],
        mask.shape[2:],
        *window,
        wrap=wrap_triton,
    )
    return of_weight.movedim(-1, 1).contiguous()


def _keep_for_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    of_dense, of_pruned, dense, pruned, mask, *ctx.window = inputs
    ctx.save_for_backward(of_dense, of_pruned, dense, pruned, mask)


def _weight_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    of_dense, of_pruned, dense, pruned, mask = ctx.saved_tensors
    results: tuple[Any, Any] = (None, None)
    inputs = [None, None]
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        results = dual_conv(dense, pruned, gradient, mask, None, *ctx.window)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        inputs = _of_inputs((of_dense, of_pruned), gradient, mask, dense, pruned, ctx.window)
    return *results, *inputs, None, None, None, None, None


dual_conv.register_autograd(_dual_conv_backward, setup_context=_keep_for_dual_conv)
dual_conv_input_gradient.register_autograd(
    _input_gradient_backward, setup_context=_keep_for_input_gradient
)
dual_conv_weight_gradient.register_autograd(
    _weight_gradient_backward, setup_context=_keep_for_weight_gradient
)
