"""Files of the samples of a run."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader

from fastpie.mining.places import places_of
from fastpie.mining.reading import path_of
from fastpie.mining.result import MiningResult

__all__ = ["paths_of"]


def paths_of(
    run: MiningResult, sample_ids: pa.ChunkedArray, dataset: Any = None
) -> pa.ChunkedArray:  # large_string [n], null where nobody tells
    """The file of each sample, by the data set if there is one, else as the run's manifest has it.

    Raises:
        FastpieError: for the data set of another run.
    """
    if dataset is not None:
        dataset = dataset.dataset if isinstance(dataset, DataLoader) else dataset
        places = places_of(run, dataset, sample_ids)
        paths = [path_of(dataset, int(i)) if i >= 0 else None for i in places]
        return pa.chunked_array([paths], pa.large_string())
    manifest = run.manifest
    if manifest is None or "path" not in manifest.column_names:
        return pa.chunked_array([pa.nulls(len(sample_ids), pa.large_string())])
    ids = manifest["sample_id"].cast(pa.large_string())
    rows = pc.index_in(sample_ids.cast(pa.large_string()), value_set=ids)
    return manifest["path"].cast(pa.large_string()).take(rows.combine_chunks())
