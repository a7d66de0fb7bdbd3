"""The choice of the hardest: how many, in which direction, per stratum; reading a run as a stream."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpie
from fastpie.mining import selection
from fastpie.mining.quantiles import RANK_ERROR
from fastpie.mining.run_folder import NO_ROWS, RunFolder


def write_run(folder: Path, parts: Sequence[pa.Table]) -> fastpie.MiningResult:
    (folder / "scores").mkdir()
    for number, part in enumerate(parts):
        pq.write_table(part, folder / "scores" / f"part-{number:06d}.parquet")
    (folder / "run.json").write_text(json.dumps({"format": "fastpie-run-2", "config": {}}))
    return fastpie.MiningResult(folder)


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
    return write_run(tmp_path, [table.slice(0, 5), table.slice(5)])


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


# ---------------------------------------------------------------------------- against a plain sort

FEW = [0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan, None]  # many equal values
NUMBERS = {
    pa.float32(): st.sampled_from(FEW) | st.floats(width=32),
    pa.float64(): st.sampled_from(FEW) | st.floats(),
    pa.int64(): st.none() | st.integers(-3, 3) | st.integers(-(2**53), 2**53),
    pa.bool_(): st.none() | st.booleans(),
}
STRATA = {
    pa.string(): st.sampled_from(["a", "b", "", None, "long name"]),
    pa.int64(): st.none() | st.integers(-1, 1) | st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.sampled_from([0.5, math.nan, None]),
    pa.list_(pa.float32(), 2): st.sampled_from([[0.0, 1.0], [1.0, 1.0], None]),
}


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[pa.Table], list[Any], list[Any]]:
    """Parts, empty ones among them, and the two columns of their rows."""
    rows = draw(st.integers(1, 60))
    kind, per_kind = draw(st.sampled_from(list(NUMBERS))), draw(st.sampled_from(list(STRATA)))
    values = draw(st.lists(NUMBERS[kind], min_size=rows, max_size=rows))
    strata = draw(st.lists(STRATA[per_kind], min_size=rows, max_size=rows))
    ids = pa.array([f"{row:03d}" for row in range(rows)])
    columns = {"sample_id": ids, "hardness": pa.array(values, kind)}
    table = pa.table(
        {**columns, "margin_dense": columns["hardness"], "of": pa.array(strata, per_kind)}
    )
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=8)))
    parts = [table.slice(i, j - i) for i, j in zip([0, *cuts], [*cuts, rows], strict=True)]
    return [part if len(part) else NO_ROWS for part in parts], values, strata


def hardest_first(values: list[Any], rows: list[int], sign: int) -> list[int]:
    missing = [values[r] is None or math.isnan(values[r]) for r in range(len(values))]
    return sorted(rows, key=lambda r: (missing[r], 0 if missing[r] else sign * values[r], r))


@settings(max_examples=150, deadline=None)
@given(runs(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(1, 5))
def test_select_is_a_sort_however_small_its_buffer(
    run: tuple[list[pa.Table], list[Any], list[Any]], fraction: float, spare: int
) -> None:
    parts, values, strata = run
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SPARE", spare)
        result = write_run(Path(folder), parts)
        assert len(result) == len(values)
        texts = [str(s) for s in strata]
        for by, sign in (("hardness", -1), ("margin_dense", 1)):
            order = hardest_first(values, list(range(len(values))), sign)
            want = order[: int(fraction * len(order))]
            assert result.select_rows(fraction, by).tolist() == want
            assert result.select(fraction, by) == [f"{row:03d}" for row in want]
            chosen = set()
            for text in set(texts) if fraction else ():
                members = [row for row in order if texts[row] == text]
                chosen |= set(members[: max(1, int(fraction * len(members)))])
            want = [row for row in order if row in chosen]
            assert result.select_rows(fraction, by, "of").tolist() == want


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_long_columns(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SPARE", 1000)
    monkeypatch.setattr(RunFolder, "read_parts", lambda _: pytest.fail("the table was loaded"))
    rows = 300_000
    hardness = np.random.default_rng(0).random(rows).astype(np.float32)
    if order == "equal":
        hardness[:] = 0.5
    elif order != "random":
        hardness = np.sort(hardness)[:: 1 if order == "rising" else -1].copy()
    strata = np.arange(rows) % 3000
    ids = [f"{row:06d}" for row in range(rows)]
    table = pa.table({"sample_id": ids, "hardness": hardness, "group": strata})
    result = write_run(tmp_path, [table.slice(0, 100_000), table.slice(100_000)])
    want = np.argsort(-hardness, kind="stable")
    assert np.array_equal(result.select_rows(0.05), want[:15_000])
    assert result.select(0.001) == [ids[row] for row in want[:300]]
    by_group = want[np.argsort(strata[want], kind="stable")].reshape(3000, 100)[:, :7]
    wanted = np.zeros(rows, dtype=bool)
    wanted[by_group] = True
    assert np.array_equal(result.select_rows(0.07, per="group"), want[wanted[want]])


# ---------------------------------------------------------------------------- streams


def test_scan_gives_the_table_in_batches(result: fastpie.MiningResult) -> None:
    batches = list(result.scan(batch_rows=2))
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    assert repr(pa.Table.from_batches(batches).to_pylist()) == repr(result.table.to_pylist())
    two = pa.Table.from_batches(result.scan(["spearman@0.5", "sample_id"]))
    assert two.to_pylist() == result.table.select(["spearman@0.5", "sample_id"]).to_pylist()
    with pytest.raises(fastpie.FastpieError, match="'entropy'"):
        result.scan(["entropy"])
    with pytest.raises(fastpie.FastpieError, match="batch_rows"):
        result.scan(batch_rows=0)


def test_parts_may_lack_columns_and_differ_in_kind_of_text(tmp_path: Path) -> None:
    parts = [
        NO_ROWS,
        pa.table({"sample_id": ["a", "b"], "hardness": pa.array([1, 2], pa.float32())}),
        pa.table({
            "sample_id": pa.array(["c"], pa.large_string()),
            "label": [7],
            "hardness": pa.nulls(1),
        }),
        NO_ROWS,
    ]  # fmt: skip
    result = write_run(tmp_path, parts)
    assert len(result) == 3
    table = pa.Table.from_batches(result.scan(["sample_id", "hardness", "label"]))
    assert table.to_pylist() == result.dataset.to_table(table.column_names).to_pylist()
    assert table.column("label").to_pylist() == [None, None, 7]
    assert table.column("hardness").to_pylist() == [1, 2, None]
    assert result.select(1.0) == ["b", "a", "c"]
    assert result.select(0.5, per="label") == ["b", "c"]


def test_duckdb_reads_the_run_where_it_lies(result: fastpie.MiningResult) -> None:
    dataset = result.dataset
    rows = duckdb.sql(
        "select label, count(*), max(margin_dense) from dataset group by label order by label"
    ).fetchall()
    assert rows == [(0, 6, 5.0), (1, 3, 9.0), (2, 1, 10.0)]
    assert dataset.to_table(filter=ds.field("label") == 1)["sample_id"].to_pylist() == list("ghi")


def test_a_run_at_a_url(result: fastpie.MiningResult) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(result.path), "/run-to-select", recursive=True)
    try:
        remote = fastpie.MiningResult("memory://run-to-select")
        assert remote.select(1.0, per="label") == result.select(1.0)
        ids = remote.dataset.to_table(["sample_id"])["sample_id"]
        assert ids.to_pylist() == list("abcdefghij")
    finally:
        memory.rm("/run-to-select", recursive=True)


def test_a_run_without_a_score(tmp_path: Path) -> None:
    result = write_run(tmp_path, [NO_ROWS])
    assert len(result) == 0
    assert duckdb.from_arrow(result.dataset).count("*").fetchall() == [(0,)]
    assert list(result.scan()) == []


def test_a_part_that_changes_or_is_torn_is_named(result: fastpie.MiningResult) -> None:
    assert len(result) == 10
    part = result.path / "scores" / "part-000001.parquet"
    pq.write_table(pq.read_table(part).slice(0, 3), part)
    with pytest.raises(fastpie.FastpieError, match="Open the run again"):
        result.select(0.5)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(fastpie.FastpieError, match="part-000001"):
        len(fastpie.MiningResult(result.path))


# ---------------------------------------------------------------------------- quantiles


def test_quantiles_are_within_the_bound(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    values = random.standard_exponential(400_000).astype(np.float32)
    group = random.integers(0, 2, len(values))
    unknown = random.random(len(values)) < 0.1
    table = pa.table({
        "sample_id": [str(i) for i in range(len(values))],
        "hardness": pa.array(values, mask=unknown),
        "group": group,
    })  # fmt: skip
    result = write_run(tmp_path, [table.slice(0, 150_000), table.slice(150_000)])
    q = np.linspace(0, 1, 21)

    def check(found: Any, known: np.ndarray) -> None:
        assert found.shape == q.shape
        assert (found[0], found[-1]) == (known.min(), known.max())
        assert np.isin(found.astype(np.float32), known).all()
        rank = np.searchsorted(np.sort(known), found, side="right") / len(known)
        # The bound holds at 99 %; twice that is five standard deviations.
        assert np.abs(rank - q).max() < 2 * RANK_ERROR + 1 / len(known)

    check(result.quantiles(q), values[~unknown])
    by_group = result.quantiles(q, per="group")
    assert isinstance(by_group, dict)
    assert set(by_group) == {"0", "1"}
    for name, found in by_group.items():
        check(found, values[~unknown & (group == int(name))])


def test_quantiles_of_short_columns_are_exact(result: fastpie.MiningResult) -> None:
    known = np.sort([0.1, 0.9, 0.3, 0.5, 0.9, 0.2, 0.8, 0.05, 0.01])
    q = [0.0, 0.1, 0.25, 0.5, 1.0]
    want = np.quantile(known, q, method="inverted_cdf")
    assert np.array_equal(result.quantiles(q), want)
    assert result.quantiles(0.5) == want[3]
    per = result.quantiles([0.0, 1.0], "first_flip", per="label")
    assert isinstance(per, dict)
    assert per["0"].tolist() == [0.1, 0.7]
    assert per["1"].tolist() == [0.9, 0.9]
    assert np.isnan(per["2"]).all()


def test_quantiles_refuse_what_they_cannot_do(
    result: fastpie.MiningResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(fastpie.FastpieError, match=r"\[0, 1\]"):
        result.quantiles([0.5, 1.5])
    with pytest.raises(fastpie.FastpieError, match="numbers"):
        result.quantiles(0.5, by="sample_id")
    with pytest.raises(fastpie.FastpieError, match="'site'"):
        result.quantiles(0.5, per="site")
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(fastpie.FastpieError, match=r"fastpie\[quantiles\]"):
        result.quantiles(0.5)
