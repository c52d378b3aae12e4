"""One image file becomes one grey square of pixels; nothing else of the file is kept.

::

    PNG, JPEG --(Pillow: orientation, luminance, 8 bits)-----------------+
                                                                         +--> pad to a square --> shrink
    DICOM --(pydicom: rescale, VOI LUT or window, MONOCHROME1 inverted)--+

The kind is found from the content; the name only lets a DICOM file without its preamble be tried.
Every fault of a file, whatever it is, is a `DataError` that names the file. A file that says it is synthetic is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image, ImageOps
from pydicom.pixels import apply_modality_lut, apply_voi, get_decoder

from xfed.common.errors import DataError
from xfed.common.synthetic_mark import says_synthetic

__all__ = ["PIXEL_LIMIT", "Decoded", "apply_window", "decode", "decode_image"]

PIXEL_LIMIT = 100_000_000
"""Largest image that is decoded, in pixels; a larger one is taken for a decompression bomb."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_SYNTHETIC = "it says that it is a synthetic image, not a patient's: it must not get between patients' images"
_LATERAL = {"LL", "RL", "LATERAL"}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """`pixels` uint8 [size, size]; the original's `height` and `width`; `lateral`: the header says side view."""

    pixels: npt.NDArray[np.uint8]
    height: int
    width: int
    lateral: bool = False


def decode_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Grey pixels of one PNG, JPEG or DICOM file, uint8 [size, size], 0 = black. Raises `DataError`."""
    return decode(path, size).pixels


def decode(path: Path, size: int) -> Decoded:
    """Like `decode_image`, with the original's size. Raises `DataError` naming the file and the fault."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
        if head.startswith((_PNG, _JPEG)):
            grey, lateral = _raster(path), False
        elif head[128:132] == b"DICM" or path.suffix.lower() in {".dcm", ".dicom", ""}:
            grey, lateral = _dicom(path)
        else:
            raise DataError("it is neither PNG, JPEG nor DICOM")
        width, height = grey.size
        return Decoded(pixels=_shrink(grey, size), height=height, width=width, lateral=lateral)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory to decode it") from error
    except Exception as error:  # damaged files make the decoders raise almost any type
        raise DataError(f"{path}: it is damaged or cannot be read ({type(error).__name__}: {error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"it has no pixels ({width} x {height})")
    if width * height > PIXEL_LIMIT:
        raise DataError(
            f"it has {width} x {height} pixels, more than the limit of {PIXEL_LIMIT:,} (a decompression "
            "bomb?); make it smaller before importing"
        )


def _raster(path: Path) -> Image.Image:
    """A PNG or JPEG as mode L (8-bit originals) or F in 0..255 (16-bit originals)."""
    try:
        opened = Image.open(path, formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"it is larger than an image should be ({error})") from error
    with opened as image:
        _check_pixels(*image.size)
        if getattr(image, "n_frames", 1) > 1:
            raise DataError("it holds several frames; save each as a file of its own")
        image.load()
        if says_synthetic(image.info):
            raise DataError(_SYNTHETIC)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return _full_scale(np.asarray(upright))
        if "A" in upright.getbands() or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
            return Image.alpha_composite(black, rgba).convert("L")
        return upright.convert("L") if upright.mode in {"1", "L", "RGB"} else upright.convert("RGB").convert("L")


def _full_scale(values: npt.NDArray[Any]) -> Image.Image:
    """16-bit greys to 0..255; white is the top of the fewest of 8, 10, 12, 14, 16 bits that hold the maximum.

    (PNG files made from 12-bit detectors say 16 bits; taken by their word they would be nearly black.)
    """
    top = int(values.max())
    bits = next((b for b in (8, 10, 12, 14) if top < 2**b), 16)
    return Image.fromarray(np.clip(values, 0, None).astype(np.float32) * np.float32(255 / (2**bits - 1)))


def _dicom(path: Path) -> tuple[Image.Image, bool]:
    """A DICOM file as mode F in 0..255, MONOCHROME2 sense, and whether its header says it is a side view."""
    try:
        header = pydicom.dcmread(path, force=True)
    except Exception as error:
        raise DataError(f"it is not a readable DICOM file ({type(error).__name__}: {error})") from error
    if says_synthetic(header):
        raise DataError(_SYNTHETIC)
    if "PixelData" not in header or "Rows" not in header:
        raise DataError("it is neither PNG, JPEG nor a DICOM file with pixels")
    photometric = str(header.get("PhotometricInterpretation", ""))
    if int(header.get("SamplesPerPixel", 1)) != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise DataError(f"it is a colour DICOM ({photometric or 'no photometric interpretation'}); only grey is read")
    if int(header.get("NumberOfFrames", None) or 1) != 1:
        raise DataError(f"it is a multi-frame DICOM ({header.NumberOfFrames} frames); save each frame as its own file")
    if not 1 <= int(header.BitsStored) <= 16:
        raise DataError(f"it stores {header.BitsStored} bits per pixel; 1 to 16 are read")
    _check_pixels(int(header.Columns), int(header.Rows))
    _check_syntax(header)
    stored = np.asarray(header.pixel_array)
    if stored.ndim != 2:
        raise DataError(f"its pixels have shape {stored.shape}; one grey frame is needed")
    padding = _padding_mask(stored, header)
    values = np.asarray(apply_modality_lut(_significant_bits(stored, header), header), dtype=np.float64)
    shown = _display(values, header, padding)
    if photometric == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0  # after inverting: padding is outside the picture and always black
    lateral = str(header.get("ViewPosition", "")).strip().upper() in _LATERAL
    return Image.fromarray((shown * 255).astype(np.float32)), lateral


def _check_syntax(header: Any) -> None:
    """Fill in a missing transfer syntax; refuse one that no decoder reads, saying what to install."""
    if not hasattr(header, "file_meta"):
        header.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in header.file_meta:
        implicit = header.original_encoding[0]
        header.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        )
    syntax = header.file_meta.TransferSyntaxUID
    try:
        available = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        available = False
    if not available:
        raise DataError(
            f"its transfer syntax is {syntax.name} ({syntax}) and no installed decoder reads it; "
            "install the decoders with: pip install 'xfed[dicom]'"
        )


def _significant_bits(stored: npt.NDArray[Any], header: Any) -> npt.NDArray[Any]:
    """Drop bits outside BitsStored (overlays live there) and extend the sign (PS3.5, section 8.1.1)."""
    bits = int(header.BitsStored)
    width = stored.dtype.itemsize * 8
    high = int(header.get("HighBit", bits - 1))
    if bits >= width or not bits - 1 <= high < width:
        return stored
    return (stored << (width - 1 - high)) >> (width - bits)


def _padding_mask(stored: npt.NDArray[Any], header: Any) -> npt.NDArray[np.bool_]:
    """Pixels outside the picture: PixelPaddingValue up to PixelPaddingRangeLimit (PS3.3, C.7.5.1.1.2)."""
    first = header.get("PixelPaddingValue")
    if first is None or isinstance(first, (bytes, str)):
        return np.zeros(stored.shape, dtype=bool)
    last = header.get("PixelPaddingRangeLimit")
    ends = [int(first), int(first if last is None or isinstance(last, (bytes, str)) else last)]
    if stored.dtype.kind == "i":
        ends = [end - 65536 if end > 32767 else end for end in ends]  # often written as unsigned
    return (stored >= min(ends)) & (stored <= max(ends))


def _first(value: Any) -> Any:
    """The first of a multi-valued element, or the value itself; None when empty."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return value
    return value[0] if len(value) else None


def _display(values: npt.NDArray[np.float64], header: Any, padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Modality values to 0..1: VOI LUT, else window, else the 1st..99th percentile of the picture."""
    if header.get("VOILUTSequence"):
        entries, start, depth = (int(x) for x in header.VOILUTSequence[0].LUTDescriptor)
        mapped = np.clip(np.rint(values), start, start + (entries or 65536) - 1).astype(np.int64)
        shown = np.asarray(apply_voi(mapped, header, 0), dtype=np.float64)
        return np.asarray(np.clip(shown / (2**depth - 1), 0, 1), dtype=np.float64)
    center, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    function = str(header.get("VOILUTFunction", None) or "LINEAR").strip().upper()
    if (
        center is not None
        and width is not None
        and float(width) > 0
        and np.isfinite([float(center), float(width)]).all()
    ):
        return apply_window(values, center=float(center), width=float(width), function=function)
    picture = values[~padding] if not padding.all() else values
    low, high = np.percentile(picture, [1, 99])
    if high <= low:
        low, high = float(picture.min()), float(picture.max())
    if high <= low:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0, 1), dtype=np.float64)


def apply_window(
    values: npt.NDArray[np.float64], *, center: float, width: float, function: str = "LINEAR"
) -> npt.NDArray[np.float64]:
    """Window modality values to 0..1. `function`: LINEAR (also for unknown names), LINEAR_EXACT or SIGMOID.

    Source: DICOM PS3.3, C.11.2.1.2.1 and C.11.2.1.3.
    """
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - center) / width, -700, 700)
        return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float64)
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width <= 1:  # LINEAR of width 1 is a threshold
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _shrink(grey: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Mode L or F in 0..255 to uint8 [size, size]: black borders to a square, then an antialiasing bilinear filter."""
    side = max(grey.size)
    if grey.size != (side, side):
        square = Image.new(grey.mode, (side, side), 0)
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    if side != size:
        grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    values = np.asarray(grey)
    return values.copy() if values.dtype == np.uint8 else np.clip(np.rint(values), 0, 255).astype(np.uint8)
