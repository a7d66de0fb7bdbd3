"""Paths stay inside the root; stamps change with the content."""

import os

import pytest

from fastpie import FastpieError
from fastpie.data import read_manifest
from fastpie.data.files import Files, FolderFiles


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/sub/x.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data/up").symlink_to(tmp_path)
    (tmp_path / "data/loop").symlink_to(tmp_path / "data/loop")
    (tmp_path / "data-2").mkdir()
    (tmp_path / "data-2/x.png").write_bytes(b"a neighbour of the same beginning")
    return tmp_path / "data"


def test_inside_is_opened(root):
    files = FolderFiles(root)
    assert isinstance(files, Files)
    for path in ("sub/x.png", "./sub/../sub/x.png", str(root / "sub/x.png")):
        assert files.open(path) == root / "sub/x.png"
    assert files.name("sub/x.png") == str(root / "sub/x.png")


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "/etc/passwd", "link.png", "up/secret.png", "../data-2/x.png", "sub/../.."],
)
def test_outside_is_refused_unless_allowed(root, path):
    with pytest.raises(FastpieError, match="inside the data root"):
        FolderFiles(root).open(path)
    with pytest.raises(FastpieError, match="inside the data root"):
        FolderFiles(root).stamp(path)
    assert FolderFiles(root, allow_outside=True).open(path) == (root / path).resolve()


@pytest.mark.parametrize("path", ["", "a\0b.png"])
def test_what_is_no_path_is_refused(root, path):
    with pytest.raises(FastpieError, match="Expected the path"):
        FolderFiles(root).open(path)


def test_a_circle_of_links_raises(root):
    with pytest.raises((FastpieError, OSError)):
        FolderFiles(root).open("loop").stat()


def test_the_stamp_changes_with_size_and_time(root):
    files, path = FolderFiles(root), root / "sub/x.png"
    stamps = {files.stamp("sub/x.png"), files.stamp("sub/x.png")}
    os.utime(path, ns=(0, 5))
    stamps.add(files.stamp("sub/x.png"))
    path.write_bytes(b"insides")
    os.utime(path, ns=(0, 5))
    stamps.add(files.stamp("sub/x.png"))
    assert len(stamps) == 3
    with pytest.raises(OSError, match="none"):
        files.stamp("none.png")


def test_a_manifest_passes_the_permission_on(root):
    source = root / "data.csv"
    source.write_text("path\n../secret.png\n")
    with pytest.raises(FastpieError, match="allow_outside"):
        read_manifest(source).files.open("../secret.png")
    manifest = read_manifest(source, allow_outside=True)
    assert manifest.files.open("../secret.png").read_bytes() == b"outside"
    # A manifest from somebody else cannot bring the permission along.
    manifest.save(root / "saved.parquet")
    with pytest.raises(FastpieError, match="allow_outside"):
        read_manifest(root / "saved.parquet").files.open("../secret.png")
