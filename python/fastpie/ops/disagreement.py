"""The operator `disagreement`: every score of two logit tensors in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference

__all__ = ["SCORES", "disagreement"]

SCORES = (
    "js",
    "kl",
    "kl_reverse",
    "spearman",
    "flip",
    "margin_dense",
    "margin_pruned",
    "drift",
    "loss_dense",
    "loss_pruned",
    "damage",
)
"""The rows of the operator's output, in the order of `Score` in the contract header."""

_TASKS = {"multiclass": 0, "multilabel": 1}

_native.library.define(
    "disagreement(Tensor dense, Tensor pruned, Tensor? labels, str task) -> Tensor"
)


def disagreement(
    dense: Tensor,  # [N, C]
    pruned: Tensor,  # [L, N, C]
    labels: Tensor | None = None,  # multiclass: int64 [N]; multilabel: float [N, C]
    task: str = "multiclass",
) -> Tensor:  # [11, L, N]
    """Every disagreement score of every row, packed; `fastpie.disagreement` names them.

    Equivalent to::

        fastpie.ops.reference.disagreement(dense, pruned, labels, task)

    fp32, bf16 and fp16 logits run on a kernel (fp64 sums on the CPU, fp32 on CUDA); fp64 logits
    compute the twin above and give fp64. Differentiable once, through the twin: js, kl,
    kl_reverse, margins, drift and losses; spearman and flip are piecewise constant.

    Args:
        dense: logits of the dense model, last dimension contiguous or else copied.
        pruned: logits of the pruned model at L levels, same dtype and device.
        labels: class indices, or targets of 1, 0 or NaN (unknown). A class index outside [0, C)
            makes the scores that depend on it NaN.
        task: "multiclass" or "multilabel".

    Returns:
        fp32 [11, L, N] on the device of the inputs, rows in the order of `SCORES`.

    Raises:
        FastpieError: for shapes, dtypes or devices that do not fit together.
    """
    _check(dense, pruned, labels, task)
    return torch.ops.fastpie.disagreement(dense, pruned, labels, task)  # type: ignore[no-any-return]


def _check(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> None:
    if task not in _TASKS:
        raise FastpieError(f"Expected `task` to be one of {sorted(_TASKS)}, but got {task!r}.")
    if dense.ndim != 2 or dense.shape[1] == 0:
        raise FastpieError(
            f"Expected `dense` to have shape [N, C] with C >= 1, but got {list(dense.shape)}."
        )
    rows, classes = dense.shape
    _native.check_outputs(dense, pruned)
    if labels is None:
        return
    if labels.device != dense.device:
        raise FastpieError(
            f"Expected all tensors on one device, but got {dense.device} and {labels.device}."
        )
    if task == "multiclass" and (labels.dtype is not torch.int64 or labels.shape != (rows,)):
        raise FastpieError(
            f"Expected multiclass `labels` to be int64 of shape [{rows}], but got {labels.dtype} "
            f"{list(labels.shape)}."
        )
    if task == "multilabel" and (not labels.is_floating_point() or labels.shape != dense.shape):
        raise FastpieError(
            f"Expected multilabel `labels` to be floating point of shape [{rows}, {classes}], but "
            f"got {labels.dtype} {list(labels.shape)}."
        )


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _kernel_arguments(
    dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str
) -> tuple[Tensor, list[Any], tuple[Tensor | None, ...]]:
    """Output, arguments of the native call, and the tensors that must outlive it."""
    dense, pruned = _rows_contiguous(dense), _rows_contiguous(pruned)
    if labels is not None:
        labels = labels.contiguous() if task == "multiclass" else labels.float().contiguous()
    levels, rows, classes = pruned.shape
    out = torch.empty((len(SCORES), levels, rows), dtype=torch.float32, device=dense.device)
    arguments = [
        dense.data_ptr(),
        pruned.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        out.data_ptr(),
        _native.LOGIT_DTYPES[dense.dtype],
        _TASKS[task],
        levels,
        rows,
        classes,
        dense.stride(0),
        pruned.stride(0),
        pruned.stride(1),
    ]
    return out, arguments, (dense, pruned, labels)


@torch.library.impl(_native.library, "disagreement", "CPU")
def _disagreement_cpu(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.disagreement(dense, pruned, labels, task)
    out, arguments, _alive = _kernel_arguments(dense, pruned, labels, task)
    _native.call(_C.disagreement_cpu, *arguments, torch.get_num_threads())
    return out


@torch.library.impl(_native.library, "disagreement", "CUDA")
def _disagreement_cuda(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:
    if dense.dtype is torch.float64:
        return reference.disagreement(dense, pruned, labels, task)
    if _native.cuda_unusable_reason() is not None or dense.shape[1] > _C.cuda_max_classes:
        return _native.triton_kernels().disagreement(  # type: ignore[no-any-return]
            dense, pruned, labels, task
        )
    out, arguments, _alive = _kernel_arguments(dense, pruned, labels, task)
    with torch.cuda.device(dense.device):
        _native.call(_C.disagreement_cuda, *arguments, _native.cuda_stream(dense))
    return out


_native.library.impl("disagreement", reference.disagreement, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpie::disagreement", lib=_native.library)
def _disagreement_fake(dense: Tensor, pruned: Tensor, labels: Tensor | None, task: str) -> Tensor:
    dtype = torch.float64 if dense.dtype is torch.float64 else torch.float32
    return dense.new_empty((len(SCORES), pruned.shape[0], pruned.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, pruned, labels, ctx.task = inputs
    ctx.save_for_backward(dense, pruned, labels)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    dense, pruned, labels = ctx.saved_tensors
    # Scores that are NaN come with a zero incoming gradient, and zero times NaN must stay zero on
    # the way back: the twin runs on finite logits, a class of probability zero at -1e30 among them.
    leaves = [
        x.detach().double().nan_to_num(0.0, 0.0, -1e30).requires_grad_() for x in (dense, pruned)
    ]
    with torch.enable_grad():
        scores = reference.disagreement(leaves[0], leaves[1], labels, ctx.task)
    of_dense, of_pruned = torch.autograd.grad(scores, leaves, gradient.double())
    unusable = [(x.isnan() | (x == torch.inf)).any(-1) for x in (dense, pruned)]
    bad = (unusable[0] | unusable[1]).unsqueeze(-1)
    of_pruned = of_pruned.masked_fill(bad, 0.0)
    of_dense = of_dense.masked_fill(unusable[0].unsqueeze(-1), 0.0)
    of_dense, of_pruned = of_dense.to(dense.dtype), of_pruned.to(pruned.dtype)
    return of_dense, of_pruned, None, None


torch.library.register_autograd(
    "fastpie::disagreement", _backward, setup_context=_setup_context, lib=_native.library
)
