"""Trainings shared by processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpie.training.sampling.order import epoch_order
from training_runs import SAMPLES, Points, check_same, start, state_of, train_shared, trainer_of


def shared(
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    processes: int = 2,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """A training to its end: what each process comes to."""
    final = tmp_path / name
    started = [
        start(train_shared, rank, processes, tmp_path / f"{name}.store", folder, final, options)
        for rank in range(processes)
    ]
    for process in started:
        process.join(100)
        assert process.exitcode == 0
    return [torch.load(final.with_suffix(f".{rank}.pt")) for rank in range(processes)]


@pytest.mark.parametrize("attention", ["weights", "draws"])
def test_processes_train_as_one(tmp_path: Path, attention: str) -> None:
    lost = tuple(epoch_order(SAMPLES, 0, 0)[[0, 20]].tolist())
    options: dict[str, Any] = {
        "attention": attention,
        "broken": lost,
        "valid": Points(),
        "clip": 0.5,
    }
    alone = trainer_of(**options)
    with pytest.warns(UserWarning, match="could not be read"):
        history = alone.fit().history
    found = shared(tmp_path, "two", options)
    check_same(found[1]["state"], found[0]["state"])
    for name, want in state_of(alone).items():
        torch.testing.assert_close(found[0]["state"][name], want, rtol=1e-4, atol=1e-5)
    assert found[0]["errors"].keys() == found[1]["errors"].keys() == {f"case-{i}" for i in lost}
    times = ("seconds", "images_per_second", "evaluation_seconds", "mining_seconds")
    for rank in range(2):
        for row, want in zip(found[rank]["history"], history, strict=True):
            row, want = ({k: v for k, v in r.items() if k not in times} for r in (row, want))
            assert row == pytest.approx(want, rel=1e-4)


def test_a_share_that_cannot_be_read_skips_the_batch(tmp_path: Path) -> None:
    first = epoch_order(SAMPLES, 0, 0)[:8]
    found = shared(
        tmp_path, "two", {"broken": tuple(first[4:].tolist()), "epochs": 1, "norm": True}
    )
    for one in found:
        assert one["history"][0]["skipped_batches"] == 1
        assert one["history"][0]["images"] == SAMPLES - 8
    check_same(
        {k: v for k, v in found[1]["state"].items() if "running" not in k},
        {k: v for k, v in found[0]["state"].items() if "running" not in k},
    )


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """By a signal to one of the processes; the other ends too, and says why."""
    folder = tmp_path / "run"
    options: dict[str, Any] = {"attention": "draws", "dropout": 0.3, "norm": True, "epochs": 3}
    whole = shared(tmp_path, "whole", options)
    started = [
        start(
            train_shared,
            rank,
            2,
            tmp_path / "store",
            folder,
            tmp_path / "x",
            {**options, "pause": 0.03},
        )
        for rank in range(2)
    ]
    while not (folder / "checkpoint.pt").exists():
        assert all(process.is_alive() for process in started)
        time.sleep(0.005)
    os.kill(started[1].pid, signal.SIGTERM)
    for process in started:
        process.join(60)
    assert started[1].exitcode == -signal.SIGTERM
    assert started[0].exitcode == 1
    assert torch.load(folder / "checkpoint.pt")["progress"]["epoch"] < 3
    found = shared(tmp_path, "resumed", options, folder=folder)
    for one, want in zip(found, whole, strict=True):
        check_same(one["state"], want["state"])
