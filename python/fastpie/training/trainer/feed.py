"""Batches of a training: the same samples, augmented the same, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from fastpie.errors import FastpieError
from fastpie.mining.batching import image_fault, of_one_depth, reason_of
from fastpie.mining.loading import load
from fastpie.mining.plan import known_sample_ids, text_id
from fastpie.mining.reading import Kind, Problem, Reader, item_of, label_kind, parse_item, shapes_of
from fastpie.training.objectives.objective import TrainBatch
from fastpie.training.trainer.randomness import generators_kept, seed_of, seed_reading

__all__ = ["Feed", "Fetched"]


class Fetched(NamedTuple):
    """What could be read of a batch, in this process's memory; `images` None for nothing."""

    images: Any
    labels: Any
    ids: list[str]
    extra: dict[str, Any]
    unreadable: list[Problem]  # positions are indices in the data set

    def to(self, device: torch.device) -> TrainBatch:
        """The batch on a device."""

        def move(leaf: Any) -> Any:
            return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

        images, labels, extra = pytree.tree_map(move, (self.images, self.labels, self.extra))
        return TrainBatch(images, labels, self.ids, extra=extra)


class Feed(Reader):
    """Reads the batches of an epoch, in this process or in workers.

    Before a sample is read, the global generators of Python, NumPy and torch are seeded from seed,
    epoch and the sample's place in the epoch, and so are those of MONAI's transforms (anything with
    `set_random_state(seed=...)`: the data set, one it wraps, or what these hold). A sample that raises, or holds
    NaN, or does not fit the others of its batch is left out.

    Items are `(image[, label[, sample_id]])` or dicts with `image`, `label`, `sample_id` and others,
    which become `TrainBatch.extra`: collated where torch can, else a list.

    Attributes:
        ids: of all samples, where the data set tells them without reading one; else None.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        """Borrow from a DataLoader or take a data set; see `Reader`.

        Raises:
            FastpieError: for a DataLoader that does not take each sample once: its sampler is not used.
        """
        if isinstance(data, DataLoader):
            _check_sampler(data)
        super().__init__(data, batch_size=batch_size, num_workers=num_workers)
        self.ids = known_sample_ids(self.dataset)

    def batches(
        self,
        order: np.ndarray,
        places: Iterable[range],
        seed: tuple[int, ...],
        *,
        pin_memory: bool = False,
    ) -> Generator[Fetched, None, None]:
        """The batches of some places of an epoch.

        Close the iterator to end the workers before the last batch.

        Args:
            order: int64, the index of the sample at each place.
            places: of each batch.
            seed: numbers that name the epoch.
            pin_memory: for a copy to the GPU that overlaps.
        """
        job = _Items(self.dataset, self._collate, self.raw, seed)
        tasks = ([(place, int(order[place])) for place in batch] for batch in places)
        fetched = load(job, tasks, then=_pinned if pin_memory else None, **self._options)
        try:
            while True:
                if self._options["workers"]:
                    found = next(fetched, None)
                else:  # reading seeds the generators of this process
                    with generators_kept(torch.device("cpu")):
                        found = next(fetched, None)
                if found is None:
                    return
                yield self._named(*found)
        finally:
            cast(Generator[Any, None, None], fetched).close()

    def sample_id(self, index: int) -> str:
        """Of a sample, told by the data set or else its index."""
        return str(index) if self.ids is None else text_id(self.ids[index])

    def _named(
        self,
        images: Any,
        labels: Any,
        extra: dict[str, Any],
        indices: list[int],
        ids: list[Any],
        unreadable: list[Problem],
    ) -> Fetched:
        names = [
            self.sample_id(index) if own is None else text_id(own)
            for index, own in zip(indices, ids, strict=True)
        ]
        return Fetched(images, labels, names, extra, unreadable)


class _Items:
    """The job of the processes that read: `(place, index)` into what `Feed._named` takes."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        raw: bool,
        seed: tuple[int, ...],
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.raw = raw
        self.seed = seed
        self.randomizable = _randomizable(dataset)

    def read(self, at: tuple[int, int]) -> tuple[int, Any, Problem | None]:
        place, index = at
        seed = seed_of(*self.seed, place)
        try:
            seed_reading(seed)
            for transform in self.randomizable:
                transform.set_random_state(seed=seed % 2**32)
            item = item_of(self.dataset, index, self.raw)
            fault = image_fault(parse_item(item).image, raw=self.raw)
        except Exception as error:  # a data set is anybody's code
            return index, None, Problem(index, "read", reason_of(error))
        return index, item, Problem(index, "image", fault) if fault else None

    def lost(self, at: tuple[int, int], reason: str) -> tuple[int, Any, Problem | None]:
        return at[1], None, Problem(at[1], "read", reason)

    def batch(self, reads: list[tuple[int, Any, Problem | None]]) -> tuple[Any, ...]:
        unreadable = [fault for _, _, fault in reads if fault is not None]
        readable = [(index, item) for index, item, fault in reads if fault is None]
        if readable:
            try:
                return self._batch(readable, unreadable)
            except Exception:
                readable, odd = _alike(readable)
                unreadable += odd
        try:
            if readable:
                return self._batch(readable, unreadable)
        except Exception as error:
            unreadable += [Problem(i, "collate", reason_of(error)) for i, _ in readable]
        return None, None, {}, [], [], unreadable

    def _batch(self, readable: list[tuple[int, Any]], unreadable: list[Problem]) -> tuple[Any, ...]:
        items = [item for _, item in readable]
        ids = [parse_item(item).sample_id for item in items]
        if self.collate is default_collate:
            images, labels, extra = _collated(items, self.raw)
        else:
            collated = self.collate(items)
            images, labels, _ = parse_item(collated)
            extra = _others(collated)
        if isinstance(images, list):  # how torch collates tuples
            images = tuple(images)
        return images, labels, extra, [index for index, _ in readable], ids, unreadable


def _check_sampler(loader: DataLoader[Any]) -> None:
    batches, samples = loader.batch_sampler, loader.sampler
    once = isinstance(samples, SequentialSampler | DistributedSampler) or (
        isinstance(samples, RandomSampler)
        and not samples.replacement
        and samples.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if once and type(batches) in (BatchSampler, type(None)):
        return
    own = type(batches if once else samples).__name__
    raise FastpieError(
        f"Expected a DataLoader that takes each sample once an epoch, but its {own} says otherwise and "
        "would not be used. Give torch.utils.data.Subset(...) to train on some of the samples, and "
        "`draw_weights` to draw some of them more often."
    )


def _collated(items: list[Any], raw: bool) -> tuple[Any, Any, dict[str, Any]]:
    samples = [parse_item(item) for item in items]
    images: list[Any] = [sample.image for sample in samples]
    if raw:
        images = [image for (image,) in of_one_depth([(image,) for image in images])]
    labels = None
    if any(sample.label is not None for sample in samples):
        # Lists would be collated by column.
        labels = default_collate(
            [
                torch.tensor(s.label) if isinstance(s.label, list | tuple) else s.label
                for s in samples
            ]
        )
    others = [_others(item) for item in items]
    shared = [name for name in others[0] if all(name in other for other in others)]
    extra = {name: _column([other[name] for other in others]) for name in shared}
    return default_collate(images), labels, extra


def _others(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        return {}
    return {k: v for k, v in item.items() if k not in ("image", "label", "sample_id")}


def _column(values: list[Any]) -> Any:
    try:
        return default_collate(values)
    except (TypeError, RuntimeError):  # None, boxes of different numbers, objects
        return values


def _alike(
    readable: list[tuple[int, Any]],
) -> tuple[list[tuple[int, Any]], list[Problem]]:
    """Those like most of a batch, and what is said of the others."""
    samples = [parse_item(item) for _, item in readable]
    most = Kind.of_most(samples, labelled=True, batch_size=len(samples) + 1)
    alike, odd = [], []
    for (index, item), sample in zip(readable, samples, strict=True):
        shapes, label = shapes_of(sample.image), label_kind(sample.label)
        if shapes == most.image and label == most.label:
            alike.append((index, item))
            continue
        what = f"an image of shapes {shapes} and a label of {label}"
        like = f"{most.image} and {most.label} as most of its batch have"
        odd.append(Problem(index, "collate", f"Expected {like}, but got {what}."))
    return alike, odd


def _randomizable(dataset: Any) -> Sequence[Any]:
    """What keeps random generators of its own and lets them be seeded, as MONAI's transforms.

    The data set, what it holds, and the data set that it wraps.
    """
    found: dict[int, Any] = {}
    while dataset is not None:
        for value in (dataset, *vars(dataset).values()) if hasattr(dataset, "__dict__") else ():
            for candidate in value if isinstance(value, tuple) else (value,):
                if callable(getattr(candidate, "set_random_state", None)):
                    found[id(candidate)] = candidate
        dataset = vars(dataset).get("dataset") if hasattr(dataset, "__dict__") else None
    return list(found.values())


def _pinned(found: tuple[Any, ...]) -> tuple[Any, ...]:
    def pin(leaf: Any) -> Any:
        return leaf.pin_memory() if isinstance(leaf, Tensor) else leaf

    images, labels, extra = pytree.tree_map(pin, found[:3])
    return images, labels, extra, *found[3:]
