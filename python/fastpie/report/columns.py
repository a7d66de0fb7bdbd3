"""The score table of a run, and what its analysis adds to it, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.analysis import Analysis
from fastpie.mining.result import MiningResult
from fastpie.mining.scoring import level_column

__all__ = ["Columns", "codes_of"]


@dataclass(frozen=True)
class Columns:
    """Columns by name; one that the run does not have is None.

    Attributes:
        table: as `MiningResult.table`, with the columns of the analysis' `samples`.
        sparsities: levels of the run, increasing.
        is_ladder: whether scores of the pruned model have one column a level.
    """

    table: pa.Table
    sparsities: list[float]
    is_ladder: bool

    @classmethod
    def of(cls, result: MiningResult, analysis: Analysis | None = None) -> Columns:
        """The columns of a run, and of its analysis; a sample that this lacks has null there."""
        config = result.record["config"]
        table = result.table
        if analysis is not None and table.num_rows:
            places = pc.index_in(table["sample_id"], analysis.samples["sample_id"].combine_chunks())
            added = analysis.samples.take(places.combine_chunks())
            for name in added.column_names:
                if name not in table.column_names:
                    table = table.append_column(name, added[name])
        return cls(table, [float(s) for s in config["sparsities"]], config["is_ladder"])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def numbers(self, name: str) -> np.ndarray | None:  # [N]
        """A column of numbers or bools as fp64, null as NaN."""
        if name not in self.table.column_names:
            return None
        column = self.table.column(name)
        kind = column.type
        if not (
            pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        ):
            return None
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)

    def flag(self, name: str) -> np.ndarray | None:  # bool [N]
        """A column of bools, null as false."""
        values = self.numbers(name)
        return None if values is None else values > 0

    def codes(self, name: str) -> tuple[np.ndarray, list[str]] | None:
        """A column of texts as fp64 places [N] (null: NaN) in the list of its values."""
        if name not in self.table.column_names:
            return None
        return codes_of(self.table.column(name))

    def name_at(self, score: str, sparsity: float) -> str:
        """The column of a score of the pruned model at a level."""
        return level_column(score, sparsity) if self.is_ladder else score

    def at_levels(self, score: str) -> dict[float, np.ndarray]:  # sparsity: [N]
        """A score of the pruned model at every level that has it."""
        columns = {s: self.numbers(self.name_at(score, s)) for s in self.sparsities}
        return {sparsity: values for sparsity, values in columns.items() if values is not None}

    def at_highest(self, score: str) -> np.ndarray | None:  # [N]
        """A score of the pruned model at the highest level."""
        return self.numbers(self.name_at(score, self.sparsities[-1]))

    def multilabels(self) -> np.ndarray | None:  # [N, C] of 1, 0, NaN
        """The labels of a multilabel run."""
        if "label" not in self.table.column_names or not len(self):
            return None
        column = self.table.column("label")
        if not pa.types.is_fixed_size_list(column.type):
            return None
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, dtype=np.float64).reshape(len(self), -1)

    def rows(self, rows: np.ndarray) -> Columns:
        """Some rows, in the order given."""
        return Columns(self.table.take(pa.array(rows)), self.sparsities, self.is_ladder)

    def texts(self, name: str) -> list[Any]:
        """A column of texts, or None throughout."""
        if name not in self.table.column_names:
            return [None] * len(self)
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def hardest_first(self) -> np.ndarray:  # [N] rows
        """All rows, hardest first; NaN last, equal values in sample_id order."""
        hardness = self.numbers("hardness")
        if hardness is None:
            return np.arange(len(self))
        return np.argsort(-hardness, kind="stable")


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Texts as fp64 places [N] (null: NaN) in the sorted list of the values that occur."""
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=values.__getitem__)
    places = np.empty(len(values))
    places[order] = np.arange(len(values))
    indices = np.asarray(encoded.indices.cast(pa.float64()).to_numpy(zero_copy_only=False))
    known = np.isfinite(indices)
    codes = np.full(len(indices), np.nan)
    codes[known] = places[indices[known].astype(np.int64)]
    return codes, [values[i] for i in order]
