"""The table of a data set: one row a sample, whatever it was read from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastpie._files import atomic_path
from fastpie.data.files import Files
from fastpie.data.formats import FORMATS, check_options, recognise
from fastpie.data.formats.columns import text_or_null
from fastpie.data.formats.source import Request, Source
from fastpie.data.hashing import hash64, mixed
from fastpie.data.origin import files_from
from fastpie.data.texts import Texts
from fastpie.errors import FastpieError

__all__ = ["Manifest", "read_manifest"]

_KEY = b"fastpie.manifest"  # in the metadata of the Parquet schema
_SHOWN = 5


@dataclass(frozen=True)
class Manifest:
    """Samples, their labels and attributes, and how to open them.

    Attributes:
        table: one row a sample. Always `sample_id` (unique) and `path`, large_string; where known
            `label` (multiclass: int64, -1 unknown; multilabel: fixed_size_list<float>[C] of 1, 0 and
            NaN for unknown), `group` (of samples that no split may part: the patient or lesion),
            `split`, `sex` ("F", "M" or null), `age` (float, years), `view`, `site`, `frame` (int64);
            and the other columns of the source as they were, text where they came from a CSV.
        task: "multiclass", "multilabel", or None without labels.
        class_names: in index order, None where classes have only numbers.
        files: how a path is opened.
    """

    table: pa.Table
    task: str | None
    class_names: list[str] | None
    files: Files

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def sample_ids(self) -> Texts:
        """In row order, not copied."""
        return Texts(self.table.column("sample_id"))

    @property
    def splits(self) -> list[str]:
        """Names of the splits, sorted; none without a column `split`."""
        if "split" not in self.table.column_names:
            return []
        return sorted(s for s in pc.unique(self.table.column("split")).to_pylist() if s is not None)

    def subset(self, split: str) -> Manifest:
        """The samples of one split.

        Raises:
            FastpieError: if there is no such split.
        """
        if split not in self.splits:
            raise FastpieError(
                f"Expected a split of {self.splits}, but got {split!r}."
                + ("" if self.splits else " Make splits by with_split.")
            )
        rows = pc.equal(self.table.column("split"), split)
        return replace(self, table=_one_chunk(self.table.filter(rows)))

    def with_split(self, fractions: Mapping[str, float], seed: int = 0) -> Manifest:
        """Split anew, never through a group.

        A group goes where the hash of its name and of the seed falls: the same whatever the order of
        rows and whichever other samples there are. Shares are therefore met on average: of 1,000
        groups .7 gives 700 +- 14. A sample without a group is a group of its own.

        Args:
            fractions: share of each split, summing to 1; their order decides which hashes are whose.
            seed: other splits for another one.

        Returns:
            Manifest: with `split`, in place of one that was there.

        Raises:
            FastpieError: for fractions that are negative or do not sum to 1.
        """
        shares = list(fractions.values())
        if not all(f >= 0 for f in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise FastpieError(
                f"Expected fractions of at least 0 that sum to 1, but got {dict(fractions)}."
            )
        groups = self.table.column("sample_id")
        if "group" in self.table.column_names:
            groups = pc.coalesce(self.table.column("group"), groups)
        places = mixed(hash64(groups), seed) / 2.0**64  # in [0, 1)
        splits = np.searchsorted(np.cumsum(shares)[:-1], places, side="right")
        column = pa.array(list(fractions), pa.large_string()).take(pa.array(splits))
        table = self.table
        if "split" in table.column_names:
            table = table.drop_columns(["split"])
        return replace(self, table=table.append_column("split", column))

    def check_leakage(self) -> None:
        """Refuse splits that share a group.

        Raises:
            FastpieError: with the first groups and how many there are.
        """
        if not {"group", "split"} <= set(self.table.column_names):
            return
        known = self.table.select(["group", "split"]).drop_null()
        if known.num_rows == 0:
            return
        hashes = hash64(known["group"])
        codes = known["split"].dictionary_encode().combine_chunks().indices.to_numpy()
        order = np.argsort(hashes, kind="stable")
        hashes, codes = hashes[order], codes[order]
        crossing = (hashes[1:] == hashes[:-1]) & (codes[1:] != codes[:-1])
        if not crossing.any():
            return
        suspects = known.take(np.sort(order[np.isin(hashes, hashes[1:][crossing])]))
        counts = suspects.group_by("group").aggregate([("split", "count_distinct")])
        # Two groups of one hash are no leak.
        leaks = counts.filter(pc.greater(counts["split_count_distinct"], 1))["group"]
        if len(leaks) == 0:
            return
        shown = []
        for group in sorted(leaks.to_pylist())[:_SHOWN]:
            inside = suspects.filter(pc.equal(suspects["group"], group))["split"]
            shown.append(f"{group} ({', '.join(sorted(pc.unique(inside).to_pylist()))})")
        raise FastpieError(
            f"Expected every group (patient, lesion) in one split, but {len(leaks)} are in several: "
            f"{'; '.join(shown)}{' ...' * (len(leaks) > _SHOWN)}. Split anew with with_split, or pass "
            "allow_leakage=True to read_manifest."
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet file that `read_manifest` and `load` read; whole or not at all.

        Raises:
            FastpieError: for images that are only in memory, or a folder that cannot be written.
        """
        origin = getattr(self.files, "origin", None)
        if origin is None:
            raise FastpieError(
                f"Expected files that can be found again, but {type(self.files).__name__} has no "
                "origin(). Save the table and pass `files` to load."
            )
        record = {"task": self.task, "class_names": self.class_names, "files": origin()}
        metadata = {**(self.table.schema.metadata or {}), _KEY: json.dumps(record).encode()}
        try:
            with atomic_path(Path(path)) as temporary:
                pq.write_table(
                    self.table.replace_schema_metadata(metadata), temporary, compression="zstd"
                )
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(f"Expected to write a manifest to {path}, but: {error}") from error

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        files: Files | None = None,
        allow_outside: bool = False,
    ) -> Manifest:
        """Read what `save` wrote.

        Args:
            path: of the Parquet file.
            root: where the images are now, if they have moved.
            files: in place of those of the manifest.
            allow_outside: as of `read_manifest`; it is not saved.

        Raises:
            FastpieError: if the file cannot be read or `save` did not write it.
        """
        try:
            table = pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise FastpieError(f"Expected a saved manifest at {path}, but: {error}") from error
        metadata = table.schema.metadata or {}
        if _KEY not in metadata:
            raise FastpieError(
                f"Expected a manifest that Manifest.save wrote at {path}, but it is another Parquet "
                "file. Read it with read_manifest."
            )
        try:
            record = json.loads(metadata[_KEY])
            if files is None:
                files = files_from(record["files"], root, allow_outside)
            return cls(_one_chunk(table), record["task"], record["class_names"], files)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FastpieError(
                f"Expected a manifest that Manifest.save wrote at {path}, but it has been changed: "
                f"{type(error).__name__} {error}."
            ) from error


def read_manifest(
    source: Any,
    *,
    format: str = "auto",
    root: str | os.PathLike[str] | None = None,
    labels: str | Sequence[str] | None = None,
    task: str | None = None,
    class_names: Sequence[str] | None = None,
    path_column: str = "path",
    group: str | None = None,
    split: str | None = None,
    sex: str | None = None,
    age: str | None = None,
    view: str | None = None,
    site: str | None = None,
    frame: str | None = None,
    uncertain: str | None = None,
    unmentioned: str | None = None,
    groups: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
    allow_leakage: bool = False,
) -> Manifest:
    """Read the samples of a data set; images are not opened.

    | format | what |
    |---|---|
    | nih | ChestX-ray14's `Data_Entry_2017.csv` or its folder; images anywhere below the root; splits train_val and test from the lists beside it |
    | cxr-lt | label files of NIH-CXR-LT and MIMIC-CXR-LT (2022: one class an image, 2023: several), one or a folder of them |
    | chexpert | CheXpert's `train.csv`, `valid.csv` or their folder |
    | isic | ISIC 2018 task 3 ground truths, or HAM10000's metadata; one file or the folder |
    | table | a CSV or Parquet file of your own, or what `Manifest.save` wrote |
    | folder | images in sub-folders, one a class |
    | webdataset | tar files: a folder of them, a pattern (data-{000..012}.tar, data-*.tar) or a list |
    | huggingface | a `datasets.Dataset` or DatasetDict, or a folder of save_to_disk |

    Args:
        source: what to read.
        format: one of these; "auto" tells by the columns or files. A file is taken for a table
            where `labels` is given.
        root: the folder that paths are relative to and may not leave; by default that of the source.
        labels: table, webdataset (keys of .json; by default .cls), huggingface (by default the
            ClassLabel column): the column of class indices or names, or for multilabel the columns
            of 1, 0 or empty (unknown).
        task: "multiclass" or "multilabel"; by default the data set's, of a table "multiclass".
        class_names: order of the classes that the model was trained with; by default the data set's
            order, or sorted.
        path_column: of a table.
        group: of a table, webdataset or huggingface: the column of patients or lesions, by default
            `group` where there is one. Likewise:
        split: the column of splits.
        sex: F, M, female, male; anything else is null.
        age: years, or DICOM's 058Y; what is no age up to 120 is null.
        view: e.g. PA.
        site: of the body, or the hospital.
        frame: which frame of a file with several.
        uncertain: CheXpert, required: what -1 counts as. "u_ones", "u_zeros" or "u_ignore" (unknown).
        unmentioned: CheXpert: what an empty cell counts as, "unknown" (default) or "negative", which
            is what most of the published models were trained with.
        groups: ISIC 2018: the file of lesion groupings, by default the one beside the ground truth.
        allow_outside: let paths leave the root (absolute, "..", symbolic links).
        allow_leakage: let splits of the source share groups.

    Returns:
        Manifest: with unique, non-empty sample ids.

    Raises:
        FastpieError: if the source cannot be read or is of no known format; for duplicate or empty
            ids, unknown classes, splits that share a group.
    """
    if isinstance(source, str | os.PathLike):
        source = Path(source)
    if isinstance(source, Path) and not _exists(source):
        raise FastpieError(f"Expected a manifest at {source}, but there is no such file or folder.")
    if task not in (None, "multiclass", "multilabel"):
        raise FastpieError(f"Expected task 'multiclass' or 'multilabel', but got {task!r}.")
    if format not in ("auto", *FORMATS):
        raise FastpieError(
            f"Expected `format` to be 'auto' or of {list(FORMATS)}, but got {format!r}."
        )
    options = {
        "labels": labels, "group": group, "split": split, "sex": sex, "age": age, "view": view,
        "site": site, "frame": frame, "uncertain": uncertain, "unmentioned": unmentioned,
        "groups": None if groups is None else Path(groups),
    }  # fmt: skip
    given = {n: v for n, v in options.items() if v is not None}
    if path_column != "path":
        given["path_column"] = path_column
    if format in ("auto", "table") and _is_saved(source):
        if given or class_names is not None:
            raise FastpieError(
                f"Expected no options of labels or columns for {source}, which Manifest.save wrote, "
                f"but got {sorted(given) or ['class_names']}."
            )
        return Manifest.load(source, root=root, allow_outside=allow_outside)
    request = Request(
        source,
        root=None if root is None else Path(root),
        task=task,
        class_names=None if class_names is None else _distinct_names(class_names),
        path_column=path_column,
        allow_outside=allow_outside,
        **options,  # type: ignore[arg-type]
    )
    name = recognise(request) if format == "auto" else format
    check_options(name, given)
    manifest = _checked(FORMATS[name].read(request), source)
    if not allow_leakage:
        manifest.check_leakage()
    pa.default_memory_pool().release_unused()  # of 10 million rows 1 GiB, kept for later otherwise
    return manifest


def _exists(source: Path) -> bool:
    return source.exists() or source.suffix == ".tar"  # shards say themselves which are missing


def _is_saved(source: Any) -> bool:
    if not isinstance(source, Path) or source.suffix != ".parquet" or not source.is_file():
        return False
    try:
        return _KEY in (pq.read_schema(source).metadata or {})
    except (OSError, pa.ArrowException):
        return False  # the reader says why


def _distinct_names(class_names: Sequence[str]) -> list[str]:
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if len(set(names)) != len(names):
        raise FastpieError(f"Expected distinct `class_names`, but got {names}.")
    return names


def _checked(source: Source, name: object) -> Manifest:
    """A manifest of what a format found, its ids unique and its text columns of one type."""
    pa.default_memory_pool().release_unused()  # by the reader; the peak is what comes now
    table = source.table
    for column in ("group", "split", "view", "site"):
        if column in table.column_names and not pa.types.is_large_string(table[column].type):
            place = table.column_names.index(column)
            table = table.set_column(place, column, text_or_null(table[column]))
    table = _one_chunk(table.replace_schema_metadata(None))
    ids = table.column("sample_id")
    empty = pc.equal(ids, "")
    if pc.any(empty).as_py():
        row = pc.index(empty, True).as_py()
        raise FastpieError(
            f"Expected a sample id in every row of {name}, but that of row {row + 1} is empty "
            f"({pc.sum(empty).as_py()} in all)."
        )
    nul = pc.match_substring(ids, "\0")
    if pc.any(nul).as_py():
        row = pc.index(nul, True).as_py()
        raise FastpieError(
            f"Expected text in the sample ids of {name}, but that of row {row + 1} holds a NUL byte. "
            "Is the file damaged, or in UTF-16?"
        )
    _refuse_duplicates(ids, name)
    return Manifest(table, source.task, source.class_names, source.files)


def _refuse_duplicates(ids: pa.ChunkedArray, name: object) -> None:
    ordered = hash64(ids)
    ordered.sort()
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again) == 0:
        return
    counts = pc.value_counts(ids.filter(pa.array(np.isin(hash64(ids), again))))
    # Two ids of one hash are no duplicates.
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice) == 0:
        return
    shown = [f"{v['values'][:200]!r} ({v['counts']} times)" for v in twice.slice(0, 3).to_pylist()]
    raise FastpieError(
        f"Expected unique sample ids in {name}, but {len(twice)} occur more than once, for example "
        f"{', '.join(shown)}. Give each row an id of its own in a column sample_id."
    )


def _one_chunk(table: pa.Table) -> pa.Table:
    """Ids and paths in one piece each, so that `Texts` takes them without a copy."""
    ids, paths = table.column("sample_id"), table.column("path")
    joined = _joined(ids)
    # Paths that serve as ids stay one column in memory.
    columns = {"sample_id": joined, "path": joined if _same(ids, paths) else _joined(paths)}
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _same(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    def places(column: pa.ChunkedArray) -> list[tuple[int, int]]:
        return [(c.buffers()[1].address, c.offset) for c in column.chunks if len(c)]

    return len(a) > 0 and places(a) == places(b)
