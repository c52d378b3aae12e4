from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing, get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from xfed.client import decode as decode_module
from xfed.client.decode import apply_window, decode, decode_image
from xfed.common.errors import DataError, XfedError

RAMP = np.tile(np.arange(64, dtype=np.uint16), (64, 1))


def write_dicom(
    path: Path, stored: np.ndarray, *, bits: int = 16, kind: str = "MONOCHROME2", rle: bool = False, **elements: object
) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID = "Doe^Jane", "SECRET-4711"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, kind
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    for name, value in elements.items():
        setattr(ds, name, value)
    if rle:
        ds.compress(RLELossless)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_8_bit_png_is_kept_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", 32), pixels)


def test_reducing_by_whole_factors_keeps_the_mean_and_does_not_alias(tmp_path: Path) -> None:
    checks = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "a.png")
    small = decode_image(tmp_path / "a.png", 32)
    assert np.abs(small.astype(int) - 127).max() <= 2  # nearest-neighbour sampling would give 0 or 255


def test_16_bit_png_equals_8_bit_png_of_the_same_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 80), dtype=np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(np.rint(pixels * (4095 / 255)).astype(np.uint16)).save(tmp_path / "12in16.png")
    eight = decode_image(tmp_path / "8.png", 32).astype(int)
    assert np.abs(decode_image(tmp_path / "16.png", 32).astype(int) - eight).max() <= 1
    assert np.abs(decode_image(tmp_path / "12in16.png", 32).astype(int) - eight).max() <= 1


@pytest.mark.parametrize(("shape", "axis"), [((64, 32), 1), ((32, 64), 0)])
def test_padding_is_black_and_centred(tmp_path: Path, shape: tuple[int, int], axis: int) -> None:
    Image.fromarray(np.full(shape, 200, dtype=np.uint8)).save(tmp_path / "a.png")
    result = decode(tmp_path / "a.png", 64)
    lines = np.moveaxis(result.pixels, axis, 0)
    assert (result.height, result.width) == shape
    assert (lines[:16] == 0).all()
    assert (lines[48:] == 0).all()
    assert (lines[16:48] == 200).all()


def test_colour_modes_become_luminance(tmp_path: Path) -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    image = Image.fromarray(grey)
    clear = image.convert("RGBA")
    clear.putpixel((63, 0), (255, 255, 255, 0))
    for name, other in {
        "rgb": image.convert("RGB"),
        "la": image.convert("LA"),
        "rgba": image.convert("RGBA"),
        "p": image.convert("P"),
    }.items():
        other.save(tmp_path / f"{name}.png")
        assert np.array_equal(decode_image(tmp_path / f"{name}.png", 64), grey), name
    clear.save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png", 64)[0, 63] == 0  # transparent is outside the picture
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    red.save(tmp_path / "red.png")
    assert decode_image(tmp_path / "red.png", 32)[0, 0] == 76  # ITU-R 601: 0.299 * 255
    Image.fromarray(grey > 100).save(tmp_path / "1.png")
    assert set(np.unique(decode_image(tmp_path / "1.png", 64))) == {0, 255}


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:32] = 240  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: above comes to the right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = decode_image(tmp_path / "a.jpg", 64)
    assert shown[:, 40:].min() > 200
    assert shown[:, :24].max() < 40


def test_damaged_files_are_data_errors_that_name_the_file(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError, match=f"cut-{name}"):
            decode_image(tmp_path / f"cut-{name}", 32)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "noext").write_text("no picture either, but long enough to be looked at " * 9)
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    for name in ("empty.png", "text.png", "noext", "a.gif", "absent.png"):
        with pytest.raises(DataError, match=name):
            decode_image(tmp_path / name, 32)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(decode_module, "PIXEL_LIMIT", 400 * 400)
    decode_image(tmp_path / "a.png", 32)
    monkeypatch.setattr(decode_module, "PIXEL_LIMIT", 400 * 400 - 1)
    with pytest.raises(DataError, match="400 x 400 pixels"):
        decode_image(tmp_path / "a.png", 32)
    write_dicom(tmp_path / "a.dcm", np.zeros((400, 400), np.uint16))
    with pytest.raises(DataError, match="400 x 400 pixels"):
        decode_image(tmp_path / "a.dcm", 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png"):
        decode_image(tmp_path / "a.png", 32)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16)])
def test_dicom_window_by_closed_form(tmp_path: Path, dtype: type, bits: int) -> None:
    stored = RAMP.astype(dtype)
    path = write_dicom(tmp_path / "a.dcm", stored, bits=bits, WindowCenter=32, WindowWidth=64)
    expected = np.clip((RAMP - 31.5) / 63 + 0.5, 0, 1) * 255
    assert np.array_equal(decode_image(path, 64), np.rint(expected.astype(np.float32)))
    inverted = write_dicom(tmp_path / "b.dcm", stored, bits=bits, kind="MONOCHROME1", WindowCenter=32, WindowWidth=64)
    total = decode_image(path, 64).astype(int) + decode_image(inverted, 64)
    assert np.abs(total - 255).max() <= 1


@given(
    center=st.floats(-500, 500),
    width=st.floats(2, 1000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
@settings(deadline=None, max_examples=60)
def test_window_agrees_with_pydicom(center: float, width: float, function: str) -> None:
    values = np.linspace(-1000, 1000, 101)
    ds = Dataset()
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = "MONOCHROME2", 12, 0
    # DS elements hold 16 characters
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = f"{center:.4f}", f"{width:.4f}", function
    with np.errstate(over="ignore"):
        theirs = apply_windowing(values, ds) / 4095
    ours = apply_window(values, center=float(ds.WindowCenter), width=float(ds.WindowWidth), function=function)
    assert np.allclose(ours, theirs, atol=1e-9)


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    plain = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=32, WindowWidth=64)
    scaled = write_dicom(
        tmp_path / "b.dcm",
        RAMP,
        RescaleSlope=2,
        RescaleIntercept=-1000,
        WindowCenter=2 * 31.5 - 1000 + 0.5,
        WindowWidth=2 * 63 + 1,
    )
    assert np.array_equal(decode_image(plain, 64), decode_image(scaled, 64))


def test_signed_pixels_and_first_of_several_windows(tmp_path: Path) -> None:
    signed = (RAMP.astype(np.int16) - 32).astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", signed, bits=12, WindowCenter=[0, 500], WindowWidth=[64, 1])
    plain = write_dicom(tmp_path / "b.dcm", RAMP, WindowCenter=32, WindowWidth=64)
    assert np.array_equal(decode_image(path, 64), decode_image(plain, 64))


def test_bits_above_bits_stored_are_dropped(tmp_path: Path) -> None:
    overlay = RAMP | (np.eye(64, dtype=np.uint16) << 15)
    path = write_dicom(tmp_path / "a.dcm", overlay, bits=12, WindowCenter=32, WindowWidth=64)
    plain = write_dicom(tmp_path / "b.dcm", RAMP, bits=12, WindowCenter=32, WindowWidth=64)
    assert np.array_equal(decode_image(path, 64), decode_image(plain, 64))
    signed = ((RAMP.astype(np.int16) - 32) & 0x0FFF).astype(np.int16)  # the sign is in bit 11, not extended
    unextended = write_dicom(tmp_path / "c.dcm", signed, bits=12, WindowCenter=0, WindowWidth=64)
    assert np.array_equal(decode_image(unextended, 64), decode_image(plain, 64))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_value_is_black_and_does_not_stretch_the_contrast(tmp_path: Path, kind: str) -> None:
    signed = RAMP.astype(np.int16) + 100
    padded = signed.copy()
    padded[:8] = -2000
    path = write_dicom(tmp_path / "a.dcm", padded, kind=kind, PixelPaddingValue=-2000)
    plain = write_dicom(tmp_path / "b.dcm", signed, kind=kind)
    assert (decode_image(path, 64)[:8] == 0).all()
    assert np.array_equal(decode_image(path, 64)[8:], decode_image(plain, 64)[8:])


def test_without_a_window_the_1st_to_99th_percentile_is_shown(tmp_path: Path) -> None:
    stored = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    shown = decode_image(write_dicom(tmp_path / "a.dcm", stored), 100).astype(int)
    low, high = np.percentile(stored, [1, 99])
    assert np.abs(shown - np.clip((stored - low) / (high - low), 0, 1) * 255).max() <= 0.51
    constant = write_dicom(tmp_path / "b.dcm", np.full((64, 64), 7, np.uint16), WindowCenter=5, WindowWidth=0)
    assert (decode_image(constant, 64) == 0).all()


def test_voi_lut_is_applied_and_precedes_the_window(tmp_path: Path) -> None:
    item = Dataset()
    item.LUTDescriptor = [64, 0, 16]
    item.LUTData = [int((i / 63) ** 2 * 65535) for i in range(64)]
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    path = write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=Sequence([item]), WindowCenter=1, WindowWidth=2)
    assert np.abs(decode_image(path, 64).astype(float) - (RAMP / 63.0) ** 2 * 255).max() <= 0.51


def test_rle_equals_uncompressed(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (70, 50), dtype=np.uint16)
    plain = write_dicom(tmp_path / "a.dcm", stored, bits=12)
    packed = write_dicom(tmp_path / "b.dcm", stored, bits=12, rle=True)
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(decode_image(plain, 32), decode_image(packed, 32))


@pytest.mark.skipif(not get_decoder(JPEGBaseline8Bit).is_available, reason="no JPEG decoder installed")
def test_jpeg_baseline(tmp_path: Path) -> None:
    grey = (RAMP * 4).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.jpg", quality=98)
    ds = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", grey, bits=8, WindowCenter=128, WindowWidth=256))
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = encapsulate([(tmp_path / "a.jpg").read_bytes()])
    ds.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert np.abs(decode_image(tmp_path / "b.dcm", 64).astype(int) - grey).max() <= 6


def test_a_syntax_without_decoder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", RAMP))
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    ds.save_as(tmp_path / "b.dcm", enforce_file_format=True)

    class Absent:
        is_available = False

    monkeypatch.setattr(decode_module, "get_decoder", lambda syntax: Absent())
    with pytest.raises(DataError, match=r"JPEG-LS Lossless.*1\.2\.840.*pip install 'xfed\[dicom\]'"):
        decode_image(tmp_path / "b.dcm", 32)


def test_dicom_is_found_by_content_and_without_preamble(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=32, WindowWidth=64)
    expected = decode_image(path, 64)
    (tmp_path / "misnamed.png").write_bytes(path.read_bytes())
    assert np.array_equal(decode_image(tmp_path / "misnamed.png", 64), expected)
    ds = pydicom.dcmread(path)
    bare = Dataset()
    bare.update({e.tag: e for e in ds if e.tag.group != 2})
    bare.save_as(tmp_path / "IM0001", implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert np.array_equal(decode_image(tmp_path / "IM0001", 64), expected)


def test_colour_multi_frame_and_wide_pixels_are_refused(tmp_path: Path) -> None:
    frames = np.zeros((2, 8, 8), np.uint16)
    with pytest.raises(DataError, match=r"m\.dcm.*multi-frame.*2 frames"):
        decode_image(write_dicom(tmp_path / "m.dcm", frames, NumberOfFrames=2), 32)
    colour = write_dicom(
        tmp_path / "c.dcm", np.zeros((8, 24), np.uint8), bits=8, SamplesPerPixel=3, kind="RGB", Columns=8
    )
    with pytest.raises(DataError, match="colour"):
        decode_image(colour, 32)
    with pytest.raises(DataError, match="32 bits"):
        decode_image(write_dicom(tmp_path / "w.dcm", np.zeros((8, 8), np.uint32), bits=32), 32)
    side = write_dicom(tmp_path / "s.dcm", RAMP, ViewPosition="LL")
    assert decode(side, 32).lateral
    assert not decode(write_dicom(tmp_path / "p.dcm", RAMP, ViewPosition="PA"), 32).lateral


@given(data=st.binary(max_size=400), start=st.sampled_from(["png", "dcm", "jpg", ""]), cut=st.integers(0, 3000))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_damage_never_raises_anything_but_xfed_errors(tmp_path: Path, data: bytes, start: str, cut: int) -> None:
    path = tmp_path / "fuzz"
    whole = b""
    if start == "dcm":
        whole = write_dicom(path, RAMP, bits=12).read_bytes()
    elif start:
        Image.fromarray((RAMP * 4).astype(np.uint8)).save(path, format={"png": "PNG", "jpg": "JPEG"}[start])
        whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    try:
        pixels = decode_image(path, 32)
    except XfedError as error:
        message = str(error)
    else:
        message = path.name
        assert pixels.shape == (32, 32)
        assert pixels.dtype == np.uint8
    assert "fuzz" in message
