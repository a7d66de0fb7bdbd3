"""Triton kernels of `disagreement`, with the contract of csrc/include/fastpie/disagreement.h.

Up to TILE_CLASSES classes a program holds several rows in registers and scores all levels; above,
a program scores one row at one level in chunks of CHUNK classes, read again in every pass. Ranks
come from counting, C^2 comparisons, which is what a language without shuffles and without indexing
into registers does well; the CUDA kernel sorts.

The formulas are those of csrc/cuda/disagreement.cu, where they are explained: KL terms that cannot
be negative, series in t = (q - p) / (q + p) for nearly equal probabilities, KL sums in units of
2^16 and logarithms in quarters against overflow. Both sides of a `tl.where` are computed, so the
side that is dropped may hold NaN.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CHUNK", "TILE_CLASSES", "chunk_kernel", "disagreement", "launch_options", "tile_kernel"]

TILE_CLASSES = 512
CHUNK = 512
# Per program of few classes: one per thread of four warps. With four the reductions over rows are
# unrolled to 219 registers for 20 classes instead of 58 (sm_90, Triton 3.9).
_TILE_LOGITS = 128
_SCORES = 11

# Whatever changes with the batch: a specialised value would recompile for 1 and for multiples of 16.
_PER_BATCH = ["levels", "rows", "pruned_level_stride"]

_NEAR = tl.constexpr(0.5)
_TINY = tl.constexpr(1e-37)
_KL_UNIT = tl.constexpr(65536.0)
_PER_KL_UNIT = tl.constexpr(1.0 / 65536.0)


# ------------------------------------------------------------------------------ functions of fp32


@triton.jit
def _atanh_tail(t2):
    """(atanh(t) / t - 1) / t^2 for |t| <= 1/3."""
    y = tl.fma(t2, 1.0 / 17.0, 1.0 / 15.0)
    y = tl.fma(y, t2, 1.0 / 13.0)
    y = tl.fma(y, t2, 1.0 / 11.0)
    y = tl.fma(y, t2, 1.0 / 9.0)
    y = tl.fma(y, t2, 1.0 / 7.0)
    y = tl.fma(y, t2, 1.0 / 5.0)
    return tl.fma(y, t2, 1.0 / 3.0)


@triton.jit
def _log1p_unit(x):
    """log(1 + x) for x in [0, 1]."""
    t = x / (2.0 + x)
    t2 = t * t
    return 2.0 * tl.fma(t * t2, _atanh_tail(t2), t)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0."""
    return tl.where(x < 1.0, _log1p_unit(tl.minimum(x, 1.0)), tl.log(1.0 + x))


@triton.jit
def _expm1_half(x):
    """exp(x) - 1 for |x| < 1/2."""
    y = tl.fma(x, 1.0 / 40320.0, 1.0 / 5040.0)
    y = tl.fma(y, x, 1.0 / 720.0)
    y = tl.fma(y, x, 1.0 / 120.0)
    y = tl.fma(y, x, 1.0 / 24.0)
    y = tl.fma(y, x, 1.0 / 6.0)
    y = tl.fma(y, x, 0.5)
    return tl.fma(x * x, y, x)


@triton.jit
def _tanh_half(x):
    """tanh(x / 2) for |x| < 1/2."""
    h = 0.5 * x
    h2 = h * h
    y = tl.fma(h2, 62.0 / 2835.0, -17.0 / 315.0)
    y = tl.fma(y, h2, 2.0 / 15.0)
    y = tl.fma(y, h2, -1.0 / 3.0)
    return tl.fma(h * h2, y, h)


# ------------------------------------------------------------------------------ one model's rows


@triton.jit
def _load(logits, offsets, inside):
    """Logits as fp32, with 0 for what makes a row unusable (NaN, +inf), and where that was."""
    z = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)
    unusable = ~(z < float("inf"))
    return tl.where(unusable, 0.0, z), unusable & inside


@triton.jit
def _extremes(z, unusable, c, inside):
    """Per row: largest logit, its first class, largest of the others, smallest, unusable."""
    top = tl.max(tl.where(inside, z, -float("inf")), 1)
    top_class = tl.min(tl.where(inside & (z == top[:, None]), c, 2147483647), 1)
    others = inside & (c != top_class[:, None])
    second = tl.max(tl.where(others, z, -float("inf")), 1)
    bottom = tl.min(tl.where(inside, z, float("inf")), 1)
    return top, top_class, second, bottom, tl.max(unusable.to(tl.int32), 1)


@triton.jit
def _scale(top, bottom):
    """A power of two near 1 / max |z|, so that squares stay in range."""
    largest = tl.maximum(tl.abs(top), tl.abs(bottom))
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    biased = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sums(z, c, inside, top, top_class, scale):
    """Per row: sum of exp(z - top) without the top class, and of (z * scale)^2."""
    others = inside & (c != top_class[:, None])
    rest = tl.sum(tl.where(others, tl.exp(z - top[:, None]), 0.0), 1)
    scaled = tl.where(inside, z * scale[:, None], 0.0)
    return rest, tl.sum(scaled * scaled, 1)


@triton.jit
def _norm(square, scale):
    """L2 norm of the scaled row, at least 1e-12 unscaled as in torch.nn.functional.normalize."""
    return tl.maximum(tl.sqrt_rn(square), 1e-12 * scale)


@triton.jit
def _count_ranks(logits, row_offsets, z, inside, row_inside, classes):
    """Average ranks, doubled and centred: #less - #greater."""
    rank = tl.zeros(z.shape, tl.int32)
    for j in range(classes):
        other = tl.load(logits + row_offsets + j, mask=row_inside, other=0.0).to(tl.float32)
        less = (other[:, None] < z).to(tl.int32)
        rank += less - (other[:, None] > z).to(tl.int32)
    return tl.where(inside, rank, 0).to(tl.int64)


@triton.jit
def _targets(z, targets, offsets, inside):
    """Per row of targets: lowest positive, highest negative, counts, cross-entropy / 2^16."""
    target = tl.load(targets + offsets, mask=inside, other=float("nan"))
    positive = target > 0.5
    negative = target <= 0.5
    known = positive | negative  # NaN compares false
    lowest = tl.min(tl.where(positive, z, float("inf")), 1)
    highest = tl.max(tl.where(negative, z, -float("inf")), 1)
    against = tl.where(positive, -z, z)
    softplus = _log1p_unit(tl.exp(-tl.abs(z)))
    loss = _PER_KL_UNIT * tl.maximum(against, 0.0) + _PER_KL_UNIT * softplus
    positives = tl.sum(positive.to(tl.int32), 1)
    negatives = tl.sum(negative.to(tl.int32), 1)
    return lowest, highest, positives, negatives, tl.sum(tl.where(known, loss, 0.0), 1)


@triton.jit
def _supervise_multilabel(lowest, highest, positives, negatives, loss):
    """Margin and loss of a row with targets; 0 stands in for a side that the row does not have."""
    known = positives + negatives
    low = tl.where(positives > 0, lowest, 0.0).to(tl.float64)
    high = tl.where(negatives > 0, highest, 0.0).to(tl.float64)
    mean = loss.to(tl.float64) * _KL_UNIT / tl.maximum(known, 1).to(tl.float64)
    nan = float("nan")
    return tl.where(known > 0, low - high, nan), tl.where(known > 0, mean, nan)


@triton.jit
def _supervise(
    logits, offsets, labels, row, row_inside, classes, extremes, log_sum, HAS_LABELS: tl.constexpr
):
    """Margin and loss of a row without targets: of its label or, without labels, of the top class.

    NaN where the label is outside [0, classes), and nothing is read there.
    """
    top, top_class, second = extremes
    nan = float("nan")
    if HAS_LABELS:
        label = tl.load(labels + row, mask=row_inside, other=-1)
        valid = row_inside & (label >= 0) & (label < classes)
        index = tl.where(valid, label, 0)
        of_label = tl.load(logits + offsets + index, mask=valid, other=0.0)
        of_label = of_label.to(tl.float32).to(tl.float64)
        best_other = tl.where(label == top_class, second, top).to(tl.float64)
        margin = tl.where(valid, of_label - best_other, nan)
        loss = tl.where(valid, (top.to(tl.float64) - of_label) + log_sum.to(tl.float64), nan)
    else:
        margin = top.to(tl.float64) - second.to(tl.float64)
        loss = tl.full(margin.shape, nan, tl.float64)
    return margin, loss


# ------------------------------------------------------------------------------ both models


@triton.jit
def _one_way(p, q, p4, q4, x4):
    """Term p * (e^x - 1 - x) for x = log(q / p) that is not small."""
    difference = _PER_KL_UNIT * (q - p)
    finite = tl.where(p > 0.0, difference - 4.0 * _PER_KL_UNIT * p * x4, difference)
    infinite = tl.where(p4 > -float("inf"), float("inf"), difference)
    return tl.where(q4 == -float("inf"), infinite, finite)


@triton.jit
def _outcome(p, q, p4, q4, near, t):
    """Terms of js, kl and kl_reverse; p4 and q4 are quarters of logarithms, t counts where near."""
    total = p + q
    t = tl.where(near, t, 0.0)
    t2 = t * t
    phi = tl.fma(t2, 1.0 / 90.0, 1.0 / 56.0)
    phi = tl.fma(phi, t2, 1.0 / 30.0)
    phi = tl.fma(phi, t2, 1.0 / 12.0)
    phi = tl.fma(phi, t2, 0.5)
    square = total * t2
    cube = 2.0 * t * t2 * _atanh_tail(t2)
    x4 = q4 - p4
    more = tl.maximum(p, q)
    less = tl.minimum(p, q)
    log_more = _log1p_unit(tl.where(more > _TINY, (more - less) / tl.maximum(total, _TINY), 0.0))
    log_less = tl.where(less > 0.0, log_more - 4.0 * tl.abs(x4), 0.0)
    js = tl.where(near, 0.5 * total * t2 * phi, 0.5 * (more * log_more + less * log_less))
    kl = tl.where(near, _PER_KL_UNIT * (square - p * cube), _one_way(p, q, p4, q4, x4))
    kl_reverse = tl.where(near, _PER_KL_UNIT * (square + q * cube), _one_way(q, p, q4, p4, -x4))
    return js, kl, kl_reverse


@triton.jit
def _sigmoid(z):
    """p, log p, 1 - p and log(1 - p)."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    softplus = _log1p_unit(e)
    positive = z >= 0.0
    p = tl.where(positive, large, small)
    not_p = tl.where(positive, small, large)
    log_p = tl.where(positive, -softplus, z - softplus)
    log_not_p = tl.where(positive, -z - softplus, -softplus)
    return p, log_p, not_p, log_not_p


@triton.jit
def _multilabel(z, y):
    """Terms of the divergences of two Bernoulli variables per class."""
    p, log_p, not_p, log_not_p = _sigmoid(z)
    q, log_q, not_q, log_not_q = _sigmoid(y)
    d = y - z
    small = tl.abs(d) < _NEAR
    e = _expm1_half(tl.where(small, d, 0.0))
    difference = p * not_p * e / tl.fma(p, e, 1.0)
    total = p + q
    not_total = not_p + not_q
    t = tl.where(total > _TINY, difference / tl.maximum(total, _TINY), 0.0)
    not_t = tl.where(not_total > _TINY, -difference / tl.maximum(not_total, _TINY), 0.0)
    x = log_q - log_p
    not_x = log_not_q - log_not_p
    near = tl.abs(x) < _NEAR
    not_near = tl.abs(not_x) < _NEAR
    t = tl.where(small, t, _tanh_half(tl.where(near, x, 0.0)))
    not_t = tl.where(small, not_t, _tanh_half(tl.where(not_near, not_x, 0.0)))
    js, kl, kl_reverse = _outcome(p, q, 0.25 * log_p, 0.25 * log_q, near | small, t)
    not_js, not_kl, not_kl_reverse = _outcome(
        not_p, not_q, 0.25 * log_not_p, 0.25 * log_not_q, not_near | small, not_t
    )
    return js + not_js, kl + not_kl, kl_reverse + not_kl_reverse


@triton.jit
def _multiclass(z, y, top_z, rest_z, log_sum_z, top_y, rest_y, log_sum_y):
    """Terms of the divergences of two softmaxes."""
    of_top = (top_y - top_z)[:, None]
    of_sum = (log_sum_y - log_sum_z)[:, None]
    from_top_z = z - top_z[:, None]
    from_top_y = y - top_y[:, None]
    p = tl.exp(from_top_z) / (1.0 + rest_z)[:, None]
    q = tl.exp(from_top_y) / (1.0 + rest_y)[:, None]
    direct = tl.abs(of_top) <= 1.0
    x = tl.where(direct, (y - z) - of_top, from_top_y - from_top_z) - of_sum
    near = tl.abs(x) < _NEAR
    p4 = (0.25 * z - (0.25 * top_z)[:, None]) - (0.25 * log_sum_z)[:, None]
    q4 = (0.25 * y - (0.25 * top_y)[:, None]) - (0.25 * log_sum_y)[:, None]
    return _outcome(p, q, p4, q4, near, _tanh_half(tl.where(near, x, 0.0)))


@triton.jit
def _compare(z, y, inside, of_z, of_y, MULTILABEL: tl.constexpr):
    """Sums over the classes of js, kl, kl_reverse and drift^2, and any crossing of 1/2.

    `of_z` and `of_y` hold top, rest, log_sum and direction of their rows.
    """
    top_z, rest_z, log_sum_z, direction_z = of_z
    top_y, rest_y, log_sum_y, direction_y = of_y
    if MULTILABEL:
        js, kl, kl_reverse = _multilabel(z, y)
    else:
        js, kl, kl_reverse = _multiclass(z, y, top_z, rest_z, log_sum_z, top_y, rest_y, log_sum_y)
    difference = tl.where(inside, direction_z - direction_y, 0.0)
    return (
        tl.sum(tl.where(inside, js, 0.0), 1),
        tl.sum(tl.where(inside, kl, 0.0), 1),
        tl.sum(tl.where(inside, kl_reverse, 0.0), 1),
        tl.sum(difference * difference, 1),
        tl.max((inside & ((z > 0.0) != (y > 0.0))).to(tl.int32), 1),
    )


@triton.jit
def _put(out, score: tl.constexpr, step, row_inside, bad, value):
    value = tl.where(bad, float("nan"), value.to(tl.float32))
    tl.store(out + score * step, value, mask=row_inside)


@triton.jit
def _emit(
    out,
    step,
    row_inside,
    bad,
    js,
    kl,
    kl_reverse,
    product,
    square_z,
    square_y,
    flip,
    margin_dense,
    margin_pruned,
    drift,
    loss_dense,
    loss_pruned,
    classes,
    MULTILABEL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
):
    """Write the scores of rows; `out` points at their first score, `step` leads to the next."""
    if MULTILABEL:
        js = js / classes
        kl = kl * (_KL_UNIT / classes)
        kl_reverse = kl_reverse * (_KL_UNIT / classes)
    else:
        kl = kl * _KL_UNIT
        kl_reverse = kl_reverse * _KL_UNIT
    if not (MULTILABEL and HAS_LABELS):  # with one class there is no other
        margin_dense = tl.where(classes > 1, margin_dense, float("nan"))
        margin_pruned = tl.where(classes > 1, margin_pruned, float("nan"))
    squares = square_z.to(tl.float64) * square_y.to(tl.float64)
    constant = squares == 0.0
    root = tl.sqrt(tl.where(constant, 1.0, squares))
    spearman = tl.where(constant, float("nan"), product.to(tl.float64) / root)
    _put(out, 0, step, row_inside, bad, tl.where(js < 0.0, 0.0, js))
    _put(out, 1, step, row_inside, bad, tl.where(kl < 0.0, 0.0, kl))
    _put(out, 2, step, row_inside, bad, tl.where(kl_reverse < 0.0, 0.0, kl_reverse))
    _put(out, 3, step, row_inside, bad, spearman)
    flipped = tl.where(bad, 0.0, flip.to(tl.float32))
    tl.store(out + 4 * step, flipped, mask=row_inside)
    _put(out, 5, step, row_inside, bad, margin_dense)
    _put(out, 6, step, row_inside, bad, margin_pruned)
    _put(out, 7, step, row_inside, bad, tl.sqrt_rn(drift))
    _put(out, 8, step, row_inside, bad, loss_dense)
    _put(out, 9, step, row_inside, bad, loss_pruned)
    _put(out, 10, step, row_inside, bad, loss_pruned - loss_dense)


# ------------------------------------------------------------------------------ few classes


@triton.jit
def _prepare_tile(
    logits,
    row_offsets,
    labels,
    row,
    row_inside,
    c,
    classes,
    MULTILABEL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
):
    inside = row_inside[:, None] & (c < classes)
    z, unusable = _load(logits, row_offsets[:, None] + c, inside)
    top, top_class, second, bottom, bad = _extremes(z, unusable, c, inside)
    scale = _scale(top, bottom)
    rest, square = _sums(z, c, inside, top, top_class, scale)
    log_sum = _log1p(rest)
    if not MULTILABEL:  # nothing but -inf: softmax has no value
        bad = bad | (top == -float("inf")).to(tl.int32)
    if MULTILABEL and HAS_LABELS:
        lowest, highest, positives, negatives, sum_loss = _targets(
            z, labels, row[:, None] * classes + c, inside
        )
        margin, loss = _supervise_multilabel(lowest, highest, positives, negatives, sum_loss)
    else:
        extremes = (top, top_class, second)
        margin, loss = _supervise(
            logits, row_offsets, labels, row, row_inside, classes, extremes, log_sum, HAS_LABELS
        )
    rank = _count_ranks(logits, row_offsets, z, inside, row_inside, classes)
    # A quotient, which no compiler contracts with the difference taken of it: equal rows must give
    # a drift of exactly zero.
    direction = (z * scale[:, None]) / _norm(square, scale)[:, None]
    return z, inside, bad, top_class, margin, loss, rank, (top, rest, log_sum, direction)


@triton.jit(do_not_specialize=_PER_BATCH)
def tile_kernel(
    dense,
    pruned,
    labels,
    out,
    levels,
    rows,
    classes,
    dense_row_stride,
    pruned_level_stride,
    pruned_row_stride,
    MULTILABEL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score ROWS rows at all levels; classes <= BLOCK."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    c = tl.arange(0, BLOCK)[None, :]
    z, inside, bad_z, class_z, margin_z, loss_z, rank_z, of_z = _prepare_tile(
        dense, row * dense_row_stride, labels, row, row_inside, c, classes, MULTILABEL, HAS_LABELS
    )
    square_z = tl.sum(rank_z * rank_z, 1)
    step = levels.to(tl.int64) * rows
    offsets = row * pruned_row_stride
    out += row
    for _level in range(levels):
        y, _, bad_y, class_y, margin_y, loss_y, rank_y, of_y = _prepare_tile(
            pruned, offsets, labels, row, row_inside, c, classes, MULTILABEL, HAS_LABELS
        )
        js, kl, kl_reverse, drift, flip = _compare(z, y, inside, of_z, of_y, MULTILABEL)
        if not MULTILABEL:
            flip = (class_z != class_y).to(tl.int32)
        _emit(
            out,
            step,
            row_inside,
            (bad_z | bad_y) != 0,
            js,
            kl,
            kl_reverse,
            tl.sum(rank_z * rank_y, 1),
            square_z,
            tl.sum(rank_y * rank_y, 1),
            flip,
            margin_z,
            margin_y,
            drift,
            loss_z,
            loss_y,
            classes,
            MULTILABEL,
            HAS_LABELS,
        )
        offsets += pruned_level_stride
        out += rows


# ------------------------------------------------------------------------------ many classes


@triton.jit
def _prepare_row(
    logits,
    row_offsets,
    labels,
    row,
    row_inside,
    classes,
    MULTILABEL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    top = tl.full([1], -float("inf"), tl.float32)
    second = top
    bottom = -top
    top_class = tl.zeros([1], tl.int32)
    bad = tl.zeros([1], tl.int32)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = c < classes
        z, unusable = _load(logits, row_offsets[:, None] + c, inside)
        here, here_class, here_second, here_bottom, here_bad = _extremes(z, unusable, c, inside)
        second = tl.maximum(tl.minimum(top, here), tl.maximum(second, here_second))
        top_class = tl.where(here > top, here_class, top_class)
        top = tl.maximum(top, here)
        bottom = tl.minimum(bottom, here_bottom)
        bad = bad | here_bad
    scale = _scale(top, bottom)
    rest = tl.zeros([1], tl.float32)
    square = rest
    lowest = tl.full([1], float("inf"), tl.float32)
    highest = -lowest
    positives = tl.zeros([1], tl.int32)
    negatives = positives
    sum_loss = rest
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = c < classes
        z, unusable = _load(logits, row_offsets[:, None] + c, inside)
        here_rest, here_square = _sums(z, c, inside, top, top_class, scale)
        rest += here_rest
        square += here_square
        if MULTILABEL and HAS_LABELS:
            here_lowest, here_highest, here_positives, here_negatives, here_loss = _targets(
                z, labels, row[:, None] * classes + c, inside
            )
            lowest = tl.minimum(lowest, here_lowest)
            highest = tl.maximum(highest, here_highest)
            positives += here_positives
            negatives += here_negatives
            sum_loss += here_loss
    log_sum = _log1p(rest)
    if MULTILABEL and HAS_LABELS:
        margin, loss = _supervise_multilabel(lowest, highest, positives, negatives, sum_loss)
    else:
        extremes = (top, top_class, second)
        margin, loss = _supervise(
            logits, row_offsets, labels, row, row_inside, classes, extremes, log_sum, HAS_LABELS
        )
    if not MULTILABEL:
        bad = bad | (top == -float("inf")).to(tl.int32)
    return bad, top, top_class, rest, log_sum, scale, _norm(square, scale), margin, loss


@triton.jit(do_not_specialize=_PER_BATCH)
def chunk_kernel(
    dense,
    pruned,
    labels,
    out,
    levels,
    rows,
    classes,
    dense_row_stride,
    pruned_level_stride,
    pruned_row_stride,
    MULTILABEL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score one row at one level, BLOCK classes at a time."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    level = tl.program_id(1).to(tl.int64)
    row_inside = row < rows
    offsets_z = row * dense_row_stride
    offsets_y = level * pruned_level_stride + row * pruned_row_stride
    bad_z, top_z, class_z, rest_z, log_sum_z, scale_z, norm_z, margin_z, loss_z = _prepare_row(
        dense, offsets_z, labels, row, row_inside, classes, MULTILABEL, HAS_LABELS, BLOCK
    )
    bad_y, top_y, class_y, rest_y, log_sum_y, scale_y, norm_y, margin_y, loss_y = _prepare_row(
        pruned, offsets_y, labels, row, row_inside, classes, MULTILABEL, HAS_LABELS, BLOCK
    )
    js = tl.zeros([1], tl.float32)
    kl = js
    kl_reverse = js
    drift = js
    flip = tl.zeros([1], tl.int32)
    product = tl.zeros([1], tl.int64)
    square_z = product
    square_y = product
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        inside = c < classes
        z, _ = _load(dense, offsets_z[:, None] + c, inside)
        y, _ = _load(pruned, offsets_y[:, None] + c, inside)
        of_z = (top_z, rest_z, log_sum_z, (z * scale_z[:, None]) / norm_z[:, None])
        of_y = (top_y, rest_y, log_sum_y, (y * scale_y[:, None]) / norm_y[:, None])
        here_js, here_kl, here_kl_reverse, here_drift, crosses = _compare(
            z, y, inside, of_z, of_y, MULTILABEL
        )
        js += here_js
        kl += here_kl
        kl_reverse += here_kl_reverse
        drift += here_drift
        flip = flip | crosses
        rank_z = _count_ranks(dense, offsets_z, z, inside, row_inside, classes)
        rank_y = _count_ranks(pruned, offsets_y, y, inside, row_inside, classes)
        product += tl.sum(rank_z * rank_y, 1)
        square_z += tl.sum(rank_z * rank_z, 1)
        square_y += tl.sum(rank_y * rank_y, 1)
    if not MULTILABEL:
        flip = (class_z != class_y).to(tl.int32)
    _emit(
        out + level * rows + row,
        levels.to(tl.int64) * rows,
        row_inside,
        (bad_z | bad_y) != 0,
        js,
        kl,
        kl_reverse,
        product,
        square_z,
        square_y,
        flip,
        margin_z,
        margin_y,
        drift,
        loss_z,
        loss_y,
        classes,
        MULTILABEL,
        HAS_LABELS,
    )


# ------------------------------------------------------------------------------ launch


def launch_options(classes: int) -> dict[str, int]:
    """Block sizes of the kernel that scores `classes` classes; ROWS is there for `tile_kernel`."""
    if classes > TILE_CLASSES:
        return {"BLOCK": CHUNK}
    block = max(8, triton.next_power_of_2(classes))
    return {"ROWS": max(1, _TILE_LOGITS // block), "BLOCK": block}


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def disagreement(
    dense: Tensor,  # [N, C] fp32, bf16 or fp16
    pruned: Tensor,  # [L, N, C]
    labels: Tensor | None,  # multiclass: int64 [N]; multilabel: float [N, C]
    task: str,
) -> Tensor:  # [11, L, N]
    """Every disagreement score of every row, in the order of `fastpie.ops.disagreement.SCORES`.

    Equivalent to::

        fastpie.ops.reference.disagreement(dense, pruned, labels, task)

    CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.

    Returns:
        fp32 on the device of the inputs.
    """
    dense, pruned = _rows_contiguous(dense), _rows_contiguous(pruned)
    multilabel = task == "multilabel"
    if labels is not None:
        labels = labels.float().contiguous() if multilabel else labels.contiguous()
    levels, rows, classes = pruned.shape
    out = torch.empty((_SCORES, levels, rows), dtype=torch.float32, device=dense.device)
    if out.numel() == 0:
        return out
    options = launch_options(classes)
    if classes > TILE_CLASSES:
        kernel, grid = chunk_kernel, (rows, levels)
    else:
        kernel, grid = tile_kernel, (triton.cdiv(rows, options["ROWS"]),)
    device = torch.cuda.device(dense.device) if dense.is_cuda else contextlib.nullcontext()
    with device:
        kernel[grid](
            dense,
            pruned,
            dense if labels is None else labels,  # any pointer: without labels it is not read
            out,
            levels,
            rows,
            classes,
            dense.stride(0),
            pruned.stride(0),
            pruned.stride(1),
            MULTILABEL=multilabel,
            HAS_LABELS=labels is not None,
            num_warps=4,
            enable_fp_fusion=False,
            **options,
        )
    return out
