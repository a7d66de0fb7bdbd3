"""Quantiles of columns that are too long to be held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastpie._extras import load_extra
from fastpie.errors import FastpieError
from fastpie.mining.selection import Strata

__all__ = ["RANK_ERROR", "quantiles_of"]

_K = 4096
"""Of the sketches; a sketch holds about three times as many values at most."""
RANK_ERROR = 0.00071
"""How far the rank of a quantile is off at most, as a fraction of all values (99 % confidence)."""


def quantiles_of(
    batches: Iterable[pa.RecordBatch], q: float | Sequence[float], stratified: bool
) -> dict[str, np.ndarray]:
    """Quantiles of the first column, for each value of the second one where that is asked for.

    Args:
        batches: of a column of numbers and, where `stratified`, another column.
        q: one or several, each in [0, 1].
        stratified: for each value of the second column.

    Returns:
        fp64 arrays of the shape of `q`, by the text of the second column's value, else by "".

    Raises:
        FastpieError: for q outside [0, 1], or without the package datasketches.
    """
    wanted = np.asarray(q, dtype=np.float64)
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise FastpieError(f"Expected `q` in [0, 1], but got {q}.")
    sketch_type = _sketch_type()
    strata = Strata()
    sketches = [] if stratified else [sketch_type(_K)]
    for batch in batches:
        values = batch.column(0).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        known = ~np.isnan(values)
        if not stratified:
            sketches[0].update(values[known])
            continue
        numbers = strata.numbers(batch.column(1))
        sketches += [sketch_type(_K) for _ in range(len(sketches), len(strata.names))]
        values, numbers = values[known], numbers[known]
        order = np.argsort(numbers, kind="stable")
        present, starts = np.unique(numbers[order], return_index=True)
        for number, group in zip(present, np.split(values[order], starts[1:]), strict=False):
            sketches[number].update(group)
    names = strata.names if stratified else [""]
    return {name: _read(sketch, wanted) for name, sketch in zip(names, sketches, strict=True)}


def _read(sketch: Any, q: np.ndarray) -> np.ndarray:
    if sketch.is_empty():
        return np.full(q.shape, np.nan)
    flat = q.reshape(-1)
    found = np.asarray(sketch.get_quantiles(flat, True), dtype=np.float64)
    found[flat == 0] = sketch.get_min_value()  # the sketch itself promises only the rank
    found[flat == 1] = sketch.get_max_value()
    return found.reshape(q.shape)


def _sketch_type() -> Any:
    return load_extra("datasketches", "quantiles", "quantiles").kll_doubles_sketch
