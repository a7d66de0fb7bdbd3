"""WebDataset shards."""

import io
import json
import tarfile

import pytest

from fastpie import FastpieError
from fastpie.data import Manifest, read_manifest


def shard(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key, label, content=None):
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", content or key.encode())]


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        members = [m for j in range(4) for m in sample(f"s{4 * i + j:05d}", (4 * i + j) % 3)]
        shard(tmp_path / f"data-{i:03d}.tar", members)
    return tmp_path


def test_a_folder_a_pattern_and_a_list_are_the_same(folder):
    sources = [
        folder,
        str(folder / "data-{000..002}.tar"),
        str(folder / "data-00{0,1,2}.tar"),
        folder / "data-*.tar",
        [folder / f"data-{i:03d}.tar" for i in range(3)],
    ]
    manifests = [read_manifest(s) for s in sources]
    for manifest in manifests:
        assert manifest.table.equals(manifests[0].table)
        assert manifest.sample_ids == [f"s{i:05d}" for i in range(12)]
        assert manifest.table["label"].to_pylist() == [i % 3 for i in range(12)]
        assert manifest.task == "multiclass"
        for sample_id, path in zip(
            manifest.sample_ids, manifest.table["path"].to_pylist(), strict=True
        ):
            assert manifest.files.open(path) == sample_id.encode()
    path = manifests[0].table["path"][5].as_py()
    assert manifests[0].files.name(path) == f"{folder}/data-001.tar::s00005.jpg"
    assert len(read_manifest(folder / "data-002.tar")) == 4


def test_json_gives_labels_and_attributes(tmp_path):
    values = [
        {"finding": "mass", "patient": 7, "sex": "f", "age": "061Y", "a": True, "b": None},
        {"finding": "edema", "patient": 7, "sex": "M", "a": 0, "b": 1, "boxes": [[1, 2]]},
    ]
    members = []
    for i, value in enumerate(values):
        members += [
            (f"x/{i}.json", json.dumps(value).encode()),
            (f"x/{i}.png", b"image"),
            (f"x/{i}.txt", b"a report"),
        ]
    shard(tmp_path / "a.tar", members)
    manifest = read_manifest(tmp_path / "a.tar", labels="finding", group="patient")
    table = manifest.table.to_pydict()
    assert table["sample_id"] == ["x/0", "x/1"]
    assert (manifest.class_names, table["label"]) == (["edema", "mass"], [1, 0])
    assert (table["group"], table["sex"], table["age"]) == (["7", "7"], ["F", "M"], [61, None])
    manifest = read_manifest(tmp_path / "a.tar", labels=["a", "b"], task="multilabel")
    assert str(manifest.table["label"].to_pylist()) == "[[1.0, nan], [0.0, 1.0]]"
    assert read_manifest(tmp_path / "a.tar").task is None
    with pytest.raises(FastpieError, match="label columns"):
        read_manifest(tmp_path / "a.tar", labels="diagnosis")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_kind(tmp_path, format):
    long = "folder/" * 12 + "k" * 60
    members = [
        ("__index__.json", b"{}"), (".hidden.png", b"-"), (f"{long}.png", b"long"),
        ("scan.nii.gz", b"volume"), ("scan.seg.nii.gz", b"mask"), ("UPPER.JPG", b"upper"),
        ("nothing.txt", b"no image"), ("empty.png", b""),
    ]  # fmt: skip
    path = shard(tmp_path / "a.tar", members, format)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    manifest = read_manifest(path)
    assert manifest.sample_ids == [long, "scan", "UPPER", "nothing", "empty"]
    paths = manifest.table["path"].to_pylist()
    assert [manifest.files.open(p) for p in paths[:3]] == [b"long", b"volume", b"upper"]
    for lost in paths[3:]:  # they go to the errors table, and the run goes on
        with pytest.raises(FastpieError, match="0 bytes"):
            manifest.files.open(lost)


@pytest.mark.parametrize("cut", [100, 512, 600, 1024, 1536, 3000, 4096, 8192])
def test_a_cut_shard_is_named(folder, cut):
    path = folder / "data-001.tar"
    whole = path.read_bytes()
    assert len(whole) == 10240
    path.write_bytes(whole[:cut])
    with pytest.raises(FastpieError, match=r"data-001\.tar"):
        read_manifest(folder)


def test_a_damaged_header_does_not_end_the_shard(folder):
    path = folder / "data-001.tar"
    content = bytearray(path.read_bytes())
    content[2048:2560] = b"x" * 512  # where the header of the third member was
    path.write_bytes(content)
    with pytest.raises(FastpieError, match="byte 2048"):
        read_manifest(folder)


def test_what_is_no_shard(folder, tmp_path):
    with pytest.raises(FastpieError, match=r"1 are not there.*data-003"):
        read_manifest(str(folder / "data-{000..003}.tar"))
    with pytest.raises(FastpieError, match="there are none"):
        read_manifest(str(folder / "train-*.tar"))
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(FastpieError, match="uncompressed"):
        read_manifest(tmp_path / "packed.tar")


def test_one_key_twice(folder):
    shard(folder / "data-003.tar", sample("s00001", 0))
    with pytest.raises(FastpieError, match="'s00001'"):
        read_manifest(folder)
    shard(folder / "data-003.tar", [("new.png", b"a"), ("new.jpg", b"b")])
    with pytest.raises(FastpieError, match="one image a sample"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_bad_json_is_named(tmp_path, content):
    shard(tmp_path / "a.tar", [("k.json", content), ("k.png", b"image")])
    with pytest.raises(FastpieError, match=r"a\.tar::k\.json"):
        read_manifest(tmp_path)


def test_names_in_another_encoding(tmp_path):
    shard(tmp_path / "a.tar", [("\udcff.png", b"image")], tarfile.GNU_FORMAT)
    with pytest.raises(FastpieError, match="UTF-8"):
        read_manifest(tmp_path)


def test_a_shard_that_changed_since(folder):
    manifest = read_manifest(folder)
    path = manifest.table["path"][11].as_py()
    before = manifest.files.stamp(path)
    assert before != manifest.files.stamp(manifest.table["path"][10].as_py())
    (folder / "data-002.tar").write_bytes((folder / "data-002.tar").read_bytes()[:4000])
    assert manifest.files.stamp(path) != before
    with pytest.raises(FastpieError, match="changed since"):
        manifest.files.open(path)


def test_shards_outside_the_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "linked.tar").symlink_to(folder / "data-000.tar")
    with pytest.raises(FastpieError, match="inside the data root"):
        read_manifest(elsewhere)
    manifest = read_manifest(elsewhere, allow_outside=True)
    assert manifest.files.open(manifest.table["path"][0].as_py()) == b"s00000"
    for path in ("../x.tar::0+9::x.png", "/etc/passwd::0+9::x.png"):
        with pytest.raises(FastpieError, match="inside the data root"):
            read_manifest(folder).files.open(path)
    with pytest.raises(FastpieError, match="shard::offset"):
        manifest.files.open("x.png")


def test_a_saved_manifest_opens_members(folder):
    manifest = read_manifest(folder)
    manifest.save(folder / "saved.parquet")
    loaded = Manifest.load(folder / "saved.parquet")
    assert loaded.files == manifest.files
    assert loaded.files.open(loaded.table["path"][3].as_py()) == b"s00003"
