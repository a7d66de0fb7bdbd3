"""Labels that cannot be: single ones go to the errors table, a wrong format stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpie

Dual = Callable[..., fastpie.DualModel]


def data_with(labels: list[Any], images: Any, samples: Any) -> Any:
    items = list(zip(images(len(labels)), labels, strict=True))
    return samples(items, [f"s{i}" for i in range(len(labels))])


@pytest.mark.parametrize("wrong", [3, -1, 1000, 1.5, math.nan, math.inf])
def test_single_class_indices_out_of_range(
    wrong: float, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = data_with([0, 1, wrong, 2, 0], images, samples)
    if isinstance(wrong, float):  # indices of one type, or torch's collate function mixes them up
        data = data_with([0.0, 1.0, wrong, 2.0, 0.0], images, samples)
    result = fastpie.mine(dual(), data, tmp_path, batch_size=2)
    (row,) = result.errors.to_pylist()
    assert (row["sample_id"], row["stage"]) == ("s2", "label")
    assert "[0, 3)" in row["error"]
    assert f"{wrong:g}" in row["error"]
    assert result.table.column("sample_id").to_pylist() == ["s0", "s1", "s3", "s4"]
    assert result.table.column("label").to_pylist() == [0, 1, 2, 0]


@pytest.mark.parametrize("wrong", [2.0, 0.5, -1.0, math.inf])
def test_single_multilabel_values(
    wrong: float, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    labels = [torch.tensor([0.0, 1.0, math.nan]) for _ in range(5)]
    labels[3] = torch.tensor([0.0, wrong, 1.0])
    data = data_with(labels, images, samples)
    result = fastpie.mine(dual(), data, tmp_path, task="multilabel", batch_size=2)
    (row,) = result.errors.to_pylist()
    assert (row["sample_id"], row["stage"]) == ("s3", "label")
    assert f"{wrong:g}" in row["error"]
    assert len(result) == 4


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrong", ["?", torch.tensor([0, 1, 0]), {"class": 1}, None])
def test_a_single_label_of_another_kind_costs_its_sample_only(
    wrong: Any, workers: int, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = data_with([0, 1, 2, wrong, 1, 0], images, samples)
    result = fastpie.mine(dual(), data, tmp_path, batch_size=6, num_workers=workers)
    assert result.errors.column("sample_id").to_pylist() == ["s3"]
    assert len(result) == 5


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        ([torch.eye(3)[i % 3] for i in range(5)], "multiclass", "class indices.*multilabel"),
        (["cat", "dog", "cat", "dog", "cat"], "multiclass", "of str"),
        ([7, 8, 9, 7, 8], "multiclass", "of the first 5 of 5 none can.*got 7"),
        ([0.3, 0.4, 0.5, 0.2, 0.7], "multiclass", "of the first 5 of 5 none can.*got 0.3"),
        ([0, 1, 2, 0, 1], "multilabel", r"\[5, 3\]"),
        ([torch.ones(4)] * 5, "multilabel", r"\[5, 3\]"),
        ([torch.full((3,), 2.0)] * 5, "multilabel", "0, 1 or NaN"),
    ],
    ids=["one-hot", "strings", "range", "floats", "indices", "classes", "values"],
)
def test_a_wrong_format_is_told_at_once(
    labels: list[Any], task: str, words: str, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    data = data_with(labels, images, samples)
    with pytest.raises(fastpie.FastpieError, match=f"(?s){words}"):
        fastpie.mine(dual(), data, tmp_path, task=task, batch_size=5)
    assert list((tmp_path / "scores").iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_bad_first_batch_does_not_condemn_the_rest(
    batch_size: int, dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    """Two wrong labels that happen to come first are errors like those that come later."""
    data = data_with([9, 9, 0, 1, 2, 0], images, samples)
    result = fastpie.mine(dual(), data, tmp_path, batch_size=batch_size)
    assert result.errors.column("sample_id").to_pylist() == ["s0", "s1"]
    assert len(result) == 4


def test_a_first_sample_without_label_does_not_unlabel_the_rest(
    dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    """Hardness must not silently change its meaning because one label is missing."""
    result = fastpie.mine(dual(), data_with([None, 0, 1, 2, 0], images, samples), tmp_path)
    assert "loss_pruned" in result.record["hardness"]
    assert result.errors.column("sample_id").to_pylist() == ["s0"]


def test_labels_as_columns_and_booleans(
    dual: Dual, images: Any, samples: Any, tmp_path: Path
) -> None:
    plain = fastpie.mine(dual(), data_with([0, 1, 1], images, samples), tmp_path / "a")
    for name, labels in {
        "column": [torch.tensor([i]) for i in (0, 1, 1)],
        "bool": [False, True, True],
        "float": [0.0, 1.0, 1.0],
    }.items():
        other = fastpie.mine(dual(), data_with(labels, images, samples), tmp_path / name)
        assert other.table.equals(plain.table), name
