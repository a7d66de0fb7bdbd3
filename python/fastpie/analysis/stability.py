"""How far exemplars move with level, model, definition and masks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.analysis.predictions import Predictions
from fastpie.analysis.significance import column
from fastpie.errors import FastpieError
from fastpie.scores.pie import scored_exemplars

__all__ = ["control_share", "stability", "stability_of_scores"]

_DEFINITIONS = {
    "multiclass": ("spearman", "modal", "taxicab", "js", "margin", "flip"),
    "multilabel": ("spearman", "vote", "js", "margin", "flip"),
}


@dataclass(frozen=True)
class _Found:
    """What a definition makes of one set of predictions."""

    rows: np.ndarray  # int64, of the PIEs
    score: np.ndarray  # fp64 [N], higher = harder, NaN unknown


def stability(
    predictions: Predictions,
    *,
    definition: str = "spearman",
    sparsity: float | None = None,
    fraction: float = 0.05,
    threshold: float = 0.5,
    control: Predictions | None = None,
    hardness: np.ndarray | None = None,  # [N]
) -> pa.Table:
    """How far the set of PIEs and the ranking behind it agree with themselves when something changes.

    Sets that agree by chance alone have a Jaccard index near f / (2 - f) (.026 for f = .05).

    Args:
        predictions: of one model or several, at one level or several.
        definition: what changes are measured by, as of `fastpie.pie`, but "drift".
        sparsity: the level at which models and definitions are compared; by default the highest.
        fraction: as of `fastpie.pie`.
        threshold: as of `fastpie.pie`.
        control: predictions of the same samples with random masks instead, at some of the same
            levels.
        hardness: of the samples (a run's column, higher = harder): its hardest `fraction` is compared
            with the definitions as one more of them.

    Returns:
        One row a comparison: `what` is compared: "level" (each two levels, averaged over the models;
        `a`, `b` the sparsities), "model" (each two models at `sparsity`, by their numbers),
        "definition" (each two that the task has, by their names) or "control" (magnitude and random
        masks at the level `a`; `b` is "control"); `jaccard` of the two sets (null where both are
        empty); Spearman's `rank_correlation` of the two scores (null where one is constant) over the
        `n` samples that have both.

    Raises:
        FastpieError: for an unknown level or definition, or a control of other samples or classes.
    """
    _check(definition)
    dense = predictions.probabilities()
    pruned = predictions.probabilities(predictions.level(sparsity))
    options = (predictions.task, fraction, threshold)
    rows = []
    if len(predictions.sparsities) > 1:
        found = {
            _text(s): _found(dense, predictions.probabilities(place), definition, *options)
            for place, s in enumerate(predictions.sparsities)
        }
        rows += _compared("level", found)
    if predictions.models > 1:
        found = {
            str(model): _found(dense[model], pruned[model], definition, *options)
            for model in range(predictions.models)
        }
        rows += _compared("model", found)
    found = {name: _found(dense, pruned, name, *options) for name in _DEFINITIONS[predictions.task]}
    if hardness is not None:
        found["hardness"] = _of_score("hardness", hardness, predictions.samples, fraction)
    rows += _compared("definition", found)
    if control is not None:
        ours, theirs = _aligned(predictions, control)
        for s in _common_levels(ours, theirs):
            pair = (
                _found(p.probabilities(), p.probabilities(p.level(s)), definition, *options)
                for p in (ours, theirs)
            )
            rows += _compared("control", dict(zip((_text(s), "control"), pair, strict=True)))
    return _table(rows)


def stability_of_scores(
    what: str,
    scores: Mapping[str, np.ndarray],  # each [N]
    *,
    fraction: float = 0.05,
) -> pa.Table:
    """The same of any scores, say a column of a run that kept no logits, or of runs with other masks.

    Args:
        what: is compared, for the column `what`.
        scores: by name, higher = harder, of the same samples in the same order; NaN unknown.
        fraction: of the samples that is each score's set, its hardest, equals in the order of the rows.

    Returns:
        One row for each two scores, with the columns of `stability`.

    Raises:
        FastpieError: for scores of other lengths, or a fraction outside [0, 1].
    """
    samples = len(next(iter(scores.values()), ()))
    found = {name: _of_score(name, score, samples, fraction) for name, score in scores.items()}
    return _table(_compared(what, found))


def control_share(
    predictions: Predictions,
    control: Predictions,
    *,
    definition: str = "spearman",
    sparsity: float | None = None,
    fraction: float = 0.05,
    threshold: float = 0.5,
) -> dict[str, float | None]:
    """How much of the disagreement is magnitude pruning's own, and how much comes with any damage.

    The scores of magnitude and of random masks at one level are compared as ranks. Both are noisy,
    and noise alone would look like magnitude's own share. With two models or more that is corrected
    for (Spearman, 1904, "correction for attenuation"): the correlation of one half of the models
    under magnitude with the other half under random masks, over the geometric mean of the
    correlations of half with half under the same masks. Its square is the share of the variance of
    the ranks that any damage of the same size explains. With one model nothing can be corrected:
    the shares are then those of the raw correlation, in which the dense model's own noise is common
    to both and the masks' is not.

    Args:
        predictions: with magnitude masks; likewise the others as of `stability`.
        control: of the same samples, with random masks.
        definition: as of `fastpie.pie`, but "drift".
        sparsity: a level that both have; by default the highest of `predictions`.
        fraction: as of `fastpie.pie`.
        threshold: as of `fastpie.pie`.

    Returns:
        `rank_correlation` of the two scores, averaged over the models; `reliability` and
        `control_reliability` (half with half; None with one model); `any_damage` and `own`, which sum
        to 1 (None where the reliability is not above 0); `pies_shared`, the share of magnitude's PIEs
        that are the control's too, and `pies_shared_by_chance`.

    Raises:
        FastpieError: as `stability`.
    """
    _check(definition)
    predictions, control = _aligned(predictions, control)
    sparsity = predictions.sparsities[predictions.level(sparsity)]
    options = (definition, predictions.task, fraction, threshold)
    outputs = [
        (p.probabilities(), p.probabilities(p.level(sparsity))) for p in (predictions, control)
    ]
    pair = [_found(dense, pruned, *options) for dense, pruned in outputs]
    correlation = _rank_correlation(pair[0].score, pair[1].score)[0]
    reliability = [np.nan, np.nan]
    corrected = correlation
    if min(predictions.models, control.models) > 1:
        halves = [
            [_found(dense[h::2], pruned[h::2], *options).score for h in (0, 1)]
            for dense, pruned in outputs
        ]
        reliability = [_rank_correlation(*half)[0] for half in halves]
        cross = np.mean([_rank_correlation(halves[0][h], halves[1][1 - h])[0] for h in (0, 1)])
        possible = min(reliability) > 0
        corrected = float(cross / np.sqrt(np.prod(reliability))) if possible else np.nan
    shared = min(max(corrected, 0.0), 1.0) ** 2 if np.isfinite(corrected) else np.nan
    common = len(np.intersect1d(pair[0].rows, pair[1].rows))
    numbers = {
        "rank_correlation": correlation,
        "reliability": reliability[0],
        "control_reliability": reliability[1],
        "any_damage": shared,
        "own": 1 - shared,
        "pies_shared": common / len(pair[0].rows) if len(pair[0].rows) else np.nan,
        "pies_shared_by_chance": len(pair[1].rows) / max(1, control.samples),
    }
    return {name: float(v) if np.isfinite(v) else None for name, v in numbers.items()}


def _text(sparsity: float) -> str:
    return f"{sparsity:.12g}"


def _check(definition: str) -> None:
    if definition == "drift":
        raise FastpieError(
            "Expected a definition on predictions, but 'drift' is one on embeddings: compare what "
            "fastpie.pie gives for each run."
        )


def _found(
    dense: np.ndarray,  # [S, N, C] or [N, C]
    pruned: np.ndarray,
    definition: str,
    task: str,
    fraction: float,
    threshold: float,
) -> _Found:
    return _Found(*scored_exemplars(dense, pruned, definition, fraction, threshold, task=task))


def _of_score(name: str, values: np.ndarray, samples: int, fraction: float) -> _Found:
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    score = np.asarray(values, dtype=np.float64)
    if score.shape != (samples,):
        raise FastpieError(f"Expected {name!r} of shape [{samples}], but got {list(score.shape)}.")
    order = np.argsort(-score, kind="stable")  # NaN last
    return _Found(order[: int(fraction * samples)], score)


def _table(rows: list[tuple[str, str, str, float, float, int]]) -> pa.Table:
    return pa.table(
        {
            "what": pa.array([row[0] for row in rows], pa.string()),
            "a": pa.array([row[1] for row in rows], pa.string()),
            "b": pa.array([row[2] for row in rows], pa.string()),
            "jaccard": column([row[3] for row in rows]),
            "rank_correlation": column([row[4] for row in rows]),
            "n": pa.array([row[5] for row in rows], pa.int64()),
        }
    )


def _compared(
    what: str, found: Mapping[str, _Found]
) -> list[tuple[str, str, str, float, float, int]]:
    """A row for each two."""
    rows = []
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        shared = len(np.intersect1d(first.rows, second.rows))
        union = len(first.rows) + len(second.rows) - shared
        jaccard = shared / union if union else np.nan
        rows.append((what, a, b, jaccard, *_rank_correlation(first.score, second.score)))
    return rows


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """Spearman's rho over the samples that have both scores, NaN if one is constant; their number."""
    stats = load_extra("scipy.stats", "analysis", "rank correlations")
    known = ~(np.isnan(first) | np.isnan(second))
    count = int(known.sum())
    if count < 2:
        return np.nan, count
    ranks = [stats.rankdata(score[known]) for score in (first, second)]
    if any(r[0] == r.min() == r.max() for r in ranks):
        return np.nan, count
    return float(np.corrcoef(*ranks)[0, 1]), count


def _common_levels(first: Predictions, second: Predictions) -> list[float]:
    common = [s for s in first.sparsities if np.isclose(second.sparsities, s, 0, 1e-9).any()]
    if not common:
        raise FastpieError(
            f"Expected a control at some of the levels {first.sparsities}, but it has "
            f"{second.sparsities}."
        )
    return common


def _aligned(first: Predictions, second: Predictions) -> tuple[Predictions, Predictions]:
    """Both with the samples that both have, in one order.

    A run can have failed on samples that another could score.
    """
    if first.task != second.task or first.classes != second.classes:
        raise FastpieError(
            f"Expected a control of {first.classes} classes, {first.task}, but it has "
            f"{second.classes}, {second.task}."
        )
    if first.sample_ids is None or second.sample_ids is None:
        if first.samples != second.samples:
            raise FastpieError(
                f"Expected a control of the same {first.samples} samples, but it has {second.samples}."
            )
        return first, second
    if first.sample_ids == second.sample_ids:
        return first, second
    places = {sample: row for row, sample in enumerate(second.sample_ids)}
    rows = [row for row, sample in enumerate(first.sample_ids) if sample in places]
    if not rows:
        raise FastpieError("Expected a control of the same samples, but it has none of them.")
    return _at(first, rows), _at(second, [places[first.sample_ids[row]] for row in rows])


def _at(predictions: Predictions, rows: list[int]) -> Predictions:
    ids, labels = predictions.sample_ids, predictions.labels
    return replace(
        predictions,
        dense=predictions.dense[:, rows],
        pruned=predictions.pruned[:, :, rows],
        labels=None if labels is None else labels[rows],
        sample_ids=None if ids is None else [ids[row] for row in rows],
    )
