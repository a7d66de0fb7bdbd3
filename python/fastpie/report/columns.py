"""The score table of a run as arrays, whatever its task and levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fastpie.mining.result import MiningResult
from fastpie.mining.scoring import level_column

__all__ = ["Columns"]


@dataclass(frozen=True)
class Columns:
    """Columns by name; one that the run does not have is None.

    Attributes:
        table: as `MiningResult.table`.
        sparsities: levels of the run, increasing.
        is_ladder: whether scores of the pruned model have one column a level.
    """

    table: pa.Table
    sparsities: list[float]
    is_ladder: bool

    @classmethod
    def of(cls, result: MiningResult) -> Columns:
        """The columns of a run."""
        config = result.record["config"]
        return cls(result.table, [float(s) for s in config["sparsities"]], config["is_ladder"])

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

    def sample_ids(self, rows: np.ndarray) -> list[str]:
        """Sample ids of some rows."""
        return list(self.table.column("sample_id").take(pa.array(rows)).to_pylist())

    def hardest_first(self) -> np.ndarray:  # [N] rows
        """All rows, hardest first; NaN last, equal values in sample_id order."""
        hardness = self.numbers("hardness")
        if hardness is None:
            return np.arange(len(self))
        return np.argsort(-hardness, kind="stable")
