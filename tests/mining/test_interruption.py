"""A signal while mining: what is scored is kept, and the caller's own handler has the last word."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import fastpie

Dual = Callable[..., fastpie.DualModel]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Those of pytest are back after each test."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signalling(Dataset):
    """Does something when a sample of the run is read, by index."""

    def __init__(self, inner: Any, folder: Path, actions: dict[int, Callable[[], Any]]) -> None:
        self.inner, self.folder, self.actions = inner, folder, actions
        self.sample_ids = inner.sample_ids

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        if (self.folder / "run.json").exists() and index in self.actions:
            self.actions.pop(index)()
        return self.inner[index]


def raising(number: int) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_handler_of_the_caller_is_called_when_the_rows_are_kept(
    number: int, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    data, seen = labelled(12, bad={4: OSError("gone")}), []
    whole = fastpie.mine(dual(), data, tmp_path / "whole", batch_size=2)
    run = tmp_path / "run"
    signal.signal(number, lambda n, frame: seen.append((n, len(fastpie.MiningResult(run)))))
    with pytest.raises(SystemExit) as ended:
        fastpie.mine(dual(), Signalling(data, run, {5: raising(number)}), run, batch_size=2)
    assert ended.value.code == 128 + number
    assert seen == [(number, 5)]  # the batch with the signal, less the error
    result = fastpie.mine(dual(), data, run, batch_size=2)
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)


def test_ctrl_c_is_a_keyboard_interrupt(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    data = Signalling(labelled(8), tmp_path, {3: raising(signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        fastpie.mine(dual(), data, tmp_path, batch_size=2)
    assert len(fastpie.MiningResult(tmp_path)) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_same_request_twice_is_one(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    """As a batch system and torchrun make it."""
    again = {4: raising(signal.SIGTERM), 5: raising(signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: None)
    with pytest.raises(SystemExit):
        fastpie.mine(dual(), Signalling(labelled(8), tmp_path, again), tmp_path, batch_size=2)
    assert len(fastpie.MiningResult(tmp_path)) == 6


def test_a_later_signal_ends_at_once(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpie.mining.interruption._SAME_REQUEST_SECONDS", 0.0)
    again = {5: raising(signal.SIGINT), 4: raising(signal.SIGINT)}
    data = Signalling(labelled(8), tmp_path, again)
    with pytest.raises(KeyboardInterrupt):
        fastpie.mine(dual(), data, tmp_path, batch_size=2)
    assert len(fastpie.MiningResult(tmp_path)) == 0  # all in one part, whose batch was not finished
    assert len(fastpie.mine(dual(), labelled(8), tmp_path, batch_size=2)) == 8


def test_a_signal_before_scoring_ends_at_once(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    """While the run is set up there is nothing to keep, and it can take long."""
    data = labelled(8)
    read = type(data).__getitem__

    class Interrupted(type(data)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            signal.raise_signal(signal.SIGINT)
            return read(self, index)

    reads = Interrupted(data.items, data.sample_ids)
    with pytest.raises(KeyboardInterrupt):
        fastpie.mine(dual(), reads, tmp_path, batch_size=2)
    assert reads.reads == []
    assert len(fastpie.mine(dual(), data, tmp_path, batch_size=2)) == 8


def test_a_failure_does_not_swallow_the_signal(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a loop over folds that goes on after an error could not be ended."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def act() -> None:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr("pyarrow.parquet.write_table", full)

    data = Signalling(labelled(8), tmp_path, {3: act})
    with pytest.raises(KeyboardInterrupt) as ended:
        fastpie.mine(dual(), data, tmp_path, batch_size=2)
    assert "disk is full" in str(ended.value.__context__)


def test_a_thread_catches_nothing(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    handlers, results = [], []

    def look() -> None:
        handlers.append([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)])

    look()
    data = Signalling(labelled(8), tmp_path, {3: look})
    thread = threading.Thread(
        target=lambda: results.append(fastpie.mine(dual(), data, tmp_path, batch_size=2))
    )
    thread.start()
    thread.join()
    assert len(results[0]) == 8
    assert handlers[0] == handlers[1]
