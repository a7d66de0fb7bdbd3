"""The operators `masked_conv1d`, `masked_conv2d`, `masked_conv3d` and `masked_linear`.

One family of three operators serves them: `masked_conv`, the gradient of its input and the gradient
of its weight. Each is linear in two tensors and the derivatives of each are the other two, so that
any order of derivative exists. The number of strides is the number of spatial dimensions; without
any it is a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpie.errors import FastpieError
from fastpie.ops import _native, masked_conv_sparse
from fastpie.ops.masked_conv_sparse import (
    FORWARD_DENSITY,
    WEIGHT_GRADIENT_DENSITY,
    Geometry,
    KnownMask,
    known_mask,
)

__all__ = ["masked_conv1d", "masked_conv2d", "masked_conv3d", "masked_linear"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_native.library.define(
    f"masked_conv(Tensor input, Tensor weight, Tensor mask, Tensor? bias, {_GEOMETRY}) -> Tensor"
)
_native.library.define(
    "masked_conv_input_gradient(Tensor output_gradient, Tensor weight, Tensor mask, "
    f"SymInt[] input_size, {_GEOMETRY}) -> Tensor"
)
_native.library.define(
    f"masked_conv_weight_gradient(Tensor output_gradient, Tensor input, Tensor mask, {_GEOMETRY})"
    " -> Tensor"
)


# ---------------------------------------------------------------------------- what people call


def masked_conv1d(
    input: Tensor,  # [N, C, W] or [C, W]
    weight: Tensor,  # [K, C / groups, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with the kept weights alone, in one dimension; see `masked_conv2d`.

    Equivalent to::

        output = torch.nn.functional.conv1d(
            input, weight * mask, bias, stride, padding, dilation, groups
        )
    """
    return _masked_conv(1, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_conv2d(
    input: Tensor,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [K, C / groups, kh, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with the kept weights alone.

    Equivalent to::

        output = torch.nn.functional.conv2d(
            input, weight * mask, bias, stride, padding, dilation, groups
        )

    What torch accepts is accepted, with the same result and memory format, and what torch refuses
    is refused. Which code runs is decided by device, dtype, shapes and density alone:

    * on the CPU in fp32 and bf16, where fewer than .35 of the weights are kept (gradient of the
      weight: .12, bf16 .06) and the layer is large enough, the sparse kernels. There a masked
      weight takes no part: infinite or NaN inputs and weights that meet only masked places leave
      no trace. (In the gradient of the weight an infinite input can make more places NaN than
      torch's, as the zeros around the image are multiplied too.)
    * everywhere else (other devices, float64, float16, complex, denser masks, small layers, tensor
      subclasses) exactly the expression above.

    Weights and mask may change in any way between two calls. Packing is kept for each mask and
    done again when the mask or the geometry changes; see `masked_conv_sparse`.

    Derivatives of any order in input, weight and bias; the gradient of a masked weight is zero.
    Under autocast the tensors are cast as for conv2d. Inside torch.func transforms (vmap, grad, jvp)
    and forward-mode derivatives the expression above is computed.

    Args:
        input: images.
        weight: filters.
        mask: which weights are kept.
        bias: summand of each output channel.
        stride: step of the filter.
        padding: zeros on both sides, "valid" or "same".
        dilation: distance of the filter's taps.
        groups: groups of channels.

    Returns:
        A new tensor, shaped like the result of conv2d.

    Raises:
        FastpieError: if `mask` is not a bool tensor of the weight's shape on its device.
        RuntimeError: as torch.nn.functional.conv2d.
    """
    return _masked_conv(2, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_conv3d(
    input: Tensor,  # [N, C, D, H, W] or [C, D, H, W]
    weight: Tensor,  # [K, C / groups, kd, kh, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with the kept weights alone, in three dimensions; see `masked_conv2d`.

    Equivalent to::

        output = torch.nn.functional.conv3d(
            input, weight * mask, bias, stride, padding, dilation, groups
        )
    """
    return _masked_conv(3, input, weight, mask, bias, stride, padding, dilation, groups)


def masked_linear(
    input: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
) -> Tensor:  # [..., K]
    """Multiply with the kept weights alone; see `masked_conv2d`.

    Equivalent to::

        output = torch.nn.functional.linear(input, weight * mask, bias)
    """
    _check_mask(weight, mask)
    if weight.ndim == 2 and _is_ours(input, weight, bias) and input.ndim >= 1:
        return torch.ops.fastpie.masked_conv(  # type: ignore[no-any-return]
            input, weight, mask, bias, [], [], [], 1
        )
    return functional.linear(input, weight * mask, bias)


def _masked_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """Bring a plain call into the operator's form; all others, good or bad, are torch's."""
    _check_mask(weight, mask)
    strides, dilations = _numbers(stride, rank), _numbers(dilation, rank)
    if (
        strides is None
        or dilations is None
        or not _is_number(groups)
        or not _is_ours(input, weight, bias)
        or weight.ndim != rank + 2
        or input.ndim not in (rank + 1, rank + 2)
    ):
        return _CONVOLUTIONS[rank](input, weight * mask, bias, stride, padding, dilation, groups)
    if padding == "valid":
        paddings: list[int] | None = [0] * rank
    elif padding == "same" and all(s == 1 for s in strides) and groups > 0:
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        paddings = [t // 2 for t in total]
        if any(t % 2 for t in total):  # the odd zero goes behind, as in torch
            behind = [value for t in reversed(total) for value in (0, t % 2)]
            input = functional.pad(input, behind)
    else:
        paddings = None if isinstance(padding, str) else _numbers(padding, rank)
    if paddings is None:
        return _CONVOLUTIONS[rank](input, weight * mask, bias, stride, padding, dilation, groups)
    batched = input if input.ndim == rank + 2 else input.unsqueeze(0)
    output: Tensor = torch.ops.fastpie.masked_conv(
        batched, weight, mask, bias, strides, paddings, dilations, groups
    )
    return output if input.ndim == rank + 2 else output.squeeze(0)


def _check_mask(weight: Tensor, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or not isinstance(weight, Tensor):
        raise FastpieError(
            "Expected `weight` and `mask` to be tensors, but got "
            f"{type(weight).__name__} and {type(mask).__name__}."
        )
    if mask.dtype is not torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise FastpieError(
            f"Expected `mask` to be bool of the weight's shape {list(weight.shape)} on "
            f"{weight.device}, but got {mask.dtype} {list(mask.shape)} on {mask.device}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _numbers(value: int | Sequence[int], rank: int) -> list[int] | None:
    """One number for each dimension, or None where torch shall say what it thinks of the value."""
    if _is_number(value):
        return [value] * rank  # type: ignore[list-item]
    if not isinstance(value, (tuple, list)) or not all(_is_number(v) for v in value):
        return None
    return list(value) * rank if len(value) == 1 else list(value) if len(value) == rank else None


def _is_ours(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operator takes the tensors: plain CPU tensors of one dtype that has kernels."""
    tensors: list[Any] = [input, weight] if bias is None else [input, weight, bias]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # torch has the rules of its own operators, forward mode among them
    for t in tensors:
        if not isinstance(t, Tensor) or t.layout is not torch.strided or t.device.type != "cpu":
            return False
        if t.dtype not in WEIGHT_GRADIENT_DENSITY:
            return False
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        return False
    # Autocast makes them one dtype, in the operator.
    return len({t.dtype for t in tensors}) == 1 or torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------------------- what torch computes
#
# `window` is stride, padding, dilation and groups, as the operators take them; a linear layer has
# no strides.


def _dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *window: Any,
) -> Tensor:
    if not window[0]:
        return functional.linear(input, weight, bias)
    return _CONVOLUTIONS[len(window[0])](input, weight, bias, *window)


def _dense_gradient(
    output_gradient: Tensor, input: Tensor, weight: Tensor, *window: Any, of_weight: bool
) -> Tensor:
    stride, padding, dilation, groups = window
    wanted = [not of_weight, of_weight, False]
    rest = (None, stride, padding, dilation, False, [0] * len(stride), groups, wanted)
    gradients = torch.ops.aten.convolution_backward(output_gradient, input, weight, *rest)
    return gradients[1 if of_weight else 0]  # type: ignore[no-any-return]


def _memory_format(rank: int, *tensors: Tensor) -> torch.memory_format:
    """The memory format that torch gives: in 2D and 3D channels_last where any operand has it."""
    for t in tensors if rank > 1 else ():
        if (found := suggest_memory_format(t)) is not torch.contiguous_format:
            return found
    return torch.contiguous_format


def _empty(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _laid_out(result: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The result with the strides that the fake kernel announces; mostly it has them."""
    if memory_format is torch.contiguous_format and result.is_contiguous():
        return result
    expected = _empty(result, result.shape, memory_format)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def _product(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask``, the same bits in a third of the time."""
    return mask.to(weight.dtype).mul_(weight)


# ---------------------------------------------------------------------------- which kernel


def _three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
    return (*[fill] * (3 - len(values)), *values)  # type: ignore[return-value]


def _five(x: Tensor, rank: int) -> Tensor:
    """A view [N, C, D, H, W] of [N, C, ...], or of [..., C] where there is no spatial dimension."""
    if rank == 0:
        x = x.reshape(-1, x.shape[-1])
    return x[(slice(None), slice(None)) + (None,) * (3 - rank)]


def _geometry_of(
    input_size: Sequence[int],
    output_channels: int,
    weight_size: Sequence[int],
    *window: Any,
) -> Geometry | None:
    """The geometry of a sound call with something to compute; None leaves the call to torch."""
    stride, padding, dilation, groups = window
    rank = len(stride)
    if rank and not (len(input_size) == len(weight_size) == rank + 2):
        return None
    if min(groups, *input_size, *weight_size, *stride, *dilation) < 1 or min(0, *padding, 0) < 0:
        return None
    channels = input_size[1] if rank else input_size[-1]
    if weight_size[1] * groups != channels or weight_size[0] % groups:
        return None
    if output_channels != weight_size[0]:
        return None
    geometry = Geometry(
        _three(input_size[2:] if rank else (), 1),
        _three(weight_size[2:], 1),
        _three(stride, 1),
        _three(padding, 0),
        _three(dilation, 1),
        groups,
    )
    return geometry if min(geometry.output_size) >= 1 else None


def _known_if_worth(
    geometry: Geometry | None,
    input_size: Sequence[int],
    mask: Tensor,
    highest: float,
    reads_weight: bool = True,
) -> KnownMask | None:
    """The mask where the sparse kernels shall compute, else None."""
    if geometry is None:
        return None
    out_channels, channels = mask.shape[0], mask.shape[1] * geometry.groups
    images = math.prod(input_size) // (channels * math.prod(geometry.size))
    if not masked_conv_sparse.is_possible(geometry, images, max(channels, out_channels)):
        return None

    def is_worth(density: float) -> bool:
        return masked_conv_sparse.is_worth(
            geometry, images, channels, out_channels, density, highest, reads_weight
        )

    if not is_worth(0.0):  # whatever the mask is
        return None
    known = known_mask(mask)
    return known if is_worth(known.density) else None


def _have_kernel(*tensors: Tensor | None) -> bool:
    present = [t for t in tensors if t is not None]
    return present[0].dtype in WEIGHT_GRADIENT_DENSITY and len({t.dtype for t in present}) == 1


# ---------------------------------------------------------------------------- masked_conv


def _masked_conv_torch(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *window: Any,
) -> Tensor:
    memory_format = _memory_format(len(window[0]), input, weight)
    product = _product(weight, mask)
    output = _dense(input, product, bias, *window)
    return _laid_out(output, memory_format)


@torch.library.impl(_native.library, "masked_conv", "CPU")
def _masked_conv_cpu(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *window: Any,
) -> Tensor:
    known = geometry = None
    if _have_kernel(input, weight, bias) and (bias is None or bias.shape == weight.shape[:1]):
        geometry = _geometry_of(input.shape, weight.shape[0], weight.shape, *window)
        known = _known_if_worth(geometry, input.shape, mask, FORWARD_DENSITY)
    if geometry is None or known is None:
        return _masked_conv_torch(input, weight, mask, bias, *window)
    rank = len(window[0])
    size = geometry.output_size[3 - rank :] if rank else ()
    shape = [input.shape[0], weight.shape[0], *size] if rank else [*input.shape[:-1], len(weight)]
    output = _empty(input, shape, _memory_format(rank, input, weight))
    masked_conv_sparse.forward(
        geometry, _five(input, rank), _five(weight, rank), known, bias, _five(output, rank)
    )
    return output


_native.library.impl("masked_conv", _masked_conv_torch, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::masked_conv", lib=_native.library)
def _masked_conv_fake(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *window: Any,
) -> Tensor:
    memory_format = _memory_format(len(window[0]), input, weight)
    output = _dense(input, weight, bias, *window)  # torch's refusals too
    return _empty(output, output.shape, memory_format)


# The weight in autocast's dtype, and then the operator again without autocast.
def _masked_conv_autocast(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *window: Any,
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")

    def cast(t: Tensor) -> Tensor:  # as torch's own: float64 stays
        return t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return torch.ops.fastpie.masked_conv(  # type: ignore[no-any-return]
            cast(input),
            cast(weight),
            mask,
            None if bias is None else cast(bias),
            *window,
        )


_native.library.impl("masked_conv", _masked_conv_autocast, "AutocastCPU")


def _keep_for_masked_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, mask, _, *ctx.window = inputs
    ctx.save_for_backward(input, weight, mask)


def _masked_conv_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mask = ctx.saved_tensors
    of_input = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_input = _input_gradient(gradient, weight, mask, input.shape, ctx.window)
    if ctx.needs_input_grad[1]:
        of_weight = _weight_gradient(gradient, input, mask, ctx.window)
    if ctx.needs_input_grad[3]:
        if ctx.window[0]:
            of_bias = gradient.sum([0, *range(2, gradient.ndim)])
        else:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return of_input, of_weight, None, of_bias, None, None, None, None


def _input_gradient(
    gradient: Tensor, weight: Tensor, mask: Tensor, size: Sequence[int], window: list[Any]
) -> Tensor:
    return torch.ops.fastpie.masked_conv_input_gradient(  # type: ignore[no-any-return]
        gradient, weight, mask, size, *window
    )


def _weight_gradient(gradient: Tensor, input: Tensor, mask: Tensor, window: list[Any]) -> Tensor:
    return torch.ops.fastpie.masked_conv_weight_gradient(  # type: ignore[no-any-return]
        gradient, input, mask, *window
    )


def _convolve(input: Tensor, weight: Tensor, mask: Tensor, window: list[Any]) -> Tensor:
    return torch.ops.fastpie.masked_conv(  # type: ignore[no-any-return]
        input, weight, mask, None, *window
    )


torch.library.register_autograd(
    "fastpie::masked_conv",
    _masked_conv_backward,
    setup_context=_keep_for_masked_conv,
    lib=_native.library,
)


# ---------------------------------------------------------------------------- gradient of the input


def _input_gradient_torch(
    output_gradient: Tensor,
    weight: Tensor,
    mask: Tensor,
    input_size: Sequence[int],
    *window: Any,
) -> Tensor:
    memory_format = _memory_format(len(window[0]), output_gradient, weight)
    product = _product(weight, mask)
    if not window[0]:
        return torch.matmul(output_gradient, product).contiguous()
    like = _empty(output_gradient, input_size, memory_format)  # only its shape is read
    gradient = _dense_gradient(output_gradient, like, product, *window, of_weight=False)
    return _laid_out(gradient, memory_format)


@torch.library.impl(_native.library, "masked_conv_input_gradient", "CPU")
def _input_gradient_cpu(
    output_gradient: Tensor,
    weight: Tensor,
    mask: Tensor,
    input_size: Sequence[int],
    *window: Any,
) -> Tensor:
    rank = len(window[0])
    known = geometry = None
    if _have_kernel(output_gradient, weight):
        channels = output_gradient.shape[1 if rank else -1]
        geometry = _geometry_of(input_size, channels, weight.shape, *window)
        known = _known_if_worth(geometry, input_size, mask, FORWARD_DENSITY)
    if geometry is None or known is None:
        return _input_gradient_torch(output_gradient, weight, mask, input_size, *window)
    gradient = _empty(
        output_gradient, input_size, _memory_format(rank, output_gradient, weight)
    ).zero_()
    masked_conv_sparse.input_gradient(
        geometry,
        _five(output_gradient, rank),
        _five(weight, rank),
        known,
        _five(gradient, rank),
    )
    return gradient


_native.library.impl(
    "masked_conv_input_gradient", _input_gradient_torch, "CompositeExplicitAutograd"
)


@torch.library.register_fake("fastpie::masked_conv_input_gradient", lib=_native.library)
def _input_gradient_fake(
    output_gradient: Tensor,
    weight: Tensor,
    mask: Tensor,
    input_size: Sequence[int],
    *window: Any,
) -> Tensor:
    memory_format = _memory_format(len(window[0]), output_gradient, weight)
    return _empty(output_gradient, input_size, memory_format)


def _keep_for_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    output_gradient, weight, mask, _, *ctx.window = inputs
    ctx.save_for_backward(output_gradient, weight, mask)


def _input_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    output_gradient, weight, mask = ctx.saved_tensors
    of_output_gradient = of_weight = None
    if ctx.needs_input_grad[0]:
        of_output_gradient = _convolve(gradient, weight, mask, ctx.window)
    if ctx.needs_input_grad[1]:
        of_weight = _weight_gradient(output_gradient, gradient, mask, ctx.window)
    return of_output_gradient, of_weight, None, None, None, None, None, None


torch.library.register_autograd(
    "fastpie::masked_conv_input_gradient",
    _input_gradient_backward,
    setup_context=_keep_for_input_gradient,
    lib=_native.library,
)


# ---------------------------------------------------------------------------- gradient of the weight


def _weight_gradient_torch(
    output_gradient: Tensor,
    input: Tensor,
    mask: Tensor,
    *window: Any,
) -> Tensor:
    if not window[0]:
        rows = output_gradient.reshape(-1, mask.shape[0])
        gradient = rows.t() @ input.reshape(-1, mask.shape[1])
    else:
        like = input.new_empty(mask.shape)  # only its shape is read
        gradient = _dense_gradient(output_gradient, input, like, *window, of_weight=True)
    return gradient.contiguous().masked_fill_(~mask, 0)


@torch.library.impl(_native.library, "masked_conv_weight_gradient", "CPU")
def _weight_gradient_cpu(
    output_gradient: Tensor,
    input: Tensor,
    mask: Tensor,
    *window: Any,
) -> Tensor:
    rank = len(window[0])
    known = geometry = None
    if _have_kernel(output_gradient, input):
        channels = output_gradient.shape[1 if rank else -1]
        geometry = _geometry_of(input.shape, channels, mask.shape, *window)
        highest = WEIGHT_GRADIENT_DENSITY[input.dtype]
        known = _known_if_worth(geometry, input.shape, mask, highest, reads_weight=False)
    if geometry is None or known is None:
        return _weight_gradient_torch(output_gradient, input, mask, *window)
    gradient = masked_conv_sparse.weight_gradient(
        geometry,
        _five(output_gradient, rank),
        _five(input, rank),
        known,
        _five(mask, rank).shape,
    )
    return gradient.view(mask.shape).to(input.dtype)


_native.library.impl(
    "masked_conv_weight_gradient", _weight_gradient_torch, "CompositeExplicitAutograd"
)


@torch.library.register_fake("fastpie::masked_conv_weight_gradient", lib=_native.library)
def _weight_gradient_fake(
    output_gradient: Tensor,
    input: Tensor,
    mask: Tensor,
    *window: Any,
) -> Tensor:
    return input.new_empty(mask.shape)


def _keep_for_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    output_gradient, input, mask, *ctx.window = inputs
    ctx.save_for_backward(output_gradient, input, mask)


def _weight_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    output_gradient, input, mask = ctx.saved_tensors
    of_output_gradient = of_input = None
    if ctx.needs_input_grad[0]:
        of_output_gradient = _convolve(input, gradient, mask, ctx.window)
    if ctx.needs_input_grad[1]:
        of_input = _input_gradient(output_gradient, gradient, mask, input.shape, ctx.window)
    return of_output_gradient, of_input, None, None, None, None, None


torch.library.register_autograd(
    "fastpie::masked_conv_weight_gradient",
    _weight_gradient_backward,
    setup_context=_keep_for_weight_gradient,
    lib=_native.library,
)


# ---------------------------------------------------------------------------- vmap


def _vmap_by_loop(name: str) -> Callable[..., tuple[Tensor, int]]:
    """The batching rule of an operator: one call for each member, whatever is batched."""
    operator = getattr(torch.ops.fastpie, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        def member(i: int) -> Tensor:
            return operator(  # type: ignore[no-any-return]
                *(
                    a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                    for a, d in zip(args, in_dims, strict=True)
                )
            )

        return torch.stack([member(i) for i in range(info.batch_size)]), 0

    return rule


for _name in ("masked_conv", "masked_conv_input_gradient", "masked_conv_weight_gradient"):
    torch.library.register_vmap(f"fastpie::{_name}", _vmap_by_loop(_name), lib=_native.library)
