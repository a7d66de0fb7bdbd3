"""What is in the table: each row against the sample scored alone."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastpie
from fastpie.mining.scoring import Scorer

LADDER = [0.2, 0.5, 0.8]
Dual = Callable[..., fastpie.DualModel]


def alone(
    dual: fastpie.DualModel, image: Tensor, label: Any = None, task: str = "multiclass"
) -> tuple[fastpie.DualOutput, dict[str, Tensor]]:
    """One sample through the dual model and `disagreement`; scores as [1] or [L, 1]."""
    with torch.no_grad():
        out = dual(image.unsqueeze(0))
    labels = None if label is None else torch.as_tensor(label).unsqueeze(0)
    return out, fastpie.disagreement(out.dense, out.pruned, labels, task)


def check_row(row: dict[str, Any], scores: dict[str, Tensor], levels: list[float] | None) -> None:
    """Every score of a sample against its columns."""
    for name, score in scores.items():
        values = score.double().flatten().tolist()
        if levels is None:
            assert row[name] == pytest.approx(values[0], abs=1e-5, nan_ok=True), name
            continue
        if name in ("margin_dense", "loss_dense"):
            assert row[name] == pytest.approx(values[0], abs=1e-5, nan_ok=True), name
            continue
        for level, value in zip(levels, values, strict=True):
            column = f"{name}@{level:g}"
            assert row[column] == pytest.approx(value, abs=1e-5, nan_ok=True), column
        if name == "flip":
            flipped = [level for level, value in zip(levels, values, strict=True) if value]
            assert row["flip"] == bool(flipped)
            assert row["first_flip"] == (flipped[0] if flipped else None)
        else:
            assert row[name] == pytest.approx(np.mean(values), abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
@pytest.mark.parametrize("with_labels", [True, False])
def test_multiclass(
    sparsity: Any,
    with_labels: bool,
    dual: Dual,
    images: Any,
    samples: Any,
    rows_of: Any,
    tmp_path: Path,
) -> None:
    model, x = dual("normalised", sparsity), images(11)
    levels = sparsity if isinstance(sparsity, list) else None
    items = [(image, i % 3) if with_labels else (image,) for i, image in enumerate(x)]
    data = samples(items, [f"s{i:02d}" for i in range(11)])
    result = fastpie.mine(model, data, tmp_path, batch_size=4, recalibrate=False)
    rows = rows_of(result.table)
    assert list(rows) == data.sample_ids
    flips = 0
    for i, image in enumerate(x):
        out, scores = alone(model, image, i % 3 if with_labels else None)
        row = rows[f"s{i:02d}"]
        check_row(row, scores, levels)
        hard = scores["loss_pruned" if with_labels else "js"].double().mean().item()
        assert row["hardness"] == pytest.approx(hard, abs=1e-5)
        assert row["prediction_dense"] == out.dense.argmax().item()
        if levels is None:
            assert row["prediction_pruned"] == out.pruned.argmax().item()
        else:
            for level, logits in zip(levels, out.pruned, strict=True):
                assert row[f"prediction_pruned@{level:g}"] == logits.argmax().item()
        flips += row["flip"]
        assert ("label" in row) == with_labels
        assert ("damage" in row) == with_labels
        if with_labels:
            assert row["label"] == i % 3
    assert 0 < flips < 11  # the data show both
    formula = result.record["hardness"]
    assert ("loss_pruned" if with_labels else "js") in formula
    assert ("levels" in formula) == (levels is not None)


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
def test_multilabel_with_unknown_labels(
    sparsity: Any, dual: Dual, images: Any, samples: Any, rows_of: Any, tmp_path: Path
) -> None:
    model, x = dual("plain", sparsity, classes=4), images(6)
    nan = float("nan")
    labels = torch.tensor(
        [[1, 0, 0, nan], [0, 0, 0, 0], [1, 1, 1, 1], [nan, nan, nan, 1], [0, 1, nan, 0], [nan] * 4]
    )
    data = samples(list(zip(x, labels, strict=True)), list("abcdef"))
    result = fastpie.mine(model, data, tmp_path, task="multilabel", batch_size=4)
    rows = rows_of(result.table)
    for sample_id, image, label in zip("abcdef", x, labels, strict=True):
        _, scores = alone(model, image, label, "multilabel")
        check_row(rows[sample_id], scores, sparsity if isinstance(sparsity, list) else None)
        np.testing.assert_equal(np.array(rows[sample_id]["label"]), label.numpy())
        hard = scores["loss_pruned"].double().mean().item()
        assert rows[sample_id]["hardness"] == pytest.approx(hard, abs=1e-5, nan_ok=True)
    assert np.isfinite(rows["e"]["hardness"])
    assert np.isnan(rows["f"]["hardness"])  # no label is known
    assert result.select(1.0)[-1] == "f"


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
@pytest.mark.parametrize("classes", [1, 3])
def test_segmentation(
    sparsity: Any,
    classes: int,
    dual: Dual,
    images: Any,
    samples: Any,
    rows_of: Any,
    tmp_path: Path,
) -> None:
    model, x = dual("segmenting", sparsity, classes=classes), images(5)
    data = samples([(image, torch.zeros(8, 8)) for image in x], list("abcde"))
    result = fastpie.mine(model, data, tmp_path, task="segmentation", batch_size=2)
    rows = rows_of(result.table)
    for sample_id, image in zip("abcde", x, strict=True):
        _, scores = alone(model, image, task="segmentation")
        assert scores.keys() == {"iou", "iou_soft"}
        check_row(rows[sample_id], scores, sparsity if isinstance(sparsity, list) else None)
        hard = 1 - scores["iou_soft"].double().mean().item()
        assert rows[sample_id]["hardness"] == pytest.approx(hard, abs=1e-5)


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
def test_embedding(
    sparsity: Any, dual: Dual, images: Any, samples: Any, rows_of: Any, tmp_path: Path
) -> None:
    model, x = dual("normalised", sparsity, classes=6), images(5)
    data = samples([{"image": image} for image in x], list("abcde"))
    result = fastpie.mine(model, data, tmp_path, task="embedding", batch_size=2, recalibrate=False)
    rows = rows_of(result.table)
    for sample_id, image in zip("abcde", x, strict=True):
        _, scores = alone(model, image, task="embedding")
        check_row(rows[sample_id], scores, sparsity if isinstance(sparsity, list) else None)
        hard = scores["drift"].double().mean().item()
        assert rows[sample_id]["hardness"] == pytest.approx(hard, abs=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("task", "shape"), [("segmentation", (3, 4, 4)), ("embedding", (6,))])
def test_outputs_without_a_score_are_problems(
    task: str, shape: tuple[int, ...], value: float
) -> None:
    dense, pruned = torch.randn(4, *shape), torch.randn(2, 4, *shape)
    dense[1, ..., 0] = value  # of every class: -inf alone is a class of probability zero
    pruned[1, 2, ..., 0] = value
    scorer = Scorer(task, [0.3, 0.5], is_ladder=True, labelled=False)
    out = fastpie.DualOutput(dense, pruned, None)
    keep, columns, problems, _ = scorer.score(out, None, range(10, 14), range(4))
    assert keep == [0, 3]
    assert [(p.position, p.stage) for p in problems] == [(11, "score"), (12, "score")]
    assert np.isfinite(columns["hardness"]).all()
    want = fastpie.disagreement(dense[keep], pruned[:, keep], task=task)
    for name, score in want.items():
        np.testing.assert_array_equal(columns[f"{name}@0.5"], score[1])


@pytest.mark.parametrize("task", ["segmentation", "embedding"])
def test_labels_that_are_not_scored_may_be_anything(
    task: str, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    """These tasks score no labels: what they hold can cost no sample."""
    model = dual("segmenting" if task == "segmentation" else "plain")
    labels = [torch.zeros(8, 8), torch.zeros(5, 5), None, "cat"]
    data = samples(list(zip(images(4), labels, strict=True)), list("abcd"))
    result = fastpie.mine(model, data, tmp_path, task=task, batch_size=4)
    assert result.errors.to_pylist() == []
    assert result.table.num_rows == 4


# ---------------------------------------------------------------------- kept tensors


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
def test_logits_and_features_are_kept(
    sparsity: Any, dual: Dual, images: Any, samples: Any, tmp_path: Path, tiny_parts: None
) -> None:
    model, x = dual("normalised", sparsity, features="pool"), images(10)
    ids = [f"s{i}" for i in (3, 9, 0, 1, 7, 5, 2, 8, 4, 6)]
    items: list[Any] = [(image, 0) for image in x]
    items[4] = OSError("gone")  # s7
    result = fastpie.mine(
        model,
        samples(items, ids),
        tmp_path,
        batch_size=3,
        recalibrate=False,
        keep_logits=True,
        keep_features=True,
    )
    levels = len(sparsity) if isinstance(sparsity, list) else 1
    logits, features = result.logits(), result.features()
    assert logits[0].shape == (9, 3)
    assert logits[1].shape == (levels, 9, 3)
    assert features[0].shape == (9, 128)
    assert features[1].shape == (levels, 9, 128)
    assert {a.dtype for a in (*logits, *features)} == {np.dtype(np.float32)}
    for row, sample_id in enumerate(result.table.column("sample_id").to_pylist()):
        out, _ = alone(model, x[ids.index(sample_id)])
        pruned = out.pruned.reshape(levels, 3)
        np.testing.assert_allclose(logits[0][row], out.dense[0], atol=1e-5)
        np.testing.assert_allclose(logits[1][:, row], pruned, atol=1e-5)
        of_pruned = out.features.pruned.reshape(levels, 128)
        np.testing.assert_allclose(features[0][row], out.features.dense[0], atol=1e-5)
        np.testing.assert_allclose(features[1][:, row], of_pruned, atol=1e-5)
        drift = fastpie.disagreement(out.features.dense, of_pruned[:, None], task="embedding")
        want = drift["drift"].mean().item()
        assert result.table.column("feature_drift")[row].as_py() == pytest.approx(want, abs=1e-5)


def test_logits_are_kept_when_nothing_of_a_part_can_be_read(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    data = labelled(9, bad={i: OSError("gone") for i in (3, 4, 5)})
    result = fastpie.mine(dual(), data, tmp_path, batch_size=3, keep_logits=True)
    assert result.errors.num_rows == 3
    dense, pruned = result.logits()
    assert dense.shape == (6, 3)
    assert pruned.shape == (1, 6, 3)
    np.testing.assert_array_equal(
        dense.argmax(1), result.table.column("prediction_dense").to_numpy()
    )


def test_what_was_not_kept_is_said(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    result = fastpie.mine(dual(), labelled(3), tmp_path)
    with pytest.raises(fastpie.FastpieError, match="keep_logits"):
        result.logits()
    with pytest.raises(fastpie.FastpieError, match="keep_features"):
        result.features()
    with pytest.raises(fastpie.FastpieError, match="feature module"):
        fastpie.mine(dual(), labelled(3), tmp_path / "other", keep_features=True)


# ---------------------------------------------------------------------- structured outputs

Outputs = namedtuple("Outputs", ["aux", "logits"])


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner = model
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        if self.kind == "dict":
            return {"aux": x.mean((1, 2, 3)), "logits": logits}
        if self.kind == "namedtuple":
            return Outputs(x.mean((1, 2, 3)), logits)
        return x.mean((1, 2, 3)), logits


@pytest.mark.parametrize("sparsity", [0.7, LADDER])
@pytest.mark.parametrize(("kind", "entry"), [("dict", "logits"), ("tuple", 1), ("namedtuple", 1)])
def test_one_entry_of_a_structured_output(
    kind: str, entry: Any, sparsity: Any, network: Any, labelled: Any, tmp_path: Path
) -> None:
    plain, wrapped = network(), Wrapped(network(), kind)
    data = labelled(5)
    one = fastpie.mine(
        fastpie.DualModel(plain, fastpie.prune(plain, sparsity)), data, tmp_path / "a", batch_size=2
    )
    other = fastpie.DualModel(wrapped, fastpie.prune(wrapped, sparsity))
    two = fastpie.mine(other, data, tmp_path / "b", batch_size=2, output=entry)
    assert one.table.equals(two.table)


@pytest.mark.parametrize(("kind", "outline"), [("dict", "aux.*logits"), ("tuple", "2 entries")])
def test_an_entry_must_be_named(
    kind: str, outline: str, network: Any, labelled: Any, tmp_path: Path
) -> None:
    with pytest.raises(fastpie.FastpieError, match=outline):
        fastpie.mine(Wrapped(network(), kind), labelled(5), tmp_path / "a")
    with pytest.raises(fastpie.FastpieError, match=outline):
        fastpie.mine(Wrapped(network(), kind), labelled(5), tmp_path / "b", output="other")
    entry: Any = "aux" if kind == "dict" else 0
    with pytest.raises(fastpie.FastpieError, match=r"\[N, C\]"):
        fastpie.mine(Wrapped(network(), kind), labelled(5), tmp_path / "c", output=entry)


def test_images_of_several_tensors(images: Any, samples: Any, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.age = nn.Linear(64, 3), nn.Linear(1, 3)

        def forward(self, x: Tensor, age: Tensor) -> Tensor:
            return self.image(x.flatten(1)) + self.age(age)

    model, x, age = Two().eval(), images(5), torch.arange(5.0).unsqueeze(1)
    dual = fastpie.DualModel(model, fastpie.prune(model, 0.5))
    data = samples([((x[i], age[i]), i % 3) for i in range(5)], list("abcde"))
    table = fastpie.mine(dual, data, tmp_path, batch_size=2).table
    with torch.no_grad():
        out = dual(x, age)
    want = fastpie.disagreement(out.dense, out.pruned, torch.arange(5) % 3)
    np.testing.assert_allclose(table.column("js").to_numpy(), want["js"], atol=1e-5)
    np.testing.assert_allclose(table.column("damage").to_numpy(), want["damage"], atol=1e-5)


def test_features_of_the_dense_model_alone(tmp_path, dual, labelled, images):
    model = dual("normalised", [0.3, 0.7], features="conv1+bn2")
    result = fastpie.mine(model, labelled(10), tmp_path / "run", keep_features="dense")
    dense, pruned = result.features()
    assert pruned.shape == (0, 10, 32)
    assert result.record["feature_widths"] == [16, 16]
    with torch.no_grad():
        np.testing.assert_allclose(dense, model(images(10)).features.dense, rtol=1e-3, atol=1e-5)
    assert "feature_drift@0.7" in result.table.column_names
    with pytest.raises(fastpie.FastpieError, match="True, False or 'dense', but got 'pruned'"):
        fastpie.mine(model, labelled(10), tmp_path / "other", keep_features="pruned")
