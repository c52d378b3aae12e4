from __future__ import annotations

import csv
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from xfed.client import import_work
from xfed.client.importing import ImportReport, import_folder, patient_numbers
from xfed.client.readiness import Readiness, inverted_score
from xfed.client.store import open_store
from xfed.common.config import Data
from xfed.common.durable import exclusive
from xfed.common.errors import DataError, StorageError

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")
SALT = bytes(range(32))
REAL = Path(__file__).parent.parent.parent / "shared/data/nih-cxr5"


def make_source(folder: Path, patients: int = 40, per_patient: int = 2) -> Path:
    """Noise pictures: patient p has class p % 5."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = [("image", "patient", "label")]
    for patient in range(patients):
        for number in range(per_patient):
            name = f"NAMEOFFILE{patient:03}_{number}.png"
            Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / name)
            rows.append((name, f"PATIENT-{patient:05}", CLASSES[patient % 5]))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def run(source: Path, store: Path, **options: object) -> ImportReport:
    values: dict[str, object] = {"size": 32, "classes": CLASSES, "data": Data(), "seed": 1, "workers": 2} | options
    return import_folder(source, store, **values)  # type: ignore[arg-type]


def contents(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.iterdir()) if p.is_file() and p.name != "index.npz"}


def test_import_end_to_end(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    seen: list[tuple[int, int]] = []
    report = run(source, tmp_path / "site/store", progress=lambda done, total: seen.append((done, total)))
    store = open_store(tmp_path / "site/store")
    assert report.fresh
    assert report.quarantine is None
    assert report.readiness.total_images == 80
    assert seen[0] == (0, 80)
    assert seen[-1] == (80, 80)
    assert seen == sorted(seen)
    assert store.images.shape == (80, 32, 32)
    assert store.classes == CLASSES
    assert store.counts().sum(axis=0).tolist() == [16] * 5
    assert sorted(set(store.patients.tolist())) == list(range(40))
    for patient in range(40):
        rows = store.patients == patient
        assert len(set(store.splits[rows].tolist())) == 1
        assert len(set(store.labels[rows].tolist())) == 1
    assert report.readiness == Readiness.from_json(json.loads((store.folder / "readiness.json").read_text()))
    assert report.readiness.images["Normal"]["train"] == int(store.counts()[0, 1])
    assert sorted(p.name for p in (tmp_path / "site").iterdir()) == ["store", "store-salt"]
    assert not (store.folder / ".import").exists()


def test_pixels_belong_to_their_labels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for position, name in enumerate(CLASSES):
        (source / name).mkdir(parents=True)
        for patient in range(4):
            Image.new("L", (32, 32), 40 * position + patient).save(source / name / f"P{position}{patient}_1.png")
    report = run(source, tmp_path / "store")
    store = open_store(report.store)
    assert np.array_equal(store.images[:, 0, 0] // 40, store.labels)
    assert report.layout == "folders"
    assert report.readiness.suspects["blank"] == 20


def test_a_known_salt_makes_runs_reproducible_and_another_does_not(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    for name, salt, workers in (("a", SALT, 1), ("b", SALT, 4), ("c", b"x" * 32, 2), ("d", None, 2), ("e", None, 2)):
        run(source, tmp_path / name, salt=salt, workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    images = {name: (tmp_path / name / "images.npy").read_bytes() for name in "acde"}
    assert len(set(images.values())) == 4
    assert not (tmp_path / "a-salt").exists()
    salt = tmp_path / "d-salt"
    assert len(salt.read_bytes()) == 32
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert salt.read_bytes() != (tmp_path / "e-salt").read_bytes()
    salt.write_bytes(b"short")
    with pytest.raises(DataError, match="5 bytes"):
        run(source, tmp_path / "d")


def test_patient_numbers_are_a_salted_order() -> None:
    ids = [f"{i:08}" for i in range(200)]
    numbers = patient_numbers(ids, SALT)
    assert sorted(numbers.values()) == list(range(200))
    assert patient_numbers(ids[::-1], SALT) == numbers != patient_numbers(ids, b"y" * 32)
    correlation = np.corrcoef(np.arange(200), [numbers[i] for i in ids])[0, 1]
    assert abs(correlation) < 0.3  # sd of chance 0.07: the order of the ids does not show


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.StudyDate = "HEADERNAME^Jane", "HEADERID-77", "19810203"
    ds.InstitutionName = "HEADERHOSPITAL"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    ds.save_as(path, enforce_file_format=True)


def test_no_name_no_patient_no_header_in_any_byte_of_the_store(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", patients=20)
    rng = np.random.default_rng(1)
    with (source / "labels.csv").open("a") as file:
        for number in range(5):
            write_dicom(source / f"DICOMFILE{number}.dcm", rng.integers(0, 4096, (50, 40)))
            file.write(f"DICOMFILE{number}.dcm,SECRETPATIENT-{number},Normal\n")
        (source / "BADFILE.dcm").write_bytes(b"HEADERNAME^Jane")
        file.write("BADFILE.dcm,SECRETPATIENT-9,Normal\nGONEFILE.png,SECRETPATIENT-8,Normal\n")
        file.write("NAMEOFFILE000_0.png,PATIENT-00000,SECRETLABEL\n")
    report = run(source, tmp_path / "store")
    assert report.readiness.total_images == 44  # 40 + 5 - the one with two labels
    needles = [
        *(b"NAMEOFFILE", b"PATIENT-", b"DICOMFILE", b"SECRET", b"BADFILE", b"GONEFILE", b"source", b"DICM"),
        *(b"HEADER", b"19810203", b"1.2.840", b"labels.csv", os.fsencode(tmp_path)),
    ]
    whole = (source / "DICOMFILE0.dcm").read_bytes() + os.fsencode(source / "labels.csv")
    whole += (source / "labels.csv").read_bytes() + b"BADFILE GONEFILE"
    assert all(needle in whole for needle in needles)  # the search can fail
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert [n for n in needles if n in data or n.decode().encode("utf-16-le") in data] == [], path
    assert report.quarantine == tmp_path / "store-quarantine.csv"
    assert stat.S_IMODE(report.quarantine.stat().st_mode) == 0o600
    rows = list(csv.DictReader(report.quarantine.read_text().splitlines()))
    assert {row["file"]: row["reason"] for row in rows} == {
        "BADFILE.dcm": "cannot be decoded",
        "GONEFILE.png": "file is not there",
        "NAMEOFFILE000_0.png": "listed with different labels or patients",
    }
    assert report.readiness.quarantined == {
        "cannot be decoded": 1,
        "file is not there": 1,
        "listed with different labels or patients": 1,
    }
    assert pydicom.dcmread(source / "DICOMFILE0.dcm").PatientID == "HEADERID-77"


def test_a_finished_import_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = make_source(tmp_path / "source"), tmp_path / "store"
    first = run(source, store)
    before = {p: p.stat().st_mtime_ns for p in store.iterdir() if p.name != ".lock"}
    monkeypatch.setattr(import_work, "decode", lambda *_: pytest.fail("decoded again"))
    second = run(source, store)
    assert not second.fresh
    assert second.readiness == first.readiness
    assert {p: p.stat().st_mtime_ns for p in store.iterdir() if p.name != ".lock"} == before


def test_other_settings_on_the_same_store_are_refused_until_restart(tmp_path: Path) -> None:
    source, store = make_source(tmp_path / "source"), tmp_path / "store"
    run(source, store)
    for options, words in (
        ({"size": 64}, "size was 32, now 64"),
        ({"seed": 2}, "seed was 1, now 2"),
        ({"classes": CLASSES[:3]}, "classes was"),
        ({"salt": SALT}, "salt"),
    ):
        with pytest.raises(DataError, match=f"{words}.*--store.*--restart"):
            run(source, store, **options)
    text = (source / "labels.csv").read_text()
    (source / "labels.csv").write_text(text.replace("PATIENT-00007", "PATIENT-00008"))
    with pytest.raises(DataError, match=r"labels or the salt have changed.*--restart"):
        run(source, store)
    assert run(source, store, size=64, restart=True).fresh
    assert open_store(store).size == 64


KILLED = """
import sys, time
from pathlib import Path
from xfed.client import import_work
from xfed.client.importing import import_folder
from xfed.common.config import Data
import_work.BLOCK = 8
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.02)
import_folder(Path(sys.argv[1]), Path(sys.argv[2]), size=32, classes=sys.argv[3].split(","), data=Data(), seed=1,
              workers=2, salt=bytes(range(32)), progress=progress)
"""


def test_a_killed_import_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = make_source(tmp_path / "source"), tmp_path / "store"
    (source / "NAMEOFFILE003_0.png").write_bytes(b"no picture")
    whole = run(source, tmp_path / "whole", salt=SALT)
    command = [sys.executable, "-c", KILLED, str(source), str(store), ",".join(CLASSES)]
    for stop in ("30", "50"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == stop:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(DataError, match="no finished image store"):
            open_store(store)
    with (store / ".import/journal.jsonl").open("a") as file:
        file.write("[[32, 3")  # as a kill in the middle of a line leaves it
    with (store / ".import/rows.bin").open("ab") as file:
        file.write(b"half a block")
    with pytest.raises(DataError, match=r"unfinished import with other settings.*--restart"):
        run(source, store, salt=SALT, size=64)
    decoded: list[Path] = []
    monkeypatch.setattr(import_work, "decode", lambda path, size: decoded.append(path) or real_decode(path, size))
    report = run(source, store, salt=SALT)
    assert 0 < len(decoded) <= 80 - 48
    assert report.readiness == whole.readiness
    assert report.readiness.quarantined == {"cannot be decoded": 1}
    assert contents(store) == contents(tmp_path / "whole")
    ours, theirs = open_store(store), open_store(tmp_path / "whole")
    for name in ("labels", "patients", "splits"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert not (store / ".import").exists()


real_decode = import_work.decode


def test_a_full_disk_while_decoding_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = make_source(tmp_path / "source"), tmp_path / "store"
    monkeypatch.setattr(import_work, "BLOCK", 8)
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(handle)

    real_fsync = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            run(source, store, salt=SALT)
    with pytest.raises(DataError, match="no finished"):
        open_store(store)
    run(source, store, salt=SALT)
    run(source, tmp_path / "whole", salt=SALT)
    assert contents(store) == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, None])
def test_a_full_disk_while_writing_the_store_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    source, store = make_source(tmp_path / "source"), tmp_path / "store"

    def full(path: Path, array: np.ndarray) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(number, "full") if number else OSError("1024 requested and 12 written")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(StorageError, match="again"):
            run(source, store, salt=SALT)
    assert sorted(p.name for p in store.iterdir()) == [".import", ".lock"]
    monkeypatch.setattr(import_work, "decode", lambda *_: pytest.fail("decoded again"))
    assert run(source, store, salt=SALT).fresh


def test_two_imports_never_share_a_store(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", patients=5)
    with exclusive(tmp_path / "store"), pytest.raises(StorageError, match="in use"):
        run(source, tmp_path / "store")


def test_places_that_are_no_store_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", patients=5)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(DataError, match=r"thesis\.tex"):
        run(source, tmp_path / "home", restart=True)
    with pytest.raises(DataError, match="is a file"):
        run(source, source / "../home/thesis.tex")
    with pytest.raises(DataError, match="inside the source"):
        run(source, source / "store")
    assert (tmp_path / "home/thesis.tex").exists()


def test_nothing_usable_is_a_data_error_that_counts_the_reasons(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"x")
    (source / "labels.csv").write_text("image,patient,label\na.png,1,Hernia\ngone.png,2,Normal\n")
    with pytest.raises(DataError, match=r"carries none of the classes[\s\S]*Hernia[\s\S]*quarantine\.csv"):
        run(source, tmp_path / "store")
    (source / "labels.csv").write_text("image,patient,label\na.png,1,Normal\n")
    with pytest.raises(DataError, match=r"none of 1 images could be read.*quarantine\.csv"):
        run(source, tmp_path / "store")
    assert "cannot be decoded" in (tmp_path / "store-quarantine.csv").read_text()
    with pytest.raises(DataError, match="no finished"):
        open_store(tmp_path / "store")
    Image.new("L", (32, 32)).save(source / "a.png")  # repaired: the list of faults goes
    report = run(source, tmp_path / "store")
    assert report.quarantine is None
    assert not (tmp_path / "store-quarantine.csv").exists()
    assert sum("has no images" in warning for warning in report.readiness.warnings) == 4


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_real_images_match_their_published_table(tmp_path: Path) -> None:
    report = run(REAL, tmp_path / "store", size=64)
    ready = report.readiness
    totals = {name: (sum(ready.images[name].values()), sum(ready.patients[name].values())) for name in ready.classes}
    assert totals == {
        "Normal": (2000, 1116),
        "Pleural Effusion": (658, 287),
        "Pneumothorax": (349, 165),
        "Cardiomegaly": (138, 98),
        "Pulmonary Edema": (105, 77),
    }
    assert report.readiness.suspects["blank"] == 0
    assert report.readiness.suspects["inverted"] < 10
    assert report.readiness.suspects["lateral"] < 65
    images = np.asarray(open_store(report.store).images)
    assert (inverted_score(255 - images) < -0.5).mean() > 0.97
