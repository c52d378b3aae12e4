"""One synthetic image as a DICOM Secondary Capture that no archive of a hospital should take for a patient's.

::

    row + PNG + manifest --dicom_file--> SC Image Storage, 8 bits, MONOCHROME2, uncompressed, ConversionType SYN
        SyntheticData YES, PatientName SYNTHETIC^XFED, PatientID from the archive's root, ImageComments, DerivationDescription,
        private block (0099,xx) "XFED": root digest, file name, class, seed, generator

UIDs follow from root digest and file name (UUIDs under 2.25): the same archive gives the same files, and one study per archive,
one series per class. `xfed-client import` refuses such files (xfed.client.decode).

Source: DICOM PS3.3, A.8.1 (Secondary Capture Image IOD), C.8.6.1 (ConversionType), C.12.1 (SyntheticData); PS3.5, B.2 (UIDs).
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from xfed.common.synthetic_mark import DICOM_NAME, MARK

__all__ = ["PRIVATE_GROUP", "burned_in", "dicom_file"]

PRIVATE_GROUP = 0x0099
WORD, SHORT_WORD = "SYNTHETIC", "SYN"


def dicom_file(
    manifest: Mapping[str, Any], row: Mapping[str, str], png: bytes, *, number: int, burn_in: bool = False
) -> bytes:
    """The bytes of a DICOM file of one image; `row` is its row of metadata.csv, `number` its place in the archive, from 1."""
    with Image.open(io.BytesIO(png)) as opened:
        image = opened.convert("L")
    if burn_in:
        image = burned_in(image)
    pixels = np.asarray(image)
    root, label = manifest["root_sha256"], row["label"]
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    _identify(ds, manifest, row, f"{root} {row['file_name']}{' burned in' if burn_in else ''}")
    _date(ds, manifest.get("released"))
    ds.SeriesNumber = str(int(row["label_index"]) + 1)
    ds.InstanceNumber = str(number)
    what = " and ".join(row["findings"].split("|")) if "findings" in row else f"the class {label}"
    of = "of all images, steered to" if "findings" in row else "of"
    ds.ImageComments = f"{MARK}. Drawn by a generative model for {what}."
    ds.DerivationDescription = (
        f"Drawn by the generator {row['generator_sha256'][:16]} {of} {what} with seed {row['seed']}; "
        f"no patient was imaged. Archive {root}."
    )
    ds.BurnedInAnnotation = "YES" if burn_in else "NO"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelRepresentation = 0
    ds.WindowCenter, ds.WindowWidth = "128", "256"  # linear: 0 is black, 255 white
    data = pixels.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    own = ds.private_block(PRIVATE_GROUP, "XFED", create=True)
    for element, value in enumerate((root, row["file_name"], label, row["seed"], row["generator_sha256"]), 1):
        own.add_new(element, "UT", value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def _identify(ds: Dataset, manifest: Mapping[str, Any], row: Mapping[str, str], instance: str) -> None:
    """Whose and what it is: nobody's; made by software; study, series and instance from the root digest."""
    root, label = manifest["root_sha256"], row["label"]
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = _uid(instance)
    ds.SyntheticData = "YES"
    ds.PatientName = DICOM_NAME
    ds.PatientID = f"XFED-SYNTHETIC-{root[:16]}"
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.PatientComments = MARK
    ds.StudyInstanceUID = _uid(f"{root} study")
    ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyDescription = f"SYNTHETIC {manifest['name']}"[:64]
    ds.SeriesInstanceUID = _uid(f"{root} series {label}")
    ds.SeriesDescription = f"SYNTHETIC {label}"[:64]
    ds.Modality = "OT"
    ds.ConversionType = "SYN"
    ds.Manufacturer = ds.SecondaryCaptureDeviceManufacturer = "xfed"
    ds.SecondaryCaptureDeviceSoftwareVersions = ds.SoftwareVersions = str(manifest["software"])[:64]
    ds.ImageType = ["DERIVED", "SECONDARY", "SYNTHETIC"]
    ds.PatientOrientation = ""


def _date(ds: Dataset, released: str | None) -> None:
    """The time of the release (UTC) as the study's; empty where the archive was not released."""
    if released is None:
        ds.StudyDate = ds.StudyTime = ""
        return
    time = datetime.fromisoformat(released)
    ds.StudyDate = ds.ContentDate = ds.DateOfSecondaryCapture = time.strftime("%Y%m%d")
    ds.StudyTime = ds.ContentTime = ds.TimeOfSecondaryCapture = time.strftime("%H%M%S")
    ds.TimezoneOffsetFromUTC = "+0000"


def _uid(name: str) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'xfed {name}').int}"


def burned_in(image: Image.Image) -> Image.Image:
    """A copy with the word SYNTHETIC (SYN where it is too narrow) in white on black along its lower edge."""
    result = image.copy()
    draw = ImageDraw.Draw(result)
    height = max(9, image.height // 12)
    font = ImageFont.load_default(size=height)
    word = WORD if draw.textlength(WORD, font=font) <= image.width - 2 else SHORT_WORD
    draw.rectangle((0, image.height - height - 2, image.width, image.height), fill=0)
    draw.text((1, image.height - 1), word, fill=255, font=font, anchor="ls")
    return result
