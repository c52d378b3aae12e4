"""Exports: read back by the programs they are for, pixel by pixel; synthetic DICOM is refused as a patient's."""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.archives import FakeRun, built, released, weights_of
from tests.conftest import tiny
from xfed.client.decode import decode_image
from xfed.client.importing import import_folder
from xfed.common.config import Data
from xfed.common.errors import CheckpointError, ConfigError, DataError
from xfed.common.synthetic_mark import MARK
from xfed.server import export_webdataset
from xfed.server.archive import build_archive, read_archive
from xfed.server.archive_export import FORMATS, Format, export_archive
from xfed.server.archive_manifest import open_archive
from xfed.server.archive_signature import check_archive
from xfed.server.cli import app
from xfed.server.export_dicom import burned_in

CLASSES = tiny().classes
PER_CLASS = 5
OPEN_FILES = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
"""The readers leave files open."""
# PS3.3, A.8.1: the elements of a Secondary Capture that must have a value, and those that may be empty but must be there
TYPE_1 = """
    StudyInstanceUID Modality SeriesInstanceUID ConversionType SamplesPerPixel PhotometricInterpretation Rows Columns
    BitsAllocated BitsStored HighBit PixelRepresentation PixelData SOPClassUID SOPInstanceUID
"""
TYPE_2 = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber
    SeriesNumber InstanceNumber PatientOrientation Manufacturer
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("export"), PER_CLASS)


@pytest.fixture(scope="module")
def images(archive: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    return read_archive(archive, CLASSES)


def _export(archive: Path, out: Path, to: Format, **options: Any) -> Path:
    done = export_archive(archive, out, to, **options)
    assert done.images == PER_CLASS * len(CLASSES)
    assert done.fingerprint == check_archive(archive).fingerprint
    readme = (out / "README.md").read_text()
    assert "No image here shows a patient" in readme
    assert done.root_sha256 in readme
    assert str(done.fingerprint) in readme
    return out


def _torchvision_datasets() -> Any:
    """torchvision.datasets; where torch cannot load torchvision's operators, the names of two are enough to import it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed")
    if "torchvision" not in sys.modules:
        try:
            torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        except OSError:
            names = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(names)
    return importlib.import_module("torchvision.datasets")


_KEEP: list[Any] = []


def test_torchvision_reads_the_image_folder(archive: Path, tmp_path: Path, images: Any) -> None:
    datasets = _torchvision_datasets()
    found = datasets.ImageFolder(str(_export(archive, tmp_path / "out", "imagefolder")))
    assert found.classes == sorted(CLASSES)
    assert len(found) == len(images[0])
    for label, name in enumerate(found.classes):
        mine = np.stack([np.asarray(picture.convert("L")) for picture, target in found if target == label])
        assert np.array_equal(mine, images[0][images[1] == CLASSES.index(name)])


@OPEN_FILES
def test_hugging_face_reads_the_image_folder(
    archive: Path, tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    out = _export(archive, tmp_path / "out", "huggingface")
    found = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == len(images[0])
    assert {"label", "label_index", "seed", "contrast", "oddity"} <= set(found.features)
    by_seed = {str(row["seed"]): row for row in found}
    for row, pixels in zip(open_archive(archive).rows, images[0], strict=True):
        assert by_seed[row["seed"]]["label"] == row["label"]
        assert np.array_equal(np.asarray(by_seed[row["seed"]]["image"].convert("L")), pixels)
    del found, by_seed
    gc.collect()


@OPEN_FILES
def test_the_archive_itself_opens_with_both(archive: Path, tmp_path: Path, images: Any) -> None:
    torchvision = _torchvision_datasets()
    datasets = pytest.importorskip("datasets")
    assert len(torchvision.ImageFolder(str(archive / "images"))) == len(images[0])
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(archive), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(set(found["label"])) == sorted(CLASSES)
    del found
    gc.collect()


@OPEN_FILES
def test_webdataset_reads_the_shards(
    archive: Path, tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(export_webdataset, "SAMPLES", 4)
    out = _export(archive, tmp_path / "out", "webdataset")
    shards = sorted(str(path) for path in out.glob("*.tar"))
    assert [Path(shard).name for shard in shards] == [f"tiny-{number:06d}.tar" for number in range(4)]
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("l8"))
    assert len(found) == len(images[0])
    rows = {row["file_name"]: number for number, row in enumerate(open_archive(archive).rows)}
    for sample in found:
        number = rows[sample["json"]["file_name"]]
        assert sample["cls"] == images[1][number] == int(sample["json"]["label_index"])
        assert np.array_equal(sample["png"], images[0][number])
    classes = [sample["cls"] for sample in found]
    assert classes != sorted(classes)  # classes do not lie together
    gc.collect()
    export_archive(archive, tmp_path / "again", "webdataset")
    assert [p.read_bytes() for p in sorted(out.iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "again").iterdir())
    ]


def test_a_dot_in_a_name_does_not_end_the_key_of_a_sample(tmp_path: Path) -> None:
    classes = ["Stage 1.5", "Normal"]
    settings = {"phantom": {"patients": {}}}
    changes: dict[str, Any] = {"classes": classes, "data": settings, "name": "v1.2"}
    run = FakeRun(tmp_path, archive={"balance": "fixed", "per_class": 2}, **changes)
    build_archive(run, weights_of(run))  # type: ignore[arg-type]
    export_archive(tmp_path / "archive", tmp_path / "out", "webdataset", unsigned=True)
    with tarfile.open(tmp_path / "out" / "v1-2-000000.tar") as tar:
        assert all(name.count(".") == 1 for name in tar.getnames())


def test_pydicom_reads_what_is_plainly_synthetic(archive: Path, tmp_path: Path, images: Any) -> None:
    out = _export(archive, tmp_path / "out", "dicom")
    rows = open_archive(archive).rows
    root = open_archive(archive).manifest["root_sha256"]
    instances, series, studies = set(), set(), set()
    for number, (row, pixels) in enumerate(zip(rows, images[0], strict=True), 1):
        path = out / row["label"] / f"{Path(row['file_name']).stem}.dcm"
        ds = pydicom.dcmread(path)  # strict: preamble and file meta information must be right
        assert np.array_equal(ds.pixel_array, pixels)
        assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
        for name in TYPE_1.split():
            assert ds.data_element(name) is not None, name
            assert not ds.data_element(name).is_empty, name
        for name in TYPE_2.split():
            assert name in ds, name
        assert str(ds.PatientName) == "SYNTHETIC^XFED"
        assert (ds.SyntheticData, ds.ConversionType, ds.BurnedInAnnotation) == ("YES", "SYN", "NO")
        assert ds.ImageComments.startswith(MARK)
        assert row["seed"] in ds.DerivationDescription
        block = ds.private_block(0x0099, "XFED")
        assert [block[n].value for n in range(1, 5)] == [root, row["file_name"], row["label"], row["seed"]]
        assert int(ds.InstanceNumber) == number
        for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID):
            assert uid.is_valid
        instances.add(ds.SOPInstanceUID)
        series.add((ds.SeriesInstanceUID, ds.SeriesDescription))
        studies.add(ds.StudyInstanceUID)
    assert (len(instances), len(series), len(studies)) == (len(rows), len(CLASSES), 1)
    first = next(out.rglob("*.dcm")).relative_to(out)
    export_archive(archive, tmp_path / "again", "dicom")
    assert (out / first).read_bytes() == (tmp_path / "again" / first).read_bytes()


def test_the_window_shows_every_grey_as_it_is(
    archive: Path, tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as an import reads patients' files (its refusal switched off), the pixels are those of the archive."""
    out = _export(archive, tmp_path / "out", "dicom")
    monkeypatch.setattr("xfed.client.decode.says_synthetic", lambda _: False)
    row = open_archive(archive).rows[0]
    shown = decode_image(out / row["label"] / f"{Path(row['file_name']).stem}.dcm", 32)
    assert np.array_equal(shown, images[0][0])


@pytest.mark.parametrize(("size", "word"), [(32, "SYN"), (256, "SYNTHETIC")])
def test_burned_in_text_is_on_the_lower_edge_alone(size: int, word: str) -> None:
    grey = Image.new("L", (size, size), 90)
    after = np.asarray(burned_in(grey))
    changed = np.flatnonzero((after != 90).any(1))
    assert changed.min() >= 0.6 * size
    assert (after[-3:] == 0).any()
    assert after.max() > 200
    assert np.asarray(grey).max() == 90
    assert word


def test_burned_in_files_are_other_files_and_say_so(archive: Path, tmp_path: Path) -> None:
    plain = _export(archive, tmp_path / "plain", "dicom")
    burnt = _export(archive, tmp_path / "burnt", "dicom", burn_in=True)
    for path in plain.rglob("*.dcm"):
        a, b = pydicom.dcmread(path), pydicom.dcmread(burnt / path.relative_to(plain))
        assert b.BurnedInAnnotation == "YES"
        assert a.SOPInstanceUID != b.SOPInstanceUID
        assert not np.array_equal(a.pixel_array, b.pixel_array)
    with pytest.raises(ConfigError, match="--burn-in"):
        export_archive(archive, tmp_path / "x", "imagefolder", burn_in=True)


@pytest.mark.parametrize("to", ["dicom", "imagefolder"])
def test_an_import_refuses_synthetic_images_and_says_why(archive: Path, tmp_path: Path, to: Format) -> None:
    out = _export(archive, tmp_path / "out", to)
    with pytest.raises(DataError, match="none of 15 images could be read"):
        import_folder(
            out, tmp_path / "store", size=32, classes=CLASSES, data=Data(source="folder", layout="folders"), seed=1
        )
    told = (tmp_path / "store-quarantine.csv").read_text()
    assert told.count("it says that it is a synthetic image, not a patient's") == 15


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("SyntheticData", "YES"), ("PatientName", "Synthetic^Xfed"), ("ImageComments", f"{MARK}. Changed.")],
)
def test_each_mark_alone_is_enough_whoever_made_the_file(
    archive: Path, tmp_path: Path, keyword: str, value: str
) -> None:
    out = _export(archive, tmp_path / "out", "dicom")
    path = next(out.rglob("*.dcm"))
    ds = pydicom.dcmread(path)
    for name in ("SyntheticData", "PatientName", "ImageComments"):
        setattr(ds, name, "")
    ds.save_as(path)
    assert decode_image(path, 32).shape == (32, 32)  # a file like any other
    setattr(ds, keyword, value)
    ds.save_as(path)
    with pytest.raises(DataError, match="synthetic"):
        decode_image(path, 32)


@pytest.mark.parametrize("to", FORMATS)
def test_a_changed_archive_is_not_exported(tmp_path: Path, to: Format) -> None:
    archive = released(tmp_path, 2)
    victim = next((archive / "images" / "Normal").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="do not use it"):
        export_archive(archive, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_an_unsigned_archive_or_another_key_is_refused(tmp_path: Path) -> None:
    archive = built(tmp_path, 2)
    with pytest.raises(CheckpointError, match="not signed"):
        export_archive(archive, tmp_path / "out", "imagefolder")
    done = export_archive(archive, tmp_path / "out", "imagefolder", unsigned=True)
    assert done.fingerprint is None
    assert "not signed by anybody" in (tmp_path / "out" / "README.md").read_text()
    export_archive(archive, tmp_path / "dicom", "dicom", unsigned=True)
    ds = pydicom.dcmread(next((tmp_path / "dicom").rglob("*.dcm")))
    assert ds.StudyDate == ""  # never released


def test_an_image_that_changes_while_it_is_read_is_found(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_archive(archive)
    opened.manifest["files"][opened.rows[3]["file_name"]] = hashlib.sha256(b"another").hexdigest()  # type: ignore[index]
    monkeypatch.setattr("xfed.server.archive_export.open_archive", lambda _: opened)
    with pytest.raises(CheckpointError, match="while it was read"):
        export_archive(archive, tmp_path / "out", "imagefolder")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_free_is_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="something already"):
        export_archive(archive, tmp_path / "mine", "imagefolder")
    with pytest.raises(ConfigError, match="inside the archive"):
        export_archive(archive, archive / "out", "imagefolder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_command_exports(archive: Path, tmp_path: Path) -> None:
    arguments = ["archive", "export", str(archive), "--to", "imagefolder", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["images"] == 15
    other = CliRunner().invoke(app, [*arguments[:4], "zip", *arguments[5:]])
    assert "imagefolder, huggingface, webdataset, dicom" in str(other.exception)


def test_every_png_says_that_it_is_synthetic(archive: Path) -> None:
    for row in open_archive(archive).rows:
        with Image.open(io.BytesIO((archive / row["file_name"]).read_bytes())) as image:
            assert image.info["Comment"] == MARK
            assert image.mode == "L"
