"""p-values after adjustment, and what of a number can be told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra

__all__ = ["benjamini_hochberg", "column"]


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:  # [n] -> [n]
    """p-values adjusted for the false discovery rate (Benjamini and Hochberg, 1995).

    A NaN is no test: it stays NaN and does not count.
    """
    stats = load_extra("scipy.stats", "analysis", "the statistics")
    q = np.full(len(p), np.nan)
    told = ~np.isnan(p)
    if told.any():
        q[told] = stats.false_discovery_control(p[told])
    return q


def column(values: Sequence[float] | np.ndarray) -> pa.Array:
    """Numbers as fp64, null where they are not finite."""
    array = np.asarray(values, dtype=np.float64)
    return pa.array(array, mask=~np.isfinite(array))
