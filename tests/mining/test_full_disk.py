"""A full disk: the message says so, what was written stays, and the run goes on when there is room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import fastpie

Dual = Callable[..., fastpie.DualModel]
BAD = {3: OSError("gone"), 7: OSError("gone")}


def mined(model: fastpie.DualModel, data: Any, folder: Path) -> fastpie.MiningResult:
    return fastpie.mine(model, data, folder, batch_size=2, keep_logits=True)


@pytest.mark.parametrize("number", range(1, 9))
def test_no_space_for_a_table(
    number: int,
    dual: Dual,
    labelled: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_parts: None,
) -> None:
    model, data = dual("normalised"), labelled(10, bad=BAD)
    whole = mined(model, data, tmp_path / "whole")
    write, calls = pq.write_table, [0]

    def full(table: Any, where: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] >= number:
            Path(where).write_bytes(b"PAR1 and half a row group")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, where, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(fastpie.FastpieError, match=r"disk is full.*run the same command"):
            mined(model, data, tmp_path / "run")
    if (tmp_path / "run" / "run.json").exists():
        partial = fastpie.MiningResult(tmp_path / "run")
        assert len(partial) == 0 or partial.table.equals(whole.table.slice(0, len(partial)))
    assert not list((tmp_path / "run").rglob(".*.parquet.*"))
    result = mined(model, data, tmp_path / "run")
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)


@pytest.mark.parametrize("number", range(1, 5))
def test_no_space_for_another_file(
    number: int,
    dual: Dual,
    images: Any,
    samples: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sample ids, recalibration, masks, run.json."""
    model = dual("normalised")
    data = samples([(x, i % 3, f"s{i}") for i, x in enumerate(images(6))])
    whole = fastpie.mine(model, data, tmp_path / "whole")
    write, calls = Path.write_bytes, [0]

    def full(self: Path, content: bytes) -> int:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(fastpie.FastpieError, match="disk is full"):
            fastpie.mine(model, data, tmp_path / "run")
    assert fastpie.mine(model, data, tmp_path / "run").table.equals(whole.table)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None
) -> None:
    model, data = dual("normalised", [0.3, 0.7]), labelled(99, bad=BAD)
    whole = mined(model, data, tmp_path / "whole")
    with pytest.raises(fastpie.FastpieError, match="disk is full"):
        mined(model, data, small_disk / "run")
    before = fastpie.MiningResult(small_disk / "run")
    assert 0 < len(before) < 97
    assert before.table.equals(whole.table.slice(0, len(before)))
    with pytest.raises(fastpie.FastpieError, match="disk is full"):
        mined(model, data, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = mined(model, data, small_disk / "run")
    assert result.table.equals(whole.table)
    assert result.errors.equals(whole.errors)
    assert [len(a) for a in result.logits()] == [97, 2]
    assert torch.from_numpy(result.logits()[0]).isfinite().all()
