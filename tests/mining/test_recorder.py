"""The Recorder beside a training: what it records, what it leaves alone, what survives a kill."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastpie
from fastpie.mining import Recorder
from recording import LEVELS, Small, Training, recorder_of, seed

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


@pytest.fixture
def training(network: Any, labelled: Any) -> Callable[..., Training]:
    """training(): a fresh one, with the generators at their start; of `Small`, or network(kind)."""

    def make(kind: str | None = None) -> Training:
        seed()
        model = network(kind) if kind else Small()
        seed()
        return Training(model, labelled(COUNT))

    return make


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
        {"method": "filter", "norm": 2, "exclude": ["fc"]},
        {"method": "2:5"},
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
