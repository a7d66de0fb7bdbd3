"""The data sets that a configuration names."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from fastpie.data import ImageCache, ManifestDataset, Preprocessing, read_manifest
from fastpie.errors import FastpieError
from fastpie.training.config.augment import WithUnlabelled
from fastpie.training.config.config import PARTS, DataConfig, SourceConfig
from fastpie.training.config.fields import Place, made
from fastpie.training.criteria.counts import class_counts

__all__ = ["TrainingData"]

_GIB = 2**30


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on and to evaluate on.

    Attributes:
        train: not augmented; unlabelled ones are behind the labelled.
        valid: or None.
        test: or None.
        task: "multiclass", "multilabel" or "segmentation".
        class_names: in index order, or None.
        labels: of `train`, None if the data set tells none without reading samples.
        counts: of these, see `class_counts`.
    """

    train: Any
    valid: Any
    test: Any
    task: str
    class_names: list[str] | None
    labels: Any
    counts: Tensor | None

    @classmethod
    def of_config(cls, config: DataConfig, place: Place) -> TrainingData:
        """Open the data sets; images are read later.

        Class names are those of the training set in all of them: a folder of test images may lack a
        class.

        Raises:
            FastpieError: for what cannot be opened, or images both to train on and to evaluate on.
        """
        found: dict[str, Any] = {}
        names: list[str] | None = None
        for part in PARTS:
            source = config.part(part)
            if source is None:
                found[part] = None
                continue
            if source.classes is None and names is not None and part != "unlabelled":
                source = source.model_copy(update={"classes": names})
            with (place / part).naming(SourceConfig.model_fields):
                found[part] = _open(source, place / part)
                if not len(found[part]):
                    raise FastpieError("Expected samples, but there are none.")
            names = names or getattr(found[part], "class_names", None)
        train = found["train"]
        source = config.part("train")
        task = (source and source.task) or _task(train)
        for part in ("valid", "test"):
            _check_apart(train, found[part], place / part)
        if found["unlabelled"] is not None:
            with (place / "unlabelled").naming():
                train = WithUnlabelled(train, found["unlabelled"])
        labels = getattr(train, "labels", None)
        counts = None
        if labels is not None and task != "segmentation":
            classes = len(names) if names else _classes([train, found["valid"], found["test"]])
            counts = class_counts(labels, classes if task == "multiclass" else None, task)
        return cls(train, found["valid"], found["test"], task, names, labels, counts)

    def summary(self) -> list[str]:
        """Lines that say how many samples there are, and of which classes."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        sizes = [f"{len(data)} {name}" for name, data in parts.items() if data is not None]
        lines = [f"{self.task}, images: {', '.join(sizes)}"]
        if self.counts is not None:
            of_class = self.counts[1] if self.counts.ndim == 2 else self.counts
            names = self.class_names or [str(c) for c in range(len(of_class))]
            told = [f"{name} {n}" for name, n in zip(names, of_class.tolist(), strict=True)]
            if isinstance(self.labels, list) and (unknown := sum(c < 0 for c in self.labels)):
                told.append(f"unlabelled {unknown}")
            lines.append(f"to train on, by class: {', '.join(told)}")
        return lines


def _open(source: SourceConfig, place: Place) -> Any:
    if (source.source is None) == (source.factory is None):
        raise FastpieError("Expected either `source` or `factory`.")
    if source.factory is not None:
        return made({"factory": source.factory, "args": source.args}, place)
    label = source.labels
    options = {
        **source.manifest_args,
        "format": source.format,
        "root": source.root,
        "labels": label[0] if label and len(label) == 1 and source.task != "multilabel" else label,
        "task": source.task,
        "class_names": source.classes,
        "path_column": source.path_column,
        "uncertain": source.uncertain,
    }
    manifest = read_manifest(source.source, **{k: v for k, v in options.items() if v is not None})
    if source.splits:
        manifest = manifest.with_split(source.splits)
    if source.split:
        manifest = manifest.subset(source.split)
    if source.leave_out:
        ids = pa.array(_ids(Path(source.leave_out)), pa.large_string())
        rows = pc.invert(pc.is_in(manifest.table.column("sample_id"), ids))
        manifest = replace(manifest, table=manifest.table.filter(rows).combine_chunks())
    preprocessing = Preprocessing(
        size=tuple(source.size) if source.size else None,  # type: ignore[arg-type]  # 2 or 3
        mean=tuple(source.mean),
        std=tuple(source.std),
        channels=source.channels,
        window=(source.window[0], source.window[1]) if source.window else None,
    )
    cache = None
    if source.cache:
        limit = None if source.cache_limit is None else int(source.cache_limit * _GIB)
        cache = ImageCache(source.cache, limit=limit)
    return ManifestDataset(manifest, preprocessing=preprocessing, cache=cache)


def _ids(path: Path) -> list[str]:
    """A line each, or the column `sample_id` of a CSV."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastpieError(f"Expected `leave_out` to be readable, but: {error}") from error
    if path.suffix == ".csv":
        rows = list(csv.DictReader(lines))
        if rows and "sample_id" not in rows[0]:
            raise FastpieError(
                f"Expected `leave_out` to have a column sample_id, but it has {list(rows[0])}."
            )
        return [row["sample_id"] for row in rows]
    return [line.strip() for line in lines if line.strip()]


def _task(dataset: Any) -> str:
    manifest = getattr(dataset, "manifest", None)
    return getattr(manifest, "task", None) or "multiclass"


def _classes(datasets: list[Any]) -> int:
    labels = [getattr(data, "labels", None) for data in datasets]
    return 1 + max(
        (max(of_one) for of_one in labels if isinstance(of_one, list) and of_one), default=-1
    )


def _check_apart(train: Any, other: Any, place: Place) -> None:
    """No image, and no patient where they are told, both to train on and to evaluate on."""
    if not isinstance(train, ManifestDataset) or not isinstance(other, ManifestDataset):
        return
    told = [("image", set(train.paths), set(other.paths))]
    one, two = train.manifest.table, other.manifest.table
    if "group" in one.column_names and "group" in two.column_names:
        groups = [set(table.column("group").to_pylist()) - {None} for table in (one, two)]
        told.append(("group", groups[0], groups[1]))
    for what, ours, theirs in told:
        if shared := ours & theirs:
            raise place.error(
                f"Expected `{place.path}` to have no {what} of the training set, but {len(shared)} are "
                f"in both, for example {min(shared)!r}."
            )
