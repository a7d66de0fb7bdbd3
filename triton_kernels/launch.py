"""What the convolution kernels' launches have in common: where pixels are, and the launch itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["JIT", "Launch", "Pixels", "is_shared", "pixels_of", "plain", "run", "three", "vector"]

JIT = triton.runtime.jit.JITFunction
"""The class of compiled kernels; under TRITON_INTERPRET=1 a kernel is of another."""


class Launch(NamedTuple):
    """All about a launch but the stream; made without a GPU too, on meta tensors."""

    kernel: Any
    grid: int  # programs
    arguments: list[Any]
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


class Pixels(NamedTuple):
    """Where the pixels of a channels-last tensor are."""

    sizes: list[int]  # images, then three dimensions
    strides: list[int]
    uniform: bool  # pixel i, counted through all images, is at i * strides[3]

    @property
    def count(self) -> int:
        """Pixels of all images."""
        return math.prod(self.sizes)


def three(values: Sequence[int], fill: int) -> list[int]:
    """The numbers of one to three dimensions as those of three."""
    return [fill] * (3 - len(values)) + list(values)


def pixels_of(x: Tensor, rank: int) -> Pixels:
    """The pixels of [N, C, *spatial], or without spatial dimensions of [..., C]."""
    if rank == 0:
        step = x.stride(-2) if x.ndim > 1 else x.shape[-1]
        return Pixels([x.numel() // x.shape[-1], 1, 1, 1], [step] * 4, True)
    sizes = [x.shape[0], *three(x.shape[2:], 1)]
    given = [x.stride(0), *three(x.stride()[2:], 0)]
    # The stride of a dimension of size 1 can be anything; it becomes what the others imply.
    after = next((s for n, s in zip(sizes[::-1], given[::-1], strict=True) if n > 1), x.shape[1])
    strides, uniform = [], True
    for n, s in zip(sizes[::-1], given[::-1], strict=True):
        uniform = uniform and (n == 1 or s == after)
        strides.append(after if n == 1 else s)
        after = strides[-1] * n
    return Pixels(sizes, strides[::-1], uniform)


def vector(x: Tensor, *multiples: int) -> int:
    """How many values are loaded together: up to 16 bytes, and each of `multiples` a multiple."""
    count = 16 // x.element_size()
    while any(m % count for m in multiples):
        count //= 2
    return count


def is_shared(tensors: Sequence[Tensor]) -> bool:
    """Whether two models read the same values from the same place."""
    if len(tensors) == 1:
        return False
    a, b = tensors
    if a is b:
        return True
    if any(type(t) is not Tensor or t.is_meta for t in tensors):  # nowhere, as when it is traced
        return False
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride()) == (b.shape, b.stride())


def plain(kernel: Any) -> Any:
    """The kernel itself, where nothing has to wrap it."""
    return kernel


def run(launch: Launch, wrap: Callable[[Any], Any] = plain) -> None:
    """Put a launch on the current stream of its tensors' device."""
    kernel = wrap(launch.kernel)
    options: dict[str, Any] = dict(launch.options)
    if isinstance(kernel, JIT):
        # Contraction is off so that the same sums come out whatever surrounds them; where an fma is
        # wanted it is written. A wrapped kernel takes no such option.
        options["enable_fp_fusion"] = False
    device = launch.arguments[0].device
    here = device.type == "cuda" and isinstance(kernel, JIT)
    with torch.cuda.device(device) if here else contextlib.nullcontext():
        kernel[(launch.grid,)](*launch.arguments, **launch.constants, **options)
