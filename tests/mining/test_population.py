"""Several models in one run: the folders of each, the means, groups, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch import nn

import fastpie

Dual = Callable[..., fastpie.DualModel]
LEVELS = [0.3, 0.6]


@pytest.fixture
def duals(dual: Dual) -> list[fastpie.DualModel]:
    return [dual("normalised", LEVELS, seed=seed) for seed in range(3)]


def mined(models: Any, data: Any, folder: Path, **options: Any) -> fastpie.MiningResult:
    return fastpie.mine(models, data, folder, batch_size=4, keep_logits=True, **options)


def test_each_model_has_the_run_that_it_has_alone(
    duals: list[fastpie.DualModel], labelled: Any, tmp_path: Path
) -> None:
    data = labelled(18, bad={5: OSError("gone")})
    result = mined(duals, data, tmp_path / "all")
    for number, (member, model) in enumerate(zip(result.members, duals, strict=True)):
        alone = mined(model, data, tmp_path / str(number))
        assert member.table.equals(alone.table)
        assert member.errors.equals(alone.errors)
        for one, two in zip(member.logits(), alone.logits(), strict=True):
            assert one.tobytes() == two.tobytes()
        samples = member.samples()
        assert samples is not None
        assert samples.sample_ids == result.samples().sample_ids  # type: ignore[union-attr]
    assert result.errors.equals(alone.errors)
    assert result.record["models"] == 3
    assert "mean over 3 models" in result.record["hardness"]


def test_every_sample_is_read_once_for_all(
    duals: list[fastpie.DualModel], labelled: Any, tmp_path: Path
) -> None:
    one, all_of_them = labelled(40), labelled(40)
    mined(duals[0], one, tmp_path / "one", recalibrate=False)
    mined(duals, all_of_them, tmp_path / "all", recalibrate=False)
    assert len(all_of_them.reads) == len(one.reads)


def test_the_table_holds_means(
    duals: list[fastpie.DualModel], labelled: Any, tmp_path: Path
) -> None:
    result = mined(duals, labelled(18), tmp_path)
    tables = [member.table for member in result.members]

    def stacked(name: str) -> np.ndarray:
        return np.stack([table[name].to_numpy() for table in tables])

    table = result.table
    for name in ("hardness", "js@0.6", "loss_dense", "margin_pruned"):
        want = stacked(name).astype(np.float64).mean(0).astype(np.float32)
        np.testing.assert_array_equal(table[name].to_numpy(), want)
    np.testing.assert_allclose(
        table["hardness_std"].to_numpy(), stacked("hardness").astype(np.float64).std(0), rtol=1e-6
    )
    flips = stacked("flip@0.6")
    np.testing.assert_array_equal(table["flip@0.6"].to_numpy(), flips.any(0))
    np.testing.assert_allclose(table["flip_rate@0.6"].to_numpy(), flips.mean(0), rtol=1e-6)
    for row, votes in zip(
        table["prediction_dense"].to_pylist(), stacked("prediction_dense").T, strict=True
    ):
        counts = {int(v): (votes == v).sum() for v in votes}
        assert row == max(v for v in counts if counts[v] == max(counts.values()))
    lowest = [
        min(
            (t["first_flip"][i].as_py() for t in tables if t["first_flip"][i].is_valid),
            default=None,
        )
        for i in range(18)
    ]
    assert table["first_flip"].to_pylist() == lowest
    assert {None, *LEVELS} >= set(lowest)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_groups_change_nothing(
    at_once: int, duals: list[fastpie.DualModel], labelled: Any, tmp_path: Path
) -> None:
    data = labelled(18, bad={5: OSError("gone")})
    loaded = []

    def load(number: int) -> Callable[[], fastpie.DualModel]:
        def build() -> fastpie.DualModel:
            loaded.append(number)
            return duals[number]

        return build

    whole = mined(duals, data, tmp_path / "whole")
    result = mined([load(n) for n in range(3)], data, tmp_path / "run", models_at_once=at_once)
    assert loaded == [0, 1, 2]
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)
    data.reads.clear()
    assert mined(duals, data, tmp_path / "run").table.equals(whole.table)
    assert data.reads == []


class Odd(nn.Module):
    """NaN for images whose first pixel is above a bar."""

    def __init__(self, inner: nn.Module, bar: float) -> None:
        super().__init__()
        self.inner, self.bar = inner, bar

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0, 0, :1] > self.bar, torch.nan, self.inner(x))


def test_a_sample_that_one_model_cannot_score_is_an_error(
    network: Any, labelled: Any, tmp_path: Path
) -> None:
    data = labelled(12)
    bar = sorted(item[0][0, 0, 0].item() for item in data.items)[-3]
    models = [network("plain"), Odd(network("plain", seed=1), bar)]
    duals = [fastpie.DualModel(m, fastpie.prune(m, 0.5)) for m in models]
    result = mined(duals, data, tmp_path)
    assert len(result.members[0]) == 12
    assert len(result.members[1]) == 10
    assert len(result) == 10
    assert result.errors.column("stage").to_pylist() == ["score", "score"]
    ids = result.table.column("sample_id").to_pylist()
    assert not set(ids) & set(result.errors.column("sample_id").to_pylist())
    # Rows of both are matched by id.
    row = ids[-1]
    each = [m.table.filter(pc.field("sample_id") == row)["js"][0].as_py() for m in result.members]
    want = np.float32(np.mean(np.asarray(each, np.float64)))
    assert result.table["js"][len(ids) - 1].as_py() == want
    assert len(fastpie.pie(result, definition="modal")) <= 10


def test_pie_takes_the_models_as_seeds(
    duals: list[fastpie.DualModel], labelled: Any, tmp_path: Path
) -> None:
    result = mined(duals, labelled(18), tmp_path)
    logits = [member.logits() for member in result.members]
    dense = torch.from_numpy(np.stack([d for d, _ in logits])).double().softmax(-1).numpy()
    pruned = torch.from_numpy(np.stack([p[1] for _, p in logits])).double().softmax(-1).numpy()
    ids = result.table.column("sample_id").to_pylist()
    for definition in ("spearman", "modal", "vote"):
        rows = fastpie.pie((dense, pruned), definition, fraction=0.3)
        assert fastpie.pie(result, definition, fraction=0.3) == [ids[r] for r in rows]
    with pytest.raises(fastpie.FastpieError, match="members"):
        result.logits()


def test_what_does_not_fit_is_refused(
    duals: list[fastpie.DualModel], dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    data = labelled(8)
    with pytest.raises(fastpie.FastpieError, match="empty list"):
        mined([], data, tmp_path / "none")
    with pytest.raises(fastpie.FastpieError, match=r"sparsities.*model 1"):
        mined([duals[0], dual("normalised", [0.2, 0.6])], data, tmp_path / "levels")
    with pytest.raises(fastpie.FastpieError, match="Expected a model, but got str"):
        mined([lambda: "model"], data, tmp_path / "text")
    mined(duals, data, tmp_path / "run")
    with pytest.raises(fastpie.FastpieError, match="3 models"):
        mined(duals[:2], data, tmp_path / "run")
    with pytest.raises(fastpie.FastpieError, match=r"differs in .*model: "):
        mined([duals[1], duals[0], duals[2]], data, tmp_path / "run")
    with pytest.raises(fastpie.FastpieError, match="Choose another folder"):
        mined(duals[0], data, tmp_path / "run")


def test_a_retry_mends_the_means(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    models = [dual("plain", seed=seed) for seed in range(2)]
    whole = mined(models, labelled(10), tmp_path / "whole")
    mined(models, labelled(10, bad={3: OSError("gone")}), tmp_path / "run")
    again = mined(models, labelled(10), tmp_path / "run", retry_errors=True)
    assert again.table.equals(whole.table)
    assert again.errors.num_rows == 0
