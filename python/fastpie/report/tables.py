"""The tables of a report: an analysis' as they are, and the one of the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.analysis import Analysis
from fastpie.report.classes import ClassRow
from fastpie.report.drawing import numbers

__all__ = ["Cell", "Table", "class_table", "tables_of", "without_identities"]

_MOST_ROWS = 200
_MOST_TEXT = 300
# Words of attributes that name nobody. Others, a patient's or a doctor's, say, are for the owner.
_HARMLESS = frozenset(
    [
        "sex",
        "age",
        "band",
        "view",
        "site",
        "split",
        "class",
        "label",
        "labels",
        "label_count",
        "count",
        "number",
        "of",
        "and",
        "by",
        "x",
    ]
)
_TITLES = {
    "levels": ("overview", "Metrics at each sparsity"),
    "links": ("classes", "Links to frequency"),
    "counts": ("classes", "PIEs by number of labels"),
    "subgroups": ("subgroups", "Subgroups"),
    "pairs": ("pairs", "Pairs of classes, the most different first"),
    "regression": ("pairs", "Regression of the distance of two classes' curves"),
    "stability": ("stability", "Stability"),
    "agreement": ("stability", "Agreement on labels in doubt"),
}
_NAMES = {
    "n": "samples",
    "n_hard": "among the hardest",
    "n_pie": "PIEs",
    "odds_ratio": "odds ratio",
    "pie_ratio": "ratio of PIEs",
    "fcd": "FCD",
    "iou": "IoU",
    "iou_root": "IoU^(1/4)",
    "vif": "VIF",
    "class_a": "class",
    "class_b": "and class",
    "rank_correlation": "rank correlation",
    "frequency_difference": "difference of log frequencies",
    "small": "small cell",
}


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by."""

    text: str
    value: float | str | None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column names the row.

    Attributes:
        name: of the table, its id.
        section: of the page.
        title: of the table.
        columns: heads, and whether the column holds text.
        rows: cells.
        note: what is to be said of it.
        keys: class index of each row, of the table of classes.
    """

    name: str
    section: str
    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[Cell]]
    note: str = ""
    keys: list[int] | None = None


def without_identities(subgroups: pa.Table) -> pa.Table:
    """The rows of attributes that name nobody."""
    words = [re.findall(r"[a-z_]+", str(a).lower()) for a in subgroups["attribute"].to_pylist()]
    return subgroups.filter(pa.array([set(w) <= _HARMLESS for w in words], pa.bool_()))


def tables_of(analysis: Analysis) -> list[Table]:
    """The tables of an analysis but `curves` and `classes`, which are plots and a table of their own.

    An interval is one column.
    """
    found = []
    for name, (section, title) in _TITLES.items():
        table = analysis.tables.get(name)
        if table is None or not table.num_rows:
            continue
        note = ""
        if name == "pairs":
            table = table.sort_by([("fcd", "descending")])
        if table.num_rows > _MOST_ROWS:
            note = f"The first {_MOST_ROWS} of {table.num_rows:,} rows; all are in the CSV file."
            table = table.slice(0, _MOST_ROWS)
        found.append(_generic(name, section, title, table, note))
    return found


def class_table(
    rows: Sequence[ClassRow],
    name_of: Callable[[int], str],
    highest: float,
    analysis: Analysis | None = None,
) -> Table:
    """The classes of a run, hardest first, with what the analysis says of them.

    Args:
        rows: of every class.
        name_of: the name of a class.
        highest: level of the pruned model.
        analysis: its table `classes` is joined by the name.
    """
    count = len(rows)
    rows = sorted(rows, key=lambda row: -(row.hardness or 0.0))[:_MOST_ROWS]
    with_accuracy = any(row.dense_accuracy is not None for row in rows)
    columns = [("class", True), ("n", False)]
    if with_accuracy:
        columns += [("dense accuracy", False), (f"pruned accuracy at {highest:g}", False)]
        columns += [("0 to 100%", False)]
    columns += [(f"flip rate at {highest:g}", False), ("mean hardness", False)]
    added: dict[str, list[Cell]] = {}
    heads: list[tuple[str, bool]] = []
    table = None if analysis is None else analysis.tables.get("classes")
    if table is not None and table.num_rows:
        heads, added = _added(table)
    cells = []
    for row in rows:
        name = name_of(row.index)
        line = [_text(name), Cell(f"{row.n:,}", row.n)]
        if with_accuracy:
            line += [_percent(row.dense_accuracy), _percent(row.pruned_accuracy)]
            both = None
            if row.dense_accuracy is not None and row.pruned_accuracy is not None:
                both = (row.dense_accuracy, row.pruned_accuracy)
            line.append(Cell("", None if both is None else both[1] - both[0], both))
        line += [_percent(row.flip_rate), _number(row.hardness)]
        line += added.get(name, [Cell("–", None)] * len(heads))
        cells.append(line)
    note = ""
    if count > len(rows):
        note = f"Of {count:,} classes, the {len(rows)} hardest are shown."
    keys = [row.index for row in rows]
    return Table("class-table", "classes", "Classes", columns + heads, cells, note, keys)


def _added(table: pa.Table) -> tuple[list[tuple[str, bool]], dict[str, list[Cell]]]:
    """Heads, and cells by class name, of the columns that hold something."""
    wanted = {
        "n_train": "n in training",
        "ap": "AP",
        "ap_pruned": "AP pruned",
        "auroc": "AUROC",
        "auroc_pruned": "AUROC pruned",
        "first_drop": "first drop",
        "extreme_drop": "change at the highest level",
        "impact": "impact",
        "impact_q": "q of the impact",
        "pie_ratio": "ratio of PIEs",
    }
    values = {n: numbers(table, n) for n in table.column_names if n != "class"}
    used = [n for n in wanted if n in values and np.isfinite(values[n]).any()]
    cells: dict[str, list[Cell]] = {}
    for row, name in enumerate(table["class"].to_pylist()):
        line = []
        for column in used:
            cell = _number(values[column][row])
            low, high = (values.get(f"{column}_{end}") for end in ("low", "high"))
            if low is not None and high is not None and np.isfinite(low[row] + high[row]):
                cell = Cell(f"{cell.text} ({low[row]:.3g} to {high[row]:.3g})", cell.value)
            line.append(cell)
        cells[name] = line
    return [(wanted[n], False) for n in used], cells


def _generic(name: str, section: str, title: str, table: pa.Table, note: str) -> Table:
    names = [n for n in table.column_names if table[n].null_count < table.num_rows]
    interval = {"low", "high"} <= set(names)
    columns, lines = [], []
    for column in names:
        kind = table.schema.field(column).type
        if interval and column in ("low", "high"):
            if column == "low":
                columns.append(("95 % interval", False))
                both = zip(table["low"].to_pylist(), table["high"].to_pylist(), strict=True)
                lines.append([_interval(a, b) for a, b in both])
            continue
        is_text = not (
            pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        )
        columns.append((_NAMES.get(column, column.replace("_", " ")), is_text))
        lines.append([_cell(v) for v in table[column].to_pylist()])
    return Table(
        f"table-{name}", section, title, columns, [list(r) for r in zip(*lines, strict=True)], note
    )


def _cell(value: Any) -> Cell:
    if value is None:
        return Cell("–", None)
    if isinstance(value, bool):
        return Cell("yes" if value else "", float(value))
    if isinstance(value, int):
        return Cell(f"{value:,}", value)
    if isinstance(value, float):
        return _number(value)
    return _text(value)


def _interval(low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return Cell("–", None)
    return Cell(f"{low:.3g} to {high:.3g}", low)


def _text(value: Any) -> Cell:
    text = str(value)
    text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
    return Cell(text, text)


def _percent(value: float | None) -> Cell:
    return Cell("–", None) if value is None else Cell(f"{value:.1%}", value)


def _number(value: float | None) -> Cell:
    if value is None or np.isnan(value):
        return Cell("–", None)
    # Sorted by a script that knows no "inf".
    key = float(np.nan_to_num(value, posinf=1e300, neginf=-1e300))
    return Cell(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}", key)
