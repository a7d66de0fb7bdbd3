"""Shares of a run in one folder: who may write where, and who may not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastpie
from fastpie.mining.lock import RunLock

Dual = Callable[..., fastpie.DualModel]


def test_shards_give_the_whole_table(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    data = labelled(14, bad={3: OSError("gone"), 11: OSError("gone")})
    whole = fastpie.mine(dual(), data, tmp_path / "whole", batch_size=2)
    for shard in ((1, 2), (0, 3), (2, 6), (1, 2)):
        result = fastpie.mine(dual(), data, tmp_path / "run", batch_size=2, shard=shard)
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)


@pytest.mark.parametrize(
    ("first", "second", "free"),
    [
        ((0, 2), (1, 2), True),
        ((0, 3), (1, 3), True),
        ((0, 3), (2, 6), True),
        ((1, 7), (0, 7), True),
        ((0, 2), (0, 2), False),
        ((0, 2), (1, 3), False),
        ((0, 1), (999, 1000), False),
        ((3, 4), (1, 2), False),
    ],
)
def test_shares_exclude_each_other_where_they_overlap(
    first: tuple[int, int], second: tuple[int, int], free: bool, tmp_path: Path
) -> None:
    one, two = RunLock(tmp_path, first), RunLock(tmp_path, second)
    one.acquire()
    if free:
        two.acquire()
        with two.set_up() as others:
            assert others
        two.release()
    else:
        with pytest.raises(fastpie.FastpieError, match=r"another run is writing.*do not overlap"):
            two.acquire()
    one.release()
    two.acquire()
    with two.set_up() as others:
        assert not others
    two.release()


def test_looking_for_others_refuses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is asked for at the very instant at which another looks whether it is taken."""
    one, two = RunLock(tmp_path, (0, 2)), RunLock(tmp_path, (1, 2))
    take, refused = RunLock._take, []

    def acquire() -> None:
        try:
            two.acquire()
        except fastpie.FastpieError as error:
            refused.append(error)

    thread = threading.Thread(target=acquire)

    def slow(self: RunLock, held: Any, wanted: tuple[int, int]) -> bool:
        taken = take(self, held, wanted)
        if self is one and wanted == two._range:
            thread.start()
            thread.join(0.2)
        return taken

    one.acquire()
    monkeypatch.setattr(RunLock, "_take", slow)
    with one.set_up() as others:
        assert not others
    thread.join()
    assert refused == []
    two.release()
    one.release()


def test_the_errors_of_all_shards_are_in_the_table(
    dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    """A shard removes errors that it has mended while another one lists them."""
    bad = {3: OSError("gone"), 11: OSError("gone")}
    run = tmp_path / "run"
    fastpie.mine(dual(), labelled(14, bad=bad), run, batch_size=2)
    folder = fastpie.mining.run_folder.RunFolder(run)
    read = folder.read_part

    def mended(part: int, *arguments: Any, **options: Any) -> Any:
        if part == 1 and "errors" in arguments:
            (run / "errors" / "part-000001.parquet").unlink()
        return read(part, *arguments, **options)

    folder.read_part = mended  # type: ignore[method-assign]
    assert folder.errors().column("sample_id").to_pylist() == ["s11"]
