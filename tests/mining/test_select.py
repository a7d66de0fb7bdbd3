"""The choice of the hardest: how many, in which direction, per stratum."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastpie


@pytest.fixture
def result(tmp_path: Path) -> fastpie.MiningResult:
    """A run of ten samples written by hand, in two parts."""
    nan = math.nan
    columns: dict[str, Any] = {
        "sample_id": list("abcdefghij"),
        "label": [0, 0, 0, 0, 0, 0, 1, 1, 1, 2],
        "hardness": [0.1, 0.9, 0.3, nan, 0.5, 0.9, 0.2, 0.8, 0.05, 0.01],
        "spearman": [1.0, -0.5, 0.3, nan, 0.2, 0.1, 0.9, 0.8, -1.0, 0.7],
        "spearman@0.5": [1.0, -0.5, 0.3, 0.6, 0.2, 0.1, 0.9, 0.8, -1.0, 0.7],
        "margin_dense": [5.0, 1, 2, 3, 4, -6, 7, 8, 9, 10],
        "first_flip": [None, 0.5, 0.1, None, 0.3, 0.7, None, None, 0.9, None],
        "flip": [False, True, True, False, True, True, False, False, True, False],
        "iou_soft": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
    }
    table = pa.table(columns)
    (tmp_path / "scores").mkdir()
    for part in range(2):
        pq.write_table(table.slice(part * 5, 5), tmp_path / "scores" / f"part-{part:06d}.parquet")
    (tmp_path / "run.json").write_text(json.dumps({"format": "fastpie-run-2", "config": {}}))
    return fastpie.MiningResult(tmp_path)


@pytest.mark.parametrize(
    ("fraction", "ids"), [(0.0, ""), (0.05, ""), (0.1, "b"), (0.39, "bfh"), (1.0, "bfhecgaijd")]
)
def test_the_hardest_come_first_and_nan_last(
    fraction: float, ids: str, result: fastpie.MiningResult
) -> None:
    assert result.select(fraction) == list(ids)


@pytest.mark.parametrize(
    ("by", "ids"),
    [
        ("spearman", "ibfecjhgad"),  # low is hard; NaN last
        ("spearman@0.5", "ibfecdjhga"),
        ("margin_dense", "fbcdeaghij"),
        ("iou_soft", "jihgfedcba"),
        ("first_flip", "cebfiadghj"),  # none is easy
        ("flip", "bcefiadghj"),
    ],
)
def test_each_column_has_its_hard_end(by: str, ids: str, result: fastpie.MiningResult) -> None:
    assert result.select(1.0, by=by) == list(ids)


def test_a_fraction_of_each_class(result: fastpie.MiningResult) -> None:
    # Six of class 0, three of 1, one of 2: half of them, one at least.
    assert result.select(0.5, per="label") == ["b", "f", "h", "e", "j"]
    assert result.select(0.05, per="label") == ["b", "h", "j"]
    assert result.select(0.0, per="label") == []
    assert result.select(1.0, per="label") == result.select(1.0)
    assert result.select(0.34, by="spearman", per="label") == ["i", "b", "f", "j"]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf])
def test_fractions_outside(fraction: float, result: fastpie.MiningResult) -> None:
    with pytest.raises(fastpie.FastpieError, match=r"\[0, 1\]"):
        result.select(fraction)


def test_unknown_columns(result: fastpie.MiningResult) -> None:
    with pytest.raises(fastpie.FastpieError, match="'entropy'"):
        result.select(0.5, by="entropy")
    with pytest.raises(fastpie.FastpieError, match="'site'"):
        result.select(0.5, per="site")
    with pytest.raises(fastpie.FastpieError, match="numbers"):
        result.select(0.5, by="sample_id")
