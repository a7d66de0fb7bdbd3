"""Attributes of samples as values that can be counted: columns of a manifest, classes, label counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.analysis.classes import label_counts
from fastpie.errors import FastpieError

__all__ = ["Attribute", "read_attributes"]

_FIRST = ("sex", "age", "view", "site", "class", "labels")
_NOT_ATTRIBUTES = ("sample_id", "path", "label", "group", "split", "frame")
_MOST_VALUES = 50  # of text; more are names of something, not groups
_MOST_NUMBERS = 10  # that stay single values; more are banded
_BANDS = 4
_OLDEST = 150  # years; a column "age" beyond it is in another unit


@dataclass(frozen=True)
class Attribute:
    """An attribute of N samples that has V values.

    Attributes:
        name: of the attribute.
        values: V texts.
        codes: int64 [N], the value of each sample, -1 unknown; None where a sample can have several.
        member: [N, V] of 1, 0, NaN (unknown), where a sample can have several values; else None.
    """

    name: str
    values: list[str]
    codes: np.ndarray | None = None
    member: np.ndarray | None = None


def read_attributes(
    table: pa.Table, names: Sequence[str] | None, class_names: Sequence[str] | None
) -> list[Attribute]:
    """The attributes asked for, or all that are some.

    Raises:
        FastpieError: for a name that is no attribute.
    """
    derived = _of_labels(table, class_names)
    if names is not None:
        return [_asked(table, derived, name) for name in names]
    found = dict(derived)
    for name in table.column_names:
        if name not in _NOT_ATTRIBUTES and _is_attribute(table.schema.field(name).type):
            attribute = _of_column(name, table.column(name))
            if attribute is not None and _differ(attribute):
                found[name] = attribute
    first = [name for name in _FIRST if name in found]
    return [found[name] for name in [*first, *(n for n in found if n not in first)]]


def _asked(table: pa.Table, derived: dict[str, Attribute], name: str) -> Attribute:
    if name in table.column_names:
        column = table.column(name)
        if not _is_attribute(column.type):
            raise FastpieError(
                f"Expected an attribute of texts, numbers or bools, but {name!r} is {column.type}."
            )
        attribute = _of_column(name, column)
        if attribute is None:
            raise FastpieError(
                f"Expected an attribute of at most {_MOST_VALUES} texts, but {name!r} has "
                f"{len(pc.unique(column))}."
            )
        return attribute
    if name not in derived:
        raise FastpieError(
            f"Expected `attributes` of {[*table.column_names, *derived]}, but got {name!r}."
        )
    return derived[name]


def _of_labels(table: pa.Table, class_names: Sequence[str] | None) -> dict[str, Attribute]:
    """What `label` says: `class` and, of several a sample, `labels`, their number."""
    if "label" not in table.column_names:
        return {}
    column = table.column("label").combine_chunks()
    found = {}
    if pa.types.is_integer(column.type):
        labels = column.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        names = _names(class_names, int(labels.max(initial=-1)) + 1)
        found["class"] = Attribute("class", names, np.maximum(labels, -1))
    elif pa.types.is_fixed_size_list(column.type):
        size: int = column.type.list_size
        member = np.full((len(column), size), np.nan, np.float32)
        given = column.is_valid().to_numpy(zero_copy_only=False)
        member[given] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        names = _names(class_names, size)
        found["class"] = Attribute("class", names, member=member)
        counts, bins = label_counts(member, names)
        found["labels"] = Attribute("labels", bins, counts)
    return {name: a for name, a in found.items() if name not in table.column_names}


def _names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    if class_names is None:
        return [str(i) for i in range(classes)]
    if len(class_names) < classes:
        raise FastpieError(f"Expected {classes} `class_names`, but got {len(class_names)}.")
    return list(class_names)


def _is_attribute(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        is_kind(kind)
        for is_kind in (
            types.is_string, types.is_large_string, types.is_boolean, types.is_integer,
            types.is_floating,
        )
    )  # fmt: skip


def _differ(attribute: Attribute) -> bool:
    return len(attribute.values) + bool(np.any(attribute.codes == -1)) > 1


def _of_column(name: str, column: pa.ChunkedArray) -> Attribute | None:
    """None for text of too many values. Numbers may come as text, as they do from a CSV."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    entries = encoded.dictionary
    if pa.types.is_boolean(entries.type):
        entries = pc.if_else(entries, "true", "false")
    numbers = _numbers(entries)
    if numbers is not None and name == "age" and np.nanmax(numbers, initial=0) <= _OLDEST:
        return _banded(name, codes, numbers, *_decades(numbers))
    if numbers is not None and len(numbers) > _MOST_NUMBERS:
        return _banded(name, codes, numbers, *_quantiles(numbers, codes))
    if numbers is not None:
        known = np.unique(numbers[~np.isnan(numbers)])
        return _banded(name, codes, numbers, known[1:], [f"{v:.6g}" for v in known])
    texts = [text.strip() for text in entries.to_pylist()]
    values = sorted(set(texts) - {""})
    if len(values) > _MOST_VALUES:
        return None
    place = {value: i for i, value in enumerate(values)}
    places = np.array([*(place.get(text, -1) for text in texts), -1], np.int64)
    return Attribute(name, values, places[codes])


def _numbers(entries: pa.Array) -> np.ndarray | None:  # fp64, NaN unknown; None for text
    if not pa.types.is_integer(entries.type) and not pa.types.is_floating(entries.type):
        trimmed = pc.utf8_trim_whitespace(entries)
        trimmed = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
        try:
            entries = trimmed.cast(pa.float64())
        except pa.ArrowInvalid:
            return None
        if entries.null_count == len(entries):
            return None
    numbers = entries.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).copy()
    numbers[~np.isfinite(numbers)] = np.nan
    result: np.ndarray = numbers
    return result


def _decades(numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    top = np.nanmax(numbers, initial=0)
    starts = np.arange(0, top + 1, 10)
    return starts[1:], [f"{s:.0f}-{s + 9:.0f}" for s in starts]


def _quantiles(numbers: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    values = numbers[codes[codes >= 0]]
    values = values[~np.isnan(values)]
    if not len(values):
        return np.empty(0), [""]
    # A value that occurs: equal ones are never parted.
    edges = np.unique(np.quantile(values, np.arange(1, _BANDS) / _BANDS, method="inverted_cdf"))
    inner = [f"{a:.6g} to {b:.6g}" for a, b in itertools.pairwise(edges)]
    return edges, [f"< {edges[0]:.6g}", *inner, f">= {edges[-1]:.6g}"]


def _banded(
    name: str, codes: np.ndarray, numbers: np.ndarray, edges: np.ndarray, names: list[str]
) -> Attribute:
    """Bands that begin at the edges; those that no sample is in are left out."""
    band = np.searchsorted(edges, numbers, side="right")
    band = np.append(np.where(np.isnan(numbers), -1, band), -1)[codes]  # code -1 is the last
    there = np.unique(band[band >= 0])
    place = np.full(len(names) + 1, -1)
    place[there] = np.arange(len(there))
    return Attribute(name, [names[i] for i in there], place[band])
