"""The Recorder beside a training: what it records, what it leaves alone, what survives a kill."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastpie
from fastpie.mining import Recorder

LEVELS = [0.3, 0.6]
COUNT = 22


class Restless(Dataset):
    """Uses every random generator to read a sample that is always the same."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.sample_ids = inner.sample_ids

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
        return self.inner[index]


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


@pytest.fixture
def seeded() -> Callable[[], None]:
    def seed() -> None:
        random.seed(5)
        np.random.seed(6)  # noqa: NPY002
        torch.manual_seed(7)

    return seed


@pytest.fixture
def training(network: Any, labelled: Any, seeded: Any) -> Callable[..., Training]:
    """training(): a fresh one, with the generators at their start; of `Small`, or network(kind)."""

    def make(kind: str | None = None) -> Training:
        seeded()
        model = network(kind) if kind else Small()
        seeded()
        return Training(model, labelled(COUNT))

    return make


def recorder_of(training: Training, out: Any = None, data: Any = None, **options: Any) -> Recorder:
    dual = fastpie.DualModel(training.model, fastpie.prune(training.model, LEVELS))
    data = training.data if data is None else data
    return Recorder(dual, data, out, **{"batch_size": 8, **options})


def state_of(training: Training) -> list[Any]:
    tensors = [t.clone() for t in training.model.state_dict().values()]
    grads = [p.grad.clone() for p in training.model.parameters()]
    momenta = [s["momentum_buffer"] for s in training.optimizer.state.values()]
    return tensors + grads + momenta


def test_training_is_the_same_bits_with_and_without(training: Any) -> None:
    states = []
    for with_recorder in (False, True):
        run = training()
        recorder = recorder_of(run, data=Restless(run.data)) if with_recorder else None
        for epoch in range(3):
            run.epoch()
            if recorder is not None:
                run.model.bn2.eval()  # a part that the user has frozen
                modes = [m.training for m in run.model.modules()]
                assert recorder.step(epoch)
                assert [m.training for m in run.model.modules()] == modes
                run.model.bn2.train()
            assert all(p.requires_grad for p in run.model.parameters())
        generators = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
        states.append((state_of(run), generators))
    for one, two in zip(states[0][0], states[1][0], strict=True):
        assert torch.equal(one, two)
    assert states[0][1] == states[1][1]


def test_each_epoch_is_what_mine_gives_and_the_table_its_mean(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer samples than are recalibrated from: mine() takes the same ones."""
    compiled = []
    compile_ = fastpie.DualModel.compile

    def counted(dual: Any, *args: Any, **options: Any) -> Any:
        compiled.append(1)
        return compile_(dual, *args, **options)

    run = training("normalised")
    recorder = recorder_of(run, backend="reference")
    tables = []
    for epoch in range(3):
        run.epoch()
        with monkeypatch.context() as patch:
            patch.setattr(fastpie.DualModel, "compile", counted)
            recorder.step(epoch)
        run.model.eval()
        dual = fastpie.DualModel(run.model, fastpie.prune(run.model, LEVELS))
        mined = fastpie.mine(
            dual, run.data, tmp_path / str(epoch), batch_size=8, backend="reference"
        )
        tables.append(mined.table)
        run.model.train()
    assert len(compiled) == 1  # refreshed after that
    assert not tables[0]["js@0.6"].equals(tables[2]["js@0.6"])
    found = recorder.result()
    assert found["sample_id"].equals(tables[0]["sample_id"])
    assert found["label"].equals(tables[0]["label"])
    hardness_last = found["hardness_last"].to_numpy().astype(np.float32)
    assert (hardness_last == tables[-1]["hardness"].to_numpy()).all()
    of_mine = {
        "hardness": "hardness",
        "loss_dense_mean": "loss_dense",
        "loss_pruned_mean": "loss_pruned",
        "loss_pruned_mean@0.6": "loss_pruned@0.6",
        "margin_dense_mean": "margin_dense",
        "margin_pruned_mean": "margin_pruned",
        "margin_pruned_mean@0.3": "margin_pruned@0.3",
        "js_mean@0.6": "js@0.6",
        "flips@0.3": "flip@0.3",
    }
    for name, column in of_mine.items():
        values = [t[column].to_numpy(zero_copy_only=False).astype(np.float64) for t in tables]
        assert found[name].to_numpy() == pytest.approx(np.mean(values, 0), rel=1e-6, abs=1e-7), name
    right = np.array([t["prediction_dense"].to_numpy() == t["label"].to_numpy() for t in tables])
    assert found["correctness"].to_numpy() == pytest.approx(right.mean(0))
    assert found["forgetting"].to_numpy().tolist() == (right[:-1] & ~right[1:]).sum(0).tolist()
    assert found.schema.metadata[b"epochs"] == b"[0, 1, 2]"
    assert b"loss_pruned" in found.schema.metadata[b"hardness"]


def test_the_engine_gives_what_two_passes_give(training: Any) -> None:
    tables = []
    for backend in ("auto", "reference"):
        run = training("plain")
        recorder = recorder_of(run, backend=backend)
        for epoch in range(3):
            run.epoch()
            recorder.step(epoch)
        tables.append(recorder.result())
    for name in ("loss_pruned_mean", "margin_pruned_mean@0.6", "js_mean", "variability"):
        one, two = (table[name].to_numpy() for table in tables)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "random", "seed": 3},
        {"scope": "layer", "exclude": ["fc"]},
        {"modules": (nn.Linear,)},
    ],
)
def test_masks_are_chosen_again_by_the_rule_of_those_given(
    rule: dict[str, Any], training: Any, tmp_path: Path
) -> None:
    run = training("plain")
    dual = fastpie.DualModel(run.model, fastpie.prune(run.model, 0.6, **rule))
    recorder = Recorder(dual, run.data, batch_size=8, backend="reference")
    run.epoch()
    recorder.step(0)
    run.model.eval()
    dual = fastpie.DualModel(run.model, fastpie.prune(run.model, 0.6, **rule))
    mined = fastpie.mine(dual, run.data, tmp_path, batch_size=8, backend="reference")
    table = recorder.result()
    assert "js_mean@0.6" not in table.column_names  # one level is no ladder
    for name, column in {"js_mean": "js", "loss_pruned_mean": "loss_pruned"}.items():
        assert (table[name].to_numpy() == mined.table[column].to_numpy()).all()


def test_a_plain_model_is_pruned_at_the_default_ladder(training: Any) -> None:
    run = training("plain")
    recorder = Recorder(run.model, DataLoader(run.data, batch_size=5, num_workers=1))
    run.epoch()
    recorder.step(0)
    here = Recorder(run.model, run.data, batch_size=5)
    here.step(0)
    table = recorder.result()
    assert table.equals(here.result())  # workers or not
    for level in (0.1, 0.3, 0.5, 0.7):
        assert f"loss_pruned_mean@{level}" in table.column_names


def test_wrapped_models_are_unwrapped(training: Any) -> None:
    run = training("plain")
    compiled = torch.compile(run.model)
    recorder = Recorder(compiled, run.data, backend="reference")
    run.epoch()
    recorder.step(0)
    plain = Recorder(run.model, run.data, backend="reference")
    plain.step(0)
    assert recorder.result().equals(plain.result())


# ---------------------------------------------------------------------- epochs


def test_every_nth_epoch_and_none_twice(training: Any) -> None:
    run = training("plain")
    recorder = recorder_of(run, every=2, backend="reference")
    with pytest.raises(fastpie.FastpieError, match="there is none yet"):
        recorder.result()
    assert [recorder.step(epoch) for epoch in range(5)] == [False, True, False, True, False]
    assert recorder.epochs == [1, 3]
    before = recorder.result()
    run.epoch()
    for epoch in (3, 1):
        with pytest.warns(UserWarning, match=f"Epoch {epoch} is not recorded: epoch 3 already"):
            assert not recorder.step(epoch)
    assert recorder.result().equals(before)
    assert recorder.step(5)
    assert recorder.result()["epochs"].to_pylist() == [3] * COUNT
    for wrong in (-1, 1.5, "2"):
        with pytest.raises(fastpie.FastpieError, match="`epoch` to be an int of at least 0"):
            recorder.step(wrong)  # type: ignore[arg-type]
    with pytest.raises(fastpie.FastpieError, match="`every` to be an int of at least 1"):
        recorder_of(run, every=0)


def test_el2n_is_of_the_epochs_named(training: Any) -> None:
    run = training("plain")
    recorder = recorder_of(run, el2n_epochs=[1], backend="reference")
    run.epoch()
    recorder.step(0)
    assert recorder.result()["el2n"].null_count == COUNT
    run.epoch()
    recorder.step(1)
    with torch.no_grad():
        x = torch.stack([item[0] for item in run.data.items])
        y = torch.tensor([item[1] for item in run.data.items])
        p = run.model.eval()(x).softmax(1)
    expected = (p - nn.functional.one_hot(y, 3)).norm(dim=1)
    assert recorder.result()["el2n"].to_pylist() == pytest.approx(expected.tolist(), rel=1e-4)


# ---------------------------------------------------------------------- data


def test_samples_that_cannot_be_scored_are_errors_and_the_rest_goes_on(
    network: Any, labelled: Any
) -> None:
    model = network("plain")
    x = torch.zeros(1, 8, 8)
    bad = {3: OSError("gone"), 4: (x, 9, "s04"), 6: (torch.full((1, 8, 8), torch.nan), 0, "s06")}
    data = labelled(COUNT, bad)
    recorder = Recorder(model, data, batch_size=4)
    recorder.step(0)
    data.items[3] = (x, 0, "s03")  # the drive is back
    recorder.step(1)
    errors = {row["sample_id"]: row for row in recorder.errors.to_pylist()}
    assert {k: (r["stage"], r["epoch"]) for k, r in errors.items()} == {
        "s03": ("read", 0),
        "s04": ("label", 1),
        "s06": ("image", 1),
    }
    assert "gone" in errors["s03"]["error"]
    rows = {row["sample_id"]: row["epochs"] for row in recorder.result().to_pylist()}
    assert rows["s03"] == 1
    assert not {"s04", "s06"} & rows.keys()
    assert len(rows) == COUNT - 2
    good = Recorder(model, labelled(COUNT), batch_size=4)
    good.step(0)
    before = recorder.result()
    data.items[:] = [OSError("unmounted")] * COUNT
    with pytest.raises(fastpie.FastpieError, match=r"after epoch 2 none of 22 can.*unmounted"):
        recorder.step(2)
    assert recorder.epochs == [0, 1]
    assert recorder.result().equals(before)


def test_an_interrupted_epoch_leaves_no_trace(training: Any) -> None:
    run = training("plain")
    recorder = recorder_of(run, backend="reference")
    run.epoch()
    recorder.step(0)
    before, state = recorder.result(), torch.get_rng_state()
    good, run.data.items[15] = run.data.items[15], None

    class Interrupting(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 15:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    items, run.data.items = run.data.items, Interrupting(run.data.items)
    with pytest.raises(KeyboardInterrupt):
        recorder.step(1)
    assert recorder.epochs == [0]
    assert recorder.result().equals(before)
    assert torch.equal(torch.get_rng_state(), state)
    run.data.items = items
    run.data.items[15] = good
    assert recorder.step(1)


def test_multilabel_with_unknown_labels(network: Any, samples: Any, images: Any) -> None:
    x = images(9)
    labels = (torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    labels[2, 1] = labels[5] = torch.nan
    labels[7, 0] = 2
    ids = [f"a{i}" for i in range(9)]
    data = samples([(x[i], labels[i]) for i in range(9)], ids)
    model = network("plain")
    recorder = Recorder(model, data, task="multilabel", batch_size=4, backend="reference")
    recorder.step(0)
    table = recorder.result()
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    assert "a7" not in rows
    assert recorder.errors["stage"].to_pylist() == ["label"]
    assert rows["a5"]["loss_pruned_mean"] is None
    assert rows["a5"]["js_mean"] > 0
    with torch.no_grad():
        p = model(x).sigmoid()
    error = (p - labels).nan_to_num(0)
    assert rows["a2"]["el2n"] == pytest.approx(error[2].norm().item(), rel=1e-4)
    assert rows["a2"]["confidence"] == pytest.approx(1 - error[2].abs().sum().item() / 2, rel=1e-4)


def test_without_labels(network: Any, samples: Any, images: Any) -> None:
    model = network("plain")
    with pytest.warns(UserWarning, match="indices serve as ids"):
        recorder = Recorder(model, samples(list(images(6))), backend="reference")
    recorder.step(0)
    table = recorder.result()
    assert table["hardness"].equals(table["js_mean"])
    assert "margin_dense_mean" not in table.column_names
    assert "label" not in table.column_names


def test_ids_in_the_items_and_an_entry_of_a_dict(network: Any, samples: Any, images: Any) -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("plain")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x), "other": x}

    model = Dict()
    x = images(5)
    data = samples([{"image": x[i], "label": i % 3, "sample_id": f"z{4 - i}"} for i in range(5)])
    recorder = Recorder(model, data, output="logits", backend="reference")
    recorder.step(0)
    rows = recorder.result().to_pylist()
    assert [(row["sample_id"], row["label"]) for row in rows] == [
        ("z0", 1), ("z1", 0), ("z2", 2), ("z3", 1), ("z4", 0),
    ]  # fmt: skip
    data.items[2]["sample_id"] = "another"
    recorder.step(1)
    assert recorder.errors["stage"].to_pylist() == ["id"]


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_used_is_refused_before_the_training(
    network: Any, dual: Any, labelled: Any, samples: Any, images: Any
) -> None:
    model, data = network("plain"), labelled(COUNT)
    given = fastpie.DualModel(model, {"fc.weight": torch.rand_like(model.fc.weight.detach()) > 0.5})
    with pytest.raises(fastpie.FastpieError, match=r"masks of fastpie.prune"):
        Recorder(given, data)
    with pytest.raises(fastpie.FastpieError, match="'segmentation'"):
        Recorder(model, data, task="segmentation")
    with pytest.raises(fastpie.FastpieError, match="multilabel labels of shape"):
        Recorder(model, data, task="multilabel")
    with pytest.raises(fastpie.FastpieError, match=r"shape .*, but it raised RuntimeError"):
        Recorder(model, samples([(torch.zeros(2, 8, 8), 0)], ["a"]))
    with pytest.raises(fastpie.FastpieError, match="none can; the last: OSError: gone"):
        Recorder(model, samples([OSError("gone")], ["a"]))
    with pytest.raises(fastpie.FastpieError, match=r"none can.*class index in"):
        Recorder(model, samples([(images(1)[0], 7)], ["a"]))
    with pytest.raises(fastpie.FastpieError, match="22 samples, but got 2"):
        Recorder(model, data, sample_ids=["a", "b"])
    with pytest.raises(fastpie.FastpieError, match="device that torch can use, but got 'abacus'"):
        Recorder(model, data, device="abacus")
    with pytest.raises(fastpie.FastpieError, match=r"nn.Module"):
        Recorder("resnet", data)  # type: ignore[arg-type]


def test_a_model_that_has_broken_down_or_changed_is_refused(training: Any) -> None:
    run = training("plain")
    recorder = recorder_of(run, backend="reference")
    with torch.no_grad():
        run.model.fc.weight[0, 0] = torch.nan
    with pytest.raises(fastpie.FastpieError, match="finite weights"):
        recorder.step(0)
    run.model.fc = nn.Linear(64, 5)
    with pytest.raises(fastpie.FastpieError, match="other names or shapes"):
        recorder.step(0)
    assert recorder.epochs == []


# ---------------------------------------------------------------------- what survives


def train(training: Training, recorder: Recorder, epochs: range, checkpoint: Path) -> None:
    """A training as users write it: a checkpoint after every epoch, then the records."""
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        epochs = range(state["epoch"] + 1, epochs.stop)
        # Killed between the checkpoint and the records: the weights are those of that epoch.
        if not recorder.epochs or recorder.epochs[-1] < state["epoch"]:
            recorder.step(state["epoch"])
    for epoch in epochs:
        random.seed(epoch)
        np.random.seed(epoch)  # noqa: NPY002
        torch.manual_seed(epoch)
        training.epoch()
        state = {"model": training.model.state_dict(), "epoch": epoch}
        torch.save({**state, "optimizer": training.optimizer.state_dict()}, checkpoint)
        recorder.step(epoch)


@pytest.mark.parametrize("where", ["scoring", "writing"])
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
    assert recorder.epochs == [0, 1]
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
