"""The samples of a report as the page's script reads them: columns of numbers and texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.mining.result import MiningResult
from fastpie.report.columns import Columns, codes_of
from fastpie.report.identities import Identities
from fastpie.report.probabilities import probabilities

__all__ = ["FLAGS", "SCORES", "Score", "records"]


class Score(NamedTuple):
    """A column that samples are sorted by.

    Attributes:
        key: of the table.
        name: on the page.
        low: whether a low value comes first.
    """

    key: str
    name: str
    low: bool = False


SCORES = (
    Score("hardness", "Hardness"),
    Score("label_in_doubt", "Label in doubt"),
    Score("atypical", "Atypical"),
    Score("js", "Disagreement (JS)"),
    Score("iou_soft", "Overlap (soft IoU)", True),
    Score("drift", "Drift"),
    Score("feature_drift", "Feature drift"),
    Score("loss_dense", "Loss, dense"),
    Score("loss_pruned", "Loss, pruned"),
    Score("damage", "Damage"),
    Score("margin_dense", "Margin, dense", True),
    Score("margin_pruned", "Margin, pruned", True),
    Score("margin_committee", "Margin, committee", True),
    Score("js_committee", "Disagreement, committee"),
    Score("spearman", "Rank correlation", True),
    Score("first_flip", "First level that flips", True),
    Score("brightness", "Brightness", True),
    Score("contrast", "Contrast", True),
    Score("sharpness", "Sharpness", True),
)
FLAGS = {
    "wrong": "dense wrong",
    "changed": "flips",
    "lost": "right, pruned wrong",
    "pie": "PIE",
    "duplicate": "duplicate",
    "blank": "blank",
    "dark": "dark",
    "bright": "bright",
    "blurred": "blurred",
}
# Attributes that many share and that name nobody: shown and filtered by. Age in decades.
_ATTRIBUTES = ("sex", "age", "view", "site", "split")
_NO_ATTRIBUTES = ("sample_id", "label", *_ATTRIBUTES)
_MOST_VALUES = 60
_MOST_OTHERS = 20
_MOST_TEXT = 300


def records(
    result: MiningResult,
    columns: Columns,
    rows: np.ndarray,  # [n]
    name_of: Callable[[int], str],
    identities: Identities,
) -> dict[str, Any]:
    """What JSON can hold of some samples; every list has an entry for each sample.

    Args:
        result: the run.
        columns: of the run and its analysis.
        rows: of the samples in `columns`.
        name_of: the name of a class.
        identities: names of the samples.
    """
    some = columns.rows(rows)
    shown, note = probabilities(result, columns, rows)
    labels, several = some.numbers("label"), some.multilabels()
    dense = some.numbers("prediction_dense")
    levels = list(some.at_levels("prediction_pruned").values())
    named: set[int] = set()
    for values in (labels, dense, *levels):
        if values is not None:
            named |= {int(v) for v in np.unique(values[np.isfinite(values)])}
    for of_sample in shown or []:
        named |= {c for c, _ in of_sample}
    if several is not None:
        named |= set(np.flatnonzero((several == 1).any(0)).tolist())
    quadrant = some.codes("quadrant")
    ids = some.texts("sample_id")
    return {
        "levels": columns.sparsities,
        "classes": {str(index): name_of(index)[:_MOST_TEXT] for index in sorted(named)},
        "ids": [identities.of(i)[:_MOST_TEXT] for i in ids],
        "scores": _scores(columns, rows),
        "interval": _interval(some),
        "label": _integers(labels),
        "labels": None if several is None else [np.flatnonzero(r == 1).tolist() for r in several],
        "dense": _integers(dense),
        "pruned": [_integers(level) for level in levels],
        "probabilities": None
        if shown is None
        else [[[c, *(_per_mille(p) for p in values)] for c, values in one] for one in shown],
        "probability_note": note,
        "flags": _flags(some),
        "quadrants": None if quadrant is None else quadrant[1],
        "quadrant": None if quadrant is None else _integers(quadrant[0]),
        "duplicates": [
            None if i is None else identities.of(i)[:_MOST_TEXT] for i in some.texts("duplicate_of")
        ],
        "attributes": _attributes(result, ids),
        "others": _others(result, ids) if identities.shown else [],
    }


def _scores(columns: Columns, rows: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for score in SCORES:
        values = columns.numbers(score.key)
        if values is None:
            continue
        finite = np.sort(values[np.isfinite(values)])
        if not len(finite):
            continue
        place = np.searchsorted(finite, values[rows], side="right") / len(finite)
        found.append(
            {
                "key": score.key,
                "name": score.name,
                "low": score.low,
                "values": [_number(v) for v in values[rows]],
                # The fraction of all samples that are not above this one.
                "rank": [
                    _per_mille(p) if np.isfinite(v) else None
                    for p, v in zip(place, values[rows], strict=True)
                ],
            }
        )
    return found


def _interval(some: Columns) -> list[list[float | None]] | None:
    low, high = some.numbers("hardness_low"), some.numbers("hardness_high")
    if low is None or high is None:
        return None
    return [[_number(a), _number(b)] for a, b in zip(low, high, strict=True)]


def _flags(some: Columns) -> list[dict[str, Any]]:
    found: dict[str, np.ndarray | None] = {name: some.flag(name) for name in FLAGS}
    labels, dense = some.numbers("label"), some.numbers("prediction_dense")
    pruned = some.at_highest("prediction_pruned")
    if labels is not None and dense is not None:
        known = np.isfinite(labels)
        found["wrong"] = known & (labels != dense)
        if pruned is not None:
            found["lost"] = known & (labels == dense) & (labels != pruned)
    found["changed"] = some.flag("flip")
    found["duplicate"] = np.array([i is not None for i in some.texts("duplicate_of")], bool)
    return [
        {"key": name, "name": FLAGS[name], "rows": np.flatnonzero(values).tolist()}
        for name, values in found.items()
        if values is not None and values.any()
    ]


def _attributes(result: MiningResult, ids: list[str]) -> list[dict[str, Any]]:
    """Sex, age band, view, site and split, where the run's manifest has them."""
    table = _manifest(result, ids)
    found = []
    for name in _ATTRIBUTES:
        if table is None or name not in table.column_names:
            continue
        column = table.column(name)
        if name == "age":
            column = _bands(column)
        try:
            codes, values = codes_of(column)
        except pa.ArrowException:  # a column of lists, say, under this name
            continue
        if not np.isfinite(codes).any():
            continue
        if name == "age":
            order = sorted(range(len(values)), key=lambda i: int(values[i].split("-")[0]))
            codes = _renumbered(codes, order)
            values = [values[i] for i in order]
        codes, values = _most_common(codes, values)
        found.append(
            {
                "key": name,
                "name": "age band" if name == "age" else name,
                "values": [v[:_MOST_TEXT] for v in values],
                "index": _integers(codes),
            }
        )
    return found


def _others(result: MiningResult, ids: list[str]) -> list[dict[str, Any]]:
    """Everything else that the manifest says: it can name a patient."""
    table = _manifest(result, ids)
    found: list[dict[str, Any]] = []
    if table is None:
        return found
    for name in table.column_names:
        if name not in _NO_ATTRIBUTES and len(found) < _MOST_OTHERS:
            values = table.column(name).to_pylist()
            if any(v is not None for v in values):
                found.append(
                    {
                        "name": name,
                        "values": [None if v is None else str(v)[:_MOST_TEXT] for v in values],
                    }
                )
    return found


def _manifest(result: MiningResult, ids: list[str]) -> pa.Table | None:
    """Rows of the manifest of some samples."""
    manifest = result.manifest
    if manifest is None or "sample_id" not in manifest.column_names:
        return None
    known = manifest["sample_id"].cast(pa.large_string()).combine_chunks()
    return manifest.take(pc.index_in(pa.array(ids, pa.large_string()), known))


def _bands(column: pa.ChunkedArray) -> pa.Array:
    """Ages in decades; a null age has no band."""
    try:
        ages = column.cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        return pa.nulls(len(column), pa.string())
    decades = [int(a // 10) * 10 if np.isfinite(a) and a >= 0 else None for a in ages]
    return pa.chunked_array(
        [pa.array([None if d is None else f"{d}-{d + 9}" for d in decades], pa.string())]
    )


def _most_common(codes: np.ndarray, values: list[str]) -> tuple[np.ndarray, list[str]]:
    """At most so many values that a menu can list them; the rest are "other"."""
    if len(values) <= _MOST_VALUES:
        return codes, values
    counts = np.bincount(codes[np.isfinite(codes)].astype(np.int64), minlength=len(values))
    kept = sorted(np.argsort(-counts, kind="stable")[: _MOST_VALUES - 1].tolist())
    codes = _renumbered(codes, kept, len(kept))
    return codes, [*(values[i] for i in kept), "other"]


def _renumbered(codes: np.ndarray, order: list[int], rest: int = -1) -> np.ndarray:
    size = int(np.nanmax(codes)) + 1 if np.isfinite(codes).any() else 0
    places = np.full(max(size, max(order, default=-1) + 1), float(rest))
    places[order] = np.arange(len(order))
    known = np.isfinite(codes)
    new = np.full(len(codes), np.nan)
    new[known] = places[codes[known].astype(np.int64)]
    return new


def _integers(values: np.ndarray | None) -> list[int | None] | None:
    if values is None:
        return None
    return [int(v) if np.isfinite(v) else None for v in values]


def _number(value: float) -> float | None:
    """Four digits: what a reader can use."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _per_mille(value: float) -> int | None:
    return round(1000 * value) if np.isfinite(value) else None
