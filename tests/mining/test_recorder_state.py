"""What a Recorder has recorded: in a folder, in a checkpoint, after a kill, on several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import fastpie
from fastpie.mining import Recorder
from recording import Small, Training, recorder_of, seed

COUNT = 22


@pytest.fixture
def training(network: Any, labelled: Any) -> Callable[..., Training]:
    """training(): a fresh one, with the generators at their start; of `Small`, or network(kind)."""

    def make(kind: str | None = None) -> Training:
        seed()
        model = network(kind) if kind else Small()
        seed()
        return Training(model, labelled(COUNT))

    return make


def train(training: Training, recorder: Recorder, epochs: range, checkpoint: Path) -> None:
    """A training as users write it: the records after every epoch, then a checkpoint."""
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        epochs = range(state["epoch"] + 1, epochs.stop)
    for epoch in epochs:
        random.seed(epoch)
        np.random.seed(epoch)  # noqa: NPY002
        torch.manual_seed(epoch)
        training.epoch()
        recorder.step(epoch)
        state = {"model": training.model.state_dict(), "epoch": epoch}
        torch.save({**state, "optimizer": training.optimizer.state_dict()}, checkpoint)


@pytest.mark.parametrize("where", ["scoring", "writing", "recorded"])
def test_a_killed_training_goes_on_with_the_same_bits(
    where: str, training: Any, tmp_path: Path
) -> None:
    run = training()
    whole = recorder_of(run, tmp_path / "whole")
    train(run, whole, range(4), tmp_path / "whole.pt")

    def until_killed() -> None:
        run = training()
        recorder = recorder_of(run, tmp_path / "killed")
        train(run, recorder, range(2), tmp_path / "killed.pt")
        if where == "scoring":
            reads = len(run.data.reads)
            inner = type(run.data).__getitem__

            def fatal(data: Any, index: int) -> Any:
                if len(data.reads) > reads + COUNT + 2 * COUNT - 5:  # of training, of scoring
                    os.kill(os.getpid(), signal.SIGKILL)
                return inner(data, index)

            type(run.data).__getitem__ = fatal  # type: ignore[method-assign]
        elif where == "recorded":
            torch.save = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        else:
            # The new table is there, the new state still under another name.
            def killed(path: Path) -> None:
                if path.name.startswith(".samples.safetensors"):
                    os.kill(os.getpid(), signal.SIGKILL)

            fastpie._files._sync = killed
        train(run, recorder, range(4), tmp_path / "killed.pt")

    process = multiprocessing.get_context("fork").Process(target=until_killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    if where == "writing":
        assert list((tmp_path / "killed").glob(".samples.safetensors.*"))
        assert pq.read_table(tmp_path / "killed" / "samples.parquet")["epochs"][0].as_py() == 3
    run = training()
    recorder = recorder_of(run, tmp_path / "killed")
    assert recorder.epochs == ([0, 1, 2] if where == "recorded" else [0, 1])
    with (
        pytest.warns(UserWarning, match="Epoch 2 is not recorded")
        if where == "recorded"
        else contextlib.nullcontext()
    ):
        train(run, recorder, range(4), tmp_path / "killed.pt")
    assert recorder.epochs == [0, 1, 2, 3]
    assert recorder.result().equals(whole.result(), check_metadata=True)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "errors.parquet", "samples.parquet", "samples.safetensors",
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "killed" / "samples.parquet")
    assert table.equals(whole.result())
    reopened = recorder_of(training(), tmp_path / "killed")
    assert reopened.result().equals(whole.result())


def test_state_in_a_checkpoint_takes_the_records_back(training: Any, tmp_path: Path) -> None:
    """The folder is ahead of the checkpoint; with the state in it nothing is kept of what is redone."""
    run = training("plain")
    recorder = recorder_of(run, tmp_path / "a")
    for epoch in range(2):
        run.epoch()
        recorder.step(epoch)
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    after = recorder.result()
    weights = [p.detach().clone() for p in run.model.parameters()]
    run.epoch()
    recorder.step(2)
    ahead = recorder.result()

    resumed = recorder_of(run, tmp_path / "a")
    assert resumed.result().equals(ahead)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.epochs == [0, 1]
    assert resumed.result().equals(after)
    resumed.step(2)
    assert resumed.result().equals(ahead)
    with torch.no_grad():
        for parameter, weight in zip(run.model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.step(2)
    assert not resumed.result().equals(ahead)
    assert pq.read_table(tmp_path / "a" / "samples.parquet").equals(resumed.result())


def test_the_kernels_of_a_state_are_chosen_again(training: Any) -> None:
    """They are chosen by timing, which could end otherwise on another day."""
    run = training("plain")
    recorder = recorder_of(run)
    recorder.step(0)
    state = recorder.state_dict()
    assert state["plan"]["backend"] == "cpu"
    recorder.load_state_dict({**state, "plan": {"backend": "reference"}})
    recorder.step(1)
    assert recorder.state_dict()["plan"] == {"backend": "reference"}


def test_a_folder_of_something_else_is_refused(
    training: Any, labelled: Any, tmp_path: Path
) -> None:
    run = training("plain")
    recorder = recorder_of(run, tmp_path, backend="reference")
    recorder.step(0)
    for options, message in (
        ({"backend": "auto"}, "backend: 'reference' in the state, 'auto' now"),
        ({"batch_size": 4, "backend": "reference"}, "batch_size: 8 in the state, 4 now"),
        ({"data": labelled(21), "backend": "reference"}, "data: '22 samples"),
    ):
        with pytest.raises(fastpie.FastpieError, match=message):
            recorder_of(run, tmp_path, **options)
    with pytest.raises(fastpie.FastpieError, match="sparsities"):
        Recorder(run.model, run.data, tmp_path, batch_size=8, backend="reference")
    state = tmp_path / "samples.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(fastpie.FastpieError, match="Expected the state of a Recorder in"):
        recorder_of(run, tmp_path, backend="reference")
    with pytest.raises(fastpie.FastpieError, match="format 'fastpie-recorder-1', but got 'x'"):
        recorder.load_state_dict({"format": "x"})


def test_a_url_holds_the_records(training: Any) -> None:
    run = training("plain")
    url = "memory://recorder-test/records"
    recorder_of(run, url, backend="reference").step(0)
    again = recorder_of(run, url, backend="reference")
    assert again.epochs == [0]


# ---------------------------------------------------------------------- several processes


class Generated(Dataset):
    """50 samples, of which 3 cannot be read."""

    sample_ids = [f"case-{(i * 37) % 50:02d}" for i in range(50)]  # noqa: RUF012

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        number = int(self.sample_ids[index][5:])
        if number % 17 == 4:
            raise OSError(f"cannot read {number}")
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number)), number % 3


def tables_of(model: nn.Module, out: Any, rank: int) -> tuple[list[Any], Recorder]:
    """The table after each of three epochs of a model that differs from rank to rank."""
    trained = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    recorder = Recorder(trained, Generated(), out, batch_size=4)
    found = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(epoch + 100 * rank)
        with torch.no_grad():
            for tensor in (*model.parameters(), model.bn1.running_mean):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        assert recorder.step(epoch)
        found.append(recorder.result())
    return found, recorder


def one_of_two(rank: int, folder: Path, model: nn.Module, queue: Any) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    found, recorder = tables_of(model, folder / "records", rank)
    errors = recorder.errors
    recorder.epochs = recorder.epochs[: 3 - rank]  # as where the folder is not shared
    try:
        recorder.step(5)
    except fastpie.FastpieError as error:
        queue.put((rank, found, errors, str(error)))
    dist.destroy_process_group()


def test_ranks_share_the_batches_of_the_model_of_rank_0(training: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    model = training().model
    processes = [
        context.Process(target=one_of_two, args=(rank, tmp_path, model, queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone, recorder = tables_of(model, None, 0)
    for _, found, errors, refusal in results:
        for one, two in zip(found, alone, strict=True):
            assert one.equals(two)
        assert errors.equals(recorder.errors)
        assert "the same epochs on every rank" in refusal
    assert len(alone[0]) == 47
    assert not alone[0]["hardness_last"].equals(alone[2]["hardness_last"])
    assert pq.read_table(tmp_path / "records" / "samples.parquet").equals(alone[2])
