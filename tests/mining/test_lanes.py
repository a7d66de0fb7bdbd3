"""Batches that are computed while earlier ones are scored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpie
from fastpie.mining.lanes import Lanes


class FakeStream:
    """Records who waits for whom."""

    current: list[str]

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_scores_wait_for_their_own_batch_only() -> None:
    log: list[str] = []
    lanes = Lanes(torch.device("cpu"))
    lanes.ahead = 1

    def compute(item: int) -> int:
        log.append(f"compute {item}")
        return 10 * item

    def score(item: int, result: int) -> str:
        log.append(f"score {item}")
        return f"{item}: {result}"

    done = list(lanes.overlapped([1, 2, 3], compute, score))
    assert done == [(1, "1: 10"), (2, "2: 20"), (3, "3: 30")]
    assert log == ["compute 1", "compute 2", "score 1", "compute 3", "score 2", "score 3"]


def test_on_a_gpu_scores_have_a_stream_that_waits_for_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    marks = iter(["batch 1", "batch 2"])

    @contextlib.contextmanager
    def stream(given: FakeStream) -> Iterator[None]:
        log.append(f"on {given.name}")
        yield
        log.append("back")

    lanes = Lanes(torch.device("cpu"))
    lanes.ahead, lanes._scores = 1, FakeStream("scores", log)  # type: ignore[assignment]
    monkeypatch.setattr(lanes, "_mark", lambda: next(marks))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    list(lanes.overlapped("ab", str.upper, lambda item, result: log.append(result)))
    assert log == [
        "scores waits for batch 1", "on scores", "A", "back",
        "scores waits for batch 2", "on scores", "B", "back",
    ]  # fmt: skip


def test_a_run_that_computes_ahead_gives_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Images(torch.utils.data.Dataset[Any]):
        sample_ids = tuple(f"s{i:03d}" for i in range(37))

        def __len__(self) -> int:
            return len(self.sample_ids)

        def __getitem__(self, index: int) -> Any:
            if index == 11:
                raise OSError("unreadable")
            image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
            return image, index % 4

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(6, 4),
    ).eval()  # fmt: skip
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    tables = []
    for ahead in (0, 1, 3):
        plain = Lanes.__init__

        def init(self: Lanes, device: torch.device, plain: Any = plain, n: int = ahead) -> None:
            plain(self, device)
            self.ahead = n

        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "__init__", init)
            loader = torch.utils.data.DataLoader(Images(), batch_size=5)
            result = fastpie.mine(dual, loader, out=tmp_path / str(ahead))
        tables.append(result.table)
        assert len(result.table) == 36
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
