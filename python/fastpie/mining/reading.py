"""Samples into batches of fixed shape; what cannot be read becomes an error, not an exception."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
    default_convert,
    get_worker_info,
)

from fastpie.errors import FastpieError
from fastpie.mining.plan import Plan, text_id

__all__ = ["Batch", "Kind", "Problem", "Reader", "Sample", "parse_item", "path_of"]


class Sample(NamedTuple):
    """What one item of a data set holds; label and id are None where it has none."""

    image: Any
    label: Any
    sample_id: Any


class Problem(NamedTuple):
    """Why the sample at a position cannot be scored."""

    position: int
    stage: str  # read, id, image, label, collate or score
    error: str


class Batch(NamedTuple):
    """A batch with all its slots filled.

    Attributes:
        images: input of the model, first dimension the batch size; None if no slot is readable.
        labels: as collated, or None.
        positions: of the readable samples.
        slots: the slot of each of `positions` in the batch.
        problems: of the others.
    """

    images: Any
    labels: Any
    positions: list[int]
    slots: list[int]
    problems: list[Problem]


def parse_item(item: Any) -> Sample:
    """Read `(image[, label[, sample_id]])`, a dict, or a bare image.

    Raises:
        FastpieError: for anything else.
    """
    if isinstance(item, dict):
        if "image" not in item:
            raise FastpieError(f"Expected an item with the key 'image', but got {list(item)}.")
        return Sample(item["image"], item.get("label"), item.get("sample_id"))
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 3:
            raise FastpieError(
                "Expected an item (image[, label[, sample_id]]), but got one of "
                f"{len(item)} elements."
            )
        return Sample(*item, *[None] * (3 - len(item)))
    if isinstance(item, Tensor | np.ndarray):
        return Sample(item, None, None)
    raise FastpieError(
        "Expected an item (image[, label[, sample_id]]) or a dict with 'image', but got "
        f"{type(item).__name__}."
    )


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
    """Reads batches of a plan through a DataLoader whose workers never fail on a bad sample.

    Attributes:
        dataset: map-style, items as `parse_item` takes them.
        batch_size: of the DataLoader lent, or the one given.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        """Borrow data set, batch size, workers and collate function of a DataLoader, or take a data set.

        Raises:
            FastpieError: for an iterable-style data set, which has no fixed samples to resume at.
        """
        self._options: dict[str, Any] = {}
        self._collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(data, DataLoader):
            dataset: Any = data.dataset
            if batch_size is None:
                batch_size = data.batch_size or getattr(data.batch_sampler, "batch_size", None)
            num_workers = data.num_workers if num_workers is None else num_workers
            if data.collate_fn not in (None, default_convert):  # the latter makes no batches
                self._collate = data.collate_fn
            if data.worker_init_fn is not None:
                self._options["worker_init_fn"] = _WorkerInit(data.worker_init_fn)
            if num_workers:
                self._options["timeout"] = data.timeout
                self._options["multiprocessing_context"] = data.multiprocessing_context
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
        self._workers = num_workers or 0

    def read_one(self, index: int) -> Sample | str:
        """One sample, or the reason why it cannot be read."""
        try:
            return parse_item(self.dataset[index])
        except Exception as error:
            return _reason(error)

    def read_sample_ids(self, progress: Callable[[int], None]) -> list[str]:
        """Every sample's id, by reading every sample; `#index` where one cannot be read."""
        ids: list[str] = []
        loader = DataLoader(
            _Ids(self.dataset),
            batch_size=256,
            num_workers=self._workers,
            collate_fn=list,
            generator=torch.Generator(),
            **self._options,
        )
        for chunk in loader:
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

        Args:
            plan: where the positions lie in the data set.
            batches: positions of each batch.
            like: what every sample must be like.
            check_ids: whether the ids in the items must be those of the plan.
            pin_memory: for a copy to the GPU that overlaps.
        """
        loader = DataLoader(
            _Slots(self.dataset, plan, check_ids),
            batch_sampler=[list(b) for b in batches],
            num_workers=self._workers,
            collate_fn=_Collate(self._collate, self.batch_size, like),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # leaves the caller's random state alone
            **self._options,
        )
        yield from loader


class Kind(NamedTuple):
    """What the samples of a run are like; plain values that JSON can hold.

    Attributes:
        image: shapes of the tensors of an image; None where they may differ (batches of one).
        label: shape of a label, or the name of its type; None for a run without labels.
    """

    image: list[list[int]] | None
    label: list[int] | str | None

    @classmethod
    def of_most(cls, samples: Sequence[Sample], *, labelled: bool, batch_size: int) -> Kind:
        """What most of some samples are like, so that an odd one among them decides nothing."""

        def most(values: list[Any]) -> Any:
            return max(values, key=values.count)  # the first of equally many

        image = most([shapes_of(s.image) for s in samples])
        label = most([label_kind(s.label) for s in samples]) if labelled else None
        return cls(None if batch_size == 1 else image, label)


def shapes_of(image: Any) -> list[list[int]]:
    """Shapes of the tensors and arrays of an image, in its own order."""
    return [list(leaf.shape) for leaf in _arrays(image)]


def label_kind(label: Any) -> list[int] | str | None:
    """Shape of a label, [] for a number; the name of its type for what has none; None for None."""
    if label is None:
        return None
    if isinstance(label, Tensor | np.ndarray | np.generic):
        return list(label.shape)
    if isinstance(label, int | float):
        return []
    if isinstance(label, list | tuple) and all(isinstance(v, int | float) for v in label):
        return [len(label)]
    return type(label).__name__


def _arrays(image: Any) -> list[Any]:
    return [x for x in pytree.tree_leaves(image) if isinstance(x, Tensor | np.ndarray)]


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Ids(Dataset[str]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            sample_id = parse_item(self.dataset[index]).sample_id
        except Exception:
            # The error itself is recorded when the sample is read to be scored.
            return f"#{index}"
        return f"#{index}" if sample_id is None else text_id(sample_id)


class _Slots(Dataset[Any]):
    """The data set by position; what goes wrong becomes the value of the slot."""

    def __init__(self, dataset: Any, plan: Plan, check_ids: bool) -> None:
        self.dataset = dataset
        self.plan = plan
        self.check_ids = check_ids

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> tuple[int, Any, Problem | None]:
        index, expected = int(self.plan.order[position]), self.plan.sample_ids[position]
        try:
            item = self.dataset[index]
            sample_id = parse_item(item).sample_id
        except Exception as error:
            return position, None, Problem(position, "read", _reason(error))
        if self.check_ids and sample_id is not None and expected != f"#{index}":
            found = text_id(sample_id)
            if found != expected:
                return position, None, Problem(position, "id", f"{expected!r} is now {found!r}")
        return position, item, None


class _WorkerInit:
    """The user's worker_init_fn, seeing its own data set in `torch.utils.data.get_worker_info()`."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        ours: Any = info.dataset
        object.__setattr__(info, "dataset", ours.dataset)  # WorkerInfo refuses assignment
        try:
            self.function(worker)
        finally:
            object.__setattr__(info, "dataset", ours)


class _Collate:
    """Batches of one shape out of what `_Slots` gives."""

    def __init__(self, collate: Callable[[list[Any]], Any], batch_size: int, like: Kind) -> None:
        self.collate = collate
        self.batch_size = batch_size
        self.like = like

    def __call__(self, reads: list[tuple[int, Any, Problem | None]]) -> Batch:
        reads = [(p, item, problem or self._problem(p, item)) for p, item, problem in reads]
        if self.collate is default_collate:
            return self._batch([self._of_one_shape(*read) for read in reads])
        try:  # a collate function of the user's may pad images of different shapes
            return self._batch(reads, may_fail=True)
        except Exception:
            return self._batch([self._of_one_shape(*read) for read in reads])

    def _batch(
        self, reads: list[tuple[int, Any, Problem | None]], *, may_fail: bool = False
    ) -> Batch:
        problems = [problem for _, _, problem in reads if problem is not None]
        slots = [slot for slot, (_, _, problem) in enumerate(reads) if problem is None]
        positions = [reads[slot][0] for slot in slots]
        if not positions:
            return Batch(None, None, [], [], problems)
        filler = self._lean(_zeroed(reads[slots[0]][1]))
        items = [filler if problem else self._lean(item) for _, item, problem in reads]
        items += [filler] * (self.batch_size - len(items))
        try:
            images, labels, _ = parse_item(self.collate(items))
        except Exception as error:
            if may_fail:
                raise
            problems += [Problem(p, "collate", _reason(error)) for p in positions]
            return Batch(None, None, [], [], sorted(problems))
        return Batch(images, labels, positions, slots, problems)

    def _lean(self, item: Any) -> Any:
        """What torch's own collate function needs; one of the user's gets the item as it is."""
        if self.collate is not default_collate:
            return item
        image, label, _ = parse_item(item)
        if self.like.label is None:
            return (image,)
        # Lists would be collated by column.
        return image, torch.tensor(label) if isinstance(label, list | tuple) else label

    def _problem(self, position: int, item: Any) -> Problem | None:
        sample = parse_item(item)
        for array in _arrays(sample.image):
            try:
                values = torch.as_tensor(array)
            except (TypeError, ValueError) as error:  # big-endian arrays, arrays of objects
                return Problem(position, "image", _reason(error))
            if values.is_floating_point() and not values.isfinite().all():
                count = int((~values.isfinite()).sum())
                return Problem(
                    position,
                    "image",
                    f"Expected finite values, but the image holds {count} NaN or infinite of "
                    f"{values.numel()}.",
                )
        if self.like.label is not None and label_kind(sample.label) != self.like.label:
            found = "none" if sample.label is None else _label_words(label_kind(sample.label))
            return Problem(
                position,
                "label",
                f"Expected a label like most samples have ({_label_words(self.like.label)}), but "
                f"got {found}.",
            )
        return None

    def _of_one_shape(
        self, position: int, item: Any, problem: Problem | None
    ) -> tuple[int, Any, Problem | None]:
        if problem is None and self.like.image is not None:
            shapes = shapes_of(parse_item(item).image)
            if shapes != self.like.image:
                problem = Problem(
                    position,
                    "image",
                    f"Expected an image of shape {_words(self.like.image)}, as most samples have, "
                    f"but got {_words(shapes)}.",
                )
        return position, item, problem


def _label_words(kind: list[int] | str | None) -> str:
    if kind == []:
        return "a number"
    return f"shape {kind}" if isinstance(kind, list) else str(kind)


def _words(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes))


def _zeroed(item: Any) -> Any:
    """The same item with an image of zeros, to fill a slot that nobody reads."""

    def zero(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.zeros_like(leaf)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else leaf

    if isinstance(item, dict):
        return {**item, "image": pytree.tree_map(zero, item["image"])}
    if isinstance(item, tuple | list):
        zeroed = [pytree.tree_map(zero, item[0]), *item[1:]]
        if hasattr(item, "_fields"):  # a namedtuple
            return type(item)(*zeroed)
        return zeroed if isinstance(item, list) else tuple(zeroed)
    return zero(item)
