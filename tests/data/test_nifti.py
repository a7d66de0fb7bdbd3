"""NIfTI volumes as nibabel writes them."""

import gzip

import nibabel
import numpy as np
import pytest
import torch

from fastpie import FastpieError
from fastpie.data import Preprocessing, decode

# [x, y, z] of RAS: to the patient's right, to the front, to the head.
VALUES = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) * 10 - 100


def content(values=VALUES, *, affine=None, slope=None, kind=nibabel.Nifti1Image, **header):
    image = kind(values, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    if slope is not None:
        image.header.set_slope_inter(*slope)
    return image.to_bytes()


def shown(values):
    """[x, y, z] of RAS as rows and columns of an axial slice in DICOM."""
    return values.transpose(2, 1, 0)[:, ::-1, ::-1]


def scaled(values, low, high):
    return np.rint((np.clip(values, low, high).astype(np.float64) - low) / (high - low) * 65535)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_slice_in_the_window(tmp_path, kind, zipped):
    data = content(kind=kind)
    path = tmp_path / ("x.nii.gz" if zipped else "x.nii")
    path.write_bytes(gzip.compress(data) if zipped else data)
    preprocessing = Preprocessing(channels=1, window=(-50, 700))
    for frame in (0, 5):
        array = decode(path, preprocessing, frame)
        assert array.dtype == np.uint16
        np.testing.assert_allclose(array[0], scaled(shown(VALUES)[frame], -50, 700), atol=1)
        np.testing.assert_array_equal(decode(path.read_bytes(), preprocessing, frame), array)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "PIR", "ALI"])
def test_every_orientation_gives_the_same(codes):
    window = Preprocessing(channels=1, window=(-100, 1100))
    original = nibabel.Nifti1Image(VALUES, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = original.as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.io_orientation(original.affine), nibabel.orientations.axcodes2ornt(codes)
        )
    )
    for frame in (1, 4):
        np.testing.assert_array_equal(
            decode(turned.to_bytes(), window, frame), decode(original.to_bytes(), window, frame)
        )
    whole = Preprocessing(channels=1, size=(6, 5, 4))
    np.testing.assert_array_equal(
        decode(turned.to_bytes(), whole), decode(original.to_bytes(), whole)
    )


def test_slope_and_intercept_come_before_the_window():
    array = decode(content(slope=(2.0, -24)), Preprocessing(channels=1, window=(-100, 900)), 3)
    np.testing.assert_allclose(array[0], scaled(shown(VALUES * 2.0 - 24)[3], -100, 900), atol=1)


def test_the_window_is_that_of_the_header_or_the_range_of_the_volume():
    grey = Preprocessing(channels=1)
    array = decode(content(cal_min=0, cal_max=500), grey, 2)
    np.testing.assert_allclose(array[0], scaled(shown(VALUES)[2], 0, 500), atol=1)
    array = decode(content(), grey, 2)
    np.testing.assert_allclose(
        array[0], scaled(shown(VALUES)[2], VALUES.min(), VALUES.max()), atol=1
    )


def test_volumes_are_resampled():
    preprocessing = Preprocessing(channels=3, size=(3, 7, 9))
    array = decode(content(), preprocessing)
    assert array.shape == (3, 3, 7, 9)
    x = scaled(shown(VALUES), VALUES.min(), VALUES.max())
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None, None], (3, 7, 9), mode="trilinear", align_corners=False
    )
    assert np.abs(array[1] - expected[0, 0].numpy()).max() <= 1


def test_eight_bits_give_eight_bits():
    values = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    array = decode(content(values), Preprocessing(channels=1, window=(0, 255)), 1)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array[0], shown(values)[1])


def test_what_is_not_finite_is_black_or_white():
    values = VALUES.astype(np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, np.inf, -np.inf
    array = decode(content(values), Preprocessing(channels=1), 0)
    np.testing.assert_array_equal(array[0, -1, ::-1][:3], [0, 65535, 0])
    with pytest.raises(FastpieError, match="finite"):
        decode(content(np.full((3, 3, 3), np.nan, np.float32)), Preprocessing(), 0)
    assert decode(content(np.full((3, 3, 3), 7, np.int16)), Preprocessing(), 0).max() == 0


def test_one_slice_needs_no_frame():
    for values in (VALUES[:, :, :1], VALUES[:, :, 0], VALUES[:, :, :1, None]):
        array = decode(content(values), Preprocessing(channels=1, window=(-100, 1100)))
        np.testing.assert_allclose(array[0], scaled(shown(VALUES)[0], -100, 1100), atol=1)
    coronal = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    assert decode(content(VALUES[:, :, 0], affine=coronal), Preprocessing()).shape == (3, 5, 4)


@pytest.mark.parametrize(
    ("data", "frame", "message"),
    [
        (content(), None, "holds 6.*frame"),
        (content(), 6, "6 slices"),
        (content(np.zeros((3, 3, 3, 2), np.int16)), 0, "three dimensions"),
        (content(np.zeros((3, 3, 3), np.complex64)), 0, "numbers"),
        (content(np.zeros((300, 300, 300), np.uint8)), 0, "max_pixels"),
        (gzip.compress(b"something else" * 99), 0, "one piece"),
    ],
)
def test_what_cannot_be_read_says_why(data, frame, message):
    with pytest.raises(FastpieError, match=message):
        decode(data, Preprocessing(max_pixels=1_000_000), frame)


def test_a_bomb_is_refused_before_its_voxels_are_read():
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((30000, 30000, 30000))
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    with pytest.raises(FastpieError, match="max_pixels"):
        decode(gzip.compress(header.binaryblock + b"\0" * 4), Preprocessing(size=(8, 8, 8)))


def test_an_affine_without_an_axis_is_refused():
    image = nibabel.Nifti1Image(VALUES, None)
    image.header["sform_code"], image.header["srow_x"] = 1, 0
    image.header["srow_y"], image.header["srow_z"] = [0, 1, 0, 0], [0, 0, 1, 0]
    with pytest.raises(FastpieError, match="affine"):
        decode(image.to_bytes(), Preprocessing(), 0)


def test_truncated_and_damaged_files_are_refused():
    generator = np.random.default_rng(0)
    data = content()
    for cut in (data[:400], data[:200], gzip.compress(data)[:-30], gzip.compress(data)[:40]):
        for preprocessing, frame in ((Preprocessing(size=(6, 5, 4)), None), (Preprocessing(), 5)):
            with pytest.raises((OSError, FastpieError)):
                decode(cut, preprocessing, frame)
    for _ in range(30):
        broken = bytearray(data)
        for place in generator.integers(0, 352, 4):
            broken[place] = generator.integers(256)
        try:
            decode(bytes(broken), Preprocessing(max_pixels=10_000, size=(4, 4, 4)))
        except (OSError, FastpieError):
            continue


def test_without_nibabel_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(FastpieError, match=r"fastpie\[medical\]"):
        decode(content(), Preprocessing(), 0)
