"""Triton kernel of `top_k_update`, with the contract of csrc/include/fastpie/top_k.h.

One program, as the CUDA kernel is one block, and the same places by binary search in the state and
counting in the batch; but each tile of the batch is merged by itself, since there is no shared
memory to collect in.

`tl.debug_barrier` is __syncthreads: what one thread stores others load. The compiler keeps loads
and stores of global memory in order around it.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_options", "top_k_update", "top_k_update_kernel"]

# Recompiled for none of these, whatever their values: they change from batch to batch.
_PER_BATCH = ["first_id", "k", "levels", "count", "level_stride"]


@triton.jit
def _before(value, id, other, other_id):
    return (value > other) | ((value == other) & (id < other_id))


@triton.jit
def _merge(
    values, ids, k, value, id, enters, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Merge the samples of one tile of the batch that enter into the state."""
    # How many of the state come before each sample or are equal to it; the state is sorted.
    place = tl.zeros([BLOCK], tl.int64)
    for bit in tl.static_range(BITS):
        reach = place + (1 << (BITS - 1 - bit))
        inside = enters & (reach <= k)
        at = tl.where(inside, reach - 1, 0)
        behind = _before(value, id, tl.load(values + at), tl.load(ids + at))
        place = tl.where(inside & ~behind, reach, place)
    first = tl.min(tl.where(enters, place, k))

    lane = tl.arange(0, BLOCK)
    same = (value[None, :] == value[:, None]) & (id[None, :] == id[:, None])
    ahead = _before(value[None, :], id[None, :], value[:, None], id[:, None])
    ahead = ahead | (same & (lane[None, :] < lane[:, None]))
    rank = tl.sum((ahead & enters[None, :]).to(tl.int32), 1)

    # The state from the first place on moves back, from its end: each tile is read before it is
    # written, and goes never to where the tiles before it are still to be read.
    pushes = tl.where(enters, place, k)
    for tile in range((k - first + TILE - 1) // TILE):
        origin = k - (tile + 1) * TILE + tl.arange(0, TILE)
        moves = origin >= first
        moved = tl.load(values + origin, mask=moves, other=0.0)
        moved_id = tl.load(ids + origin, mask=moves, other=0)
        to = origin + tl.sum((pushes[None, :] <= origin[:, None]).to(tl.int32), 1)
        tl.debug_barrier()
        moves = moves & (to < k)
        tl.store(values + to, moved, mask=moves)
        tl.store(ids + to, moved_id, mask=moves)
    place += rank
    enters = enters & (place < k)
    tl.store(values + place, value, mask=enters)
    tl.store(ids + place, id, mask=enters)
    tl.debug_barrier()


@triton.jit(do_not_specialize=_PER_BATCH)
def top_k_update_kernel(
    values,
    ids,
    scores,
    new_ids,
    first_id,
    k,
    levels,
    count,
    level_stride,
    HAS_IDS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take `count` samples into the state, BLOCK at a time; k < 2^BITS."""
    k = k.to(tl.int64)
    for begin in range(0, count, BLOCK):
        i = tl.arange(0, BLOCK).to(tl.int64) + begin
        inside = i < count
        total = tl.zeros([BLOCK], tl.float64)
        at = i
        for _level in range(levels):
            total += tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
            at += level_stride
        value = (total / levels.to(tl.float64)).to(tl.float32)
        id = tl.load(new_ids + i, mask=inside, other=0) if HAS_IDS else first_id.to(tl.int64) + i
        last = tl.load(values + k - 1)
        last_id = tl.load(ids + k - 1)
        enters = inside & (value > -float("inf")) & _before(value, id, last, last_id)
        if tl.max(enters.to(tl.int32)) != 0:
            _merge(values, ids, k, value, id, enters, BITS, BLOCK, TILE)


def launch_options(k: int) -> dict[str, int]:
    """Sizes of the kernel for a state of k places."""
    return {"BITS": k.bit_length(), "BLOCK": 128, "TILE": 64}


def top_k_update(
    values: Tensor,  # fp32 [k], contiguous, updated in place
    ids: Tensor,  # int64 [k], contiguous, updated in place
    scores: Tensor,  # fp32 [L, n]
    new_ids: Tensor | None,  # int64 [n]
    first_id: int,
) -> None:
    """Take n samples into a running top-k; see `fastpie.ops.top_k_update`.

    CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.
    """
    levels, count = scores.shape
    if count == 0:
        return
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    if new_ids is not None:
        new_ids = new_ids.contiguous()
    device = torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext()
    with device:
        top_k_update_kernel[(1,)](
            values,
            ids,
            scores,
            ids if new_ids is None else new_ids,  # any pointer: without ids it is not read
            first_id,
            values.shape[0],
            levels,
            count,
            scores.stride(0),
            HAS_IDS=new_ids is not None,
            num_warps=4,
            num_stages=1,  # loads stay where they are, behind the stores of the tile before
            enable_fp_fusion=False,
            **launch_options(values.shape[0]),
        )
