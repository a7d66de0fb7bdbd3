"""The rows of a part while it is open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.mining.reading import Problem

__all__ = ["PartRows", "kept_table"]


class PartRows:
    """What batches add to their part.

    Attributes:
        tables: of scores.
        extras: tables of kept logits and features.
        problems: of the samples without a score.
    """

    def __init__(self) -> None:
        """No rows."""
        self.tables: list[pa.Table] = []
        self.extras: dict[str, list[pa.Table]] = {}
        self.problems: list[Problem] = []

    def add(self, other: PartRows) -> None:
        """Append the rows of the next batch."""
        self.tables += other.tables
        for kind, tables in other.extras.items():
            self.extras.setdefault(kind, []).extend(tables)
        self.problems += other.problems

    def merge(self, scores: pa.Table, extras: dict[str, pa.Table]) -> set[str]:
        """Take over rows written before; of samples in both, those. Gives the ids written before."""
        ids = set(scores["sample_id"].to_pylist())

        def rows(table: pa.Table, scored: bool) -> pa.Table:
            column = table["sample_id"].to_pylist()
            return table.filter(pa.array([(i in ids) == scored for i in column], pa.bool_()))

        def merged(old: pa.Table, new: list[pa.Table]) -> list[pa.Table]:
            # Old extras can hold samples that a crash kept out of the scores.
            tables = [rows(old, True), *(rows(table, False) for table in new)]
            return [pa.concat_tables(tables, promote_options="default").sort_by("sample_id")]

        for kind, table in extras.items():
            self.extras[kind] = merged(table, self.extras.get(kind, []))
        self.tables = merged(scores, self.tables)
        return ids


def kept_table(ids: pa.Array, dense: np.ndarray, pruned: np.ndarray) -> pa.Table:
    """Logits or features [n, D] and [n, L, D] as a table of lists; L is 0 where none are kept."""
    table = pa.table({"sample_id": ids, "dense": _lists(dense)})
    return table.append_column("pruned", _lists(pruned)) if pruned.shape[1] else table


def _lists(values: np.ndarray) -> Any:  # [n, ...]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
