"""Data sets and networks that the mining tests share.

They are handed out as fixtures because test modules cannot import each other
(`--import-mode=importlib`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastpie


class Samples(Dataset):
    """Items held in a list; an exception in place of an item is raised when it is read.

    `reads` lists the indices read so far (in this process).
    """

    def __init__(self, items: Sequence[Any], sample_ids: Sequence[Any] | None = None) -> None:
        self.items = list(items)
        self.reads: list[int] = []
        if sample_ids is not None:
            self.sample_ids = list(sample_ids)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


class Plain(nn.Module):
    """No normalisation, no dropout."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(x.flatten(1))


class Normalised(nn.Module):
    """BatchNorm after two convolutions, dropout, self-attention over the pixels."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.pool = nn.Flatten()
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.drop(self.bn2(self.conv2(x)).relu())
        x = self.block(x.flatten(2).transpose(1, 2))
        return self.fc(self.pool(x))


class Segmenting(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu())


_NETWORKS = {"plain": Plain, "normalised": Normalised, "segmenting": Segmenting}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are so small that a second thread would only wait for a free core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network() -> Callable[..., nn.Module]:
    """network(kind, classes=3, seed=0): a network for images [1, 8, 8], in eval mode."""

    def make(kind: str = "plain", classes: int = 3, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = _NETWORKS[kind](classes)
            if kind != "segmenting":
                model.fc.weight.mul_(5)  # or pruning by magnitude takes the classifier whole
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture
def dual(network: Callable[..., nn.Module]) -> Callable[..., fastpie.DualModel]:
    """dual(kind, sparsity, ...): a dual model over `network(kind)`."""

    def make(
        kind: str = "plain",
        sparsity: Any = 0.7,
        *,
        features: str | None = None,
        classes: int = 3,
        seed: int = 0,
    ) -> fastpie.DualModel:
        model = network(kind, classes, seed)
        return fastpie.DualModel(model, fastpie.prune(model, sparsity), features=features)

    return make


@pytest.fixture
def samples() -> type[Samples]:
    """The class `Samples`."""
    return Samples


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """images(count, seed=0): [count, 1, 8, 8]."""

    def make(count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 1, 8, 8, generator=generator)

    return make


@pytest.fixture
def labelled(images: Callable[..., Tensor]) -> Callable[..., Samples]:
    """labelled(count, bad={}): `(image, class, id)`; ids "s00", "s01", ... in the data set's order.

    `bad` puts another item, or an exception to raise, in the place of an index.
    """

    def make(count: int, bad: dict[int, Any] | None = None, classes: int = 3) -> Samples:
        ids = [f"s{i:02d}" for i in range(count)]
        items = [(x, i % classes, ids[i]) for i, x in enumerate(images(count))]
        for index, item in (bad or {}).items():
            items[index] = item
        return Samples(items, ids)

    return make


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a part, however fast the machine is."""
    monkeypatch.setattr("fastpie.mining.session._PART_SECONDS", 0.0)


@pytest.fixture
def rows_of() -> Callable[[Any], dict[str, dict[str, Any]]]:
    """rows_of(table): the rows by sample_id; fails on an id that occurs twice."""

    def make(table: Any) -> dict[str, dict[str, Any]]:
        rows = {row["sample_id"]: row for row in table.to_pylist()}
        assert len(rows) == table.num_rows
        return rows

    return make
