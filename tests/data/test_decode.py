"""Images that Pillow reads: values, bits, and files that are not what they should be."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastpie import FastpieError
from fastpie.data import Preprocessing, decode

GREY = Preprocessing(channels=1)
RGB = Preprocessing()


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, *, data=b"", bits=8, colour=0, extra=b""):
    """A PNG made by hand: Pillow writes no 16-bit RGB and no bombs."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("preprocessing", [GREY, RGB])
def test_eight_bits_stay_as_they_are(generator, kind, preprocessing):
    pixels = generator.integers(0, 256, (9, 11), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    array = decode(encoded(Image.fromarray(pixels), kind, **options), preprocessing)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.flags.writeable
    np.testing.assert_array_equal(array, np.stack([pixels] * preprocessing.channels))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_stay_as_they_are(generator, kind):
    pixels = generator.integers(0, 65536, (9, 11), dtype=np.uint16)
    array = decode(encoded(Image.fromarray(pixels), kind), GREY)
    assert array.dtype == np.uint16
    np.testing.assert_array_equal(array[0], pixels)


def test_big_endian_and_white_is_zero_tiff(generator):
    pixels = generator.integers(0, 65536, (9, 11), dtype=np.uint16)
    big = Image.frombytes("I;16B", (11, 9), pixels.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(encoded(big, "TIFF"), GREY)[0], pixels)
    white = encoded(Image.fromarray(pixels), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(white, GREY)[0], 65535 - pixels)


def test_colours_of_sixteen_bits_become_eight(generator):
    pixels = generator.integers(0, 65536, (5, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    array = decode(png(4, 5, data=rows, bits=16, colour=2), RGB)
    np.testing.assert_array_equal(array, np.moveaxis(pixels >> 8, -1, 0))


def test_palette_alpha_and_one_bit(generator):
    colours = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    palette = colours.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    expected = np.moveaxis(np.asarray(colours.quantize(16).convert("RGB")), -1, 0)
    np.testing.assert_array_equal(decode(encoded(palette), RGB), expected)
    alpha = colours.copy()
    alpha.putalpha(7)
    np.testing.assert_array_equal(
        decode(encoded(alpha), RGB), np.moveaxis(np.asarray(colours), -1, 0)
    )
    grey = colours.convert("L")
    both = grey.copy()
    both.putalpha(9)
    np.testing.assert_array_equal(decode(encoded(both), GREY)[0], np.asarray(grey))
    bits = Image.fromarray(generator.integers(0, 2, (8, 8), dtype=np.uint8).astype(bool))
    array = decode(encoded(bits), GREY)
    np.testing.assert_array_equal(array[0], np.asarray(bits) * np.uint8(255))


def test_cmyk_jpeg_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    array = decode(encoded(image, "JPEG", quality=100), RGB)
    assert array.shape == (3, 16, 16)
    assert array[0].min() > 240
    assert array[1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_the_orientation_of_exif_is_applied(generator, orientation, kind):
    image = Image.fromarray(generator.integers(0, 256, (6, 4), dtype=np.uint8).repeat(8, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode(content, GREY)[0], np.asarray(upright))
    assert (decode(content, GREY).shape == (1, 4, 48)) is (orientation > 4)


def test_broken_exif_says_nothing(generator):
    pixels = generator.integers(0, 256, (6, 4), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(decode(content, GREY)[0], pixels)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_resizing_is_bilinear_with_antialiasing(generator, deep, colour):
    pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    if deep:
        pixels = pixels[..., 0].astype(np.uint16) * 200
    image = Image.fromarray(pixels)
    preprocessing = Preprocessing(size=(17, 11), channels=3 if colour else 1)
    array = decode(encoded(image), preprocessing)
    assert array.shape == (preprocessing.channels, 17, 11)
    x = torch.from_numpy(pixels.astype(np.float32).reshape(40, 30, -1)).permute(2, 0, 1)
    if not colour and not deep:
        x = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32))[None]
    expected = torch.nn.functional.interpolate(
        x[None], (17, 11), mode="bilinear", antialias=True, align_corners=False
    )[0]
    off = np.abs(array.astype(np.float32) - expected.expand(array.shape).numpy())
    assert off.max() <= (0.51 if deep else 1)


def test_a_window_maps_its_ends_to_the_full_range():
    pixels = np.array([[0, 1000, 2000, 3000, 65535]], dtype=np.uint16)
    array = decode(encoded(Image.fromarray(pixels)), Preprocessing(channels=1, window=(1000, 3000)))
    np.testing.assert_array_equal(array[0, 0], [0, 0, 32768, 65535, 65535])
    small = np.array([[0, 50, 100, 150, 255]], dtype=np.uint8)
    array = decode(encoded(Image.fromarray(small)), Preprocessing(window=(50, 150)))
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array[:, 0], [[0, 0, 128, 255, 255]] * 3)


def test_values_without_a_known_range_need_a_window():
    values = np.array([[-1000.0, 0.0, np.nan, 1000.0]], dtype=np.float32)
    content = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(FastpieError, match=r"floats.*window"):
        decode(content, GREY)
    array = decode(content, Preprocessing(channels=1, window=(-1000, 1000)))
    np.testing.assert_array_equal(array[0, 0], [0, 32768, 0, 65535])
    signed = Image.fromarray(np.array([[-5, 70000]], dtype=np.int32))
    with pytest.raises(FastpieError, match=r"-5 to 70000.*window"):
        decode(encoded(signed, "TIFF"), GREY)


def test_frames_of_a_tiff():
    pages = [Image.new("L", (3, 2), value) for value in (10, 20, 30)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode(content, GREY).max() == 10
    assert decode(content, GREY, frame=2).min() == 30
    with pytest.raises(FastpieError, match="3 frames"):
        decode(content, GREY, frame=3)
    with pytest.raises(FastpieError, match="0 or more"):
        decode(content, GREY, frame=-1)


def test_paths_and_contents_give_the_same(generator, tmp_path):
    content = encoded(Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)))
    (tmp_path / "no suffix").write_bytes(content)
    np.testing.assert_array_equal(decode(tmp_path / "no suffix", RGB), decode(content, RGB))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000"])
def test_truncated_files_are_refused(generator, kind):
    content = encoded(
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind
    )
    for length in (len(content) // 2, 40):
        with pytest.raises((OSError, FastpieError)):
            decode(content[:length], RGB)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000"])
def test_garbage_in_a_file_raises_nothing_else(generator, kind):
    content = encoded(
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)), kind
    )
    for _ in range(40):
        broken = bytearray(content)
        for place in generator.integers(4, len(content), 6):
            broken[place] = generator.integers(256)
        try:
            array = decode(bytes(broken), Preprocessing(size=(8, 8), max_pixels=10_000))
        except (OSError, FastpieError):
            continue
        assert array.shape == (3, 8, 8)


def test_a_bomb_is_refused_by_its_header():
    bomb = png(60_000, 60_000)  # 3.6 billion pixels in 70 bytes
    with pytest.raises(FastpieError, match="max_pixels"):
        decode(bomb, GREY)
    with pytest.raises(FastpieError, match=r"at most 99 pixels.*has 100"):
        decode(encoded(Image.new("L", (10, 10))), Preprocessing(max_pixels=99))
    assert decode(encoded(Image.new("L", (10, 10))), Preprocessing(max_pixels=100)).shape[1] == 10


def test_larger_images_than_pillow_allows_are_read_where_the_user_does(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = encoded(Image.new("L", (100, 100)))
    with pytest.raises(FastpieError, match="max_pixels"):
        decode(content, Preprocessing(max_pixels=2000))
    assert decode(content, Preprocessing(max_pixels=10_000)).shape == (3, 100, 100)


def test_what_is_no_image_is_refused(tmp_path):
    for content, message in [(b"", "empty"), (b"not an image" * 99, "is none"), (b"x", "is none")]:
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(FastpieError, match=message):
            decode(tmp_path / "x.png", RGB)
    with pytest.raises(FastpieError, match="folder"):
        decode(tmp_path, RGB)
    with pytest.raises(OSError, match=r"none\.png"):
        decode(tmp_path / "none.png", RGB)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(FastpieError, match="is none"):  # would start Ghostscript
        decode(eps, RGB)


def test_an_image_is_no_volume():
    with pytest.raises(FastpieError, match="height, width"):
        decode(encoded(Image.new("L", (9, 9))), Preprocessing(size=(4, 4, 4)))
    with pytest.raises(FastpieError, match="no frame"):
        decode(encoded(Image.new("L", (9, 9))), Preprocessing(size=(4, 4, 4)), frame=1)


@pytest.mark.parametrize("size", [(6, 5), (4, 6, 5)])
def test_normalize_gives_the_same_bits_for_eight_and_sixteen_bits(size):
    preprocessing = Preprocessing(size=size, mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.3])
    images = torch.arange(256, dtype=torch.uint8).repeat(60)[: 9 * torch.Size(size).numel()]
    images = images.reshape(3, 3, *size)
    x = preprocessing.normalize(images)
    wide = torch.from_numpy(images.numpy().astype(np.uint16) * np.uint16(257))
    assert torch.equal(preprocessing.normalize(wide), x)
    constant = [
        torch.tensor(c).view(-1, *[1] * len(size)) for c in (preprocessing.mean, preprocessing.std)
    ]
    assert torch.equal(x, (images.float() / 255 - constant[0]) / constant[1])
    assert torch.equal(preprocessing.normalize(images[0]), x[0])


def test_normalize_takes_decoded_images_only():
    for images in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(FastpieError, match="decoded images"):
            RGB.normalize(images)


@pytest.mark.parametrize(
    "bad",
    [
        {"window": (1, 1)},
        {"window": (0, float("nan"))},
        {"size": (5,)},
        {"size": (2.5, 3)},
        {"max_pixels": 0},
    ],
)
def test_bad_preprocessing_is_refused(bad):
    with pytest.raises(FastpieError):
        Preprocessing(**bad)
