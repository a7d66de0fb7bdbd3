"""A readable twin of every kernel: plain PyTorch, slow and obvious.

The twins are the oracle of the tests and the implementation for fp64 and on devices that no kernel of
ours serves (and that have fp64: Apple's MPS does not). Nothing here is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "alias_table",
    "disagreement",
    "embedding_disagreement",
    "magnitude_levels",
    "masked_conv",
    "masked_conv_nhwc",
    "masked_linear",
    "normalize_uint8",
    "null",
    "pack_mask",
    "segmentation_disagreement",
    "soft_iou",
    "spearman",
    "top_k_update",
    "unpack_mask",
    "without_segmentation",
]


def null(input: Tensor) -> Tensor:
    """Copy a tensor.

    A twin takes what the operator takes and says in torch's words what the kernel computes.
    """
    return input.clone(memory_format=torch.contiguous_format)


def masked_conv(
    input: Tensor,  # [N, C, ...]
    weight: Tensor,  # [K, C / groups, ...]
    mask: Tensor,  # bool, the weight's shape
    bias: Tensor | None,  # [K]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution with the kept weights alone: each adds one shifted view of one channel.

    Any number of spatial dimensions, as many as there are strides.
    """
    padded = functional.pad(input, [p for p in reversed(padding) for _ in range(2)])
    out_channels, channels, *kernel = weight.shape
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    output = input.new_zeros([input.shape[0], out_channels, *size])
    if bias is not None:
        output += bias.view(-1, *[1] * len(size))
    for row, c, *tap in mask.nonzero().tolist():
        channel = row // (out_channels // groups) * channels + c
        shifted = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, size, stride, strict=True)
        ]
        place, view = (row, c, *tap), (slice(None), channel, *shifted)
        output[:, row] += weight[place] * padded[view]
    return output


def masked_linear(
    input: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    mask: Tensor,  # bool, the weight's shape
    bias: Tensor | None,  # [K]
) -> Tensor:  # [..., K]
    """Linear layer with the kept weights alone."""
    output = input.new_zeros([*input.shape[:-1], weight.shape[0]])
    if bias is not None:
        output += bias
    for row, channel in mask.nonzero().tolist():
        output[..., row] += weight[row, channel] * input[..., channel]
    return output


def pack_mask(mask: Tensor) -> Tensor:  # bool [K, C, *kernel] -> int32 [K, taps, words]
    """A mask as the kernels on channels-last tensors read it: one bit for each weight.

    Bit c % 32 of word c // 32 is set where the weight of channel c is kept; bits beyond C are 0.
    """
    channels = mask.shape[1]
    by_tap = mask.unsqueeze(-1).flatten(2).transpose(1, 2)  # [K, taps, C]
    by_tap = functional.pad(by_tap, (0, -channels % 32)).unflatten(2, (-(-channels // 32), 32))
    words = (by_tap.long() << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(words: Tensor, channels: int) -> Tensor:  # int32 [K, taps, words]
    """The opposite of `pack_mask`: bool [K, C, taps]."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return bits.flatten(2)[..., :channels].bool().transpose(1, 2)


def magnitude_levels(
    weights: Sequence[Tensor],  # each [...]
    counts: Sequence[int],  # [L], non-decreasing
) -> tuple[Tensor, Tensor]:  # uint8 [N], int64 [len(weights)]
    """The first level that removes each weight of the list that all tensors make, L where none does.

    Level l removes the first counts[l] of the list sorted by magnitude, equal ones by their place.
    The second result counts the weights of each tensor that are NaN or infinite.
    """
    magnitude = torch.cat([weight.detach().float().abs().reshape(-1) for weight in weights])
    order = magnitude.argsort(stable=True)
    codes = torch.full_like(magnitude, len(counts), dtype=torch.uint8)
    for level in reversed(range(len(counts))):
        codes[order[: counts[level]]] = level
    return codes, torch.stack([(~weight.isfinite()).sum() for weight in weights])


def normalize_uint8(
    images: Tensor,  # uint8 [N, C, H, W]
    mean: Tensor,  # fp32 [C]
    std: Tensor,  # fp32 [C]
    dtype: torch.dtype,
    channel_multiple: int,
) -> Tensor:  # [N, P, H, W] of dtype, channels_last
    """(images / 255 - mean) / std in fp32, with channels of zeros up to a multiple."""
    # On a GPU torch multiplies by the reciprocal of a number; by a tensor it divides.
    x = images.float() / torch.full((), 255.0, device=images.device)
    x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    x = functional.pad(x, (0, 0, 0, 0, 0, -images.shape[1] % channel_multiple))
    output = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    return output.copy_(x)


def masked_conv_nhwc(
    inputs: Sequence[Tensor],  # of each model [N, groups * C, *spatial]
    weight: Tensor,  # [K, *kernel, C]
    masks: Sequence[Tensor | None],  # int32 [K, taps, words], see pack_mask
    scales: Sequence[Tensor | None],  # [K]
    biases: Sequence[Tensor | None],  # [K]
    residuals: Sequence[Tensor | None],  # as the result
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activate: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:  # of each model [N, K, *spatial]
    """What csrc/include/fastpie/masked_conv_nhwc.h says, in the dtype of the operands.

    The dimensions have torch's order here; how they lie in memory is the kernels' affair.
    """
    filters, channels = weight.shape[0], weight.shape[-1]
    rank = len(stride)
    outputs = []
    for x, words, scale, bias, residual in zip(
        inputs, masks, scales, biases, residuals, strict=True
    ):
        kept = weight.movedim(-1, 1)  # [K, C, *kernel]
        if words is not None:
            kept = kept * unpack_mask(words, channels).reshape(kept.shape)
        if rank:
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
            y = convolve(x, kept, None, stride, padding, dilation, groups)
        else:
            y = functional.linear(x, kept)
        shape = (filters, *(1,) * rank)
        if scale is not None:
            y = y * scale.to(y.dtype).view(shape)
        if bias is not None:
            y = y + bias.to(y.dtype).view(shape)
        if residual is not None:
            y = y + residual
        outputs.append(y if activate is None else activate(y))
    return outputs


def disagreement(
    dense: Tensor,  # [N, C]
    pruned: Tensor,  # [L, N, C]
    labels: Tensor | None,  # multiclass: int64 [N]; multilabel: [N, C] of 1, 0 or NaN
    task: str,
) -> Tensor:  # [11, L, N], the rows of fastpie.ops.disagreement.SCORES
    """Scores of `csrc/include/fastpie/disagreement.h`, computed in fp64.

    Sources: KL and Jensen-Shannon divergence in nats (Lin, 1991, Divergence measures based on the
    Shannon entropy); Spearman's rho as Pearson's correlation of average ranks; drift as the
    distance of L2-normalised vectors (PreFIQs, arXiv 2605.13396).

    Returns:
        fp32 (fp64 for fp64 logits) on the device of the inputs.
    """
    result_dtype = torch.float64 if dense.dtype is torch.float64 else torch.float32
    z = dense.double().expand(pruned.shape)
    y = pruned.double()
    bad = _unusable(z, task) | _unusable(y, task)

    if task == "multiclass":
        log_p, log_q = functional.log_softmax(z, -1), functional.log_softmax(y, -1)
        js, kl, kl_reverse = _divergences(log_p.exp(), log_p, log_q.exp(), log_q)
        flip = z.argmax(-1) != y.argmax(-1) if z.numel() else torch.zeros_like(bad)
    else:
        js = kl = kl_reverse = torch.zeros((), dtype=torch.float64, device=z.device)
        for sign in (1, -1):  # the class is there; it is not
            log_p, log_q = functional.logsigmoid(sign * z), functional.logsigmoid(sign * y)
            p, q = torch.sigmoid(sign * z), torch.sigmoid(sign * y)
            parts = _divergences(p, log_p, q, log_q)
            js, kl, kl_reverse = js + parts[0], kl + parts[1], kl_reverse + parts[2]
        classes = z.shape[-1]
        js, kl, kl_reverse = js / classes, kl / classes, kl_reverse / classes
        flip = ((z > 0) != (y > 0)).any(-1)

    difference = functional.normalize(z, dim=-1) - functional.normalize(y, dim=-1)
    drift = torch.linalg.vector_norm(difference, dim=-1)

    margin_dense, margin_pruned = _margin(z, labels, task), _margin(y, labels, task)
    loss_dense, loss_pruned = _loss(z, labels, task), _loss(y, labels, task)
    scores = [js.clamp(min=0), kl.clamp(min=0), kl_reverse.clamp(min=0), spearman(z, y)]
    scores += [flip.double(), margin_dense, margin_pruned, drift]
    scores += [loss_dense, loss_pruned, loss_pruned - loss_dense]
    out = torch.stack(scores)
    out = torch.where(bad, torch.nan, out)
    out = torch.cat([out[:4], torch.where(bad, 0.0, out[4:5]), out[5:]])  # flip is never NaN
    return out.to(result_dtype)


def _unusable(z: Tensor, task: str) -> Tensor:
    """Rows with NaN or +inf; with softmax also rows of nothing but -inf."""
    bad = (z.isnan() | (z == torch.inf)).any(-1)
    return bad | (z == -torch.inf).all(-1) if task == "multiclass" else bad


def _divergences(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Jensen-Shannon, KL(p || q) and KL(q || p), summed over the last dimension; 0 log 0 = 0."""
    m = (p + q) / 2

    def relative(a: Tensor, log_ratio: Tensor) -> Tensor:
        # However small a share is, also where it is zero in fp64, infinity is infinity.
        term = a * torch.where(a > 0, log_ratio, 0.0)
        return torch.where(log_ratio == torch.inf, torch.inf, term).sum(-1)

    # p / m and not log p - log m: the ratio of equal numbers is exactly 1.
    ratio_p, ratio_q = (torch.where(a > 0, a / m.clamp(min=1e-300), 1.0) for a in (p, q))
    js = (relative(p, ratio_p.log()) + relative(q, ratio_q.log())) / 2
    return js, relative(p, log_p - log_q), relative(q, log_q - log_p)


def spearman(z: Tensor, y: Tensor) -> Tensor:  # [..., C], [..., C] -> [...]
    """Spearman's rho over the last dimension, average ranks for ties, fp64; NaN for a constant row."""
    rank_z, rank_y = _centred_ranks(z), _centred_ranks(y)
    covariance = (rank_z * rank_y).sum(-1)
    return covariance / (rank_z.square().sum(-1) * rank_y.square().sum(-1)).sqrt()


def _centred_ranks(z: Tensor) -> Tensor:
    """Average ranks, doubled and centred: (#less + #not greater) - C, exact integers."""
    z = z.detach().contiguous()
    z = torch.where(z.isnan(), 0.0, z)  # such rows become NaN later
    ordered = z.sort(-1).values
    less = torch.searchsorted(ordered, z, right=False)
    not_greater = torch.searchsorted(ordered, z, right=True)
    return (less + not_greater - z.shape[-1]).double()


def _margin(z: Tensor, labels: Tensor | None, task: str) -> Tensor:
    classes = z.shape[-1]
    if task == "multilabel" and labels is not None:
        known = ~labels.isnan()
        positive, negative = (labels > 0.5) & known, (labels <= 0.5) & known
        lowest = torch.where(positive, z, torch.inf).amin(-1)
        highest = torch.where(negative, z, -torch.inf).amax(-1)
        # The decision threshold, 0, stands in for a side that the row does not have.
        lowest = torch.where(positive.any(-1), lowest, 0.0)
        highest = torch.where(negative.any(-1), highest, 0.0)
        return torch.where(known.any(-1), lowest - highest, torch.nan)
    if classes == 1:
        return torch.full(z.shape[:-1], torch.nan, dtype=z.dtype, device=z.device)
    if labels is None:
        top = z.topk(2, -1).values
        return top[..., 0] - top[..., 1]
    valid = (labels >= 0) & (labels < classes)
    index = torch.where(valid, labels, 0).expand(z.shape[:-1]).unsqueeze(-1)
    of_label = z.gather(-1, index).squeeze(-1)
    best_other = z.scatter(-1, index, -torch.inf).amax(-1)
    return torch.where(valid, of_label - best_other, torch.nan)


def _loss(z: Tensor, labels: Tensor | None, task: str) -> Tensor:
    if labels is None:
        return torch.full(z.shape[:-1], torch.nan, dtype=z.dtype, device=z.device)
    if task == "multilabel":
        known = ~labels.isnan()
        signed = torch.where(labels > 0.5, z, -z)
        loss = torch.where(known, -functional.logsigmoid(signed), 0.0)
        return loss.sum(-1) / known.sum(-1)  # 0 / 0 = NaN where nothing is known
    valid = (labels >= 0) & (labels < z.shape[-1])
    index = torch.where(valid, labels, 0).expand(z.shape[:-1]).unsqueeze(-1)
    loss = -functional.log_softmax(z, -1).gather(-1, index).squeeze(-1)
    return torch.where(valid, loss, torch.nan)


def embedding_disagreement(
    dense: Tensor,  # [N, D]
    pruned: Tensor,  # [L, N, D]
) -> Tensor:  # [L, N]
    """Drift of `csrc/include/fastpie/embedding_disagreement.h`, computed in fp64.

    Source: PreFIQs, arXiv 2605.13396: the L2 distance of L2-normalised embeddings.

    Returns:
        fp32 (fp64 for fp64 embeddings) on the device of the inputs.
    """
    z = functional.normalize(dense.double(), dim=-1)
    y = functional.normalize(pruned.double(), dim=-1)
    drift: Tensor = torch.linalg.vector_norm(z - y, dim=-1)
    return drift.to(torch.float64 if dense.dtype is torch.float64 else torch.float32)


def segmentation_disagreement(
    dense: Tensor,  # [N, C, ...]
    pruned: Tensor,  # [L, N, C, ...]
) -> Tensor:  # [2, L, N], the rows of fastpie.ops.segmentation_disagreement.IOUS
    """Scores of `csrc/include/fastpie/segmentation_disagreement.h`, computed in fp64.

    Returns:
        fp32 (fp64 for fp64 logits) on the device of the inputs.
    """
    z, y = dense.double().flatten(2), pruned.double().flatten(3)
    classes = z.shape[1]
    if classes == 1:
        hard_p, hard_q = z > 0, y > 0
    else:
        index = torch.arange(1, classes, device=z.device).view(-1, 1)
        hard_p, hard_q = z.argmax(1, True) == index, y.argmax(2, True) == index
    both = (hard_p & hard_q).flatten(2).sum(-1)
    either = (hard_p | hard_q).flatten(2).sum(-1)
    iou = torch.where(either > 0, both / either.clamp(min=1).double(), 1.0)
    bad = without_segmentation(z) | without_segmentation(y)
    out = torch.where(bad, torch.nan, torch.stack([iou, soft_iou(z, y)]))
    return out.to(torch.float64 if dense.dtype is torch.float64 else torch.float32)


def soft_iou(z: Tensor, y: Tensor) -> Tensor:  # [N, C, P], [L, N, C, P] -> [L, N]
    """Sum of minima over sum of maxima of the foreground's probabilities (Ruzicka), differentiable."""
    if z.shape[1] == 1:
        p, q = z.sigmoid(), y.sigmoid()
    else:
        p, q = z.softmax(-2)[..., 1:, :], y.softmax(-2)[..., 1:, :]  # class 0 is the background
    lower = torch.minimum(p, q).flatten(2).sum(-1)
    upper = torch.maximum(p, q).flatten(2).sum(-1)
    return torch.where(upper >= 1e-30, lower / upper.clamp(min=1e-30), 1.0)


def without_segmentation(z: Tensor) -> Tensor:  # [..., C, P] -> [...]
    """Images with NaN or +inf, or of several classes with a pixel of nothing but -inf."""
    bad = (z.isnan() | (z == torch.inf)).flatten(-2).any(-1)
    return bad if z.shape[-2] == 1 else bad | (z == -torch.inf).all(-2).any(-1)


def top_k_update(
    values: Tensor,  # fp32 [k]
    ids: Tensor,  # int64 [k]
    scores: Tensor,  # fp32 [L, n]
    new_ids: Tensor | None,  # int64 [n]
    first_id: int,
) -> tuple[Tensor, Tensor]:  # fp32 [k], int64 [k]
    """The next state of `csrc/include/fastpie/top_k.h`: the first k of all, old and new."""
    k = len(values)
    mean, new_ids = samples_of(scores, new_ids, first_id)
    enters = mean > -torch.inf
    values = torch.cat([values, torch.where(enters, mean, -torch.inf)])
    ids = torch.cat([ids, torch.where(enters, new_ids, -1)])
    by_id = ids.argsort(stable=True)
    order = by_id[values[by_id].argsort(descending=True, stable=True)][:k]
    return values[order], ids[order]


def samples_of(
    scores: Tensor,  # fp32 [L, n]
    new_ids: Tensor | None,  # int64 [n]
    first_id: int,
) -> tuple[Tensor, Tensor]:  # fp32 [n], int64 [n]
    """Mean over the levels, as the table of `fastpie.mine` has it, and the id of each sample."""
    total = torch.zeros(scores.shape[1:], dtype=torch.float64, device=scores.device)
    for level in scores:
        total = total + level.double()
    if new_ids is None:
        new_ids = first_id + torch.arange(scores.shape[1], device=scores.device)
    return (total / scores.shape[0]).float(), new_ids


def alias_table(weights: Tensor) -> tuple[Tensor, Tensor]:  # fp64 [n] -> fp64 [n], int64 [n]
    """The table of Vose (1991): an entry below the mean is filled up to it by one above.

    Which entry fills which is not the kernel's choice; what the tables draw is the same.
    """
    scaled = (weights / weights.max() / (weights / weights.max()).mean()).tolist()
    probability, alias = [1.0] * len(scaled), list(range(len(scaled)))
    below = [i for i, share in enumerate(scaled) if share < 1]
    above = [i for i, share in enumerate(scaled) if share >= 1]
    while below and above:
        i, donor = below.pop(), above[-1]
        probability[i], alias[i] = scaled[i], donor
        scaled[donor] -= 1 - scaled[i]
        if scaled[donor] < 1:
            below.append(above.pop())
    return (
        torch.tensor(probability, dtype=torch.float64, device=weights.device),
        torch.tensor(alias, dtype=torch.int64, device=weights.device),
    )
