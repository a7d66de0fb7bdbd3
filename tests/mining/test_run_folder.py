"""The run folder of another run, damaged, torn, or in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import Dataset

import fastpie

Dual = Callable[..., fastpie.DualModel]


@pytest.fixture
def run(dual: Dual, labelled: Any, tmp_path: Path, tiny_parts: None) -> Path:
    """A finished run of twelve samples in three parts, one of them an error."""
    data = labelled(12, bad={5: OSError("gone")})
    fastpie.mine(dual("normalised"), data, tmp_path / "run", batch_size=4, keep_logits=True)
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 3}, "batch_size: 4 in the folder, 3 now"),
        ({"recalibrate": False}, "recalibrate"),
        ({"keep_logits": False}, "keep_logits"),
        ({"precision": "bf16"}, "precision"),
        ({"task": "embedding"}, "task"),
        ({"output": 1}, "output"),
        ({"count": 11}, "data"),
        ({"seed": 1}, "model"),
        ({"sparsity": 0.6}, "sparsities"),
        ({"sparsity": [0.7]}, "is_ladder"),
        ({"other masks": True}, "masks"),
        ({"recalibrated": True}, "statistics"),
    ],
)
def test_another_configuration_is_refused(
    change: dict[str, Any], words: str, run: Path, dual: Dual, labelled: Any
) -> None:
    before = snapshot(run)
    options = {"batch_size": 4, "keep_logits": True}
    options.update({k: v for k, v in change.items() if k not in _OF_THE_MODEL})
    model = dual("normalised", change.get("sparsity", 0.7), seed=change.get("seed", 0))
    if "other masks" in change:
        inner = model.model
        model = fastpie.DualModel(inner, fastpie.prune(inner, 0.7, method="random", seed=1))
    if "recalibrated" in change:
        model.recalibrate([torch.randn(4, 1, 8, 8)])
    data = labelled(change.get("count", 12), bad={5: OSError("gone")})
    with pytest.raises(fastpie.FastpieError, match=words):
        fastpie.mine(model, data, run, **options)
    assert snapshot(run) == before
    # The run itself goes on.
    again = fastpie.mine(
        dual("normalised"),
        labelled(12, bad={5: OSError("gone")}),
        run,
        batch_size=4,
        keep_logits=True,
    )
    assert len(again) == 11


_OF_THE_MODEL = ("sparsity", "seed", "count", "other masks", "recalibrated")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"format": "fastpie-run-0"}',
        b'{"format": "fastpie-run-2"}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_record(content: bytes, run: Path, dual: Dual, labelled: Any) -> None:
    (run / "run.json").write_bytes(content)
    before = snapshot(run)
    with pytest.raises(fastpie.FastpieError, match=r"run\.json"):
        fastpie.mine(dual("normalised"), labelled(12), run, batch_size=4, keep_logits=True)
    assert snapshot(run) == before


def test_records_of_another_format_are_not_opened(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "format": "fastpie-run-99"}))
    with pytest.raises(fastpie.FastpieError, match="fastpie-run-2"):
        fastpie.MiningResult(run)


@pytest.mark.parametrize("kind", ["scores", "logits"])
@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_a_torn_part_is_done_again(
    kind: str, keep: float, run: Path, dual: Dual, labelled: Any
) -> None:
    whole = fastpie.MiningResult(run)
    table, errors, logits = whole.table, whole.errors, whole.logits()
    part = run / kind / "part-000001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    data = labelled(12, bad={5: OSError("gone")})
    with pytest.warns(UserWarning, match="Part 1"):
        again = fastpie.mine(dual("normalised"), data, run, batch_size=4, keep_logits=True)
    assert again.table.equals(table)
    assert again.errors.equals(errors)
    for one, two in zip(again.logits(), logits, strict=True):
        assert np.array_equal(one, two)
    assert set(data.reads) <= {4, 5, 6, 7}


@pytest.mark.parametrize("name", ["errors.parquet", "errors/part-000001.parquet"])
def test_a_torn_errors_table_is_made_again(name: str, run: Path, dual: Dual, labelled: Any) -> None:
    before = pq.read_table(run / name)
    (run / name).write_bytes(b"PAR1")
    data = labelled(12, bad={5: OSError("gone")})
    result = fastpie.mine(dual("normalised"), data, run, batch_size=4, keep_logits=True)
    assert set(data.reads) <= {4, 5, 6, 7}
    assert result.errors.equals(before)
    assert pq.read_table(run / name).equals(before)


def test_leftover_temporary_files_are_removed(run: Path, dual: Dual, labelled: Any) -> None:
    leftovers = [
        run / "scores" / ".part-000003.parquet.abcdefgh",
        run / "logits" / ".part-000003.parquet.abc_efgh",
        run / ".errors.parquet.12345678",
        run / "errors" / ".part-000003.parquet.abcdefgh",
        run / ".run.json.abcdefgh",
        run / ".masks.safetensors.abcdefgh",
        run / ".recalibration.safetensors.abcdefgh",
        run / ".samples.arrow.abcdefgh",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    (run / ".mine").write_text("kept: not ours")
    (run / "scores" / "notes.txt").write_text("kept: not ours")
    data = labelled(12, bad={5: OSError("gone")})
    result = fastpie.mine(dual("normalised"), data, run, batch_size=4, keep_logits=True)
    assert [p.name for p in leftovers if p.exists()] == []
    assert (run / ".mine").exists()
    assert (run / "scores" / "notes.txt").exists()
    assert len(result) == 11


def test_errors_of_a_part_that_was_never_written_are_dropped(
    run: Path, dual: Dual, labelled: Any
) -> None:
    """Killed between errors and scores; at the next start the sample can be read."""
    (run / "scores" / "part-000001.parquet").unlink()
    result = fastpie.mine(dual("normalised"), labelled(12), run, batch_size=4, keep_logits=True)
    assert len(result) == 12
    assert result.errors.to_pylist() == []
    assert fastpie.MiningResult(run).errors.to_pylist() == []


class Nested(Dataset):
    """Starts a second run in the same folder while the first one reads."""

    def __init__(self, inner: Any, second: Callable[[], Any]) -> None:
        self.inner, self.second = inner, second
        self.sample_ids = inner.sample_ids
        self.refused: list[Exception] = []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        if index == 3 and not self.refused:
            try:
                self.second()
            except Exception as error:
                self.refused.append(error)
        return self.inner[index]


def test_two_runs_in_one_folder(dual: Dual, labelled: Any, tmp_path: Path) -> None:
    data = labelled(6)
    nested = Nested(data, lambda: fastpie.mine(dual(), data, tmp_path))
    result = fastpie.mine(dual(), nested, tmp_path)
    (error,) = nested.refused
    assert isinstance(error, fastpie.FastpieError)
    assert "another run" in str(error)
    assert len(result) == 6
    assert len(fastpie.mine(dual(), data, tmp_path)) == 6  # let go at the end


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_run_lets_go_of_the_folder(
    workers: int, dual: Dual, labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its exception, and with it the worker processes, are still alive."""
    model, data = dual(), labelled(40)
    with monkeypatch.context() as patch:
        patch.setattr("fastpie.mining.session._PART_SECONDS", 0.0)
        patch.setattr("pyarrow.parquet.write_table", _refuse)
        with pytest.raises(fastpie.FastpieError) as caught:
            fastpie.mine(model, data, tmp_path, batch_size=2, num_workers=workers)
    result = fastpie.mine(model, data, tmp_path, batch_size=2, num_workers=workers)
    assert len(result) == 40
    del caught


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError(5, "Input/output error")
