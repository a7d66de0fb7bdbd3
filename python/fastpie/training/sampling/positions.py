"""Where the samples of a run are in the data set."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastpie.data.texts import Texts
from fastpie.errors import FastpieError
from fastpie.mining.plan import ids_of, known_sample_ids
from fastpie.mining.result import MiningResult
from fastpie.mining.run_folder import SampleIndex

__all__ = ["rows_of_samples"]


def rows_of_samples(result: MiningResult, dataset: Any = None) -> np.ndarray:  # int64 [n]
    """The row of `result.table` that holds the score of each sample of a data set, -1 without one.

    Args:
        result: a mined run.
        dataset: one that tells its sample ids without reading samples (see `mine`), or these ids in
            the order of the data set; None for the data set that was mined, in the order in which it
            was then.

    Raises:
        FastpieError: if the data set tells no ids or none of them has a score, or without one if the
            run does not tell the order of its samples.
    """
    if dataset is not None:
        return _rows_by_ids(result, _text_ids(dataset))
    samples = result.samples()
    if samples is None:
        raise FastpieError(
            f"Expected {result.location} to tell the order of its samples, but it has no "
            "samples.arrow. Pass `dataset`: the data set, or its sample ids in order."
        )
    return _rows_by_index(result, samples)


def _rows_by_ids(result: MiningResult, ids: pa.Array) -> np.ndarray:
    scored = [batch.column(0).cast(pa.large_string()) for batch in result.scan(["sample_id"])]
    known = pa.chunked_array(scored, pa.large_string()).combine_chunks()
    rows = _numpy(pc.fill_null(pc.index_in(ids, value_set=known), -1))
    if not (rows >= 0).any():
        raise FastpieError(
            f"Expected the data set that {result.location} was mined from, but none of its {len(ids)} "
            "samples has a score there."
        )
    return rows


def _rows_by_index(result: MiningResult, samples: SampleIndex) -> np.ndarray:
    """Both lie in sample_id order: they are walked through together, a batch at a time."""
    ids = samples.sample_ids
    rows = np.full(len(ids), -1, dtype=np.int64)
    row = at = 0
    for batch in result.scan(["sample_id"]):
        scored = batch.column(0).cast(pa.large_string())
        end = bisect.bisect_right(ids, scored[-1].as_py(), lo=at)
        places = pc.index_in(scored, value_set=ids.array.slice(at, end - at))
        if places.null_count:
            raise FastpieError(
                f"Expected every scored sample of {result.location} in its samples.arrow, but some "
                "are not there. Pass `dataset`: the data set, or its sample ids in order."
            )
        index = samples.order[at:end][_numpy(places)]
        if index.min() < 0 or index.max() >= len(rows):
            raise FastpieError(
                f"Expected places in a data set of {len(rows)} samples, but samples.arrow of "
                f"{result.location} holds others. Pass `dataset`: the data set, or its sample ids in "
                "order."
            )
        rows[index] = np.arange(row, row + len(index))
        row, at = row + len(index), end
    return rows


def _text_ids(dataset: Any) -> pa.Array:  # large_string [n]
    ids = dataset if _is_ids(dataset) else known_sample_ids(dataset)
    if ids is None:
        raise FastpieError(
            f"Expected a data set with an attribute `sample_ids`, or sample ids, but got "
            f"{type(dataset).__name__}. Leave `dataset` out if it is the one that was mined."
        )
    return (Texts(ids) if isinstance(ids, pa.Array | pa.ChunkedArray) else ids_of(ids)).array


def _is_ids(given: Any) -> bool:
    if isinstance(given, pa.Array | pa.ChunkedArray | np.ndarray):
        return True
    sequence = isinstance(given, Sequence) and len(given) > 0
    return sequence and isinstance(given[0], str | int | np.integer)


def _numpy(array: Any) -> np.ndarray:
    numbers: np.ndarray = array.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return numbers
