"""DICOM files as pydicom writes them: every road from stored values to what is shown."""

import io
import sys

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from fastpie import FastpieError
from fastpie.data import Preprocessing, decode

GREY = Preprocessing(channels=1)


def dataset(pixels, *, bits=None, syntax=ExplicitVRLittleEndian, **elements):
    """A DICOM data set of [H, W], [H, W, 3] or [F, H, W] values."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    return data


def written(data, **options):
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True, **options)
    return buffer.getvalue()


def scaled(values, low, high, maximum=65535):
    x = (np.clip(values.astype(np.float64), low, high) - low) / (high - low)
    return np.rint(x * maximum)


@pytest.fixture
def deep():
    return np.random.default_rng(0).integers(0, 4096, (7, 9), dtype=np.uint16)


def check(array, expected, off=1):
    """Rounding alone is left open: the window is computed in fp32 or fp64."""
    assert array.shape == (1, *expected.shape)
    assert np.abs(array[0].astype(np.int64) - expected).max() <= off


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_stored_bits_fill_the_range(bits):
    pixels = np.arange(2**bits, dtype=np.uint8 if bits == 8 else np.uint16).reshape(2, -1)
    array = decode(written(dataset(pixels, bits=bits)), GREY)
    assert array.dtype == (np.uint8 if bits == 8 else np.uint16)
    check(
        array,
        scaled(pixels, 0, 2**bits - 1, 255 if bits == 8 else 65535),
        off=0 if bits == 8 else 1,
    )


def test_signed_values(deep):
    signed = (deep.astype(np.int16) - 2048).astype(np.int16)
    check(decode(written(dataset(signed, bits=12)), GREY), scaled(signed, -2048, 2047))
    full = np.array([[-32768, -1, 0, 32767]], dtype=np.int16)
    check(decode(written(dataset(full)), GREY), scaled(full, -32768, 32767))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_the_window_of_the_file(deep, function):
    data = dataset(
        deep,
        bits=12,
        RescaleSlope=2,
        RescaleIntercept=-1000,
        WindowCenter=[40, 9],
        WindowWidth=[400, 5],
    )
    if function:
        data.VOILUTFunction = function
    hu = deep * 2.0 - 1000
    expected = {  # PS3.3 C.11.2.1.2 and C.11.2.1.3
        "LINEAR": (hu - 39.5) / 399 + 0.5,
        "LINEAR_EXACT": (hu - 40) / 400 + 0.5,
        "SIGMOID": 1 / (1 + np.exp(-4 * (hu - 40) / 400)),
    }[function or "LINEAR"]
    check(decode(written(data), GREY), np.rint(np.clip(expected, 0, 1) * 65535))


@pytest.mark.parametrize("slope", [1, -1, 0.5])
def test_a_window_given_is_in_hounsfield_units(deep, slope):
    data = dataset(
        deep, bits=12, RescaleSlope=slope, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400
    )
    array = decode(written(data), Preprocessing(channels=1, window=(-600, 1400)))
    check(array, scaled(deep * float(slope) - 1024, -600, 1400))
    del data.WindowCenter
    ends = sorted([-1024, 4095 * slope - 1024])
    check(decode(written(data), GREY), scaled(deep * float(slope) - 1024, *ends))


def test_monochrome1_is_inverted(deep):
    plain = dataset(deep, bits=12, WindowCenter=2000, WindowWidth=1000)
    inverted = dataset(
        deep, bits=12, WindowCenter=2000, WindowWidth=1000, PhotometricInterpretation="MONOCHROME1"
    )
    check(decode(written(inverted), GREY), 65535 - decode(written(plain), GREY)[0].astype(np.int64))
    window = Preprocessing(channels=1, window=(0, 4095))
    check(decode(written(inverted), window), 65535 - scaled(deep, 0, 4095))


def lut(entries, first, bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", list(map(int, entries)))
    return item


def test_lookup_tables(deep):
    curve = (np.linspace(0, 1, 4096) ** 2 * 1023).astype(int)
    data = dataset(deep, bits=12, VOILUTSequence=[lut(curve, 0, 10)], WindowCenter=1, WindowWidth=2)
    check(decode(written(data), GREY), scaled(curve[deep], 0, 1023))
    data = dataset(
        deep, bits=12, ModalityLUTSequence=[lut(curve[::-1], 0, 16)], ModalityLUTType="US"
    )
    data.ModalityLUTSequence[0].ModalityLUTType = "US"
    check(decode(written(data), GREY), scaled(curve[::-1][deep], 0, 65535))
    check(
        decode(written(data), Preprocessing(channels=1, window=(100, 700))),
        scaled(curve[::-1][deep], 100, 700),
    )


def test_palettes_and_colours():
    generator = np.random.default_rng(0)
    index = generator.integers(0, 256, (6, 5), dtype=np.uint8)
    tables = generator.integers(0, 256, (3, 256), dtype=np.uint8)
    data = dataset(index, PhotometricInterpretation="PALETTE COLOR")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(data, f"{name}PaletteColorLookupTableData", table.tobytes())
    np.testing.assert_array_equal(decode(written(data), Preprocessing()), tables[:, index])
    rgb = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        decode(written(dataset(rgb)), Preprocessing()), np.moveaxis(rgb, -1, 0)
    )
    planar = dataset(rgb, PlanarConfiguration=1)
    planar.PixelData = np.moveaxis(rgb, -1, 0).tobytes()
    np.testing.assert_array_equal(decode(written(planar), Preprocessing()), np.moveaxis(rgb, -1, 0))
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    array = decode(written(dataset(ybr, PhotometricInterpretation="YBR_FULL")), Preprocessing())
    assert np.abs(array.astype(int) - np.moveaxis(rgb, -1, 0)).max() <= 2
    wide = (rgb.astype(np.uint16) * 16).astype(np.uint16)
    array = decode(written(dataset(wide, bits=12)), Preprocessing())
    assert array.dtype == np.uint16
    np.testing.assert_allclose(array, np.moveaxis(scaled(wide, 0, 4095), -1, 0), atol=1)
    grey = decode(written(dataset(rgb)), GREY)[0]
    np.testing.assert_array_equal(grey, np.asarray(Image.fromarray(rgb).convert("L")))


def test_frames_and_volumes(deep):
    frames = np.stack([deep, deep[::-1], deep // 2, deep * 0])
    content = written(dataset(frames, bits=12))
    for frame in (0, 3):
        check(decode(content, GREY, frame), scaled(frames[frame], 0, 4095))
    with pytest.raises(FastpieError, match=r"holds 4.*frame"):
        decode(content, GREY)
    with pytest.raises(FastpieError, match="4 frames"):
        decode(content, GREY, 4)
    array = decode(content, Preprocessing(channels=1, size=(2, 7, 5)))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(scaled(frames, 0, 4095))[None, None], (2, 7, 5), mode="trilinear"
    )
    check(array, np.rint(expected[0, 0].numpy()))
    with pytest.raises(FastpieError, match="multi-frame"):
        decode(written(dataset(deep)), Preprocessing(size=(2, 7, 5)))


def test_enhanced_objects_have_a_window_for_each_frame(deep):
    data = dataset(np.stack([deep, deep]), bits=12)
    shared, window = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth, window.VOILUTFunction = 1000, 2000, "LINEAR_EXACT"
    shared.FrameVOILUTSequence = [window]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = []
    for slope in (1, 3):
        frame, transformation = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -10
        transformation.RescaleType = "US"
        frame.PixelValueTransformationSequence = [transformation]
        data.PerFrameFunctionalGroupsSequence.append(frame)
    for frame, slope in enumerate((1, 3)):
        check(decode(written(data), GREY, frame), scaled(deep * slope - 10.0, 0, 2000))


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
def test_lossless_compression(deep, syntax, bits, tmp_path):
    pixels = np.tile(deep, (10, 8))  # encoders want more than a few pixels
    pixels = (pixels >> 4).astype(np.uint8) if bits == 8 else pixels
    data = dataset(pixels, bits=bits)
    if syntax == RLELossless:
        data.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == JPEG2000Lossless:
        data.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    else:
        content = gdcm_compressed(written(data), syntax, tmp_path)
        check(decode(content, GREY), scaled(pixels, 0, 2**bits - 1, 255 if bits == 8 else 65535))
        return
    check(decode(written(data), GREY), scaled(pixels, 0, 2**bits - 1, 255 if bits == 8 else 65535))


def gdcm_compressed(content, syntax, folder):
    """The two syntaxes that only GDCM writes."""
    import gdcm

    (folder / "plain.dcm").write_bytes(content)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    kinds = {JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless}
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(
        gdcm.TransferSyntax(kinds.get(syntax, gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    )
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "small.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "small.dcm").read_bytes()


@pytest.mark.parametrize("colour", [False, True])
def test_baseline_jpeg(colour):
    ramp = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    pixels = np.stack([ramp, ramp.T, 255 - ramp], -1) if colour else ramp
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    data = dataset(pixels, syntax=JPEGBaseline8Bit)
    if colour:
        data.PhotometricInterpretation = "YBR_FULL"
    data.PixelData = encapsulate([buffer.getvalue()])
    data["PixelData"].is_undefined_length = True
    array = decode(written(data), Preprocessing(channels=3 if colour else 1))
    assert np.abs(array.astype(int) - np.moveaxis(np.atleast_3d(pixels), -1, 0)).max() <= 8


@pytest.mark.parametrize("implicit", [False, True])
def test_files_without_a_preamble(deep, implicit, tmp_path):
    data = dataset(deep, bits=12, PatientID="x")
    data.file_meta = FileMetaDataset()
    buffer = io.BytesIO()
    data.save_as(buffer, implicit_vr=implicit, little_endian=True)
    content = buffer.getvalue()
    assert content[128:132] != b"DICM"
    check(decode(content, GREY), scaled(deep, 0, 4095))
    (tmp_path / "old.dcm").write_bytes(content)
    check(decode(tmp_path / "old.dcm", GREY), scaled(deep, 0, 4095))


def test_dicom_is_told_by_its_content(deep, tmp_path):
    (tmp_path / "IM0001").write_bytes(written(dataset(deep, bits=12)))
    check(decode(tmp_path / "IM0001", GREY), scaled(deep, 0, 4095))


def test_floats_need_a_window():
    data = dataset(np.zeros((2, 2), np.uint16), syntax=ImplicitVRLittleEndian)
    for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        del data[keyword]
    data.BitsAllocated = 32
    data.FloatPixelData = np.array([0, 0.25, 1, np.nan], np.float32).tobytes()
    with pytest.raises(FastpieError, match=r"floats.*window"):
        decode(written(data), GREY)
    array = decode(written(data), Preprocessing(channels=1, window=(0, 1)))
    check(array, np.array([[0, 16384], [65535, 0]]))


def test_what_holds_no_pixels_is_refused(deep, tmp_path):
    data = dataset(deep)
    del data.PixelData
    with pytest.raises(FastpieError, match="no PixelData"):
        decode(written(data), GREY)
    (tmp_path / "x.dcm").write_bytes(b"no DICOM at all" * 30)
    with pytest.raises(FastpieError, match=r"x\.dcm"):
        decode(tmp_path / "x.dcm", GREY)


def test_a_bomb_is_refused_by_its_header(deep):
    data = dataset(deep, Rows=60000, Columns=60000)
    with pytest.raises(FastpieError, match="max_pixels"):
        decode(written(data), GREY)
    frames = dataset(np.stack([deep] * 3), NumberOfFrames=10**8)
    with pytest.raises(FastpieError, match="max_pixels"):
        decode(written(frames), Preprocessing(size=(2, 2, 2)))


def test_truncated_and_damaged_files_are_refused(deep):
    plain = written(dataset(deep, bits=12))
    compressed = dataset(np.tile(deep, (9, 9)), bits=12)
    compressed.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    compressed = written(compressed)
    for content in (plain, compressed):
        for length in (len(content) - 40, len(content) // 2, 200, 132):
            with pytest.raises((FastpieError, OSError)):
                decode(content[:length], GREY)
    generator = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(plain)
        for place in generator.integers(132, len(plain), 5):
            broken[place] = generator.integers(256)
        try:
            decode(bytes(broken), Preprocessing(channels=1, max_pixels=10_000))
        except (FastpieError, OSError):
            continue


def test_a_missing_decoder_names_the_extra(deep, monkeypatch):
    data = dataset(np.tile(deep, (10, 8)), bits=12)
    data.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    content = written(data)
    decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(FastpieError, match=r"JPEG 2000.*fastpie\[medical\]"):
        decode(content, GREY)


def test_without_pydicom_the_extra_is_named(deep, monkeypatch):
    content = written(dataset(deep))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(FastpieError, match=r"fastpie\[medical\]"):
        decode(content, GREY)
