"""Where a data set has the samples of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader

from fastpie.errors import FastpieError
from fastpie.mining.plan import ids_of, known_sample_ids
from fastpie.mining.result import MiningResult

__all__ = ["places_of"]


def places_of(
    result: MiningResult, dataset: Any, sample_ids: pa.ChunkedArray | pa.Array
) -> np.ndarray:  # int64 [n]
    """The index in a data set of samples of a run, -1 of one that it does not have; reads none.

    By the ids that the data set names; without, by the order of the data set that was mined, if that
    had no more ids and as many samples.

    Args:
        result: the run.
        dataset: map-style, or a DataLoader that lends it.
        sample_ids: the samples wanted.

    Raises:
        FastpieError: if neither tells where the samples are.
    """
    dataset = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    wanted = sample_ids.cast(pa.large_string())
    known = known_sample_ids(dataset)
    if known is not None:
        return _index_in(wanted, ids_of(known).array)
    stored = result.samples()
    count = len(dataset)
    if stored is None or stored.source == "data set" or len(stored.order) != count:
        raise FastpieError(
            f"Expected the data set of the run {result.location}, but the one given ({count} samples) "
            "names no sample ids, and its indices are not the ids of the run."
        )
    rows = _index_in(wanted, stored.sample_ids.array)
    return np.where(rows < 0, -1, stored.order[rows])


def _index_in(wanted: Any, ids: pa.Array) -> np.ndarray:
    found: np.ndarray = pc.fill_null(pc.index_in(wanted, value_set=ids), -1).to_numpy(
        zero_copy_only=False
    )
    return found.astype(np.int64)
