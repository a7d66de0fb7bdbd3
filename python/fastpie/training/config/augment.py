"""Simple augmentations of a training, and the data sets that apply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpie.errors import FastpieError

__all__ = ["AUGMENTATIONS", "Augmented", "Compose", "Flip", "Noise", "Shift", "WithUnlabelled"]

_HANDED_THROUGH = ("sample_ids", "paths", "labels", "class_names", "fingerprint")


@dataclass(frozen=True)
class Flip:
    """Left to right, the last dimension, with a probability."""

    probability: float = 0.5

    def __call__(self, image: Tensor) -> Tensor:  # [C, ..., W]
        """The image, or its mirror image."""
        return image.flip(-1) if float(torch.rand(())) < self.probability else image


@dataclass(frozen=True)
class Shift:
    """By up to so many pixels along each spatial dimension; what comes in has the value `fill`."""

    pixels: int = 2
    fill: float = 0.0

    def __call__(self, image: Tensor) -> Tensor:  # [C, ...]
        """The image, moved."""
        out = torch.full_like(image, self.fill)
        read, write = [slice(None)], [slice(None)]
        for size in image.shape[1:]:
            by = int(torch.randint(-self.pixels, self.pixels + 1, ()))
            by = max(-size, min(size, by))
            read.append(slice(max(0, -by), size - max(0, by)))
            write.append(slice(max(0, by), size - max(0, -by)))
        out[tuple(write)] = image[tuple(read)]
        return out


@dataclass(frozen=True)
class Noise:
    """Gaussian, added, with a standard deviation in units of the normalised image."""

    std: float = 0.05

    def __call__(self, image: Tensor) -> Tensor:
        """The image and noise."""
        return image + self.std * torch.randn_like(image)


AUGMENTATIONS: Mapping[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "flip": Flip,
    "shift": Shift,
    "noise": Noise,
}
"""By the name that a configuration gives them."""


class Compose:
    """One callable after the other.

    Those with generators of their own (`set_random_state(seed=...)`, as MONAI's transforms) are seeded
    from torch's at each call, so that a training loop which seeds that one decides all of them.
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        """Of callables on an image."""
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        """The image after all of them."""
        for transform in self.transforms:
            if callable(getattr(transform, "set_random_state", None)):
                transform.set_random_state(seed=int(torch.randint(2**31, ())))  # type: ignore[attr-defined]
            image = transform(image)
        return image


class Augmented(Dataset[Any]):
    """A data set with its images augmented; everything else of an item is kept.

    Items are `(image, ...)` or dicts with the key "image". What the data set tells of its samples is told.

    Attributes:
        dataset: the one given.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any]) -> None:
        """Join a data set and what happens to an image, a tensor [C, ...]."""
        self.dataset = dataset
        self._transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, dict):
            return {**item, "image": self._transform(item["image"])}
        image, *others = item
        return (self._transform(image), *others)

    def __getattr__(self, name: str) -> Any:
        # Not before `dataset` is there: a copy, or an unpickled object that is being filled.
        if name in _HANDED_THROUGH and "dataset" in self.__dict__:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class WithUnlabelled(Dataset[Any]):
    """Labelled samples, and behind them others whose labels are not told.

    Attributes:
        sample_ids: of all.
        paths: of all.
        labels: of all: -1, or rows of NaN, where they are not told.
    """

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        """Of two data sets with labels [N] or [N, C] and items `(image, label, sample_id)`.

        Raises:
            FastpieError: if the first has no labels, or both have samples of the same id.
        """
        self._parts = (labelled, unlabelled)
        self.sample_ids = [*labelled.sample_ids, *unlabelled.sample_ids]
        self.paths = [*labelled.paths, *unlabelled.paths]
        shared = set(labelled.sample_ids) & set(unlabelled.sample_ids)
        if shared:
            raise FastpieError(
                f"Expected the unlabelled samples to be others than the labelled ones, but "
                f"{len(shared)} are among both, for example {min(shared)!r}."
            )
        known = labelled.labels
        if known is None:
            raise FastpieError("Expected labels beside the unlabelled samples, but got none.")
        self.class_names = labelled.class_names
        count = len(unlabelled)
        self.labels: Any
        self._unknown: Any
        if isinstance(known, Tensor):
            self._unknown = torch.full_like(known[0], torch.nan)
            self.labels = torch.cat([known, self._unknown.expand(count, -1)])
        else:
            self._unknown = -1
            self.labels = [*known, *[-1] * count]
        self.fingerprint = f"{labelled.fingerprint} {unlabelled.fingerprint} unlabelled"

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Any:
        labelled, unlabelled = self._parts
        if index < len(labelled):
            return labelled[index]
        image, _, sample_id = unlabelled[index - len(labelled)]
        return image, self._unknown, sample_id
