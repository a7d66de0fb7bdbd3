"""How sure a hardness is: an interval for each sample."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.mining.result import MiningResult
from fastpie.mining.scoring import level_column

__all__ = ["hardness_interval", "hardness_values"]

_CONFIDENCE = 0.95
_CHUNK = 1 << 22  # resampled means at a time


def hardness_interval(
    values: np.ndarray,  # [M, N]
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fp64 [N], fp64 [N]
    """95 % bootstrap interval of each sample's hardness, the mean of its M values.

    With one value a model it says how far the hardness would move with other models of the same kind
    (other seeds), which is what a reader takes an interval for. With one value a level it says only
    how far the hardness depends on which levels the ladder has: levels are chosen, not drawn, and
    another model is not in it. `hardness_values` gives either.

    The M values are resampled with replacement, the same way for every sample, and the mean's
    percentiles taken, farther out than 2.5 % for small M ("expanded percentile", Hesterberg, 2015,
    arXiv 1411.5279: a plain percentile interval is too short by about `sqrt((M - 1) / M)` and by the
    normal quantile in place of Student's). Up to about 5 values it ends at the lowest and highest
    value, and holds the truth less often than 95 %.

    Args:
        values: one row a model or level.
        resamples: of the bootstrap.
        seed: equal seeds give equal intervals.

    Returns:
        Lower and upper bounds; NaN for a sample with a NaN, and all NaN with fewer than two rows.

    Raises:
        FastpieError: for values of another shape.
    """
    array = np.asarray(values)
    if array.ndim != 2:
        raise FastpieError(f"Expected `values` of shape [M, N], but got {list(array.shape)}.")
    if resamples < 1:
        raise FastpieError(f"Expected `resamples` of at least 1, but got {resamples}.")
    models, samples = array.shape
    bounds = np.full((2, samples), np.nan)
    if models < 2:
        return bounds[0], bounds[1]
    stats = load_extra("scipy.stats", "analysis", "intervals")
    far = np.sqrt(models / (models - 1)) * stats.t.ppf((1 - _CONFIDENCE) / 2, models - 1)
    tail = stats.norm.cdf(far)
    generator = np.random.default_rng(seed)
    shares = generator.multinomial(models, np.full(models, 1 / models), resamples) / models
    step = max(1, _CHUNK // resamples)
    for begin in range(0, samples, step):
        rows = slice(begin, begin + step)
        means = shares @ array[:, rows].astype(np.float64)
        bounds[:, rows] = np.quantile(means, [tail, 1 - tail], axis=0)
    return bounds[0], bounds[1]


def hardness_values(
    run: MiningResult | str | os.PathLike[str],
) -> tuple[np.ndarray, str]:  # fp32 [M, N]
    """What the hardness of a run's samples is the mean of.

    Returns:
        One row a model, and "model", for a run of several models; else one row a level, and "level".
        Columns in the order of `run.table`.

    Raises:
        FastpieError: if there is no run.
    """
    run = run if isinstance(run, MiningResult) else MiningResult(run)
    if run.members:
        ids = run.table.column("sample_id")
        values = []
        for model in run.members:
            # A model can have scored samples that another could not.
            rows = pc.index_in(ids, model.table.column("sample_id")).to_numpy()
            values.append(model.table.column("hardness").to_numpy()[rows])
        return np.stack(values), "model"
    table = run.table
    levels = run.record["config"]["sparsities"]
    for score in ("loss_pruned", "js", "iou_soft", "drift"):  # as `Scorer.hardness` chooses
        names = [level_column(score, s) for s in levels]
        if names[0] in table.column_names:
            matrix = np.stack([table.column(name).to_numpy() for name in names])
            return 1 - matrix if score == "iou_soft" else matrix, "level"
    return table.column("hardness").to_numpy()[None], "level"  # no ladder
