"""A small training, and a Recorder beside it, for the tests of both."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastpie
from fastpie.mining import Recorder

__all__ = ["LEVELS", "Small", "Training", "recorder_of", "seed"]

LEVELS = [0.3, 0.6]


class Small(nn.Module):
    """BatchNorm and dropout, captured in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.drop(self.bn2(self.conv2(x)).relu())
        return self.fc(x.flatten(1))


class Training:
    """A few steps of SGD an epoch, on batches in random order, with dropout and BatchNorm."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model = model.train()
        self.data = data
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def epoch(self) -> None:
        for x, y, _ in DataLoader(self.data, 6, shuffle=True):
            self.optimizer.zero_grad()
            noise = random.random() + np.random.rand()  # noqa: NPY002
            nn.functional.cross_entropy(self.model(x + 0.01 * noise), y).backward()
            self.optimizer.step()


def seed() -> None:
    """Put every random generator to one start."""
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002
    torch.manual_seed(7)


def recorder_of(training: Training, out: Any = None, data: Any = None, **options: Any) -> Recorder:
    dual = fastpie.DualModel(training.model, fastpie.prune(training.model, LEVELS))
    data = training.data if data is None else data
    return Recorder(dual, data, out, **{"batch_size": 8, **options})
