"""Loss weights from a mined table."""

from __future__ import annotations

import numpy as np

from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult

__all__ = ["hardness_weights", "rank_weights"]


def hardness_weights(
    result: MiningResult,
    *,
    by: str = "hardness",
    strength: float = 4.0,
    doubtful: float = 0.0,
) -> dict[str, float]:
    """Loss weights that attend to hard samples: `1 + strength * rank`, scaled to a mean of 1.

    `rank` is the sample's place in the order of hardness, from 0 (easiest) to 1 (hardest). A very
    hard sample can be a wrong label: `doubtful` is the guard, the fraction of the hardest samples
    that are left out (weight 0) instead of attended to. Source: Attend Who is Weak (arXiv
    2212.02675) with soft ranks; the guard is ours.

    Args:
        result: a mined run.
        by: the column to rank by, as in `MiningResult.select`.
        strength: how much more the hardest sample counts than the easiest.
        doubtful: fraction of the hardest samples to leave out, in [0, 1).

    Returns:
        A weight for every scored sample, by sample id, hardest first. For millions of samples
        `fastpie.HardnessSampler` holds the same weights in arrays.

    Raises:
        FastpieError: for a strength below 0 or `doubtful` outside [0, 1).
    """
    weights = rank_weights(len(result), strength, doubtful)
    return dict(zip(result.select(1.0, by=by), weights.tolist(), strict=True))


def rank_weights(count: int, strength: float, doubtful: float) -> np.ndarray:  # fp64 [count]
    """The weights of `hardness_weights`, hardest first.

    Raises:
        FastpieError: for a strength below 0 or not finite, or `doubtful` outside [0, 1).
    """
    if not 0 <= strength < np.inf:
        raise FastpieError(f"Expected `strength` of at least 0, but got {strength}.")
    if not 0 <= doubtful < 1:
        raise FastpieError(f"Expected `doubtful` in [0, 1), but got {doubtful}.")
    weights: np.ndarray = 1 + strength * np.linspace(1, 0, count)
    weights[: int(doubtful * count)] = 0
    if count:
        weights /= weights.mean()
    return weights
