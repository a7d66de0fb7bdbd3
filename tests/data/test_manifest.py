"""Manifests and decoding."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastpie import FastpieError
from fastpie.data import ManifestDataset, Preprocessing


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    deep = generator.integers(0, 65536, (12, 10), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(rgb).save(tmp_path / "photo.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:200])
    return tmp_path


def write(root, text, name="data.csv"):
    (root / name).write_text(text)
    return root / name


def test_values_are_scaled_normalised_and_channels_first(root):
    data = ManifestDataset(
        write(root, "path,label\nrgb.png,1\n"),
        labels="label",
        preprocessing=Preprocessing(mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.3]),
    )
    image, label, sample_id = data[0]
    pixels = np.asarray(Image.open(root / "rgb.png")) / 255
    expected = (pixels - [0.5, 0.4, 0.3]) / [0.2, 0.1, 0.3]
    assert image.dtype is torch.float32
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert (label, sample_id) == (1, "rgb.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_keeps_its_depth(root, channels):
    data = ManifestDataset(
        write(root, "path\ndeep.png\n"), preprocessing=Preprocessing(channels=channels)
    )
    image = data[0][0]
    expected = np.asarray(Image.open(root / "deep.png")).astype(np.float64) / 65535
    assert image.shape == (channels, 12, 10)
    np.testing.assert_allclose(image[-1].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["rgb.png", "grey.png", "deep.png", "photo.jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_gives_the_asked_shape(root, name, channels):
    data = ManifestDataset(
        write(root, f"path\n{name}\n"),
        preprocessing=Preprocessing(size=(7, 5), channels=channels),
    )
    image, label, _ = data[0]
    assert image.shape == (channels, 7, 5)
    assert label is None
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(
    ("name", "error"), [("empty.png", FastpieError), ("cut.png", OSError), ("no.png", OSError)]
)
def test_unreadable_files_raise_when_they_are_read(root, name, error):
    data = ManifestDataset(write(root, f"path\n{name}\n"))
    with pytest.raises(error):
        data[0]


def test_paths_outside_the_root_are_refused(root):
    (root / "inside").mkdir()
    data = ManifestDataset(write(root, "path\n../rgb.png\n"), root=root / "inside")
    with pytest.raises(FastpieError, match="inside the data root"):
        data[0]


def test_ids_keep_their_leading_zeros_and_default_to_the_path(root):
    data = ManifestDataset(write(root, "path,sample_id\nrgb.png,007\ngrey.png,0010\n"))
    assert data.sample_ids == ["007", "0010"]
    assert ManifestDataset(write(root, "path\nrgb.png\n")).sample_ids == ["rgb.png"]


def test_class_names_are_sorted_or_in_the_order_given(root):
    source = write(root, 'path,finding\nrgb.png,"nodule, left"\ngrey.png,edema\ndeep.png,\n')
    data = ManifestDataset(source, labels="finding")
    assert data.class_names == ["edema", "nodule, left"]
    assert data.labels == [1, 0, -1]
    data = ManifestDataset(source, labels="finding", class_names=["nodule, left", "edema"])
    assert data.labels == [0, 1, -1]
    with pytest.raises(FastpieError, match="among the classes"):
        ManifestDataset(source, labels="finding", class_names=["edema"])


def test_multilabel_columns(root):
    source = write(root, "path,a,b\nrgb.png,1,\ngrey.png,0,1\ndeep.png,1,maybe\n")
    data = ManifestDataset(source, labels=["a", "b"], task="multilabel")
    assert data.class_names == ["a", "b"]
    assert data.labels[0][0] == 1
    assert data.labels[0][1].isnan()
    assert data.labels[1].tolist() == [0, 1]
    assert data.labels[2].tolist() == [1, 2]  # refused row by row when it is mined


def test_parquet_and_image_folder(root):
    pq.write_table(pa.table({"path": ["rgb.png"], "label": [3]}), root / "data.parquet")
    assert ManifestDataset(root / "data.parquet", labels="label").labels == [3]
    for name in ("b", "a"):
        (root / "folder" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / "folder" / name / "x.png")
    data = ManifestDataset(root / "folder")
    assert data.class_names == ["a", "b"]
    assert [data[i][1:] for i in range(2)] == [(0, "a/x.png"), (1, "b/x.png")]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name\nrgb.png\n", {}, "path"),
        ("path,label\nrgb.png,1\n", {"labels": "class"}, "class"),
        ("path,a,b\nrgb.png,1,0\n", {"labels": ["a", "b"]}, "multilabel"),
        ("path,label\nrgb.png\nx,1,2,3\n", {}, "CSV"),
    ],
)
def test_bad_manifests_are_refused(root, text, options, message):
    with pytest.raises(FastpieError, match=message):
        ManifestDataset(write(root, text), **options)


def test_a_missing_manifest_and_an_empty_folder_are_refused(root):
    with pytest.raises(FastpieError, match="manifest"):
        ManifestDataset(root / "none.csv")
    (root / "void").mkdir()
    with pytest.raises(FastpieError, match="sub-folders"):
        ManifestDataset(root / "void")


@pytest.mark.parametrize(
    "bad", [{"channels": 2}, {"std": [0.0]}, {"mean": [0, 0]}, {"size": (0, 5)}]
)
def test_bad_preprocessing_is_refused(bad):
    with pytest.raises(FastpieError):
        Preprocessing(**bad)


@pytest.mark.parametrize("odd", ["NA", "?", "1.5"])
def test_names_among_indices_are_refused(root, odd):
    with pytest.raises(FastpieError, match="mixes them"):
        ManifestDataset(write(root, f"path,label\nrgb.png,1\ngrey.png,{odd}\n"), labels="label")


def test_nan_among_indices_is_a_missing_label(root):
    table = pa.table({"path": ["rgb.png", "grey.png"], "label": [10.0, float("nan")]})
    pq.write_table(table, root / "data.parquet")
    assert ManifestDataset(root / "data.parquet", labels="label").labels == [10, -1]


def test_the_fingerprint_follows_labels_and_preprocessing(root):
    def fingerprint(label=1, **preprocessing):
        source = write(root, f"path,label\nrgb.png,{label}\n")
        return ManifestDataset(
            source, labels="label", preprocessing=Preprocessing(**preprocessing)
        ).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(label=2), fingerprint(mean=[0.5])}) == 3


def test_float_images_are_refused(root):
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "float.tiff")
    with pytest.raises(FastpieError, match="floats"):
        ManifestDataset(write(root, "path\nfloat.tiff\n"))[0]
