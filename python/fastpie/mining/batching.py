"""Samples of one kind into batches of one shape; what does not fit becomes a problem, not an exception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from fastpie.errors import FastpieError

__all__ = [
    "Batch", "Collate", "Kind", "Problem", "Sample", "image_fault", "label_kind", "of_one_depth", "parse_item",
    "reason_of", "shapes_of",
]  # fmt: skip


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


def image_fault(image: Any, *, raw: bool = False) -> str | None:
    """Why an image cannot be used (no tensor, NaN, `raw` and not of whole numbers), or None."""
    for array in _arrays(image):
        try:
            values = torch.as_tensor(array)
        except (TypeError, ValueError) as error:  # big-endian arrays, arrays of objects
            return reason_of(error)
        if raw and values.dtype not in (torch.uint8, torch.uint16):
            return (
                "Expected `raw` to give an image of torch.uint8 or torch.uint16, but got "
                f"{values.dtype}."
            )
        if values.is_floating_point() and not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            return (
                f"Expected finite values, but the image holds {count} NaN or infinite of "
                f"{values.numel()}."
            )
    return None


def _arrays(image: Any) -> list[Any]:
    if isinstance(image, Tensor | np.ndarray):  # twenty times as fast as a tree of one leaf
        return [image]
    return [x for x in pytree.tree_leaves(image) if isinstance(x, Tensor | np.ndarray)]


def reason_of(error: BaseException) -> str:
    """What the errors table says of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Collate:
    """Batches of one shape out of samples, and of what stands for those that cannot be read."""

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        like: Kind,
        *,
        raw: bool = False,
    ) -> None:
        """How to make batches.

        Args:
            collate: torch's own function or one of the user's.
            batch_size: slots of every batch.
            like: what every sample must be like.
            raw: whether images must be uint8 or uint16, before normalisation.
        """
        self.collate = collate
        self.batch_size = batch_size
        self.like = like
        self.raw = raw

    def __call__(self, reads: list[tuple[int, Any, Problem | None]]) -> Batch:
        """A batch of (position, item, why it cannot be read)."""
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
        empty = len(slots) < self.batch_size
        filler = self._lean(_zeroed(reads[slots[0]][1])) if empty else None
        items = [filler if problem else self._lean(item) for _, item, problem in reads]
        items += [filler] * (self.batch_size - len(items))
        if self.raw:
            items = of_one_depth(items)
        try:
            images, labels, _ = parse_item(self.collate(items))
        except Exception as error:
            if may_fail:
                raise
            problems += [Problem(p, "collate", reason_of(error)) for p in positions]
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
        fault = image_fault(sample.image, raw=self.raw)
        if fault is not None:
            return Problem(position, "image", fault)
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


def of_one_depth(items: list[Any]) -> list[Any]:
    """Raw images of 8 bits widened to 16 where a batch has both: 257 * x / 65535 is x / 255.

    Args:
        items: tuples with the image first.
    """
    images = [torch.as_tensor(image) for image, *_ in items]
    if len({image.dtype for image in images}) == 1:
        return items
    return [
        (torch.from_numpy(x.numpy().astype(np.uint16) * np.uint16(257)), *rest)
        if x.dtype == torch.uint8
        else (x, *rest)
        for x, (_, *rest) in zip(images, items, strict=True)
    ]


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
