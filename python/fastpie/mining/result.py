"""`MiningResult`: the table of a run and the choice of the hardest."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.errors import FastpieError
from fastpie.mining.run_folder import RunFolder, SampleIndex

__all__ = ["MiningResult"]

_LOWER_IS_HARDER = ("spearman", "margin_dense", "margin_pruned", "iou", "iou_soft", "first_flip")


class MiningResult:
    """What a run has scored so far.

    Attributes:
        record: the content of `run.json`: configuration, versions, fingerprints, the formula of
            hardness.
        telemetry: of the call of `mine` that returned it: `images`, `seconds`, `images_per_second`,
            seconds by `stages`, `gpu`; None for a run opened from its folder.
    """

    telemetry: dict[str, Any] | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a run folder for reading, finished or not.

        Raises:
            FastpieError: if there is no run.
        """
        self._folder = RunFolder(path)
        record = self._folder.record()
        if record is None:
            raise FastpieError(
                f"Expected a run folder at {self.location}, but it holds no run.json."
            )
        self.record = record

    @property
    def location(self) -> str:
        """The run folder: a path or a URL."""
        return self._folder.location

    @property
    def path(self) -> Path:
        """The run folder.

        Raises:
            FastpieError: for a run at a URL.
        """
        if self._folder.path is None:
            raise FastpieError(
                f"Expected a run on this machine, but it is at {self.location}: copy it first."
            )
        return self._folder.path

    @functools.cached_property
    def members(self) -> list[MiningResult]:
        """The runs of the single models, of a run of several; else none."""
        return [
            MiningResult(self._folder.member(number).location)
            for number in range(self.record.get("models", 0))
        ]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        return (
            f"MiningResult({self.location!r}, {len(self)} samples, {self.errors.num_rows} errors)"
        )

    @functools.cached_property
    def table(self) -> pa.Table:
        """One row per scored sample, in sample_id order; see `fastpie.disagreement` for scores."""
        return self._folder.read_parts()

    @functools.cached_property
    def errors(self) -> pa.Table:
        """What could not be read or scored: sample_id, path, stage, error."""
        return self._folder.errors()

    @functools.cached_property
    def manifest(self) -> pa.Table | None:
        """Labels, groups, splits and attributes of the samples, where the data set had them."""
        return self._folder.manifest()

    def samples(self) -> SampleIndex | None:
        """Where the data set has each sample of the run; None for a run without that file."""
        return self._folder.samples()

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of both models in the order of `table`, where the run kept them.

        Returns:
            fp32 [N, C] and [L, N, C].
        """
        return self._kept("logits")

    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of both models in the order of `table`, where the run kept them.

        Returns:
            fp32 [N, D] and [L, N, D].
        """
        return self._kept("features")

    def select(
        self, fraction: float = 0.05, by: str = "hardness", per: str | None = None
    ) -> list[str]:
        """The hardest samples.

        Args:
            fraction: of the scored samples, in [0, 1]; `int(fraction * N)` are returned.
            by: a column; where a low value is hard (margins, spearman, iou, first_flip) the lowest
                come first. NaN and null come last, equal values in sample_id order.
            per: a column (say "label") to take the same fraction of each of its values, at least
                one of each.

        Returns:
            Sample ids, hardest first.

        Raises:
            FastpieError: for an unknown column or a fraction outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
        values = _numbers(self._column(by))
        if by.split("@")[0] not in _LOWER_IS_HARDER:
            values = -values
        order = np.argsort(values, kind="stable")  # NaN last
        if per is None:
            chosen = order[: int(fraction * len(order))]
        else:
            strata = np.array([str(v) for v in self._column(per).to_pylist()])[order]
            keep = np.zeros(len(order), dtype=bool)
            for stratum in np.unique(strata):
                members = np.flatnonzero(strata == stratum)
                keep[members[: max(1, int(fraction * len(members)))]] = fraction > 0
            chosen = order[keep]
        return list(self.table.column("sample_id").take(pa.array(chosen)).to_pylist())

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise FastpieError(
                f"Expected a column of the table {self.table.column_names}, but got {name!r}."
            )
        return self.table.column(name)

    def _kept(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        if self.members:
            raise FastpieError(
                f"Expected a run of one model, but {self.location} is one of {len(self.members)}: each "
                f"of `members` has its {kind}."
            )
        if not self.record["config"][f"keep_{kind}"]:
            raise FastpieError(
                f"Expected a run with its {kind} kept, but {self.location} was made without "
                f"keep_{kind}=True."
            )
        table = self._folder.read_extras(kind)
        levels = len(self.record["config"]["sparsities"])
        if table is None:
            return np.empty((0, 0), np.float32), np.empty((levels, 0, 0), np.float32)
        dense, pruned = (_matrix(table.column(name)) for name in ("dense", "pruned"))
        return dense, np.ascontiguousarray(pruned.reshape(len(dense), levels, -1).swapaxes(0, 1))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    if not (
        pa.types.is_floating(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_boolean(column.type)
    ):
        raise FastpieError(f"Expected a column of numbers to rank by, but got {column.type}.")
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:  # fixed-size lists -> [n, size]
    size: Any = column.type.list_size
    return np.concatenate(
        [c.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for c in column.chunks]
    )
