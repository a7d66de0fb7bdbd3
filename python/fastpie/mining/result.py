"""`MiningResult`: the table of a run and the choice of the hardest."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie.errors import FastpieError
from fastpie.mining.parts import BATCH_ROWS, Parts
from fastpie.mining.run_folder import RunFolder, SampleIndex
from fastpie.mining.scoring import DENSE
from fastpie.mining.selection import Hardest, Strata, check_numbers, sort_keys

__all__ = ["MiningResult"]

_LOWER_IS_HARDER = frozenset({
    "spearman", "margin_dense", "margin_pruned", "margin_committee", "iou", "iou_committee",
    "iou_soft", "iou_soft_committee", "first_flip",
})  # fmt: skip


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
                f"Expected a run on this machine, but it is at {self.location}: copy it here first, or "
                "name the file to write."
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
        return len(self._parts)

    def __repr__(self) -> str:
        return (
            f"MiningResult({self.location!r}, {len(self)} samples, {self.errors.num_rows} errors)"
        )

    def _repr_html_(self) -> str:
        """The run in a few lines, for a notebook."""
        from fastpie.report.sheet import summary_html  # see `show`

        return summary_html(self)

    def show(
        self,
        n: int = 24,
        by: str = "hardness",
        dataset: Any = None,
        class_names: Sequence[str] | None = None,
    ) -> Any:
        """The hardest samples at a glance, for a notebook: pictures with what the run says of them.

        Args:
            n: how many samples.
            by: see `select`.
            dataset: the data set of the run, for the pictures; without it there are the facts alone.
            class_names: in index order; by default the data set's, else the index is the name.

        Returns:
            A `fastpie.report.sheet.Sheet`, which a notebook shows as a grid and a terminal as lines.

        Raises:
            FastpieError: for an unknown column or a negative `n`.
        """
        # The report stands above this layer and imports it; who mines needs no report, so it is
        # imported by those who look, and when they look.
        from fastpie.report.sheet import sheet_of

        return sheet_of(self, n, by, dataset, class_names)

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

    @functools.cached_property
    def _parts(self) -> Parts:
        return self._folder.parts()

    @property
    def dataset(self) -> Any:
        """The rows of `table` as a `pyarrow.dataset.Dataset`, of which nothing is read yet.

        DuckDB queries it where it lies::

            dataset = result.dataset
            duckdb.sql("select label, avg(hardness) from dataset group by label")
        """
        return self._parts.dataset()

    def scan(
        self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `table` in its order, in batches, for a table that is too long to be held.

        Args:
            columns: to read; None for all.
            batch_rows: rows of a batch at most.

        Returns:
            An iterator over record batches with the columns asked for, in the order asked for.

        Raises:
            FastpieError: for an unknown column or `batch_rows` below 1.
        """
        if batch_rows < 1:
            raise FastpieError(f"Expected `batch_rows` of at least 1, but got {batch_rows}.")
        return self._parts.scan(columns, batch_rows)

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of both models in the order of `table`, where the run kept them.

        Returns:
            fp32 [N, C] and [L, N, C].
        """
        return self._kept("logits")

    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of both models in the order of `table`, where the run kept them.

        Returns:
            fp32 [N, D] and [L, N, D]; L is 0 where those of the dense model alone were kept.
        """
        return self._kept("features")

    def select(
        self, fraction: float = 0.05, by: str = "hardness", per: str | None = None
    ) -> list[str]:
        """The hardest samples.

        The table is read as a stream, so that memory is that of the answer, however long the table.

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
        rows = self.select_rows(fraction, by, per)
        order = np.argsort(rows)  # back from the order of the table
        rows = rows[order]
        ids = np.empty(len(rows), dtype=object)
        for first, taken in self._parts.take("sample_id", rows):
            ids[order[first : first + len(taken)]] = taken.to_numpy(zero_copy_only=False)
        chosen: list[str] = ids.tolist()
        return chosen

    def select_rows(
        self, fraction: float = 0.05, by: str = "hardness", per: str | None = None
    ) -> np.ndarray:
        """The hardest samples as rows of `table`, int64, hardest first; see `select`."""
        if not 0 <= fraction <= 1:
            raise FastpieError(f"Expected `fraction` in [0, 1], but got {fraction}.")
        if not len(self):  # then there are no columns either
            return np.empty(0, np.int64)
        columns = [by] if per is None else [by, per]
        batches = self.scan(columns)
        check_numbers(self._parts.schema.field(by).type)
        lower_is_harder = by.split("@")[0] in _LOWER_IS_HARDER
        strata = None if per is None else Strata()
        counts = self._counts(fraction, per, strata)
        if not counts.any():
            return np.empty(0, np.int64)
        hardest = Hardest(counts, len(self))
        first = 0
        for batch in batches:
            keys = sort_keys(batch.column(0), lower_is_harder)
            hardest.add(keys, first, None if strata is None else strata.numbers(batch.column(1)))
            first += batch.num_rows
        return hardest.rows()

    def _counts(self, fraction: float, per: str | None, strata: Strata | None) -> np.ndarray:
        """How many rows of each stratum are wanted, int64 [S]; numbers the strata on the way."""
        if per is None or strata is None:
            return np.array([int(fraction * len(self))])
        if fraction == 0:
            return np.zeros(1, np.int64)
        members = np.zeros(0, np.int64)
        for batch in self.scan([per]):
            found = np.bincount(strata.numbers(batch.column(0)), minlength=len(members))
            found[: len(members)] += members
            members = found
        return np.maximum(1, (fraction * members).astype(np.int64))

    def take(
        self,
        rows: np.ndarray,  # int64 [n] of `table`
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Some rows of `table` in the order asked for; the others pass by as a stream.

        Args:
            rows: such as `select_rows` gives.
            columns: to read; None for all.

        Raises:
            FastpieError: for an unknown column.
        """
        wanted, order = np.unique(rows, return_inverse=True)
        names = self._parts.schema.names if columns is None else list(columns)
        batches, at = [], 0
        for batch in self.scan(names):
            inside = wanted[slice(*np.searchsorted(wanted, (at, at + batch.num_rows)))]
            batches.append(batch.take(pa.array(inside - at)))
            at += batch.num_rows
        schema = pa.schema([self._parts.schema.field(name) for name in names])
        return pa.Table.from_batches(batches, schema).take(pa.array(order))

    def quantiles(
        self, q: float | Sequence[float], by: str = "hardness", per: str | None = None
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Quantiles of a column, from one pass in bounded memory.

        By KLL sketches (Karnin, Lang, Liberty, arXiv 1603.05346; Apache DataSketches): what comes
        for `q` is a value of the column whose rank, as a fraction of all, is within
        `fastpie.mining.quantiles.RANK_ERROR` of `q`, with a confidence of 99 %. Columns of up to some
        thousands of values, q = 0 and q = 1 are exact. The sketches are random: a second call can
        give another value within the same bounds.

        Args:
            q: one or several, each in [0, 1].
            by: a column of numbers; NaN and null are left out.
            per: a column (say "label") for quantiles of each of its values; about 100 KB of memory
                for each of them.

        Returns:
            fp64, of the shape of `q`; NaN where no number is. With `per` such an array by the value's
            text.

        Raises:
            FastpieError: for an unknown column, q outside [0, 1], or without the package
                datasketches (`pip install 'fastpie[quantiles]'`).
        """
        from fastpie.mining.quantiles import quantiles_of

        batches = self.scan([by] if per is None else [by, per])
        check_numbers(self._parts.schema.field(by).type)
        found = quantiles_of(batches, q, per is not None)
        return found if per is not None else found[""]

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
        if self.record["config"][f"keep_{kind}"] == DENSE:
            levels = 0
        if table is None:
            return np.empty((0, 0), np.float32), np.empty((levels, 0, 0), np.float32)
        dense = _matrix(table.column("dense"))
        if not levels:
            return dense, np.empty((0, *dense.shape), np.float32)
        pruned = _matrix(table.column("pruned"))
        return dense, np.ascontiguousarray(pruned.reshape(len(dense), levels, -1).swapaxes(0, 1))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:  # fixed-size lists -> [n, size]
    size: Any = column.type.list_size
    return np.concatenate(
        [c.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for c in column.chunks]
    )
