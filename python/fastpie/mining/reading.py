"""Samples into batches of fixed shape; what cannot be read becomes an error, not an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from fastpie.errors import FastpieError
from fastpie.mining.plan import Plan

__all__ = ["Batch", "Problem", "Reader", "Sample", "parse_item", "path_of", "shapes_of"]


class Sample(NamedTuple):
    """What one item of a data set holds; label and id are None where it has none."""

    image: Any
    label: Any
    sample_id: Any


class Problem(NamedTuple):
    """Why the sample at a position cannot be scored."""

    position: int
    stage: str  # read, image, collate, label or score
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
                return str(entry[0] if isinstance(entry, tuple | list) else entry)
        entry = dataset.data[index]
        return str(entry["image"]) if isinstance(entry["image"], str) else None
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
            lent = data.batch_size or getattr(data.batch_sampler, "batch_size", None)
            batch_size = batch_size or lent
            num_workers = data.num_workers if num_workers is None else num_workers
            if data.collate_fn is not None:
                self._collate = data.collate_fn
            self._options["worker_init_fn"] = data.worker_init_fn
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
        self.batch_size = batch_size or 64
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
            _Ids(self.dataset), batch_size=256, num_workers=self._workers, collate_fn=list
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
        labelled: bool,
        image_shape: Any = None,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Batches of the given positions, in order, every slot filled.

        Args:
            plan: where the positions lie in the data set.
            batches: positions of each batch.
            labelled: whether a sample without a label is a problem.
            image_shape: shapes that every image must have (`shapes_of`); None for batches of one,
                in which images may differ.
            pin_memory: for a copy to the GPU that overlaps.
        """
        loader = DataLoader(
            _Slots(self.dataset, plan.order),
            batch_sampler=[list(b) for b in batches],
            num_workers=self._workers,
            collate_fn=_Collate(self._collate, self.batch_size, labelled, image_shape),
            pin_memory=pin_memory,
            **self._options,
        )
        yield from loader


def shapes_of(image: Any) -> Any:
    """Shapes of the tensors and arrays of an image, as lists, in its own structure."""
    return [list(leaf.shape) for leaf in _arrays(image)]


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
        return f"#{index}" if sample_id is None else str(sample_id)


class _Slots(Dataset[Any]):
    """The data set by position; an exception becomes the value of the slot."""

    def __init__(self, dataset: Any, order: Sequence[int]) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[int, Any, str | None]:
        try:
            return position, self.dataset[self.order[position]], None
        except Exception as error:
            return position, None, _reason(error)


class _Collate:
    """Batches of one shape out of what `_Slots` gives."""

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        labelled: bool,
        image_shape: Any,
    ) -> None:
        self.collate = collate
        self.batch_size = batch_size
        self.labelled = labelled
        self.image_shape = image_shape

    def __call__(self, reads: list[tuple[int, Any, str | None]]) -> Batch:
        items: list[Any] = []
        problems: list[Problem] = []
        positions, slots = [], []
        for slot, (position, item, error) in enumerate(reads):
            problem = Problem(position, "read", error) if error else self._problem(position, item)
            if problem is None:
                positions.append(position)
                slots.append(slot)
            else:
                problems.append(problem)
            items.append(self._lean(item) if problem is None else None)
        if not positions:
            return Batch(None, None, [], [], problems)
        filler = _zeroed(items[slots[0]])
        items = [filler if item is None else item for item in items]
        items += [filler] * (self.batch_size - len(items))
        try:
            images, labels, _ = parse_item(self.collate(items))
        except Exception as error:
            problems += [Problem(p, "collate", _reason(error)) for p in positions]
            return Batch(None, None, [], [], sorted(problems))
        return Batch(images, labels, positions, slots, problems)

    def _lean(self, item: Any) -> Any:
        """What torch's own collate function needs; one of the user's gets the item as it is."""
        if self.collate is not default_collate:
            return item
        sample = parse_item(item)
        return (sample.image, sample.label) if self.labelled else (sample.image,)

    def _problem(self, position: int, item: Any) -> Problem | None:
        try:
            sample = parse_item(item)
        except FastpieError as error:
            return Problem(position, "read", str(error))
        for array in _arrays(sample.image):
            values = torch.as_tensor(array)
            if values.is_floating_point() and not values.isfinite().all():
                count = int((~values.isfinite()).sum())
                return Problem(
                    position,
                    "image",
                    f"Expected finite values, but the image holds {count} NaN or infinite of "
                    f"{values.numel()}.",
                )
        if self.image_shape is not None and shapes_of(sample.image) != self.image_shape:
            return Problem(
                position,
                "image",
                f"Expected an image of shape {_words(self.image_shape)}, as the first sample has, "
                f"but got {_words(shapes_of(sample.image))}.",
            )
        if self.labelled and sample.label is None:
            return Problem(position, "label", "Expected a label, but the sample has none.")
        return None


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
        return zeroed if isinstance(item, list) else tuple(zeroed)
    return zero(item)
