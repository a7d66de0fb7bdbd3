"""A labelled data set, a network that changes, and the formulas of attention, for its tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastpie
from fastpie.dual.output import DualOutput

__all__ = ["Labelled", "change", "expected_attention", "margin", "outputs_of"]


class Labelled(Dataset):
    """(image, label); ids are not in the order of the data set. An exception is raised when read."""

    def __init__(
        self, images: Tensor, labels: Any = None, bad: dict[int, Any] | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.bad = bad or {}
        self.sample_ids = [f"x{(i * 7919) % 1000:03d}" for i in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        item = self.bad.get(index)
        if isinstance(item, Exception):
            raise item
        image = self.images[index] if item is None else item
        return image if self.labels is None else (image, self.labels[index])


def change(model: nn.Module, seed: int) -> None:
    """What a few epochs of training do to weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)


def outputs_of(
    model: nn.Module, data: Labelled, sparsity: Any = 0.5, features: str | None = None
) -> DualOutput:
    """Of the model as it is now, in eval mode, recalibrated on batches of 16 in the order of the ids."""
    model = copy.deepcopy(model).eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, sparsity), features=features)
    order = sorted(range(len(data)), key=lambda i: data.sample_ids[i])
    dual.recalibrate(data.images[order].split(16))
    with torch.no_grad():
        return dual(data.images)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other."""
    own = logits.gather(-1, labels[:, None].expand(*logits.shape[:-1], 1))[..., 0]
    others = logits.scatter(-1, labels[:, None].expand(*logits.shape[:-1], 1), -torch.inf)
    return own - others.amax(-1)


def expected_attention(
    rounds: Sequence[np.ndarray], momentum: float, strata: np.ndarray | None = None
) -> np.ndarray:
    """S = b S + (1 - b) rank01(g), the first time rank01(g); section 4 of ALGORITHMS.md."""
    attention: np.ndarray | None = None
    strata = np.zeros(len(rounds[0])) if strata is None else strata
    for g in rounds:
        rank = np.empty(len(g))
        for stratum in np.unique(strata):
            here = strata == stratum
            n = here.sum()
            rank[here] = (rankdata(g[here]) - 1) / (n - 1) if n > 1 else 0.5
        attention = rank if attention is None else momentum * attention + (1 - momentum) * rank
    assert attention is not None
    return attention
