"""Samples by position, in this process or in workers; what cannot be read becomes an error, not an exception."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
    default_convert,
)

from fastpie.errors import FastpieError
from fastpie.mining.batching import (
    Batch,
    Collate,
    Kind,
    Problem,
    Sample,
    label_kind,
    parse_item,
    reason_of,
    shapes_of,
)
from fastpie.mining.loading import READ_TIMEOUT, load
from fastpie.mining.plan import Plan, text_id

__all__ = [
    "Batch", "Kind", "Problem", "Reader", "Sample", "item_of", "label_kind", "parse_item", "path_of", "shapes_of",
]  # fmt: skip


def path_of(dataset: Any, index: int) -> str | None:
    """The file of a sample, where the data set tells it without reading."""
    if isinstance(dataset, Subset):
        return path_of(dataset.dataset, dataset.indices[index])
    try:
        for attribute in ("paths", "samples", "imgs"):
            entries = getattr(dataset, attribute, None)
            if entries is not None:
                entry = entries[index]
                entry = entry[0] if isinstance(entry, tuple | list) else entry
                return os.fspath(entry) if isinstance(entry, str | os.PathLike) else None
        entry = dataset.data[index]["image"]
        return os.fspath(entry) if isinstance(entry, str | os.PathLike) else None
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


class Reader:
    """Reads batches of a plan, with workers that may raise, hang or die on a bad sample.

    A data set with `raw(index)`, an item whose image is uint8 or uint16, and `normalize(images)` is
    read raw, a quarter of the bytes; `Reader.normalize` is then due on the device.

    Attributes:
        dataset: map-style, items as `parse_item` takes them.
        batch_size: of the DataLoader lent, or the one given.
        raw: whether batches are raw images, which `normalize` makes the model's input.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        read_timeout: float | None = None,
    ) -> None:
        """Borrow data set, batch size, workers and collate function of a DataLoader, or take a data set.

        Args:
            data: a map-style data set, or a DataLoader of one.
            batch_size: samples in a batch; by default the DataLoader's, else 64.
            num_workers: processes that read; by default the DataLoader's, else none.
            read_timeout: seconds that a worker may take for one sample; by default the DataLoader's
                `timeout` if it has one, else 300.

        Raises:
            FastpieError: for an iterable-style data set, which has no fixed samples to resume at.
        """
        collate: Callable[[list[Any]], Any] = default_collate
        self._options: dict[str, Any] = {}
        if isinstance(data, DataLoader):
            dataset: Any = data.dataset
            if batch_size is None:
                batch_size = data.batch_size or getattr(data.batch_sampler, "batch_size", None)
            num_workers = data.num_workers if num_workers is None else num_workers
            if data.collate_fn not in (None, default_convert):  # the latter makes no batches
                collate = data.collate_fn
            self._options["init"] = data.worker_init_fn
            self._options["context"] = data.multiprocessing_context
            self._options["prefetch"] = data.prefetch_factor or 2
            read_timeout = read_timeout or data.timeout
        else:
            dataset = data
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise FastpieError(
                "Expected a map-style data set (__getitem__ and __len__), whose samples a resumed "
                f"run finds again, but got {type(dataset).__name__}."
            )
        self.dataset = dataset
        self.batch_size = 64 if batch_size is None else batch_size
        self._collate = collate
        self.raw = collate is default_collate and _reads_raw(dataset)
        self._options["workers"] = num_workers or 0
        self._options["timeout"] = read_timeout or READ_TIMEOUT

    def read_one(self, index: int) -> Sample | str:
        """One sample, normalised, or the reason why it cannot be read."""
        try:
            return parse_item(self.dataset[index])
        except Exception as error:
            return reason_of(error)

    def read_sample_ids(self, progress: Callable[[int], None]) -> list[str]:
        """Every sample's id, by reading every sample; `#index` where one cannot be read."""
        ids: list[str] = []
        count = len(self.dataset)
        tasks = (range(i, min(i + 256, count)) for i in range(0, count, 256))
        for chunk in load(_Ids(self.dataset), tasks, **self._options):
            ids.extend(chunk)
            progress(len(chunk))
        return ids

    def read(
        self,
        plan: Plan,
        batches: Iterable[Sequence[int]],
        *,
        like: Kind,
        check_ids: bool = False,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Batches of the given positions, in order, every slot filled.

        Close the iterator to end the workers before the last batch.

        Args:
            plan: where the positions lie in the data set; it stays in this process.
            batches: positions of each batch; taken as they are needed.
            like: what every sample must be like.
            check_ids: whether the ids in the items must be those of the plan.
            pin_memory: for a copy to the GPU that overlaps.

        Raises:
            FastpieError: the workers cannot start, or die or hang again and again without a sample
                that is to blame.
        """

        def slot(position: int) -> tuple[int, int, str | None]:
            index = int(plan.order[position])
            return int(position), index, plan.sample_ids[position] if check_ids else None

        return load(
            _Slots(
                self.dataset,
                Collate(self._collate, self.batch_size, like, raw=self.raw),
                raw=self.raw,
            ),
            ([slot(p) for p in positions] for positions in batches),
            then=_pinned if pin_memory else None,
            **self._options,
        )

    def map(
        self,
        function: Callable[[Sample], Any],
        indices: Sequence[int],
        chunk: int = 32,
    ) -> Iterator[tuple[Any, str | None]]:
        """A function of single samples, in the processes that read them, in order.

        For what is small beside an image: the images themselves do not travel.

        Args:
            function: of a sample, raw where the data set can be read raw. Processes that are started
                afresh need one that can be pickled.
            indices: of the samples in the data set.
            chunk: samples that a process is handed at a time.

        Yields:
            `(result, None)` for each index; `(None, reason)` of a sample that cannot be read or of
            which the function raises.

        Raises:
            FastpieError: as `read`.
        """
        job = _Function(self.dataset, function, raw=_reads_raw(self.dataset))
        tasks = (indices[i : i + chunk] for i in range(0, len(indices), chunk))
        for results in load(job, tasks, **self._options):
            yield from results

    def normalize(self, images: Any) -> Any:
        """The model's input from the images of a batch, on whatever device they are."""
        if not self.raw:
            return images
        return _below_subsets(self.dataset).normalize(images)


class _Ids:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def read(self, index: int) -> str:
        try:
            sample_id = parse_item(self.dataset[index]).sample_id
        except Exception:
            # The error itself is recorded when the sample is read to be scored.
            return f"#{index}"
        return f"#{index}" if sample_id is None else text_id(sample_id)

    def lost(self, index: int, reason: str) -> str:
        return f"#{index}"

    def batch(self, reads: list[str]) -> list[str]:
        return reads


class _Slots:
    """Slots (position, index, id to expect) into what `Collate` takes."""

    def __init__(self, dataset: Any, collate: Collate, *, raw: bool) -> None:
        self.dataset = dataset
        self.batch = collate
        self.raw = raw

    def read(self, slot: tuple[int, int, str | None]) -> tuple[int, Any, Problem | None]:
        position, index, expected = slot
        try:
            item = item_of(self.dataset, index, self.raw)
            sample_id = parse_item(item).sample_id
        except Exception as error:
            return position, None, Problem(position, "read", _reason(error))
        if sample_id is not None and expected is not None and expected != f"#{index}":
            found = text_id(sample_id)
            if found != expected:
                return position, None, Problem(position, "id", f"{expected!r} is now {found!r}")
        return position, item, None

    def lost(
        self, slot: tuple[int, int, str | None], reason: str
    ) -> tuple[int, Any, Problem | None]:
        return slot[0], None, Problem(slot[0], "read", reason)


class _Function:
    def __init__(self, dataset: Any, function: Callable[[Sample], Any], *, raw: bool) -> None:
        self.dataset = dataset
        self.function = function
        self.raw = raw

    def read(self, index: int) -> tuple[Any, str | None]:
        try:
            return self.function(parse_item(item_of(self.dataset, int(index), self.raw))), None
        except Exception as error:  # a data set is anybody's code
            return None, _reason(error)

    def lost(self, index: int, reason: str) -> tuple[Any, str | None]:
        return None, reason

    def batch(self, reads: list[Any]) -> list[Any]:
        return reads


def item_of(dataset: Any, index: int, raw: bool) -> Any:
    """An item of a data set, raw or not, also behind `Subset`."""
    if not raw:
        return dataset[index]
    while type(dataset) is Subset:
        dataset, index = dataset.dataset, int(dataset.indices[index])
    return dataset.raw(index)


def _below_subsets(dataset: Any) -> Any:
    while type(dataset) is Subset:  # a class derived from it may change the items
        dataset = dataset.dataset
    return dataset


def _reads_raw(dataset: Any) -> bool:
    """Whether there are `raw` and `normalize`, and no class derived from theirs makes other items."""
    dataset = _below_subsets(dataset)
    if not all(callable(getattr(dataset, name, None)) for name in ("raw", "normalize")):
        return False
    made = {name: cls for cls in reversed(type(dataset).__mro__) for name in vars(cls)}
    return "raw" in made and issubclass(made["raw"], made.get("__getitem__", object))


def _reason(error: Exception) -> str:
    reason = reason_of(error)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        reason += " (close files that are not needed, or raise the limit: ulimit -n)"
    return reason


def _pinned(batch: Batch) -> Batch:
    def pin(leaf: Any) -> Any:
        return leaf.pin_memory() if isinstance(leaf, Tensor) else leaf

    images, labels = pytree.tree_map(pin, (batch.images, batch.labels))
    return batch._replace(images=images, labels=labels)
