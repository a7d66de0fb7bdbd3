"""A run as a whole: what it leaves alone, what its table does not depend on, sample ids, resuming."""

from __future__ import annotations

import copy
import operator
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import fastpie

Dual = Callable[..., fastpie.DualModel]


# ---------------------------------------------------------------------- what is left alone


def test_model_and_modes_are_left_as_they_were(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    model = dual("normalised", [0.3, 0.7], features="bn2")
    model.train()
    model.model.bn1.eval()  # a frozen layer
    model.model.fc.weight.grad = torch.ones_like(model.model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    fastpie.mine(model, labelled(9), tmp_path, batch_size=4, keep_features=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():  # an extra state need not be a tensor
        same = torch.equal if isinstance(value, Tensor) else operator.eq
        assert same(after[name], value), name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.equal(model.model.fc.weight.grad, torch.ones_like(model.model.fc.weight))


@pytest.mark.parametrize("workers", [0, 1])
def test_random_generators_are_left_as_they_were(
    workers: int, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    """Mining between two epochs changes nothing in a seeded training run."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fastpie.mine(dual("normalised"), labelled(9), tmp_path, batch_size=4, num_workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_train_mode_changes_no_score(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    model = dual("normalised")
    one = fastpie.mine(model, labelled(9), tmp_path / "eval", batch_size=4)
    two = fastpie.mine(model.train(), labelled(9), tmp_path / "train", batch_size=4)
    assert one.table.equals(two.table)


def test_a_plain_model_is_mined_at_the_default_ladder(
    network: Any, labelled: Any, tmp_path: Path
) -> None:
    model = network("normalised")
    ladder = fastpie.DualModel(model, fastpie.prune(model, [0.1, 0.3, 0.5, 0.7]))
    one = fastpie.mine(model, labelled(9), tmp_path / "a", batch_size=4)
    two = fastpie.mine(ladder, labelled(9), tmp_path / "b", batch_size=4)
    assert one.table.equals(two.table)
    assert {f"js@{level}" for level in (0.1, 0.3, 0.5, 0.7)} <= set(one.table.column_names)


# ---------------------------------------------------------------------- what changes nothing


def test_the_order_of_the_data_set_changes_nothing(
    dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    model, data = dual("normalised", [0.3, 0.7]), labelled(23, bad={5: OSError("gone")})
    shuffled = Subset(data, random.Random(1).sample(range(23), 23))
    one = fastpie.mine(model, data, tmp_path / "a", batch_size=4)
    two = fastpie.mine(model, shuffled, tmp_path / "b", batch_size=4)
    assert one.table.equals(two.table)
    assert one.errors.equals(two.errors)
    assert one.table.num_rows == 22


def test_workers_and_sampler_change_nothing(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    model, data = dual("normalised", [0.3, 0.7]), labelled(23, bad={5: OSError("gone")})
    plain = fastpie.mine(model, data, tmp_path / "plain", batch_size=4)
    runs = {
        "workers": fastpie.mine(model, data, tmp_path / "w", batch_size=4, num_workers=2),
        "shuffle": fastpie.mine(model, DataLoader(data, 4, shuffle=True), tmp_path / "s"),
        "both": fastpie.mine(
            model, DataLoader(data, 4, shuffle=True, num_workers=2, drop_last=True), tmp_path / "b"
        ),
    }
    for name, run in runs.items():
        assert run.table.equals(plain.table), name
        assert run.errors.equals(plain.errors), name


def test_the_cut_into_parts_changes_nothing(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = dual("normalised"), labelled(23)
    tables = []
    for seconds in (0.0, 1e3):
        monkeypatch.setattr("fastpie.mining.session._PART_SECONDS", seconds)
        result = fastpie.mine(model, data, tmp_path / str(seconds), batch_size=4)
        tables.append(result.table)
        parts = len(list((result.path / "scores").glob("*.parquet")))
        assert parts == (6 if seconds == 0 else 1)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("sparsity", [0.0, [0.0]])
@pytest.mark.parametrize("with_labels", [True, False])
def test_all_ones_masks_give_no_disagreement_at_all(
    sparsity: Any,
    with_labels: bool,
    dual: Dual,
    images: Any,
    samples: Any,
    tmp_path: Path,
) -> None:
    items = [(x, i % 3) if with_labels else (x,) for i, x in enumerate(images(10))]
    data = samples(items, [f"s{i}" for i in range(10)])
    model = dual("normalised", sparsity, features="bn2")
    table = fastpie.mine(model, data, tmp_path, batch_size=4, recalibrate=True).table
    assert table.num_rows == 10
    suffixes = ["", "@0"] if isinstance(sparsity, list) else [""]
    for suffix in suffixes:
        for name in ("js", "kl", "kl_reverse", "drift", "feature_drift", "flip"):
            assert set(table.column(name + suffix).to_pylist()) == {0}, name
        assert set(table.column("spearman" + suffix).to_pylist()) == {1}
        if with_labels:
            assert set(table.column("damage" + suffix).to_pylist()) == {0}


def test_dropout_that_stays_on_is_the_same_in_both_models(
    network: Any, labelled: Any, tmp_path: Path
) -> None:
    """Both models run from the same state of the random generator, in the engine as well."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(nn.functional.dropout(x, 0.5, training=True))

    model = Noisy()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.0))
    table = fastpie.mine(dual, labelled(5), tmp_path, batch_size=4).table
    assert set(table.column("js").to_pylist()) == {0}


# ---------------------------------------------------------------------- sample ids


def test_ids_in_items_are_read_once_and_kept(
    dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = samples([(x, 0, f"case/{9 - i}") for i, x in enumerate(images(9))])
    first = fastpie.mine(dual(), data, tmp_path, batch_size=4)
    assert first.table.column("sample_id").to_pylist() == [f"case/{i + 1}" for i in range(9)]
    data.reads.clear()
    second = fastpie.mine(dual(), data, tmp_path, batch_size=4)
    assert data.reads == []
    assert second.table.equals(first.table)


def test_ids_of_a_failed_start_are_not_kept_for_other_data(
    dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    """No run was started, so nothing binds the folder to the data set that was refused."""
    one_hot = torch.eye(3)
    wrong = samples([(x, one_hot[0], f"old{i}") for i, x in enumerate(images(4))])
    with pytest.raises(fastpie.FastpieError, match="class indices"):
        fastpie.mine(dual(), wrong, tmp_path)
    right = samples([(x, 0, f"new{i}") for i, x in enumerate(images(4))])
    result = fastpie.mine(dual(), right, tmp_path)
    assert result.table.column("sample_id").to_pylist() == ["new0", "new1", "new2", "new3"]


def test_a_reordered_data_set_does_not_mix_up_a_resumed_run(
    dual: Dual, images: Any, samples: Any, tmp_path: Path, tiny_parts: None
) -> None:
    """Ids that come with the items: rows of a resumed run are of the samples that they name."""
    items = [(x, i % 3, f"s{i}") for i, x in enumerate(images(8))]
    whole = fastpie.mine(dual(), samples(items), tmp_path / "whole", batch_size=2).table
    fastpie.mine(dual(), samples(items), tmp_path / "run", batch_size=2)
    (tmp_path / "run" / "scores" / "part-000003.parquet").unlink()
    try:
        again = fastpie.mine(dual(), samples(items[::-1]), tmp_path / "run", batch_size=2)
    except fastpie.FastpieError:
        return  # refusing is as good
    assert again.table.equals(whole)


def test_indices_as_ids_are_warned_about(
    dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = samples([(x, 0) for x in images(12)])
    with pytest.warns(UserWarning, match="sample_ids"):
        result = fastpie.mine(dual(), data, tmp_path)
    assert result.table.column("sample_id").to_pylist() == sorted(map(str, range(12)))


def test_ids_given_by_the_caller(dual: Dual, images: Any, samples: Any, tmp_path: Path) -> None:
    data = samples([(x, i % 3) for i, x in enumerate(images(3))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fastpie.mine(dual(), data, tmp_path, sample_ids=["z", "x", "y"])
    assert result.table.column("sample_id").to_pylist() == ["x", "y", "z"]
    assert result.table.column("label").to_pylist() == [1, 2, 0]


@pytest.mark.parametrize(
    "sample_id", ["ü/患者-1", "a,b\"c'", " x ", "#3", "a\rb", "a\u2028b", "\0"]
)
def test_ids_of_any_text(
    sample_id: str, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = samples([(x, 0, i) for x, i in zip(images(2), ["plain", sample_id], strict=True)])
    for _ in range(2):  # once more with the ids that the run kept
        result = fastpie.mine(dual(), data, tmp_path)
        assert set(result.table.column("sample_id").to_pylist()) == {"plain", sample_id}


# ---------------------------------------------------------------------- the folder


def test_a_finished_run_is_returned_without_reading(
    dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    data = labelled(9, bad={3: OSError("gone")})
    first = fastpie.mine(dual("normalised"), data, tmp_path, batch_size=4)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    data.reads.clear()
    second = fastpie.mine(dual("normalised"), data, tmp_path, batch_size=4)
    assert data.reads == []
    assert second.table.equals(first.table)
    assert second.errors.equals(first.errors)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")} == files


def test_a_run_folder_opens_without_data(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    result = fastpie.mine(dual(), labelled(9), tmp_path / "run", note={"seed": 7})
    again = fastpie.MiningResult(str(tmp_path / "run"))
    assert again.table.equals(result.table)
    assert len(again) == 9
    assert again.record["note"] == {"seed": 7}
    assert "9 samples" in repr(again)
    assert fastpie.Masks.load(tmp_path / "run" / "masks.safetensors").sparsities == [0.7]
    # Any tool can read the parts.
    part = pq.read_table(tmp_path / "run" / "scores" / "part-000000.parquet")
    assert part.column("sample_id").to_pylist() == [f"s{i:02d}" for i in range(9)]
    with pytest.raises(fastpie.FastpieError, match=r"run\.json"):
        fastpie.MiningResult(tmp_path)


def test_bfloat16(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    model = dual("plain", 0.5)
    one = fastpie.mine(model, labelled(9), tmp_path / "a", batch_size=4).table
    two = fastpie.mine(model, labelled(9), tmp_path / "b", batch_size=4, precision="bf16").table
    np.testing.assert_allclose(one.column("js").to_numpy(), two.column("js").to_numpy(), atol=0.02)
    assert not one.equals(two)
