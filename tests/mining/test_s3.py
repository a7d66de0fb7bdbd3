"""A run on S3, as moto plays it: for who has moto[server] and s3fs installed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastpie
from fastpie.errors import FastpieError

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a bucket that is empty."""
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    s3fs.S3FileSystem.clear_instance_cache()  # of another test's server
    name = f"bucket-{uuid.uuid4().hex}"  # moto keeps them for as long as the process lives
    s3fs.S3FileSystem().mkdir(name)
    yield name
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("tiny_parts")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(botocore|moto|responses|werkzeug)\..*")
def test_a_run_on_s3_is_the_run_of_a_folder(
    bucket: str, dual: Callable[..., Any], labelled: Any, tmp_path: Path
) -> None:
    model, data = dual("normalised", [0.3, 0.7]), labelled(23, {5: OSError("gone")})
    plain = fastpie.mine(model, data, tmp_path, batch_size=4, keep_logits=True)
    url = f"s3://{bucket}/runs/one"
    some = fastpie.mine(model, data, url, batch_size=4, keep_logits=True, limit=8)
    assert len(some) + len(some.errors) == 8
    fastpie.mine(model, data, url, batch_size=4, keep_logits=True)
    result = fastpie.MiningResult(url)
    assert result.table.equals(plain.table)
    assert result.errors.equals(plain.errors)
    for ours, theirs in zip(result.logits(), plain.logits(), strict=True):
        assert (ours == theirs).all()
    mended = fastpie.mine(
        model, labelled(23), url, batch_size=4, keep_logits=True, retry_errors=True
    )
    assert (len(mended), len(mended.errors)) == (23, 0)


def test_no_bucket_is_made_for_a_misspelt_one(
    bucket: str, dual: Callable[..., Any], labelled: Any
) -> None:
    with pytest.raises(
        FastpieError, match=r"write to s3://bukcet/run, but .*bucket does not exist"
    ):
        fastpie.mine(dual(), labelled(9), "s3://bukcet/run", batch_size=4)
    buckets = s3fs.S3FileSystem().ls("", refresh=True)
    assert bucket in buckets
    assert "bukcet" not in buckets
