"""The operators `dual_conv1d`, `dual_conv2d`, `dual_conv3d` and `dual_linear`: a layer of both models.

The dense model's layer and the pruned model's, which shares its weights, in one call, for training
and inference. On CUDA in bf16 and fp16 each pass is one kernel for both models; see
`dual_conv_kernels`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpie.ops.masked_conv import _check_mask, _numbers

__all__ = ["dual_conv1d", "dual_conv2d", "dual_conv3d", "dual_linear"]

# A constant, for torch.compile to read; the tensors are on a GPU where it matters.
_HAVE_TRITON = importlib.util.find_spec("triton") is not None

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}


def dual_conv1d(
    dense: Tensor,  # [N, C, W] or [C, W]
    pruned: Tensor,  # likewise
    weight: Tensor,  # [K, C / groups, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Convolve the dense and the pruned model's images in one dimension; see `dual_conv2d`.

    Equivalent to::

        rest = (bias, stride, padding, dilation, groups)
        outputs = (
            torch.nn.functional.conv1d(dense, weight, *rest),
            torch.nn.functional.conv1d(pruned, weight * mask, *rest),
        )
    """
    return _dual_conv(1, dense, pruned, weight, mask, bias, stride, padding, dilation, groups)


def dual_conv2d(
    dense: Tensor,  # [N, C, H, W] or [C, H, W]
    pruned: Tensor,  # likewise
    weight: Tensor,  # [K, C / groups, kh, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Convolve the dense model's images, and the pruned model's with the kept weights.

    Equivalent to::

        rest = (bias, stride, padding, dilation, groups)
        outputs = (
            torch.nn.functional.conv2d(dense, weight, *rest),
            torch.nn.functional.conv2d(pruned, weight * mask, *rest),
        )

    On CUDA, where Triton can be used, in bf16 and fp16 (autocast included), one kernel computes
    both outputs and reads the weights once; an image that both models share (`dense` and `pruned`
    are one tensor) is read once as well. The results are in channels-last memory, which is what
    the kernels read without a copy. There a masked weight takes no part, and an all-ones mask with
    equal images gives equal bits. Everywhere else (other devices and dtypes, torch.func transforms,
    forward-mode derivatives, tensor subclasses) exactly the expression above is computed.

    Derivatives of any order in images, weight and bias: the gradient of the weight is the sum over
    both models, the pruned one's where the weight is kept. On the kernels it has the same bits
    every time.

    Args:
        dense: images or features of the dense model.
        pruned: those of the pruned model.
        weight: filters of both models.
        mask: which weights the pruned model keeps.
        bias: summand of each output channel, of both models.
        stride: step of the filter.
        padding: zeros on both sides, "valid" or "same".
        dilation: distance of the filter's taps.
        groups: groups of channels.

    Returns:
        Two new tensors, shaped like the results of conv2d: the dense and the pruned model's.

    Raises:
        FastpieError: if `mask` is not a bool tensor of the weight's shape on its device.
        RuntimeError: as torch.nn.functional.conv2d.
    """
    return _dual_conv(2, dense, pruned, weight, mask, bias, stride, padding, dilation, groups)


def dual_conv3d(
    dense: Tensor,  # [N, C, D, H, W] or [C, D, H, W]
    pruned: Tensor,  # likewise
    weight: Tensor,  # [K, C / groups, kd, kh, kw]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Convolve the dense and the pruned model's images in three dimensions; see `dual_conv2d`.

    Equivalent to::

        rest = (bias, stride, padding, dilation, groups)
        outputs = (
            torch.nn.functional.conv3d(dense, weight, *rest),
            torch.nn.functional.conv3d(pruned, weight * mask, *rest),
        )
    """
    return _dual_conv(3, dense, pruned, weight, mask, bias, stride, padding, dilation, groups)


def dual_linear(
    dense: Tensor,  # [..., C]
    pruned: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    mask: Tensor,  # bool, the weight's shape, True = kept
    bias: Tensor | None = None,  # [K]
) -> tuple[Tensor, Tensor]:  # [..., K] each
    """Multiply the dense model's features, and the pruned model's with the kept weights.

    Equivalent to::

        outputs = (
            torch.nn.functional.linear(dense, weight, bias),
            torch.nn.functional.linear(pruned, weight * mask, bias),
        )

    See `dual_conv2d`.
    """
    _check_mask(weight, mask)
    if weight.ndim == 2 and dense.ndim >= 1:
        tensors = _for_kernels(dense, pruned, weight, bias)
        if tensors is not None and dense.shape[-1] == weight.shape[1]:
            return _call(tensors, mask, dense is pruned, ([], [], [], 1))
    return (
        functional.linear(dense, weight, bias),
        functional.linear(pruned, weight * mask, bias),
    )


def _dual_conv(
    rank: int,
    dense: Tensor,
    pruned: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Bring a plain call into the operator's form; all others, good or bad, are torch's."""
    _check_mask(weight, mask)
    if weight.ndim == rank + 2 and dense.ndim == rank + 2:
        tensors = _for_kernels(dense, pruned, weight, bias)
        if tensors is not None:
            window = _window(rank, dense, weight, stride, padding, dilation, groups)
            if window is not None:
                return _call(tensors, mask, dense is pruned, window)
    convolve = _CONVOLUTIONS[rank]
    return (
        convolve(dense, weight, bias, stride, padding, dilation, groups),
        convolve(pruned, weight * mask, bias, stride, padding, dilation, groups),
    )


def _for_kernels(
    dense: Tensor, pruned: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """The tensors as autocast wants them where kernels compute with them, else None."""
    tensors: list[Any] = [dense, pruned, weight] if bias is None else [dense, pruned, weight, bias]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None  # torch has the rules of its own operators, forward mode among them
    for t in tensors:
        if not isinstance(t, Tensor) or t.layout is not torch.strided or t.device.type != "cuda":
            return None
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        return None
    if dense.shape != pruned.shape or len({t.device for t in tensors}) > 1:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        tensors = [
            t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t
            for t in tensors
        ]
    if len({t.dtype for t in tensors}) > 1 or not _HAVE_TRITON:
        return None
    from fastpie.ops import dual_conv_kernels

    if not dual_conv_kernels.is_served(tensors[0], weight):
        return None
    return tensors[0], tensors[1], tensors[2], None if bias is None else tensors[3]


def _window(
    rank: int,
    dense: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[list[int], list[int], list[int], int] | None:
    """Stride, padding, dilation and groups of a sound call, else None."""
    strides, dilations = _numbers(stride, rank), _numbers(dilation, rank)
    if strides is None or dilations is None or min(*strides, *dilations, groups) < 1:
        return None
    reach = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    paddings: list[int] | None
    if padding == "valid":
        paddings = [0] * rank
    elif padding == "same" and all(s == 1 for s in strides) and all(r % 2 == 0 for r in reach):
        paddings = [r // 2 for r in reach]
    else:
        paddings = None if isinstance(padding, str) else _numbers(padding, rank)
    if paddings is None or min(paddings) < 0:
        return None
    if weight.shape[1] * groups != dense.shape[1] or weight.shape[0] % groups:
        return None
    ends = zip(dense.shape[2:], paddings, reach, strict=True)
    return (
        (strides, paddings, dilations, groups) if all(n + 2 * p > r for n, p, r in ends) else None
    )


def _call(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    mask: Tensor,
    shared: bool,
    window: tuple[list[int], list[int], list[int], int],
) -> tuple[Tensor, Tensor]:
    from fastpie.ops import dual_conv_kernels

    dense, pruned, weight, bias = tensors
    both: tuple[Tensor, Tensor] = dual_conv_kernels.dual_conv(
        dense, None if shared else pruned, weight, mask, bias, *window
    )
    return both
