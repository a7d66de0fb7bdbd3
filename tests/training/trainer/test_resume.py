"""Trainings that are stopped at any moment and go on as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpie import FastpieError
from fastpie.training.masking.masked import MaskedTraining
from fastpie.training.masking.schedules import GradualPruning, IterativePruning
from fastpie.training.trainer.trainer import Trainer
from training_runs import Points, check_same, start, state_of, train, trainer_of

FULL: dict[str, Any] = {"attention": "draws", "dropout": 0.3, "norm": True, "broken": (5,), "num_workers": 1}  # fmt: skip
unreadable = pytest.mark.filterwarnings("ignore:.*could not be read:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are started have: sums of two threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(one_thread: None) -> dict[str, torch.Tensor]:
    trainer = trainer_of(**FULL)
    with pytest.warns(UserWarning, match="could not be read"):
        trainer.fit()
    return state_of(trainer)


@pytest.mark.parametrize("minutes", [None, 0.0])
def test_killed_again_and_again(
    tmp_path: Path, minutes: float | None, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "run"
    moments = random.Random(int.from_bytes(os.urandom(4), "big"))
    options = {**FULL, "checkpoint_minutes": minutes}
    begun = folder.with_suffix(".begun")
    kills = 0
    while True:
        begun.unlink(missing_ok=True)
        process = start(train, folder, {**options, "pause": 0.004 if kills < 5 else 0.0})
        while not begun.exists() and process.is_alive():
            time.sleep(0.002)
        process.join(moments.uniform(0.0, 0.6) if kills < 5 else 100)
        if process.exitcode is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    check_same(torch.load(tmp_path / "run.final.pt"), undisturbed)
    assert not [path for path in folder.glob(".*") if path.name != ".lock"]


@unreadable
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step(
    tmp_path: Path, number: int, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "run"
    process = start(train, folder, {**FULL, "pause": 0.02, "log": "csv"})
    while not (folder / "checkpoint.pt").exists():  # the first epoch is done
        assert process.is_alive()
        time.sleep(0.005)
    time.sleep(0.4)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (-signal.SIGTERM if number == signal.SIGTERM else 1)
    progress = torch.load(folder / "checkpoint.pt")["progress"]
    assert 1 <= progress["epoch"] < 4
    trainer = trainer_of(folder, **FULL, log="csv")
    result = trainer.fit()
    check_same(state_of(trainer), undisturbed)
    whole = trainer_of(**FULL).fit()
    for row, want in zip(result.history, whole.history, strict=True):
        for name in ("loss", "images", "lr", "unreadable", "skipped_steps"):
            assert row[name] == want[name]


@unreadable
def test_a_finished_training_returns_at_once(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, **FULL)
    result = first.fit()
    assert first.fit().history == result.history
    again = trainer_of(tmp_path, **FULL)
    changed = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert again.fit() == result
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == changed
    check_same(state_of(again), state_of(first))
    kept = load_file(tmp_path / "model.safetensors")
    check_same(kept, dict(first.objective.model.state_dict()))


@unreadable
def test_more_epochs_go_on(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    trainer_of(tmp_path, **FULL, epochs=1).fit()
    trainer_of(tmp_path, **FULL, epochs=3, checkpoint_every=3).fit()
    trainer = trainer_of(tmp_path, **FULL)
    assert [row["epoch"] for row in trainer.fit().history] == [0, 1, 2, 3]
    check_same(state_of(trainer), undisturbed)


class StoppedError(Exception):
    """A step that fails."""


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("stop", [3, 8, 13, 26])
def test_masks_and_their_schedule_go_on(tmp_path: Path, stop: int, iterative: bool) -> None:
    """Pruned in steps of the optimizer, and pruned and rewound by epochs; stopped in mid-epoch."""

    def run(out: Path | None, stop: int) -> tuple[Any, MaskedTraining]:
        trainer = trainer_of()
        optimizer = torch.optim.SGD(trainer.objective.parameters(), lr=0.02, momentum=0.9)
        schedule = (
            IterativePruning(0.4, rewind_to=3, every=1, rounds=2)
            if iterative
            else GradualPruning(0.6, begin=2, end=20, every=3)
        )
        masked = MaskedTraining(trainer.objective.model, schedule, optimizer)
        trainer = Trainer(
            trainer.objective, Points(), optimizer=optimizer, epochs=4, batch_size=8, masked=masked,
            out=out, progress=False, clip=1.0, checkpoint_minutes=0.0,
        )  # fmt: skip
        steps = iter(range(stop))

        def count(*args: Any) -> None:
            if next(steps, None) is None:
                raise StoppedError

        trainer.objective.register_forward_pre_hook(count)
        trainer.fit()
        return trainer, masked

    with pytest.raises(StoppedError):
        run(tmp_path, stop)
    trainer, masked = run(tmp_path, 4 * 8 - stop)  # no step is taken twice
    whole, reference = run(None, 4 * 8)
    check_same(state_of(trainer), state_of(whole))
    assert masked.sparsity == reference.sparsity
    assert masked.sparsity == pytest.approx(0.64 if iterative else 0.6, abs=0.01)
    parameters = dict(trainer.objective.model.named_parameters())
    assert all((parameters[name][~mask] == 0).all() for name, mask in masked.masks.items())


def test_fp16_goes_on_with_its_scale(tmp_path: Path) -> None:
    options = {"precision": "fp16", "lr": 0.05}
    trainer_of(tmp_path, **options, epochs=2).fit()
    trainer, whole = trainer_of(tmp_path, **options), trainer_of(**options)
    trainer.fit()
    whole.fit()
    check_same(state_of(trainer), state_of(whole))
    assert trainer._step.scaler.state_dict() == whole._step.scaler.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"batch_size": 9}, "batch_size: 8 there, 9 now"),
        ({"lr": 0.5}, "optimizer's options"),
        ({"norm": True}, "parameters and buffers"),
        ({"attention": "weights"}, "attention: None there, 'MovingAttention' now"),
        ({"precision": "bf16"}, "precision: 'fp32' there, 'bf16' now"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    trainer_of(tmp_path, epochs=1).fit()
    with pytest.raises(FastpieError, match=message):
        trainer_of(tmp_path, epochs=1, **options).fit()


def test_other_samples_are_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, epochs=1).fit()
    other = Points()
    other.sample_ids[3] = "another"
    with pytest.raises(FastpieError, match="sample ids"):
        trainer_of(tmp_path, epochs=1, data=other).fit()


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"half of something")
    with pytest.raises(FastpieError, match="a checkpoint in"):
        trainer_of(tmp_path).fit()
    torch.save({"weights": torch.ones(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(FastpieError, match="of a Trainer"):
        trainer_of(tmp_path).fit()


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(train, folder, {"pause": 0.05})
    try:
        while not (folder / ".lock").exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.2)
        with pytest.raises(FastpieError, match="another run is writing"):
            trainer_of(folder).fit()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    shutil.rmtree(folder)
