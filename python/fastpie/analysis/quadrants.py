"""The four quadrants: hard or not, label in doubt or not; and the flag *atypical*."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.errors import FastpieError

__all__ = ["QUADRANTS", "highest", "quadrants"]

QUADRANTS = ("typical", "hard", "label in doubt", "hard, label in doubt")


def quadrants(
    hard: Any,  # [N]
    in_doubt: Any,  # [N]
    atypical: Any = None,  # [N]
    *,
    fraction: float = 0.05,
) -> pa.Table:
    """Put each sample into a quadrant by whether it is among the highest of either score.

    A wrong label is hard for a model, too, so "hard" alone is a list to learn from only without those
    in doubt: it is a quadrant of its own, and where there are more wrong labels than `fraction` it is
    small. Then raise `fraction`.

    Args:
        hard: hardness, higher = harder; null or NaN where unknown.
        in_doubt: `label_in_doubt`, higher = more doubtful.
        atypical: likewise; None without.
        fraction: of the samples with a value, in [0, 1], that count as high in each.

    Returns:
        One row a sample: `quadrant`, one of `QUADRANTS`, null where both are unknown (where one is,
        it counts as not high); `is_atypical` (bool), null where unknown.

    Raises:
        FastpieError: for a fraction outside [0, 1] or arrays of different lengths.
    """
    first, second = _numbers("hard", hard), _numbers("in_doubt", in_doubt)
    third = np.full(len(first), np.nan) if atypical is None else _numbers("atypical", atypical)
    if not len(first) == len(second) == len(third):
        raise FastpieError(
            f"Expected scores of the same samples, but got {len(first)}, {len(second)} and "
            f"{len(third)} values."
        )
    which = highest(first, fraction) + 2 * highest(second, fraction)
    unknown = np.isnan(first) & np.isnan(second)
    return pa.table(
        {
            "quadrant": pa.array(
                np.array(QUADRANTS, dtype=object)[which], pa.string(), mask=unknown
            ),
            "is_atypical": pa.array(highest(third, fraction), mask=np.isnan(third)),
        }
    )


def highest(values: Any, fraction: float = 0.05) -> np.ndarray:  # bool [N]
    """The `int(fraction * n)` highest of the n values that are known; of equals the first.

    Raises:
        FastpieError: for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    numbers = _numbers("values", values)
    known = int((~np.isnan(numbers)).sum())
    chosen = np.zeros(len(numbers), bool)
    chosen[np.argsort(-numbers, kind="stable")[: int(fraction * known)]] = True  # NaN last
    return chosen


def _numbers(name: str, values: Any) -> np.ndarray:
    """Fp64 [N] with NaN for null."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise FastpieError(f"Expected `{name}` of shape [N], but got {list(array.shape)}.")
    return array
