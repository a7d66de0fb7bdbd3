"""Several models in one run: the mean of their tables."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.mining.run_folder import NO_ROWS, RunFolder

__all__ = ["merge_parts"]

_MERGED = b"fastpie.merged"  # in the metadata of a part: what of the models is in it


def merge_parts(
    folder: RunFolder, count: int, parts: Sequence[int], changed: Collection[int]
) -> None:
    """Write the parts of a run of several models that all of them have.

    A sample is in the table if every model could score it, else in the errors. Scores are means over
    the models (in fp64), predictions the most frequent class (of equally many the largest, as Hooker
    et al. have it), `flip` whether the pruned model of any seed differs from its dense one, beside
    it `flip_rate`, the share of them, and `hardness_std` the standard deviation of the hardness over
    the models (of the population, not of a sample of it).

    Args:
        folder: of the run; the models' are in it.
        count: of models.
        parts: to write, where that is not done yet.
        changed: the parts whose rows may have changed since.
    """
    members = [folder.member(number) for number in range(count)]
    there = set.intersection(*(set(m.done_parts()) for m in members))
    for part in parts:
        if part in there:
            merged = [[m.part_rows(part), m.part_rows(part, "errors")] for m in members]
            if part in changed or _merged(folder, part) != merged:
                _merge(folder, members, part, merged)


def _merge(folder: RunFolder, members: list[RunFolder], part: int, merged: Any) -> None:
    """Write a part; at every instant each of its samples is in the scores or the errors."""
    rows = [row for m in reversed(members) for row in m.errors_of(part)]
    errors = {row["sample_id"]: row for row in rows}
    table = _mean([m.read_part(part) for m in members])
    try:
        before = {row["sample_id"]: row for row in folder.errors_of(part)}
    except (OSError, pa.ArrowException):
        before = {}  # torn
    every = {**before, **errors}
    folder.write_errors(part, [every[i] for i in sorted(every)])
    folder.write_part(part, table.replace_schema_metadata({_MERGED: json.dumps(merged)}), {})
    if len(errors) < len(every):
        folder.write_errors(part, [errors[i] for i in sorted(errors)])


def _merged(folder: RunFolder, part: int) -> Any:
    """How many scores and errors of each model are in a part; rows of a model are never replaced."""
    try:
        with folder.storage.parquet(folder.part_name(part)) as file:
            return json.loads((file.schema_arrow.metadata or {})[_MERGED])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None  # not there, torn, or of an older version


def _mean(tables: list[pa.Table]) -> pa.Table:
    """One table of the samples that all tables have."""
    if not all(len(table) for table in tables):
        return NO_ROWS
    ids = reduce(
        lambda left, right: left.filter(pc.is_in(left, right)),
        (table["sample_id"] for table in tables),
    )
    if not len(ids):
        return NO_ROWS
    tables = [table.take(pc.index_in(ids, table["sample_id"])) for table in tables]
    columns: dict[str, pa.Array | np.ndarray] = {}
    for name in tables[0].column_names:
        first = tables[0][name]
        if name in ("sample_id", "label"):
            columns[name] = first
            continue
        # A level is null where no level flips.
        nan = pa.types.is_floating(first.type)
        values = np.stack(
            [(t[name].fill_null(np.nan) if nan else t[name]).to_numpy() for t in tables]
        )  # [models, n]
        if name.startswith("prediction_"):
            columns[name] = _most_frequent(values)
        elif name == "first_flip":
            lowest = np.where(np.isnan(values), np.inf, values).min(0)
            columns[name] = pa.array(lowest, mask=np.isinf(lowest))
        elif name == "flip" or name.startswith("flip@"):
            columns[name] = values.any(0)
            columns[name.replace("flip", "flip_rate")] = values.mean(0).astype(np.float32)
        else:
            columns[name] = values.mean(0, dtype=np.float64).astype(np.float32)
            if name == "hardness":
                columns["hardness_std"] = values.std(0, dtype=np.float64).astype(np.float32)
    return pa.table(columns)


def _most_frequent(values: np.ndarray) -> np.ndarray:  # [models, n] -> [n]
    classes = np.unique(values)[::-1]  # argmax takes the first of equally many
    counts = np.stack([(values == c).sum(0) for c in classes])
    most: np.ndarray = classes[counts.argmax(0)]
    return most
