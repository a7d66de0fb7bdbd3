"""Runs at URLs: fsspec's file system in memory, and one whose writes fail half-way."""

from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import fastpie
from fastpie.errors import FastpieError
from fastpie.mining.storage import LocalStorage, RemoteStorage, storage_at

Dual = Callable[..., fastpie.DualModel]


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of the process's memory."""
    name = f"bucket-{uuid.uuid4().hex}"
    yield f"memory://{name}/run"
    memory = MemoryFileSystem()
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


def files(url: str) -> dict[str, bytes]:
    """The content of every file by its name in the run."""
    memory, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): memory.cat_file(path) for path in memory.find(root)}


def same(one: fastpie.MiningResult, two: fastpie.MiningResult) -> bool:
    return one.table.equals(two.table) and one.errors.equals(two.errors)


# ---------------------------------------------------------------------- a run


@pytest.mark.usefixtures("tiny_parts")
def test_a_run_at_a_url_is_the_run_of_a_folder(
    url: str, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    model, data = dual("normalised", [0.3, 0.7], features="bn2"), labelled(23, {5: OSError("gone")})
    kept = {"keep_logits": True, "keep_features": True}
    plain = fastpie.mine(model, data, tmp_path / "plain", batch_size=4, **kept)
    result = fastpie.mine(model, data, url, batch_size=4, **kept)
    assert same(result, plain)
    assert same(fastpie.MiningResult(url), plain)
    assert result.location == url
    assert len(result) == 22
    for kind in ("logits", "features"):
        for ours, theirs in zip(getattr(result, kind)(), getattr(plain, kind)(), strict=True):
            assert (ours == theirs).all()
    assert result.select(0.3, per="label") == plain.select(0.3, per="label")
    for definition in ("spearman", "modal", "vote"):
        assert fastpie.pie(url, definition) == fastpie.pie(plain, definition)
    assert fastpie.training.hardness_weights(result) == fastpie.training.hardness_weights(plain)
    local = {str(p.relative_to(plain.path)) for p in plain.path.rglob("*") if p.is_file()}
    assert local - {".lock"} == set(files(url))


@pytest.mark.usefixtures("tiny_parts")
def test_a_stopped_run_goes_on_and_a_finished_one_is_left(
    url: str, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    model, data = dual("normalised"), labelled(23)
    fastpie.mine(model, data, url, batch_size=4, limit=8)
    some = files(url)
    assert {"scores/part-000000.parquet", "scores/part-000001.parquet"} == {
        name for name in some if name.startswith("scores/")
    }
    result = fastpie.mine(model, data, url, batch_size=4)
    every = files(url)
    assert some.items() <= every.items()
    assert same(result, fastpie.mine(model, data, tmp_path, batch_size=4))
    data.reads.clear()
    fastpie.mine(model, data, url, batch_size=4)
    assert not data.reads
    assert files(url) == every
    with pytest.raises(FastpieError, match=f"configuration of the run in {url}, but.*batch_size"):
        fastpie.mine(model, data, url, batch_size=8)


def test_errors_are_read_again(url: str, dual: Dual, labelled: Any, tmp_path: Path) -> None:
    model = dual()
    bad = labelled(9, {2: OSError("gone"), 7: OSError("gone, too")})
    assert len(fastpie.mine(model, bad, url, batch_size=4).errors) == 2
    mended = labelled(9, {7: OSError("gone, too")})
    assert len(fastpie.mine(model, mended, url, batch_size=4)) == 7
    result = fastpie.mine(model, mended, url, batch_size=4, retry_errors=True)
    plain = fastpie.mine(model, mended, tmp_path, batch_size=4)
    assert same(result, plain)
    assert "errors/part-000000.parquet" in files(url)
    result = fastpie.mine(model, labelled(9), url, batch_size=4, retry_errors=True)
    assert (len(result), len(result.errors)) == (9, 0)
    assert "errors/part-000000.parquet" not in files(url)


def test_several_models(url: str, dual: Dual, labelled: Any, tmp_path: Path) -> None:
    models, data = [dual(seed=0), dual(seed=1)], labelled(9)
    result = fastpie.mine(models, data, url, batch_size=4, models_at_once=1)
    plain = fastpie.mine(models, data, tmp_path, batch_size=4)
    assert same(result, plain)
    for ours, theirs in zip(result.members, plain.members, strict=True):
        assert ours.table.equals(theirs.table)


def test_what_others_write_is_seen(url: str) -> None:
    """fsspec remembers what a folder held."""
    ours, theirs = RemoteStorage(url), RemoteStorage(url)
    assert ours.names("scores") == []
    assert not ours.exists("scores/a")
    with theirs.file("scores/a") as path:
        path.write_bytes(b"1")
    assert ours.names("scores") == ["a"]
    assert ours.exists("scores/a")
    theirs.remove("scores/a")
    assert not ours.exists("scores/a")
    with pytest.raises(FileNotFoundError):
        ours.read("scores/a")


# ---------------------------------------------------------------------- what goes wrong


class Unavailable(Exception):
    """As the client libraries of stores have them: no OSError."""


@pytest.mark.usefixtures("tiny_parts")
def test_a_store_that_fails_at_any_write_can_be_gone_on_with(
    url: str, dual: Dual, labelled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = dual(), labelled(7, {5: OSError("gone")})
    put = MemoryFileSystem.put_file
    written: list[str] = []
    fails_at = -1

    def failing(self: Any, local: str, remote: str, **options: Any) -> None:
        written.append(remote)
        if len(written) - 1 == fails_at:
            if "part-" in remote:  # a store that does not put files whole leaves half of one
                content = Path(local).read_bytes()
                self.pipe_file(remote, content[: len(content) // 2])
            raise Unavailable("try later")
        put(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    plain = fastpie.mine(model, data, url, batch_size=4, keep_logits=True)
    count = len(written)
    assert {Path(name).name for name in written} == {Path(name).name for name in files(url)}
    for fails_at in range(count):
        written.clear()
        at = f"{url}-{fails_at}"
        message = f"Expected to write to {at}, but Unavailable: try later.*same command again"
        with pytest.raises(FastpieError, match=message):
            fastpie.mine(model, data, at, batch_size=4, keep_logits=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Part .* cannot be read and is scored again")
            result = fastpie.mine(model, data, at, batch_size=4, keep_logits=True)
        assert same(result, plain), fails_at
        for ours, theirs in zip(result.logits(), plain.logits(), strict=True):
            assert (ours == theirs).all()


def test_a_store_that_cannot_be_reached_is_named(
    url: str, dual: Dual, labelled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = dual(), labelled(9)
    fastpie.mine(model, data, url, batch_size=4, limit=4)

    def unavailable(*_: Any, **__: Any) -> Any:
        raise Unavailable("no route")

    for method in ("cat_file", "ls", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, unavailable)
            with pytest.raises(FastpieError, match=f"read {url}.*no route.*same command again"):
                fastpie.mine(model, data, url, batch_size=4)
    assert len(fastpie.mine(model, data, url, batch_size=4)) == 9


def test_errors_of_a_store_while_a_table_is_read_are_oserrors(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = RemoteStorage(url)
    with storage.file("a.parquet") as path:
        pq.write_table(pa.table({"a": range(1000)}), path)

    def unavailable(*_: Any) -> Any:
        raise Unavailable("gone away")

    def read() -> pa.Table:
        with storage.parquet("a.parquet") as file:
            monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", unavailable)
            return file.read()

    with pytest.raises(OSError, match="Unavailable: gone away"):
        read()


def test_urls_that_cannot_be_opened(
    dual: Dual, labelled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FastpieError, match="URL that fsspec can open, but got 'nowhere://a'"):
        fastpie.mine(dual(), labelled(3), "nowhere://a")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(FastpieError, match="got 's3://bucket/run': Install s3fs"):
        fastpie.MiningResult("s3://bucket/run")
    with pytest.raises(
        FastpieError, match=r"run folder at memory://none, but it holds no run\.json"
    ):
        fastpie.MiningResult("memory://none")


def test_a_run_json_that_is_no_record_says_what_to_do(url: str, dual: Dual, labelled: Any) -> None:
    with RemoteStorage(url).file("run.json") as path:
        path.write_text('{"format": "fast')
    with pytest.raises(FastpieError, match=f"{url}, but run.json holds.*Choose another folder"):
        fastpie.mine(dual(), labelled(3), url)


# ---------------------------------------------------------------------- beside a run


def test_a_report_of_a_run_at_a_url_needs_a_file(
    url: str, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    from fastpie.report import write_report

    result = fastpie.mine(dual(), labelled(9), url, batch_size=4)
    with pytest.raises(FastpieError, match=f"run on this machine, but it is at {url}: copy it"):
        write_report(result)
    path = tmp_path / "report.html"
    page = write_report(result, path, dataset=labelled(9)).read_text()
    assert url not in page
    assert "which is whose is kept nowhere" in page
    assert "s00" not in page
    page = write_report(result, path, dataset=labelled(9), show_ids=True).read_text()
    assert url in page
    assert "<title>run" in page


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_urls_of_this_machine_are_folders(
    scheme: str, dual: Dual, labelled: Any, tmp_path: Path
) -> None:
    storage = storage_at(f"{scheme}://{tmp_path}/run")
    assert isinstance(storage, LocalStorage)
    result = fastpie.mine(dual(), labelled(9), f"{scheme}://{tmp_path}/run", batch_size=4)
    assert result.path == tmp_path / "run"
    assert same(result, fastpie.MiningResult(tmp_path / "run"))
    assert (tmp_path / "run/.lock").exists()
