"""The work of a run, cut once: sample ids in order, fixed batches, parts of whole batches."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Subset

from fastpie.data.texts import Texts
from fastpie.errors import FastpieError

__all__ = ["Plan", "digest_of_ids", "fingerprint_of", "ids_of", "known_sample_ids", "text_id"]


@dataclass(frozen=True)
class Plan:
    """Which samples lie in which batch. A *position* is a place in sample_id order.

    Attributes:
        sample_ids: in increasing order (of code points), unique.
        order: int64; order[position] is the index of the sample in the data set.
        batch_size: slots of every batch; the last one is padded.
        batches_per_part: batches whose rows are written together.
    """

    sample_ids: Texts
    order: np.ndarray
    batch_size: int
    batches_per_part: int = 1

    @classmethod
    def cut(cls, sample_ids: Iterable[Any], batch_size: int) -> Plan:
        """Order the samples by id.

        Args:
            sample_ids: of the samples in the data set's own order; made strings.
            batch_size: samples in a batch.

        Raises:
            FastpieError: for no samples, or for ids that are empty or not unique.
        """
        ids = ids_of(sample_ids).array
        if not len(ids):
            raise FastpieError("Expected a data set with at least one sample, but it is empty.")
        if batch_size < 1:
            raise FastpieError(f"Expected a batch size of at least 1, but got {batch_size}.")
        empty = pc.index(ids, "").as_py()
        if empty >= 0:
            raise FastpieError(f"Expected sample ids, but sample {empty} has an empty one.")
        if pc.all(pc.less(ids[:-1], ids[1:])).as_py():  # no samples: null
            return cls(Texts(ids), np.arange(len(ids)), batch_size)
        order = pc.sort_indices(ids)
        ids = ids.take(order)
        twice = pc.unique(ids[1:].filter(pc.equal(ids[1:], ids[:-1])))
        if len(twice):
            raise FastpieError(
                f"Expected unique sample ids, but {len(twice)} occur more than once, for example "
                f"{twice[:3].to_pylist()}."
            )
        return cls(Texts(ids), order.to_numpy().astype(np.int64), batch_size)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self) // self.batch_size)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.batches // self.batches_per_part)

    def positions(self, batch: int) -> list[int]:
        """The positions in one batch; the last batch can have fewer than `batch_size`."""
        first = batch * self.batch_size
        return list(range(first, min(first + self.batch_size, len(self))))

    def batches_of(self, part: int) -> range:
        """The batches in one part."""
        first = part * self.batches_per_part
        return range(first, min(first + self.batches_per_part, self.batches))

    def samples_of(self, part: int) -> range:
        """The positions in one part."""
        batches = self.batches_of(part)
        return range(
            batches.start * self.batch_size, min(batches.stop * self.batch_size, len(self))
        )

    def part_of(self, position: int) -> int:
        """The part that a position lies in."""
        return position // (self.batch_size * self.batches_per_part)

    def find(self, sample_ids: Sequence[Any]) -> np.ndarray:  # int64 [n]
        """The positions of samples, by bisection of all of them at once: no index is built.

        Args:
            sample_ids: any of the data set, as it names them or as text.

        Raises:
            FastpieError: for an id that is not there.
        """
        array = self.sample_ids.array
        wanted = (
            sample_ids.array
            if isinstance(sample_ids, Texts)
            else pa.array([text_id(i) for i in sample_ids], pa.large_string())
        )
        first = np.zeros(len(wanted), np.int64)
        last = np.full(len(wanted), len(array) - 1)  # ids are at least one
        for _ in range(len(array).bit_length()):
            middle = (first + last) // 2
            below = pc.less(array.take(pa.array(middle)), wanted).to_numpy(zero_copy_only=False)
            first = np.where(below, np.minimum(middle + 1, last), first)
            last = np.where(below, last, middle)
        found = pc.equal(array.take(pa.array(first)), wanted).to_numpy(zero_copy_only=False)
        if not found.all():
            unknown = wanted[int(np.flatnonzero(~found)[0])].as_py()
            raise FastpieError(
                f"Expected sample ids of the data set of {len(self)} samples, but {unknown!r} is not "
                f"among them (they are like {self.sample_ids[0]!r})."
            )
        return first

    def fingerprint(self) -> str:
        """Hash of all sample ids."""
        return digest_of_ids(self.sample_ids)

    def lowest_hashes(self, count: int) -> list[int]:
        """Positions of the samples with the lowest id hash: a fixed subset, whatever the order."""

        def key(numbered: tuple[int, str]) -> bytes:
            return hashlib.blake2b(numbered[1].encode(), digest_size=16).digest()

        return [p for p, _ in heapq.nsmallest(count, enumerate(self.sample_ids), key=key)]


def ids_of(sample_ids: Iterable[Any]) -> Texts:
    """Sample ids as text.

    Raises:
        FastpieError: for ids that are no text in UTF-8.
    """
    if isinstance(sample_ids, Texts):
        return sample_ids
    if isinstance(sample_ids, range):
        return Texts(pc.cast(pa.array(np.arange(*_bounds(sample_ids))), pa.large_string()))
    texts = [text_id(i) for i in sample_ids]
    unwritable = [i for i in texts if not i.isascii() and not _is_utf8(i)]
    if unwritable:
        raise FastpieError(
            f"Expected sample ids that are text in UTF-8, but got {unwritable[0]!r} (a file name "
            "in another encoding?)."
        )
    return Texts(texts)


def digest_of_ids(sample_ids: Texts) -> str:
    """Hash of ids in the order given."""
    digest = hashlib.sha256()
    for buffer in sample_ids.buffers():
        digest.update(buffer.data)
    return digest.hexdigest()


def _bounds(numbers: range) -> tuple[int, int, int]:
    return numbers.start, numbers.stop, numbers.step


def text_id(sample_id: Any) -> str:
    """A sample id as text; a number in a tensor or array is the number."""
    return str(sample_id.item() if hasattr(sample_id, "item") else sample_id)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def known_sample_ids(dataset: Any) -> Sequence[Any] | None:
    """Sample ids that a data set tells without reading a sample, or None.

    Either an attribute `sample_ids`, or the entries of MONAI's `dataset.data` (dicts with the key
    "sample_id"), also behind `torch.utils.data.Subset`.
    """
    if isinstance(dataset, Subset):
        ids = known_sample_ids(dataset.dataset)
        if isinstance(ids, Texts):
            return Texts(ids.array.take(pa.array(dataset.indices, pa.int64())))
        return None if ids is None else [ids[i] for i in dataset.indices]
    ids = getattr(dataset, "sample_ids", None)
    if ids is None:
        entries = getattr(dataset, "data", None)
        if (
            isinstance(entries, list)
            and entries
            and all(isinstance(e, dict) and "sample_id" in e for e in entries)
        ):
            ids = [e["sample_id"] for e in entries]
    if ids is not None and len(ids) != len(dataset):
        raise FastpieError(
            f"Expected one sample id for each of the {len(dataset)} samples, but the data set "
            f"names {len(ids)}."
        )
    return ids


def fingerprint_of(dataset: Any) -> str | None:
    """What a data set says of its labels and preprocessing by an attribute `fingerprint`, or None."""
    if isinstance(dataset, Subset):
        inner = fingerprint_of(dataset.dataset)
        return None if inner is None else f"{inner} {list(dataset.indices)}"
    fingerprint = getattr(dataset, "fingerprint", None)
    return fingerprint if isinstance(fingerprint, str) else None
