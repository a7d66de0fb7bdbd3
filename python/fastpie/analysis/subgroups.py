"""Which groups of samples are hard more often: odds ratios by attribute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.analysis.attributes import Attribute, read_attributes
from fastpie.analysis.significance import benjamini_hochberg, column
from fastpie.errors import FastpieError

__all__ = ["subgroups"]

_UNKNOWN = "unknown"
_SMALL = 5  # an expected count below it: Cochran's rule for tables of two by two
_CONFIDENCE = 0.95
# SciPy's exact interval takes seconds a table from some thousands of possible counts on. Where every
# expected count is at least 100, that of Woolf is within 1 % of it (measured for 4,000 to a million
# samples).
_EXACT_BELOW = 100
_MOST_EXACT = 2000


@dataclass(frozen=True)
class _Group:
    """A value of an attribute, or of two, and the others it is compared with."""

    attribute: str
    value: str
    n: int
    hard: int
    others: int
    hard_others: int

    def table(self) -> np.ndarray:  # [[hard, not hard] of the group, of the others]
        return np.array(
            [
                [self.hard, self.n - self.hard],
                [self.hard_others, self.others - self.hard_others],
            ]
        )


def subgroups(
    table: pa.Table,
    hard: Any,  # bool [N], or floats [N]
    *,
    fraction: float = 0.05,
    attributes: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    pairs: bool = False,
) -> pa.Table:
    """Odds of being hard in each group of samples, against the other samples.

    An attribute is a column of texts, numbers or bools, or of the column `label` (as in a manifest)
    `class`, the class or classes, and, where there can be several, `labels`, how many ("0" ... "4+",
    "No Finding" not counted). Numbers, also those that came as text, are banded: `age` in decades,
    others of more than ten values in quarters of the samples. A group is compared with the other
    samples whose attribute is known. Those where it is not are a group "unknown", compared with all
    others; with several classes a sample there is none, and of `pairs` neither.

    Conditional odds ratio (Fisher's noncentral hypergeometric distribution) with its exact interval,
    by SciPy; where that would take long, that is with every expected count at least 100 or more than
    2,000 possible counts, the sample odds ratio with the interval of Woolf (1955).

    Args:
        table: N samples, say of a manifest, in the order of `hard`.
        hard: whether each is hard; or its hardness (higher = harder), of which the first
            `int(fraction * N)` are, NaN last, equals in the order of the rows.
        fraction: in [0, 1], for a hardness.
        attributes: names; by default sex, age, view, site, class, labels where they are, and every
            other column of at most 50 texts, or of numbers or bools, but group and split.
        class_names: of the class indices, by default the indices.
        pairs: also the intersections of each two attributes. Takes some milliseconds for each pair of
            values.

    Returns:
        One row a group: `attribute` (of a pair "sex, age"), `value` ("F, 40-49"), `n`, `n_hard`,
        `odds_ratio`, `low`, `high` (95 %), `p` (Fisher's exact, two-sided), `q` (Benjamini-Hochberg
        over the table), `small` (an expected count below 5: do not lean on it). Null: what is
        infinite, and all of a group that nothing can be compared with (no others, none or all hard).

    Raises:
        FastpieError: for a name that is no attribute, more than 50 texts, or shapes that do not fit.
    """
    chosen = _hard(hard, table.num_rows, fraction)
    found = read_attributes(table, attributes, class_names)
    groups = [group for attribute in found for group in _groups(attribute, chosen)]
    if pairs:
        for first, second in itertools.combinations(found, 2):
            groups += _intersections(first, second, chosen)
    return _tested(groups)


def _hard(hard: Any, samples: int, fraction: float) -> np.ndarray:  # bool [N]
    values = np.asarray(hard)
    if values.shape != (samples,) or not (
        values.dtype == np.bool_ or np.issubdtype(values.dtype, np.floating)
    ):
        raise FastpieError(
            f"Expected `hard` of shape [{samples}] (one for each row of the table), bool or floats, "
            f"but got {list(values.shape)} {values.dtype}."
        )
    if values.dtype == np.bool_:
        return values
    if not 0 <= fraction <= 1:
        raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
    chosen = np.zeros(samples, bool)
    chosen[np.argsort(-values, kind="stable")[: int(fraction * samples)]] = True
    return chosen


def _groups(attribute: Attribute, hard: np.ndarray) -> list[_Group]:
    name, values = attribute.name, attribute.values
    if attribute.member is not None:
        return [
            _of_member(name, value, attribute.member[:, place], hard)
            for place, value in enumerate(values)
        ]
    assert attribute.codes is not None
    # The last of the counts is that of the unknown, code -1.
    codes = np.where(attribute.codes < 0, len(values), attribute.codes)
    n = np.bincount(codes, minlength=len(values) + 1).tolist()
    n_hard = np.bincount(codes[hard], minlength=len(values) + 1).tolist()
    known, known_hard = sum(n[:-1]), sum(n_hard[:-1])
    groups = [
        _Group(name, value, n[i], n_hard[i], known - n[i], known_hard - n_hard[i])
        for i, value in enumerate(values)
        if n[i]
    ]
    if n[-1]:
        groups.append(_Group(name, _UNKNOWN, n[-1], n_hard[-1], known, known_hard))
    return groups


def _of_member(name: str, value: str, member: np.ndarray, hard: np.ndarray) -> _Group:
    """`member`: [N] of 1, 0, NaN."""
    inside, outside = member == 1, member == 0
    return _Group(
        name,
        value,
        int(inside.sum()),
        int((inside & hard).sum()),
        int(outside.sum()),
        int((outside & hard).sum()),
    )


def _intersections(first: Attribute, second: Attribute, hard: np.ndarray) -> list[_Group]:
    """Of each value of one attribute with each of the other, where a sample is there."""
    if first.member is not None or second.member is not None:
        several, other = (first, second) if first.member is not None else (second, first)
        assert several.member is not None
        assert other.codes is not None
        groups = []
        for place, value in enumerate(several.values):
            member = several.member[:, place]
            known = (other.codes >= 0) & ~np.isnan(member)
            cells = np.where(member == 1, other.codes, len(other.values))[known]
            texts = [f"{value}, {v}" if several is first else f"{v}, {value}" for v in other.values]
            groups += _of_cells(f"{first.name}, {second.name}", texts, cells, hard[known])
        return groups
    assert first.codes is not None
    assert second.codes is not None
    known = (first.codes >= 0) & (second.codes >= 0)
    cells = (first.codes * len(second.values) + second.codes)[known]
    texts = [f"{v}, {w}" for v in first.values for w in second.values]
    return _of_cells(f"{first.name}, {second.name}", texts, cells, hard[known])


def _of_cells(name: str, texts: list[str], cells: np.ndarray, hard: np.ndarray) -> list[_Group]:
    """Each cell that has a text and a sample, against all other samples."""
    n = np.bincount(cells, minlength=len(texts)).tolist()
    n_hard = np.bincount(cells[hard], minlength=len(texts)).tolist()
    total, total_hard = len(cells), int(hard.sum())
    return [
        _Group(name, text, n[i], n_hard[i], total - n[i], total_hard - n_hard[i])
        for i, text in enumerate(texts)
        if n[i]
    ]


def _tested(groups: list[_Group]) -> pa.Table:
    tables = [group.table() for group in groups]
    numbers = np.array([_odds(table) for table in tables], np.float64).reshape(-1, 4)
    small = [bool((_expected(table) < _SMALL).any()) for table in tables]
    p = numbers[:, 3]
    return pa.table(
        {
            "attribute": pa.array([g.attribute for g in groups], pa.string()),
            "value": pa.array([g.value for g in groups], pa.string()),
            "n": pa.array([g.n for g in groups], pa.int64()),
            "n_hard": pa.array([g.hard for g in groups], pa.int64()),
            "odds_ratio": column(numbers[:, 0]),
            "low": column(numbers[:, 1]),
            "high": column(numbers[:, 2]),
            "p": column(p),
            "q": column(benjamini_hochberg(p)),
            "small": pa.array(small, pa.bool_()),
        }
    )


def _expected(table: np.ndarray) -> np.ndarray:
    expected: np.ndarray = np.outer(table.sum(1), table.sum(0)) / max(1, table.sum())
    return expected


def _odds(table: np.ndarray) -> tuple[float, float, float, float]:
    """Odds ratio, its interval and Fisher's p; NaN where a row or column is empty."""
    if not (table.sum(0).all() and table.sum(1).all()):
        return (np.nan,) * 4
    stats = load_extra("scipy.stats", "analysis", "odds ratios")
    contingency = load_extra("scipy.stats.contingency", "analysis", "odds ratios")
    p = stats.fisher_exact(table).pvalue
    possible = min(table.sum(0).min(), table.sum(1).min())
    if _expected(table).min() < _EXACT_BELOW and possible <= _MOST_EXACT:
        result = contingency.odds_ratio(table, kind="conditional")
    elif table.all():
        result = contingency.odds_ratio(table, kind="sample")
    else:
        # The bounds of Haldane and Anscombe, half a sample more in each cell.
        more = table + 0.5
        middle = np.log(more[0, 0] * more[1, 1] / (more[0, 1] * more[1, 0]))
        half = stats.norm.ppf((1 + _CONFIDENCE) / 2) * np.sqrt((1 / more).sum())
        if table[0, 0] * table[1, 1] == 0:
            return 0.0, 0.0, float(np.exp(middle + half)), p
        return np.inf, float(np.exp(middle - half)), np.inf, p
    low, high = result.confidence_interval(_CONFIDENCE)
    return result.statistic, low, high, p
