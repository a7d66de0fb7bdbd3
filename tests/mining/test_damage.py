"""What can be wrong with a folder or happen to data while a run goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastpie

Dual = Callable[..., fastpie.DualModel]
GONE = OSError("gone")


class Killed(BaseException):
    """Ends a run where it stands."""


def test_a_folder_that_cannot_be_written(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_parts: None
) -> None:
    """As when a file system is mounted again read-only, which it is after errors of the disk."""
    data = labelled(8)
    fastpie.mine(dual(), data, tmp_path, batch_size=2, limit=4)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refuse)
        with pytest.raises(fastpie.FastpieError, match=r"Read-only.*run the same command again"):
            fastpie.mine(dual(), data, tmp_path, batch_size=2)
    assert len(fastpie.MiningResult(tmp_path)) == 4
    assert len(fastpie.mine(dual(), data, tmp_path, batch_size=2)) == 8


def test_files_that_disappear_while_the_run_reads(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    class Vanishing(type(labelled(1))):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if (tmp_path / "run.json").exists() and index == 3:
                for later in (4, 6):
                    self.items[later] = FileNotFoundError(f"no file {later}")
            return super().__getitem__(index)

    data = labelled(8)
    result = fastpie.mine(
        dual(), Vanishing(data.items, data.sample_ids), tmp_path, batch_size=2, recalibrate=False
    )
    assert result.errors.column("sample_id").to_pylist() == ["s04", "s06"]
    assert "no file 4" in result.errors.column("error")[0].as_py()
    every = fastpie.mine(dual(), data, tmp_path, batch_size=2, recalibrate=False, retry_errors=True)
    assert len(every) == 8


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_torn_list_of_samples(keep: int, dual: Dual, labelled: Any, tmp_path: Path) -> None:
    first = fastpie.mine(dual(), labelled(8), tmp_path, batch_size=2, limit=4)
    table = first.table
    file = tmp_path / "samples.arrow"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(fastpie.FastpieError, match=r"samples\.arrow.*Remove that file"):
        fastpie.mine(dual(), labelled(8), tmp_path, batch_size=2)
    file.unlink()
    again = fastpie.mine(dual(), labelled(8), tmp_path, batch_size=2)
    assert again.table.slice(0, 4).equals(table)
    assert len(again) == 8


def test_torn_logits_and_a_crash_while_they_are_made_again(
    dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New logits without a sample that cannot be read any more never stand beside its old score."""
    options = {"batch_size": 2, "keep_logits": True}
    fastpie.mine(dual(), labelled(6, bad={0: GONE}), tmp_path, **options)
    logits = tmp_path / "logits" / "part-000000.parquet"
    logits.write_bytes(logits.read_bytes()[:50])
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        done = replace(self, target)
        if target == logits:
            raise Killed
        return done

    data = labelled(6, bad={1: GONE})  # as many as before, but others
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.warns(UserWarning, match="Part 0"), pytest.raises(Killed):
            fastpie.mine(dual(), data, tmp_path, **options)
    result = fastpie.mine(dual(), data, tmp_path, **options)
    assert result.errors.column("sample_id").to_pylist() == ["s01"]
    dense, _ = result.logits()
    predicted = result.table.column("prediction_dense").to_numpy()
    assert (dense.argmax(1) == predicted).all()


# ------------------------------------------------------------------ several models


def two(dual: Dual) -> list[fastpie.DualModel]:
    return [dual(seed=0), dual(seed=1)]


def test_models_without_the_record_of_their_run(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    fastpie.mine(two(dual), labelled(8), tmp_path, batch_size=2)
    (tmp_path / "run.json").unlink()
    for part in tmp_path.glob("scores/*"):
        part.unlink()
    with pytest.raises(fastpie.FastpieError, match=r"scores without a run\.json"):
        fastpie.mine(two(dual), labelled(8), tmp_path, batch_size=2)


def test_a_finished_run_of_several_models_is_not_written_again(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    data = labelled(8, bad={3: GONE})
    result = fastpie.mine(two(dual), data, tmp_path, batch_size=2, models_at_once=1)
    assert [member.members for member in result.members] == [[], []]
    table = result.table
    parts = sorted(tmp_path.glob("scores/*"))
    before = [part.stat().st_ino for part in parts]
    fastpie.mine(two(dual), data, tmp_path, batch_size=2)
    assert [part.stat().st_ino for part in parts] == before
    parts[1].write_bytes(b"PAR1")  # torn
    again = fastpie.mine(two(dual), data, tmp_path, batch_size=2)
    assert again.table.equals(table)
    assert parts[0].stat().st_ino == before[0]


@pytest.mark.parametrize("number", range(1, 5))
def test_killed_between_the_writes_of_the_means(
    number: int, dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry mends two of three errors; the means follow, each sample in scores or errors."""
    bad = dict.fromkeys((1, 3, 5), GONE)
    options = {"batch_size": 2, "models_at_once": 1}
    clean = fastpie.mine(two(dual), labelled(6), tmp_path / "clean", **options)
    run = tmp_path / "run"
    fastpie.mine(two(dual), labelled(6, bad=bad), run, **options)
    replace, seen = Path.replace, [0]

    def killed(self: Path, target: Path) -> Path:
        seen[0] += target.parent.parent == run
        if seen[0] == number:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        try:
            fastpie.mine(two(dual), labelled(6, bad={5: GONE}), run, retry_errors=True, **options)
        except Killed:
            pass
        else:
            assert number > 3
    partial = fastpie.MiningResult(run)
    ids = partial.table["sample_id"].to_pylist() + partial.errors["sample_id"].to_pylist()
    assert sorted(ids) == [f"s{i:02d}" for i in range(6)]
    after = fastpie.mine(two(dual), labelled(6, bad={5: GONE}), run, **options)
    assert after.errors.column("sample_id").to_pylist() == ["s05"]
    every = fastpie.mine(two(dual), labelled(6), run, retry_errors=True, **options)
    assert every.table.equals(clean.table)
