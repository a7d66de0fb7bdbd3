"""The operator `top_k_update`: the k highest scored samples of a stream, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpie import _C
from fastpie.errors import FastpieError
from fastpie.ops import _native, reference
from fastpie.ops.disagreement import SCORES, disagreement

__all__ = ["disagreement_top_k", "top_k_update"]

_LOWER_IS_HARDER = ("spearman", "margin_dense", "margin_pruned")
_WITH_LABELS = ("loss_dense", "loss_pruned", "damage")

# The state is updated in place: it stays where it is, also for a CUDA graph.
_native.library.define(
    "top_k_update(Tensor(a!) values, Tensor(b!) ids, Tensor scores, Tensor? new_ids, "
    "SymInt first_id) -> ()"
)


def top_k_update(
    values: Tensor,  # fp32 [k]
    ids: Tensor,  # int64 [k]
    scores: Tensor,  # fp32 [n] or [L, n]
    new_ids: Tensor | None = None,  # int64 [n]
    first_id: int = 0,
) -> None:
    """Take n new samples into the state `values`, `ids`: the k highest scored of all so far.

    Equivalent to::

        next_values, next_ids = fastpie.ops.reference.top_k_update(
            values, ids, scores.reshape(-1, n), new_ids, first_id
        )
        values.copy_(next_values), ids.copy_(next_ids)

    The state is sorted, the highest value first and of equal values the lowest id first; unused
    places hold -inf and -1. A new state is all -inf and -1. NaN and -inf never enter. The result is
    the same, bit for bit, however a stream is cut into batches and on every device. On a GPU one
    kernel does it all, and nothing waits for the host. Not differentiable.

    Args:
        values: of the state, contiguous; updated in place.
        ids: of the state, contiguous; updated in place.
        scores: of the new samples; on L levels their mean counts, computed in fp64 and rounded.
        new_ids: of the new samples, any numbers; each occurrence of one is a sample.
        first_id: without `new_ids` they are `first_id`, `first_id + 1`, ...

    Raises:
        FastpieError: for shapes, dtypes or devices that do not fit together.
    """
    _check(values, ids, scores, new_ids, first_id)
    if scores.ndim == 1:
        scores = scores.unsqueeze(0)
    torch.ops.fastpie.top_k_update(values, ids, scores.detach(), new_ids, first_id)


def disagreement_top_k(
    dense: Tensor,  # [N, C]
    pruned: Tensor,  # [L, N, C]
    labels: Tensor | None = None,  # multiclass: int64 [N]; multilabel: float [N, C]
    task: str = "multiclass",
    *,
    values: Tensor,  # fp32 [k]
    ids: Tensor,  # int64 [k]
    new_ids: Tensor | None = None,  # int64 [N]
    first_id: int = 0,
    score: str | None = None,
) -> Tensor:  # [11, L, N]
    """Every disagreement score of a batch, and the batch taken into a running top-k.

    Equivalent to::

        scores = fastpie.ops.disagreement(dense, pruned, labels, task)
        by = scores[fastpie.ops.disagreement.SCORES.index(score)]
        fastpie.ops.top_k_update(values, ids, by.float(), new_ids, first_id)

    On a GPU these are two kernels, one after the other on the current stream. With the default
    `score` the state keeps the samples that `fastpie.mine` finds hardest.

    Args:
        dense: as for `disagreement`, like the next three.
        pruned: on L levels the mean of the score counts.
        labels: see `disagreement`.
        task: see `disagreement`.
        values: of the state, updated in place; see `top_k_update`, like the next three.
        ids: of the state, updated in place.
        new_ids: of the rows.
        first_id: without `new_ids`, the id of the first row.
        score: a name of `SCORES` of which higher is harder; without one `loss_pruned` with labels,
            `js` without.

    Returns:
        The scores, as `disagreement` returns them.

    Raises:
        FastpieError: for arguments that do not fit together.
    """
    if score is None:
        score = "js" if labels is None else "loss_pruned"
    allowed = [name for name in SCORES if name not in _LOWER_IS_HARDER]
    if labels is None:
        allowed = [name for name in allowed if name not in _WITH_LABELS]
    if score not in allowed:
        raise FastpieError(
            f"Expected `score` to be one of {allowed} (higher = harder"
            f"{', without labels' if labels is None else ''}), but got {score!r}."
        )
    _check(
        values, ids, dense.new_empty((0, *dense.shape[:1]), dtype=torch.float32), new_ids, first_id
    )
    scores = disagreement(dense, pruned, labels, task)
    top_k_update(values, ids, scores[SCORES.index(score)].float(), new_ids, first_id)
    return scores


def _check(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    if values.ndim != 1 or values.shape[0] == 0 or values.dtype is not torch.float32:
        raise FastpieError(
            "Expected `values` to be float32 of shape [k] with k >= 1, but got "
            f"{values.dtype} {list(values.shape)}."
        )
    if ids.shape != values.shape or ids.dtype is not torch.int64:
        raise FastpieError(
            f"Expected `ids` to be int64 of the shape {list(values.shape)} of `values`, but got "
            f"{ids.dtype} {list(ids.shape)}."
        )
    if not (values.is_contiguous() and ids.is_contiguous()):
        raise FastpieError(
            "Expected `values` and `ids` to be contiguous: they are updated in place."
        )
    if values.requires_grad:
        raise FastpieError("Expected `values` without requires_grad: they are updated in place.")
    if scores.ndim not in (1, 2) or scores.dtype is not torch.float32:
        raise FastpieError(
            "Expected `scores` to be float32 of shape [n] or [L, n], but got "
            f"{scores.dtype} {list(scores.shape)}."
        )
    if new_ids is not None and (
        new_ids.shape != scores.shape[-1:] or new_ids.dtype is not torch.int64
    ):
        raise FastpieError(
            f"Expected `new_ids` to be int64 of shape {list(scores.shape[-1:])}, but got "
            f"{new_ids.dtype} {list(new_ids.shape)}."
        )
    devices = {t.device for t in (values, ids, scores, new_ids) if t is not None}
    if len(devices) > 1:
        raise FastpieError(
            f"Expected all tensors on one device, but got {sorted(map(str, devices))}."
        )
    if isinstance(first_id, bool | float | str | Tensor):
        raise FastpieError(f"Expected `first_id` to be an integer, but got {first_id!r}.")


@torch.library.impl(_native.library, "top_k_update", "CPU")
def _update_cpu(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    mean, new_ids = reference.samples_of(scores, new_ids, first_id)
    # Most batches change nothing; of the others, few samples need to be sorted.
    enters = (mean > values[-1]) | ((mean == values[-1]) & (new_ids < ids[-1]))
    index = enters.nonzero().flatten()
    if len(index):
        _update_elsewhere(values, ids, mean[index].unsqueeze(0), new_ids[index], 0)


def native_arguments(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """Arguments of the native call but the stream, and the tensors that must outlive it."""
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    if new_ids is not None:
        new_ids = new_ids.contiguous()
    arguments = (
        values.data_ptr(),
        ids.data_ptr(),
        values.shape[0],
        scores.data_ptr(),
        *scores.shape,
        scores.stride(0),
        0 if new_ids is None else new_ids.data_ptr(),
        first_id,
    )
    return arguments, (scores, new_ids)


@torch.library.impl(_native.library, "top_k_update", "CUDA")
def _update_cuda(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    if _native.cuda_unusable_reason() is not None:
        _native.triton_kernels().top_k_update(values, ids, scores, new_ids, first_id)
        return
    arguments, _alive = native_arguments(values, ids, scores, new_ids, first_id)
    with torch.cuda.device(values.device):
        _native.call(_C.top_k_update_cuda, *arguments, _native.cuda_stream(values))


@torch.library.impl(_native.library, "top_k_update", "CompositeExplicitAutograd")
def _update_elsewhere(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    next_values, next_ids = reference.top_k_update(values, ids, scores, new_ids, first_id)
    values.copy_(next_values)
    ids.copy_(next_ids)


@torch.library.register_fake("fastpie::top_k_update", lib=_native.library)
def _update_fake(
    values: Tensor, ids: Tensor, scores: Tensor, new_ids: Tensor | None, first_id: int
) -> None:
    return None
