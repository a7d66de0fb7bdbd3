"""`to_fiftyone`: a run as a FiftyOne data set (https://docs.voxel51.com; `pip install 'fastpie[fiftyone]'`)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastpie._extras import load_extra
from fastpie.analysis.analysis import Analysis
from fastpie.errors import FastpieError
from fastpie.integrations.samples import paths_of
from fastpie.mining.result import MiningResult

__all__ = ["to_fiftyone"]

_OWN = ("id", "filepath", "tags", "metadata", "created_at", "last_modified_at")  # FiftyOne's fields
_PREDICTIONS = "prediction_"


def to_fiftyone(
    result: MiningResult | str | os.PathLike[str],
    dataset: Any = None,
    analysis: Analysis | None = None,
    name: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    hardest: float = 0.05,
) -> Any:
    """Make a FiftyOne data set of the samples of a run.

    Fields: `sample_id`; `ground_truth` (Classification, or Classifications of a multilabel run);
    `prediction_dense` and `prediction_pruned` (Classification), one a level on a ladder
    (`prediction_pruned_0_7` of .7); every score as a number (`js`, `js_0_7`, ...): a name has neither
    "@" nor "."; the columns of `analysis.samples`; of the manifest `group`, `sex`, `age`, `view` and
    `site`. A value that is not known is None. Tags: the split, "hard" for the hardest of the run,
    "flip" where a level changes the prediction, and from the analysis "pie", "dark", "bright",
    "blurred", "blank", "duplicate". Saved views: "hardest first" and, with an analysis that has it,
    "label in doubt". Nothing is copied: FiftyOne shows the files where they are.

    Args:
        result: the run, or its folder.
        dataset: the data set of the run, for the files and class names; by default the files are those
            of the run's manifest, relative ones to the current folder.
        analysis: of the run.
        name: of the FiftyOne data set, which must be new; by default FiftyOne makes one up.
        class_names: in index order; by default the data set's, else the index is the name.
        hardest: fraction of the samples to tag "hard".

    Returns:
        A `fiftyone.Dataset`, not persistent: set `persistent = True` to keep it.

    Raises:
        FastpieError: for samples whose files nobody names, a name that is taken, or if FiftyOne
            is not installed.
    """
    run = result if isinstance(result, MiningResult) else MiningResult(result)
    table = run.table
    paths = paths_of(run, table["sample_id"], dataset)
    if paths.null_count:
        where = "" if dataset is not None else " Pass `dataset`, the data set of the run."
        raise FastpieError(
            f"Expected the file of every sample, but of {paths.null_count} of {len(paths)} none is "
            f"known.{where}"
        )
    hard = set(run.select(hardest)) if "hardness" in table.column_names else set()
    if class_names is None:
        class_names = getattr(dataset, "class_names", None)
    table = _with_others(table, run.manifest, analysis)
    fo = load_extra("fiftyone", "fiftyone", "a FiftyOne data set")
    if name is not None and fo.dataset_exists(name):
        raise FastpieError(
            f"Expected a `name` that is new, but FiftyOne has a data set {name!r}: delete it by "
            f"fiftyone.delete_dataset({name!r}), or choose another."
        )
    made = fo.Dataset(name)
    try:
        made.info = {"fastpie_run": str(run.location), "hardness": run.record.get("hardness")}
        made.save()
        made.add_samples(_samples(fo, table, paths.to_pylist(), hard, class_names), progress=False)
        for view, field in (("hardest first", "hardness"), ("label in doubt", "label_in_doubt")):
            if made.has_field(field):
                made.save_view(view, made.sort_by(field, reverse=True))
    except BaseException:
        made.delete()  # half a data set would only stand in the way of the next call
        raise
    return made


def _with_others(table: pa.Table, manifest: pa.Table | None, analysis: Analysis | None) -> pa.Table:
    """The table of a run with the columns of its analysis and manifest."""
    ids = table["sample_id"].cast(pa.large_string())
    others: list[pa.Table] = [] if analysis is None else [analysis.samples]
    if manifest is not None:
        attributes = ("group", "split", "sex", "age", "view", "site")
        kept = [name for name in attributes if name in manifest.column_names]
        others.append(manifest.select(["sample_id", *kept]))
    for other in others:
        rows = pc.index_in(ids, value_set=other["sample_id"].cast(pa.large_string()))
        for column in other.column_names:
            if column not in table.column_names:
                table = table.append_column(column, other[column].take(rows))
    return table


def _samples(
    fo: Any, table: pa.Table, paths: list[str], hard: set[str], class_names: Sequence[str] | None
) -> Iterator[Any]:
    names = {column: _field(column) for column in table.column_names}
    at = 0
    for batch in table.to_batches(4096):
        for row in batch.to_pylist():
            fields: dict[str, Any] = {}
            label = row.pop("label", None)
            if isinstance(label, list):
                present = [i for i, value in enumerate(label) if value == 1]
                classes = [_classification(fo, i, class_names) for i in present]
                fields["ground_truth"] = fo.Classifications(classifications=classes)
            elif label is not None and label >= 0:
                fields["ground_truth"] = _classification(fo, label, class_names)
            for column, value in row.items():
                if value is None or isinstance(value, list):
                    continue
                if isinstance(value, float) and math.isnan(value):
                    continue
                if column.startswith(_PREDICTIONS):
                    value = _classification(fo, value, class_names)
                fields[names[column]] = value
            yield fo.Sample(filepath=paths[at], tags=_tags(row, hard), **fields)
            at += 1


def _classification(fo: Any, index: int, class_names: Sequence[str] | None) -> Any:
    named = class_names is not None and index < len(class_names)
    return fo.Classification(label=str(class_names[index] if named and class_names else index))


def _tags(row: dict[str, Any], hard: set[str]) -> list[str]:
    tags = [row["split"]] if row.get("split") else []
    tags += ["hard"] * (row["sample_id"] in hard)
    tags += [tag for tag in ("flip", "pie", "dark", "bright", "blurred", "blank") if row.get(tag)]
    return tags + ["duplicate"] * (row.get("duplicate_of") is not None)


def _field(column: str) -> str:
    """A name that MongoDB takes for a field, and FiftyOne has no other use for."""
    name = column.replace("@", "_").replace(".", "_").replace("$", "_").replace(" ", "_")
    return f"{name}_" if name in _OWN else name
