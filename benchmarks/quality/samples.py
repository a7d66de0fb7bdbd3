"""An imbalanced set as the data set of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.quality.imbalance import Imbalanced

__all__ = ["Samples", "test_of", "train_of"]


class Samples(Dataset[dict[str, Any]]):
    """Images in memory as dicts; with `shift`, moved by up to so many pixels and mirrored.

    Attributes:
        sample_ids: "0000" and on.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None = None,
        *,
        shift: int = 0,
        mirror: bool = False,
    ) -> None:
        self.images = torch.from_numpy(images)
        self.labels = labels
        self.masks = None if masks is None else torch.from_numpy(masks)
        self.shift, self.mirror = shift, mirror
        self.sample_ids = [f"{i:04d}" for i in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = {"image": self.images[index]}
        if self.masks is not None:
            given["mask"] = self.masks[index]
        if self.shift:
            moves = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
            given = {name: value.roll(moves, (-2, -1)) for name, value in given.items()}
        if self.mirror and torch.rand(()) < 0.5:
            given = {name: value.flip(-1) for name, value in given.items()}
        return {**given, **self._label(index, given), "sample_id": self.sample_ids[index]}

    def _label(self, index: int, given: dict[str, Tensor]) -> dict[str, Any]:
        label = self.labels[index]
        return {"label": torch.from_numpy(label) if label.ndim else int(label)}


class Masked(Samples):
    """The masks are the labels."""

    def _label(self, index: int, given: dict[str, Tensor]) -> dict[str, Any]:
        return {"label": given.pop("mask").long()}


def train_of(data: Imbalanced, *, augment: bool) -> Samples:
    """The training set, with or without augmentation; digits are not mirrored."""
    size = data.images.shape[-1]
    options: dict[str, Any] = {}
    if augment:
        options = {"shift": 1 if size <= 16 else 2, "mirror": data.masks is not None}
    kind = Masked if data.task == "segmentation" else Samples
    return kind(data.images, data.labels, data.masks, **options)


def test_of(data: Imbalanced) -> Samples:
    """The test set."""
    kind = Masked if data.task == "segmentation" else Samples
    return kind(data.test_images, data.test_labels, data.test_masks)
