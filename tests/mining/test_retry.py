"""retry_errors: what was mended is scored, what was scored stays, at whatever instant it dies."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastpie

Dual = Callable[..., fastpie.DualModel]
GONE = OSError("gone")


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.fixture
def mine(dual: Dual) -> Callable[..., fastpie.MiningResult]:
    """mine(data, folder, ...): the same configuration each time."""
    model = dual()

    def run(data: Any, folder: Path, **options: Any) -> fastpie.MiningResult:
        return fastpie.mine(model, data, folder, batch_size=2, keep_logits=True, **options)

    return run


def check_whole(result: fastpie.MiningResult, count: int) -> None:
    """Every sample once, in the table or in the errors; the kept logits belong to the rows."""
    scored = result.table.column("sample_id").to_pylist()
    failed = result.errors.column("sample_id").to_pylist()
    assert sorted(scored + failed) == [f"s{i:02d}" for i in range(count)]
    dense, _ = result.logits()
    np.testing.assert_array_equal(
        dense.argmax(1), result.table.column("prediction_dense").to_numpy()
    )


@pytest.mark.parametrize("part_seconds", [0.0, 1e3], ids=["many parts", "one part"])
@pytest.mark.parametrize("workers", [0, 2])
def test_mended_samples_are_scored(
    workers: int,
    part_seconds: float,
    mine: Any,
    labelled: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastpie.mining.session._PART_SECONDS", part_seconds)
    clean = mine(labelled(11), tmp_path / "clean")
    bad = {1: GONE, 4: GONE, 5: GONE, 10: GONE}
    first = mine(labelled(11, bad=bad), tmp_path / "run")
    assert first.errors.num_rows == 4
    del bad[4]
    bad[10] = ValueError("other")
    data = labelled(11, bad=bad)
    assert mine(data, tmp_path / "run").errors.equals(first.errors)
    assert data.reads == []  # not without being asked
    some = mine(data, tmp_path / "run", retry_errors=True, num_workers=workers)
    assert some.errors.column("sample_id").to_pylist() == ["s01", "s05", "s10"]
    assert "other" in some.errors.column("error")[2].as_py()
    check_whole(some, 11)
    every = mine(labelled(11), tmp_path / "run", retry_errors=True, num_workers=workers)
    assert every.errors.num_rows == 0
    assert every.table.equals(clean.table)
    for one, two in zip(every.logits(), clean.logits(), strict=True):
        np.testing.assert_array_equal(one, two)
    data = labelled(11)
    mine(data, tmp_path / "run", retry_errors=True)
    assert data.reads == []


def test_a_retry_loses_no_row(mine: Any, labelled: Any, tmp_path: Path) -> None:
    """The disk with the images is away while errors are retried: what was scored stays."""
    first = mine(labelled(6, bad={1: GONE}), tmp_path)
    away = labelled(6, bad=dict.fromkeys(range(6), OSError("not mounted")))
    again = mine(away, tmp_path, retry_errors=True)
    assert again.table.equals(first.table)
    assert again.errors.column("sample_id").to_pylist() == ["s01"]


def test_a_part_of_which_all_failed(
    mine: Any, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    clean = mine(labelled(6), tmp_path / "clean")
    first = mine(labelled(6, bad={2: GONE, 3: GONE}), tmp_path / "run")
    assert first.table.column("sample_id").to_pylist() == ["s00", "s01", "s04", "s05"]
    again = mine(labelled(6), tmp_path / "run", retry_errors=True)
    assert again.table.equals(clean.table)
    assert again.errors.num_rows == 0


def killed_at(number: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends just before or after the `number`-th file takes its place."""
    replace, seen = pathlib.Path.replace, [0]

    def counted(self: Path, target: Path) -> Path:
        seen[0] += 1
        if seen[0] == number and not after:
            raise Killed
        result = replace(self, target)
        if seen[0] == number:
            raise Killed
        return result

    monkeypatch.setattr(pathlib.Path, "replace", counted)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("fails", ["none", "another"])
def test_killed_between_the_writes_of_a_retry(
    fails: str,
    number: int,
    after: bool,
    mine: Any,
    labelled: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits, scores and errors are three files; no sample may fall between them.

    The retry mends s01; in the case "another" it cannot read s02, which had been scored before.
    """
    clean = mine(labelled(6), tmp_path / "clean")
    mine(labelled(6, bad={1: GONE, 4: GONE}), tmp_path / "run")
    second = labelled(6, bad={4: GONE, **({2: GONE} if fails == "another" else {})})
    with monkeypatch.context() as patch:
        killed_at(number, after, patch)
        try:
            mine(second, tmp_path / "run", retry_errors=True)
        except Killed:
            pass
        else:
            assert number == 4  # fewer files than that
    check_whole(mine(second, tmp_path / "run"), 6)
    every = mine(labelled(6), tmp_path / "run", retry_errors=True)
    assert every.errors.num_rows == 0
    assert every.table.equals(clean.table)
    check_whole(every, 6)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 13))
def test_killed_between_the_writes_of_a_run(
    number: int,
    after: bool,
    mine: Any,
    labelled: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_parts: None,
) -> None:
    """Masks, record, then logits, errors and scores of three parts."""
    bad = {1: GONE, 4: GONE}
    whole = mine(labelled(6, bad=bad), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(number, after, patch)
        try:
            mine(labelled(6, bad=bad), tmp_path / "run")
        except Killed:
            pass
        else:
            assert number > 8
    result = mine(labelled(6, bad=bad), tmp_path / "run")
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)
    check_whole(result, 6)
