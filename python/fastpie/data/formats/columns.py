"""Columns as a source has them into columns as `Manifest.table` has them.

Nothing here makes a Python object for each row: a column is encoded by its distinct values (few, for
labels and attributes), these are converted in Python, and taken by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.formats.source import Request, need_columns, shorten
from fastpie.errors import FastpieError

__all__ = [
    "ATTRIBUTES",
    "age_of",
    "all_classes",
    "attributes",
    "class_indices",
    "constant",
    "flags",
    "label_column",
    "mapped",
    "one_hot_classes",
    "sex_of",
    "table_of",
    "tags",
    "text",
    "text_or_null",
]

ATTRIBUTES = ("group", "split", "sex", "age", "view", "site", "frame")
_OLDEST = 120.0  # years; ChestX-ray14 has patients of 411
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}  # DICOM's age strings


def text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as large_string, "" where it was null.

    Raises:
        FastpieError: for a column of lists or structures.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        column = column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise FastpieError(f"Expected a column of text, but got one of {column.type}.") from error
    return column.fill_null("") if column.null_count else column


def text_or_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without white space around it, null where nothing is left."""

    def tidy(chunk: pa.Array) -> pa.Array:
        trimmed = pc.utf8_trim_whitespace(chunk)
        empty = pc.equal(trimmed, "")
        if pc.any(empty).as_py():
            return pc.if_else(empty, pa.scalar(None, pa.large_string()), trimmed)
        return chunk if trimmed.equals(chunk) else trimmed  # mostly: then nothing is copied

    return pa.chunked_array([tidy(c) for c in text(column).chunks], pa.large_string())


def mapped(
    column: pa.ChunkedArray, function: Callable[[Any], Any], kind: pa.DataType
) -> pa.Array | pa.ChunkedArray:
    """The function of each value; it gets None for a null."""
    encoded, values = _distinct(column)
    missing = function(None)
    taken = pa.array([function(v) for v in values], kind).take(encoded)
    return taken if missing is None else taken.fill_null(missing)


def constant(value: str, count: int) -> pa.Array:
    """A column of one text."""
    return pa.repeat(pa.scalar(value, pa.large_string()), count)


def attributes(table: pa.Table, request: Request, source: object) -> dict[str, Any]:
    """The columns of `ATTRIBUTES` that the table has, or that the request names.

    Raises:
        FastpieError: if a column that the request names is missing.
    """
    found: dict[str, Any] = {}
    for attribute in ATTRIBUTES:
        name = getattr(request, attribute)
        if name is not None:
            need_columns(table, [name], source, f"column of {attribute}")
        elif attribute not in table.column_names:
            continue
        column = table.column(name or attribute)
        if attribute == "sex":
            found[attribute] = mapped(column, sex_of, pa.large_string())
        elif attribute == "age":
            found[attribute] = mapped(column, age_of, pa.float32())
        elif attribute == "frame":
            found[attribute] = mapped(column, _frame_of, pa.int64())
        else:
            found[attribute] = text_or_null(column)
    return found


def sex_of(value: Any) -> str | None:
    """Sex as "F" or "M"; None for what is neither."""
    word = "" if value is None else str(value).strip().lower()
    return {"f": "F", "female": "F", "m": "M", "male": "M"}.get(word)


def age_of(value: Any) -> float | None:
    """Years, from a number or from DICOM's 058Y, 011M, ...; None where no one can be so old."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([YMWD]?)", str(value).strip().upper())
    years = math.nan if match is None else float(match[1]) * _YEARS[match[2]]
    return years if years <= _OLDEST else None


def _frame_of(value: Any) -> int | None:
    number = class_index(value)
    return None if number is None or number < 0 else number


def class_index(value: Any) -> int | None:
    """A class index ("3", "3.0", 3); -1 for an empty cell or NaN, None for a name."""
    word = "" if value is None else str(value).strip()
    if not word:
        return -1
    try:
        number = float(word)
    except ValueError:
        return None
    if math.isnan(number):
        return -1
    return int(number) if number.is_integer() and abs(number) < 2**53 else None


def flag(value: Any) -> float:
    """A multilabel cell; empty is unknown. What is no number becomes 2, which mining refuses."""
    word = "" if value is None else str(int(value) if isinstance(value, bool) else value).strip()
    try:
        return float(word) if word else math.nan
    except ValueError:
        return 2.0


def class_indices(
    column: pa.ChunkedArray, class_names: list[str] | None, source: object
) -> tuple[pa.Array, list[str] | None]:
    """A column of class indices or class names as int64 [N], -1 unknown, and the names if any.

    Raises:
        FastpieError: for a mixture of both, and for names not among `class_names`.
    """
    encoded, values = _distinct(column)
    words = ["" if v is None else str(v).strip() for v in values]
    numbers = [class_index(v) for v in values]
    if class_names is None and None not in numbers:
        indices: list[Any] = numbers
    else:
        if class_names is None:
            if any(n is not None and n >= 0 for n in numbers):
                odd = next(w for w, n in zip(words, numbers, strict=True) if n is None)
                raise FastpieError(
                    f"Expected class indices or class names, but {source} mixes them (for example "
                    f"{shorten(odd, 80)!r}); give the order of the classes by `class_names`."
                )
            class_names = sorted({w for w in words if w})
        place = {name: i for i, name in enumerate(class_names)}
        _refuse_unknown({w for w in words if w and w not in place}, class_names, source)
        indices = [place.get(w, -1) for w in words]
    return pa.array(indices, pa.int64()).take(encoded).fill_null(-1), class_names


def all_classes(asked: list[str] | None, known: list[str], source: object) -> list[str]:
    """The order of the classes of a data set: the one asked for, else the data set's.

    Raises:
        FastpieError: if the one asked for is not of the same classes.
    """
    if asked is not None and sorted(asked) != sorted(known):
        left, odd = sorted(set(known) - set(asked)), sorted(set(asked) - set(known))
        raise FastpieError(
            f"Expected `class_names` to be the {len(known)} classes of {source} in any order, but it "
            f"lacks {left} and has {odd} besides ({len(asked)} names)."
        )
    return asked or known


def flags(table: pa.Table, columns: Sequence[str]) -> np.ndarray:  # fp32 [N, C]
    """Columns of 1, 0 or empty, one a class; NaN where empty."""
    values = np.empty((table.num_rows, len(columns)), np.float32)
    for i, name in enumerate(columns):
        values[:, i] = mapped(table.column(name), flag, pa.float32()).to_numpy()
    return values


def tags(
    column: pa.ChunkedArray, separator: str, class_names: list[str], nothing: str, source: object
) -> np.ndarray:  # fp32 [N, C]
    """A column of class names with a separator between them; `nothing` is no class, "" unknown.

    Raises:
        FastpieError: for names that are not among `class_names`.
    """
    cells = pc.utf8_trim_whitespace(text(column).combine_chunks())
    lists = pc.split_pattern(cells, separator)
    names = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    places = pc.index_in(names, value_set=pa.array(class_names, pa.large_string())).to_numpy(
        zero_copy_only=False
    )
    found = ~np.isnan(places)
    odd = pc.unique(names.filter(pa.array(~found))).to_pylist()
    _refuse_unknown(set(odd) - {nothing, ""}, class_names, source)
    values = np.zeros((len(cells), len(class_names)), np.float32)
    rows = pc.list_parent_indices(lists).to_numpy()
    values[rows[found], places[found].astype(np.int64)] = 1
    values[pc.equal(cells, "").to_numpy(zero_copy_only=False)] = np.nan
    return values


def one_hot_classes(values: np.ndarray, source: object) -> pa.Array:  # [N, C] -> int64 [N]
    """The class of each row of zeros and a one; -1 where there is none.

    Raises:
        FastpieError: for a row of several ones.
    """
    ones = values > 0.5
    counts = ones.sum(1)
    if (counts > 1).any():
        row = int(np.argmax(counts > 1))
        raise FastpieError(
            f"Expected one class a row in {source}, but row {row + 1} has {counts[row]}. For several "
            "labels an image use task='multilabel'."
        )
    return pa.array(np.where(counts == 1, ones.argmax(1), -1), pa.int64())


def label_column(values: np.ndarray) -> pa.FixedSizeListArray:  # fp32 [N, C]
    """Multilabel targets as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def table_of(columns: dict[str, Any], others: pa.Table) -> pa.Table:
    """The columns of the schema first, then the others of the source, but for the same names."""
    kept = {n: others.column(n) for n in others.column_names if n not in columns}
    return pa.table({**columns, **kept})


def _refuse_unknown(unknown: set[str], class_names: list[str], source: object) -> None:
    if unknown:
        shown = [shorten(name, 80) for name in sorted(unknown)[:3]]
        raise FastpieError(
            f"Expected labels among the classes {class_names[:20]}, but {source} holds "
            f"{len(unknown)} others: {shown}."
        )


def _distinct(column: pa.ChunkedArray) -> tuple[pa.Array, list[Any]]:
    """Index of the value of each row (null for null), and the distinct values."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type):  # whose dictionary cannot pass 2 GB
        column = column.cast(pa.large_string())
    try:
        encoded = column.dictionary_encode().combine_chunks()
    except pa.ArrowException as error:
        raise FastpieError(f"Expected a column of values, but got one of {column.type}.") from error
    return encoded.indices, encoded.dictionary.to_pylist()
