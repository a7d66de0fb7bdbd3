"""BatchNorm statistics of the pruned model: from which samples, stored where, used when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastpie
from fastpie.mining.plan import Plan

Dual = Callable[..., fastpie.DualModel]


def test_statistics_are_those_of_the_chosen_samples(
    dual: Dual, labelled: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples of lowest id hash, the unreadable ones and the padding left out."""
    monkeypatch.setattr("fastpie.mining.session._RECALIBRATION_SAMPLES", 7)
    plan = Plan.cut([f"s{i:02d}" for i in range(20)], 3)
    chosen = sorted(plan.lowest_hashes(7))
    bad = chosen[2]
    x = images(20)
    model = dual("normalised", [0.3, 0.7])
    data = labelled(20, bad={bad: OSError("gone")})
    # A channel is constant at .7: BatchNorm makes 316 of one rounding there.
    result = fastpie.mine(model, data, tmp_path, batch_size=3, backend="reference")
    groups = [[i for i in chosen[j : j + 3] if i != bad] for j in (0, 3, 6)]
    model.recalibrate([x[group] for group in groups])
    stored = load_file(tmp_path / "recalibration.safetensors")
    for level in range(2):
        for name, value in model.statistics(level).items():
            assert torch.allclose(stored[f"{level}/{name}"].double(), value.double(), atol=1e-5)
    with torch.no_grad():
        out = model(x)
    js = fastpie.disagreement(out.dense, out.pruned)["js"].mean(0)
    for row in result.table.to_pylist():
        assert row["js"] == pytest.approx(js[int(row["sample_id"][1:])].item(), abs=1e-5)


def test_images_in_a_dict_are_recalibrated_without_the_padding(
    network: Any, images: Any, samples: Any, tmp_path: Path
) -> None:
    """The model takes a dict of tensors; filled slots must not enter the statistics."""

    class TakesDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("normalised")

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.inner(x["t1"] + x["t2"])

    x = images(6)
    model = TakesDict().eval()
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    items: list[Any] = [{"image": {"t1": i, "t2": i * 2}, "label": 0} for i in x]
    items[1] = OSError("gone")
    fastpie.mine(dual, samples(items, list("abcdef")), tmp_path, batch_size=4)
    good = [[0, 2, 3], [4, 5]]
    dual.recalibrate([{"image": {"t1": x[g], "t2": x[g] * 2}} for g in good])
    stored = load_file(tmp_path / "recalibration.safetensors")
    for name, value in dual.statistics(0).items():
        assert torch.allclose(stored[f"0/{name}"].double(), value.double(), atol=1e-5), name


def test_a_resumed_run_uses_the_stored_statistics(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    model = dual("normalised")
    whole = fastpie.mine(model, labelled(12), tmp_path, batch_size=4).table
    (tmp_path / "scores" / "part-000002.parquet").unlink()
    data = labelled(12)
    resumed = fastpie.mine(model, data, tmp_path, batch_size=4).table
    assert resumed.equals(whole)
    assert sorted(set(data.reads)) == [8, 9, 10, 11]  # the rest was not read to recalibrate again


def test_recalibration_makes_a_difference_and_can_be_left_out(
    dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    model = dual("normalised")
    fresh = fastpie.mine(model, labelled(12), tmp_path / "a", batch_size=4)
    kept = fastpie.mine(model, labelled(12), tmp_path / "b", batch_size=4, recalibrate=False)
    assert not fresh.table.equals(kept.table)
    assert not (tmp_path / "b" / "recalibration.safetensors").exists()
    # Statistics that the caller has set are used as they are.
    model.recalibrate([torch.randn(16, 1, 8, 8)])
    own = fastpie.mine(model, labelled(12), tmp_path / "c", batch_size=4, recalibrate=False)
    assert not own.table.equals(kept.table)


def test_networks_without_batchnorm_need_none(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    one = fastpie.mine(dual("plain"), labelled(9), tmp_path / "a", recalibrate=True)
    two = fastpie.mine(dual("plain"), labelled(9), tmp_path / "b", recalibrate=False)
    assert one.table.equals(two.table)
    assert not (tmp_path / "a" / "recalibration.safetensors").exists()


def test_no_readable_sample_among_the_chosen(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpie.mining.session._RECALIBRATION_SAMPLES", 2)
    plan = Plan.cut([f"s{i:02d}" for i in range(8)], 4)
    data = labelled(8, bad=dict.fromkeys(plan.lowest_hashes(2), OSError("gone")))
    with pytest.raises(fastpie.FastpieError, match="recalibrate=False"):
        fastpie.mine(dual("normalised"), data, tmp_path / "a", batch_size=4)
    fine = fastpie.mine(dual("normalised"), data, tmp_path / "b", batch_size=4, recalibrate=False)
    assert fine.table.num_rows == 6
    # Without BatchNorm there is nothing to recalibrate.
    assert fastpie.mine(dual("plain"), data, tmp_path / "c", batch_size=4).table.num_rows == 6
