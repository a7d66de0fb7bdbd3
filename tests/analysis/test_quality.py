"""Planted bad images among generated ones: what is found, and what is called bad and is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fastpie
from fastpie import FastpieError
from fastpie.analysis import image_quality
from fastpie.analysis.duplicates import coefficients, first_alike
from fastpie.data import ManifestDataset, Preprocessing

COUNT, SIDE = 100, 64


def scene(rng, side=SIDE):
    """Texture with the spectrum of natural images, and a few shapes with edges; uint8 [H, W]."""
    f = np.fft.fftfreq(side)
    radius = np.hypot(*np.meshgrid(f, f))
    radius[0, 0] = 1
    noise = rng.normal(size=(side, side)) + 1j * rng.normal(size=(side, side))
    image = np.fft.ifft2(noise / radius**1.2).real
    image = image / image.std() * 0.12 + rng.normal(0.5, 0.06)
    y, x = np.mgrid[:side, :side]
    for _ in range(4):
        cy, cx = rng.uniform(0, side, 2)
        a, b = rng.uniform(8, side / 3, 2)
        image[((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1] += rng.uniform(-0.2, 0.2)
    image += rng.normal(0, 0.01, image.shape)
    return np.uint8(image.clip(0, 1) * 255)


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=quality)
    return np.asarray(Image.open(buffer))


def cropped(image):
    """2 % of each side less, at the old size."""
    side = image.shape[0]
    cut = max(1, round(0.01 * side))
    inner = Image.fromarray(image[cut : side - cut, cut : side - cut])
    return np.asarray(inner.resize((side, side), Image.Resampling.BILINEAR))


def noisy(rng, image):
    return np.uint8((image + rng.normal(0, 2.5, image.shape)).clip(0, 255))


class Images(Dataset):
    """`(image, 0, id)`; an exception in place of an image is raised."""

    def __init__(self, images, ids=None, transform=lambda x: torch.from_numpy(x)[None]):
        self.images, self.ids, self.transform = list(images), ids, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if isinstance(image, Exception):
            raise image
        image = self.transform(image)
        return (image, 0) if self.ids is None else (image, 0, self.ids[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [scene(rng) for _ in range(COUNT)]


def flagged(table, column):
    """Ids of the samples with a flag."""
    return {
        i for i, v in zip(*(table[c].to_pylist() for c in ("sample_id", column)), strict=True) if v
    }


def ids(numbers):
    return {f"{i:03d}" for i in numbers}


def quality(images, **options):
    names = [f"{i:03d}" for i in range(len(images))]
    return image_quality(Images(images, names, **options), progress=False)


FLAGS = ("dark", "bright", "blurred", "blank", "duplicate_of")


def test_clean_images_have_no_flag(scenes):
    table = quality(scenes)
    assert table.column_names == ["sample_id", "brightness", "contrast", "sharpness", *FLAGS]
    assert table["sample_id"].to_pylist() == sorted(ids(range(COUNT)))
    assert sum(len(flagged(table, flag)) for flag in FLAGS) <= 1


@pytest.mark.parametrize(
    ("flag", "spoil"),
    [
        ("dark", lambda rng, x: np.uint8(x * 0.35)),
        ("bright", lambda rng, x: np.uint8(255 - (255 - x) * 0.35)),
        ("blurred", lambda rng, x: ndimage.gaussian_filter(x, 3.0)),
        ("blurred", lambda rng, x: noisy(rng, ndimage.gaussian_filter(x, 3.0))),
        ("blank", lambda rng, x: np.full_like(x, rng.integers(0, 256))),
        ("blank", lambda rng, x: noisy(rng, np.full_like(x, rng.integers(20, 230)) * 0.9)),
    ],
)
def test_planted_images_are_found(scenes, flag, spoil):
    """Recall at least .9, and nobody else."""
    rng = np.random.default_rng(1)
    planted = range(5, COUNT, 10)
    table = quality([spoil(rng, x) if i in planted else x for i, x in enumerate(scenes)])
    found = flagged(table, flag)
    assert len(found & ids(planted)) >= 9
    assert len(found - ids(planted)) <= 1
    if flag == "blank":
        assert not (flagged(table, "blurred") | flagged(table, "duplicate_of")) & ids(planted)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x,
        lambda x: jpeg(x, 30),
        lambda x: np.uint8((x * 0.8 + 20).clip(0, 255)),
        lambda x: np.asarray(Image.fromarray(x).resize((48, 48), Image.Resampling.BICUBIC)),
        lambda x: jpeg(cropped(x), 80),
    ],
    ids=["same", "jpeg", "exposure", "smaller", "cropped"],
)
def test_copies_are_found(scenes, copy):
    """At least nine of ten, each with the original that it is a copy of, and no other pair."""
    table = quality([*scenes, *(copy(x) for x in scenes[:20])])
    expected = {f"{COUNT + i:03d}": f"{i:03d}" for i in range(20)}
    found = dict(zip(*(table[c].to_pylist() for c in ("sample_id", "duplicate_of")), strict=True))
    found = {i: original for i, original in found.items() if original is not None}
    assert found.items() <= expected.items()
    assert len(found) >= 18


def test_the_scale_of_intensities_does_not_matter(scenes):
    """8 bits, 12 of 16 bits, floats in [0, 1], normalised floats: the same flags, near brightness."""
    images = [np.uint8(x * 0.3) if i % 20 == 3 else x for i, x in enumerate(scenes)]
    forms = {
        "8 bit": lambda x: torch.from_numpy(x)[None],
        "12 bit": lambda x: (x.astype(np.uint16) * 16)[None],
        "16 bit": lambda x: torch.from_numpy(x.astype(np.uint16) * np.uint16(257)),
        "floats": lambda x: np.repeat(x[None] / 255, 3, 0),
        "normalised": lambda x: torch.from_numpy((x / 255 - 0.5) / 0.2)[None],
        "half": lambda x: torch.from_numpy(x / 255)[None].bfloat16(),
        "volume": lambda x: np.stack([x * 0, x, x * 0])[None],
        "pillow": Image.fromarray,
    }
    tables = {name: quality(images, transform=form) for name, form in forms.items()}
    for name, table in tables.items():
        dark = flagged(table, "dark")
        assert dark >= ids(range(3, COUNT, 20)), name
        assert len(dark) <= len(range(3, COUNT, 20)) + (name == "normalised"), name
        assert not flagged(table, "blurred"), name
        if name != "normalised":  # where black and white are is a guess there
            brightness = table["brightness"].to_numpy()
            np.testing.assert_allclose(brightness, tables["8 bit"]["brightness"], atol=0.02)
            np.testing.assert_allclose(table["sharpness"], tables["8 bit"]["sharpness"], rtol=0.05)


def test_figures_of_known_images():
    x = np.zeros((40, 40), np.uint8)
    x[:, 20:] = 200
    table = image_quality(Images([x, np.full((40, 40), 51, np.uint8)]), progress=False)
    assert table["sample_id"].to_pylist() == ["0", "1"]
    assert table["brightness"].to_pylist() == pytest.approx([100 / 255, 0.2])
    assert table["contrast"].to_pylist() == pytest.approx([100 / 255, 0])
    edges = ndimage.gaussian_laplace(x.astype(np.float64), 1.0)
    assert table["sharpness"].to_pylist() == [pytest.approx(edges.var() / 100**2, rel=1e-4), None]


def test_what_cannot_be_read_is_a_row_of_nulls(scenes):
    images = [*scenes[:30], OSError("gone"), np.full((9, 9), np.nan, np.float32), np.zeros((0, 4))]
    rows = {row.pop("sample_id"): row for row in quality(images).to_pylist()}
    assert rows.keys() == ids(range(30)) | {"#30", "031", "032"}
    for name, row in rows.items():
        assert set(row.values()) == {None} or name in ids(range(30))
        assert row["brightness"] is not None or name not in ids(range(30))


def test_ids_from_items_from_the_data_set_or_else_from_the_index(scenes):
    three = scenes[:3]
    data = Images([*three, OSError()], ids=["c", "a", "b", "d"])
    assert image_quality(data)["sample_id"].to_pylist() == ["#3", "a", "b", "c"]
    data.sample_ids = data.ids
    assert image_quality(data)["sample_id"].to_pylist() == ["a", "b", "c", "d"]
    assert image_quality(Images([*three, OSError()]))["sample_id"].to_pylist() == list("0123")


def test_workers_give_the_same(scenes):
    data = Images(scenes[:20], ids=[f"{i:02d}" for i in range(20)])
    loader = DataLoader(data, num_workers=2)
    assert image_quality(loader, progress=False).equals(image_quality(data, num_workers=0))


def test_an_empty_or_unordered_data_set_is_refused():
    with pytest.raises(FastpieError, match="empty"):
        image_quality(Images([]))
    with pytest.raises(
        FastpieError, match="of 2 samples none can be measured; the first: OSError: no"
    ):
        image_quality(Images([OSError("no"), OSError("neither")]))
    with pytest.raises(FastpieError, match="map-style"):
        image_quality(Stream())


# ---------------------------------------------------------------------- grouping


def brute(values):
    """Leaders in order: the first earlier leader that an image is alike to, without any index."""
    near = ((values > 0)[:, None] != (values > 0)).sum(-1) <= 7
    near &= (values[:, None] * values).sum(-1) >= 0.95
    return near


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_groups_are_those_of_all_pairs():
    """Firsts are never alike, everybody else is alike to somebody of the group, alone is alone."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(150, 64))
    values = unit(np.repeat(centres, 4, 0) + rng.normal(0, 0.12, (600, 64)))
    values = values[rng.permutation(600)]
    near = brute(values)
    first = first_alike(values)
    rows = np.arange(600)
    firsts = np.flatnonzero(first == rows)
    assert (first <= rows).all()
    assert (first[first] == first).all()
    assert (near[np.ix_(firsts, firsts)] == np.eye(len(firsts), dtype=bool)).all()
    for row in np.flatnonzero(first != rows):
        group = np.flatnonzero(first == first[row])
        assert near[row, group].sum() >= 2  # itself and another
    alone = near.sum(1) == 1
    assert (first[alone] == rows[alone]).all()
    assert 150 <= len(firsts) < 400


def test_a_large_group_and_images_without_structure():
    rng = np.random.default_rng(0)
    one = rng.normal(size=64)
    values = unit(one + rng.normal(0, 0.01, (5000, 64)))
    values[[7, 8]] = 0
    values[[9, 10]] = np.nan
    first = first_alike(values)
    assert first[7:11].tolist() == [7, 8, 9, 10]
    assert (np.delete(first, range(7, 11)) == 0).all()
    assert first_alike(np.empty((0, 64), np.float16)).shape == (0,)
    with pytest.raises(FastpieError, match=r"\[N, 64\]"):
        first_alike(values[:, :8])


def test_coefficients_do_not_see_exposure_or_size():
    image = scene(np.random.default_rng(3)).astype(np.float32)
    expected = coefficients(image)
    np.testing.assert_allclose(np.linalg.norm(expected), 1, rtol=1e-6)
    np.testing.assert_allclose(coefficients(image * 3 - 40), expected, atol=1e-5)
    twice = np.repeat(np.repeat(image, 2, 0), 2, 1)
    np.testing.assert_allclose(coefficients(twice), expected, atol=1e-5)
    assert not coefficients(np.full((50, 70), 0.3, np.float32)).any()


# ---------------------------------------------------------------------- of a run


def test_the_samples_of_a_run_in_its_order(scenes, tmp_path):
    """Also through a subset of another order; a sample that is not there any more has nulls."""
    images = [*scenes[:20], OSError("gone"), scenes[3]]
    data = Images(images, transform=lambda x: torch.from_numpy(x)[None] / 255)
    data.sample_ids = [f"s{i:02d}" for i in reversed(range(22))]
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 9, 8), torch.nn.Flatten(), torch.nn.Linear(147, 3)
    )
    dual = fastpie.DualModel(net, fastpie.prune(net, 0.5))
    run = fastpie.mine(
        dual, data, tmp_path, batch_size=11, backend="reference", recalibrate=False, progress=False
    )
    table = image_quality(data, run, progress=False)
    assert table["sample_id"].equals(run.table["sample_id"])
    assert len(table) == 21
    assert table["brightness"].null_count == 0
    row = data.sample_ids.index
    for sample_id, brightness in zip(
        *(table[c].to_pylist() for c in table.column_names[:2]), strict=True
    ):
        assert brightness == pytest.approx(images[row(sample_id)].mean() / 255)
    # sample_id order: the copy, s00, comes before its original, s18
    pairs = [(r["sample_id"], r["duplicate_of"]) for r in table.to_pylist() if r["duplicate_of"]]
    assert pairs == [("s18", "s00")]
    part = torch.utils.data.Subset(data, list(range(15))[::-1])
    fewer = image_quality(part, run, progress=False)
    assert fewer["brightness"].null_count == 21 - 15
    with pytest.raises(FastpieError, match="names no sample ids"):
        image_quality(Images(scenes[:5]), run)


def test_a_manifest_is_measured_before_normalisation(scenes, tmp_path):
    for i, image in enumerate(scenes[:12]):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    rows = "".join(f"{i:02d}.png,{i % 2}\n" for i in range(12))
    (tmp_path / "data.csv").write_text("path,label\n" + rows)
    shown = Preprocessing(channels=3, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    table = image_quality(
        ManifestDataset(tmp_path / "data.csv", labels="label", preprocessing=shown), progress=False
    )
    expected = [image.mean() / 255 for image in scenes[:12]]
    assert table["brightness"].to_pylist() == pytest.approx(expected, abs=1e-3)
