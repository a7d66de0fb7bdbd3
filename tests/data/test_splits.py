"""Splits never cross a group; a manifest survives its file."""

import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastpie import FastpieError
from fastpie.data import Manifest, read_manifest

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


@pytest.fixture
def make(tmp_path):
    def make(rows, header="path,group", **options):
        (tmp_path / "data.csv").write_text("\n".join([header, *rows]) + "\n")
        return read_manifest(tmp_path / "data.csv", **options)

    return make


def by_id(manifest):
    columns = manifest.table.to_pydict()
    return dict(zip(columns["sample_id"], columns["split"], strict=True))


def test_splits_never_cross_a_group_and_do_not_follow_the_order(make):
    rows = [f"{i}.png,patient{i // 5:05d}" for i in range(10_000)]
    whole = make(rows).with_split(SHARES, seed=3)
    whole.check_leakage()
    split = by_id(whole)
    for first in range(0, 10_000, 5):
        assert len({split[f"{i}.png"] for i in range(first, first + 5)}) == 1
    for name, share in SHARES.items():
        # 2,000 groups: five standard deviations of a binomial.
        assert (
            abs(len(whole.subset(name)) / 10_000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5
        )
    random.Random(0).shuffle(rows)
    assert by_id(make(rows).with_split(SHARES, seed=3)) == split
    part = by_id(make(rows[:1000]).with_split(SHARES, seed=3))
    assert part.items() <= split.items()  # nor the other samples
    assert by_id(make(rows).with_split(SHARES, seed=4)) != split


def test_nearby_seeds_split_independently(make):
    manifest = make([f"{i}.png,p{i}" for i in range(4000)])
    halves = {"a": 0.5, "b": 0.5}
    first, second = (by_id(manifest.with_split(halves, seed)) for seed in (0, 1))
    same = sum(first[i] == second[i] for i in first)
    assert abs(same / 4000 - 0.5) < 5 * 0.5 / 4000**0.5


def test_samples_without_a_group_are_groups_of_their_own(make):
    manifest = make([f"{i}.png," for i in range(1000)]).with_split({"a": 0.5, "b": 0.5})
    assert 400 < len(manifest.subset("a")) < 600
    assert by_id(
        make([f"{i}.png" for i in range(1000)], "path").with_split({"a": 0.5, "b": 0.5})
    ) == (by_id(manifest))


def test_a_new_split_replaces_the_old_one(make):
    manifest = make(["a.png,old", "b.png,old"], "path,split")
    assert manifest.splits == ["old"]
    assert manifest.with_split({"x": 0.0, "y": 1.0}).splits == ["y"]


@pytest.mark.parametrize("bad", [{"train": 0.5}, {"train": 1.5, "test": -0.5}, {}])
def test_fractions_that_are_none(make, bad):
    with pytest.raises(FastpieError, match="sum to 1"):
        make(["a.png,p"]).with_split(bad)


def test_an_unknown_split(make):
    with pytest.raises(FastpieError, match="with_split"):
        make(["a.png,p"]).subset("train")
    with pytest.raises(FastpieError, match=r"\['train'\], but got 'val'"):
        make(["a.png,train"], "path,split").subset("val")


def test_leakage_lists_the_groups(make):
    rows = [f"{i}-{s}.png,p{i},{s}" for i in range(7) for s in ("train", "test")]
    rows += [
        "x.png,p0,train",
        "y.png,whole,train",
        "z.png,whole,train",
        "u.png,,test",
        "v.png,,train",
    ]
    header = "path,group,split"
    with pytest.raises(
        FastpieError, match=r"7 are in several: p0 \(test, train\); p1 .*p4 .* \.\.\."
    ):
        make(rows, header)
    manifest = make(rows, header, allow_leakage=True)
    with pytest.raises(FastpieError, match="7 are in several"):
        manifest.check_leakage()
    manifest.with_split({"train": 0.5, "test": 0.5}).check_leakage()
    make(rows[-4:], header).check_leakage()


def test_groups_and_ids_of_one_hash_are_told_apart(make, monkeypatch):
    monkeypatch.setattr(
        "fastpie.data.manifest.hash64", lambda column: np.zeros(len(column), np.uint64)
    )
    make(["a.png,p1,train", "b.png,p2,test"], "path,group,split")
    with pytest.raises(FastpieError, match=r"1 are in several: p1 \(test, train\)\. "):
        make(["a.png,p1,train", "b.png,p2,test", "c.png,p1,test"], "path,group,split")
    with pytest.raises(FastpieError, match=r"1 occur more than once, for example 'a\.png'"):
        make(["a.png,p1", "b.png,p2", "a.png,p1"])


def test_a_saved_manifest_is_the_same(make, tmp_path):
    manifest = make(
        ["a.png,p1,x,1,", "b.png,p2,,0,1"],
        "path,group,finding,c,d",
        labels=["c", "d"],
        task="multilabel",
    ).with_split(SHARES)
    (tmp_path / "a.png").write_bytes(b"image")
    manifest.save(tmp_path / "saved.parquet")
    for loaded in (
        Manifest.load(tmp_path / "saved.parquet"),
        read_manifest(tmp_path / "saved.parquet"),
    ):
        assert loaded.table.schema.equals(manifest.table.schema)
        assert str(loaded.table.to_pydict()) == str(manifest.table.to_pydict())  # NaN is not NaN
        assert (loaded.task, loaded.class_names) == ("multilabel", ["c", "d"])
        assert loaded.files.open("a.png").read_bytes() == b"image"
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.png").write_bytes(b"moved")
    moved = read_manifest(tmp_path / "saved.parquet", root=tmp_path / "new")
    assert moved.files.open("a.png").read_bytes() == b"moved"
    with pytest.raises(FastpieError, match="no options"):
        read_manifest(tmp_path / "saved.parquet", labels="c")
    moved.save(tmp_path / "again.parquet")
    assert Manifest.load(tmp_path / "again.parquet").files == moved.files


def test_what_is_no_saved_manifest(make, tmp_path):
    pq.write_table(make(["a.png,p"]).table, tmp_path / "plain.parquet")
    with pytest.raises(FastpieError, match="another Parquet file"):
        Manifest.load(tmp_path / "plain.parquet")
    changed = make(["a.png,p"]).table.replace_schema_metadata({"fastpie.manifest": "{}"})
    pq.write_table(changed, tmp_path / "changed.parquet")
    with pytest.raises(FastpieError, match="has been changed"):
        read_manifest(tmp_path / "changed.parquet")
    with pytest.raises(FastpieError, match="saved manifest"):
        Manifest.load(tmp_path / "none.parquet")
    with pytest.raises(FastpieError, match="write a manifest"):
        make(["a.png,p"]).save(tmp_path / "no/where.parquet")
