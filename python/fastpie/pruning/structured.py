"""What structured methods of `prune` choose from: groups of M neighbours, and whole filters."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from fastpie.errors import FastpieError

__all__ = ["channels_last_rows", "filter_means", "keep_of_pattern", "pattern_of"]

_PATTERN = re.compile(r"([1-9]\d{0,8}):([1-9]\d{0,8})")  # ten digits would pass 2**31
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def pattern_of(method: str) -> tuple[int, int] | None:
    """N and M of "N:M", None for another text.

    Raises:
        FastpieError: unless 1 <= N < M.
    """
    match = _PATTERN.fullmatch(method)
    if match is None:
        return None
    kept, size = int(match[1]), int(match[2])
    if kept >= size:
        raise FastpieError(
            f"Expected a pattern N:M with N below M, so that something goes, but got {method!r}."
        )
    return kept, size


def channels_last_rows(weight: Tensor) -> Tensor:  # [K, kernel * C / groups]
    """A filter a row, its weights ordered by tap, then by input channel; a copy where need be.

    The order of `fastpie.ops.sparse24` and of sparse tensor cores: neighbours are neighbouring input
    channels at one tap.
    """
    return weight.movedim(1, -1).flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)


def keep_of_pattern(
    weight: Tensor,  # [K, C / groups, *kernel]
    kept: int,
    size: int,
) -> Tensor:  # bool, the weight's shape
    """The `kept` largest magnitudes of every `size` neighbours in a row of `channels_last_rows`.

    The last group of a row may be shorter and then keeps as many, as though zeros followed. Of
    equal magnitudes the one at the lower index goes first. On the weight's device, in its dtype.
    """
    rows = channels_last_rows(weight.detach()).abs()
    count, columns = rows.shape
    short = -columns % size
    groups = nn.functional.pad(rows, (0, short), value=-1.0).view(
        count, (columns + short) // size, size
    )
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(-1, order[..., : size - kept], False)
    keep = keep.view(count, columns + short)[:, :columns]
    if weight.ndim < 2:
        return keep.reshape(weight.shape)
    shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
    return keep.reshape(shape).movedim(-1, 1).contiguous()


def filter_means(
    name: str,
    module: nn.Module,
    magnitude: np.ndarray,  # [K * C / groups * kernel], fp32 or fp64, absolute values
    norm: int,
) -> np.ndarray:  # fp64 [K]
    """Power mean of the magnitudes of each filter: its norm in units that all layers share.

    In one layer the order is that of the L1 or L2 norm; over several layers a norm alone would
    favour those with large filters.

    Raises:
        FastpieError: for a transposed convolution, whose first dimension is not its output.
    """
    if isinstance(module, _TRANSPOSED):
        raise FastpieError(
            f"Expected the filters of `{name}` along the first dimension of the weight, but those "
            f"of a {type(module).__name__} lie along the second; exclude it."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = magnitude.reshape(len(weight), -1).astype(np.float64)
    means: np.ndarray = rows.mean(1) if norm == 1 else np.sqrt(np.square(rows).mean(1))
    return means
