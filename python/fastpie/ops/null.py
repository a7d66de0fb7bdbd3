"""The operator `null`: a copy, and the tutorial for adding an operation.

This file is stop 6 of the nine in CONTRIBUTING.md: it gives the kernel a schema, so that torch knows
it; an implementation per device; a fake kernel, so that torch.compile and torch.export can trace
through it without running it; and a derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["null"]

# The schema is all that torch's compiler knows about the operator. It says that the output is a
# new tensor: an implementation must never return its input.
_native.library.define("null(Tensor input) -> Tensor")


def null(input: Tensor) -> Tensor:  # [...] fp32
    """Copy a tensor.

    Equivalent to::

        output = input.clone(memory_format=torch.contiguous_format)

    Args:
        input: any shape, fp32.

    Returns:
        A new contiguous tensor of the same shape and device.

    Raises:
        FastpieError: if `input` is not fp32.
    """
    # Checks that cost nothing belong here, before the dispatcher; the kernels trust them.
    if input.dtype is not torch.float32:
        raise FastpieError(f"Expected `input` to be float32, but got {input.dtype}.")
    return torch.ops.fastpie.null(input)  # type: ignore[no-any-return]


# One implementation per dispatch key. `_native.call` turns a failed Status into a FastpieError.
@torch.library.impl(_native.library, "null", "CPU")
def _null_cpu(input: Tensor) -> Tensor:
    input = input.contiguous()
    output = torch.empty_like(input)
    _native.call(
        _C.null_cpu, input.data_ptr(), output.data_ptr(), input.numel(), torch.get_num_threads()
    )
    return output


@torch.library.impl(_native.library, "null", "CUDA")
def _null_cuda(input: Tensor) -> Tensor:
    input = input.contiguous()
    if _native.cuda_unusable_reason() is not None:
        return _native.triton_kernels().null(input)  # type: ignore[no-any-return]
    output = torch.empty_like(input)
    with torch.cuda.device(input.device):
        stream = _native.cuda_stream(input)
        _native.call(_C.null_cuda, input.data_ptr(), output.data_ptr(), input.numel(), stream)
    return output


# Any other device (MPS, XPU, ...) computes the twin.
_native.library.impl("null", reference.null, "CompositeExplicitAutograd")


# The fake kernel answers with shape, dtype, device and strides alone.
@torch.library.register_fake("fastpie::null", lib=_native.library)
def _null_fake(input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


# The derivative of a copy is a copy. A formula in terms of torch operators is differentiable again.
def _null_backward(context: object, gradient: Tensor) -> Tensor:
    return gradient.clone()


torch.library.register_autograd("fastpie::null", _null_backward, lib=_native.library)
