from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xfed.client.layouts import Labelled, read_labels, resolve_label
from xfed.client.tables import read_table
from xfed.common.errors import ConfigError, DataError, XfedError

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def read(source: Path, **options: object) -> Labelled:
    return read_labels(source, classes=options.pop("classes", CLASSES), **options)  # type: ignore[arg-type]


def reasons(labelled: Labelled) -> Counter[str]:
    return Counter(record.label or record.reason for record in labelled.records)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("No Finding", "Normal"),
        ("Effusion", "Pleural Effusion"),
        ("Effusion|Infiltration", "Pleural Effusion"),
        ("Edema", "Pulmonary Edema"),
        (" pleural_effusion ", "Pleural Effusion"),
        ("PNEUMOTHORAX", "Pneumothorax"),
        ("cardiac", "Cardiomegaly"),
        ("Edema|Pulmonary Edema", "Pulmonary Edema"),
    ],
)
def test_labels_that_are_a_class(text: str, label: str) -> None:
    assert resolve_label(text, CLASSES, {"Cardiac": "Cardiomegaly"}) == (label, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Effusion|Cardiomegaly", "carries several of the classes"),
        ("Infiltration", "carries none of the classes"),
        ("Consolidation", "carries none of the classes"),
        ("", "has no label"),
    ],
)
def test_labels_that_are_no_class(text: str, reason: str) -> None:
    assert resolve_label(text, CLASSES, {}) == (None, reason)
    assert resolve_label("Consolidation", (*CLASSES, "Consolidation"), {}) == ("Consolidation", "")


def test_nih_layout_with_images_in_its_folders(tmp_path: Path) -> None:
    touch(
        tmp_path, "images_001/images/00000001_000.png", "images_002/images/00000002_000.png", "images_002/images/x.png"
    )
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,View Position\n"
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,PA\n"
        "00000002_000.png,No Finding,0,2,LATERAL\n"
        "00000003_000.png,Edema,0,3,PA\n"
    )
    labelled = read(tmp_path)
    assert labelled.layout == "nih"
    assert reasons(labelled) == {"Cardiomegaly": 1, "Normal": 1, "file is not there": 1}
    first, second, third = labelled.records
    assert first.path == tmp_path / "images_001/images/00000001_000.png"
    assert (first.patient, first.lateral, second.lateral, third.fault) == ("1", False, True, True)
    assert any("nih" in note for note in labelled.notes)
    assert any("1 images under" in note for note in labelled.notes)


def test_a_label_column_wins_over_findings(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("Image Index,Patient ID,label,Finding Labels\na.png,1,Normal,Edema\n")
    assert read(tmp_path).records[0].label == "Normal"
    assert read(tmp_path, label_column="Finding Labels").records[0].label == "Pulmonary Edema"


def test_csv_with_own_columns_and_map(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.dcm", "sub/b")
    (tmp_path / "export.txt").write_text("bild;pat;befund\nsub/a;P1;Erguss\nsub\\b;P2;o.B.\nsub/b;P2;o.B.\n")
    options = {
        "layout": "csv",
        "labels": Path("export.txt"),
        "image_column": "bild",
        "patient_column": "pat",
        "label_map": {"erguss": "Pleural Effusion", "o.B.": "Normal"},
    }
    labelled = read(tmp_path, label_column="Befund", **options)
    assert reasons(labelled) == {"Pleural Effusion": 1, "Normal": 1, "listed more than once": 1}
    with pytest.raises(ConfigError, match=r"no column 'diagnose'.*bild, pat, befund.*--label-column"):
        read(tmp_path, label_column="diagnose", **options)
    with pytest.raises(ConfigError, match=r"usual columns.*bild, pat, befund.*--label-column"):
        read(tmp_path, **options)
    with pytest.raises(ConfigError, match="the classes are"):
        read(tmp_path, label_map={"x": "Erguss"})


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x.png", "C:\\x.png", "..\\x.png", "/abs/a.png"])
def test_paths_out_of_the_source_are_quarantined(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "x.png", "source/a.png")
    (tmp_path / "source/labels.csv").write_text(f"image,patient,label\n{name},1,Normal\na.png,1,Normal\n")
    bad, good = read(tmp_path / "source").records
    assert (bad.label, bad.reason, bad.fault) == (None, "image path leads out of the source", True)
    assert good.label == "Normal"


def test_rows_that_contradict_or_miss_something_are_faults(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", "d/e.png", "f/e.png", ".hidden.png")
    (tmp_path / "labels.csv").write_text(
        "image,patient,label\na.png,1,Normal\na.png,1,Edema\nb.png,,Normal\nc.png\ne.png,5,Normal\n,6,Normal\nd/e.png,7,\n"
        ".hidden.png,8,Normal\n"
    )
    labelled = read(tmp_path)
    assert reasons(labelled) == {
        "listed with different labels or patients": 1,
        "listed more than once": 1,
        "patient is missing": 1,
        "row is too short": 1,
        "file name occurs several times": 1,
        "image name is empty": 1,
        "has no label": 1,
        "file is not there": 1,
    }
    assert sum(record.fault for record in labelled.records) == 6
    assert "d/e.png, f/e.png" in next(r.detail for r in labelled.records if r.reason.startswith("file name occurs"))


def test_folder_layout_guesses_patients_and_says_so(tmp_path: Path) -> None:
    touch(
        tmp_path, "normal/P1_1.png", "normal/P1_2.png", "pleural-effusion/P2.png", "other/P3_1.png", "normal/Thumbs.db"
    )
    labelled = read(tmp_path)
    assert labelled.layout == "folders"
    assert reasons(labelled) == {
        "Normal": 2,
        "Pleural Effusion": 1,
        "carries none of the classes": 1,
        "is not named like an image": 1,
    }
    assert [r.patient for r in labelled.records if r.label] == ["P1", "P1", "P2"]
    assert any("guessed" in note for note in labelled.notes)
    asked = read(tmp_path, patient_pattern=r"_(\d)")
    assert [r.patient for r in asked.records if r.label] == ["1", "2"]
    assert reasons(asked)["patient is missing"] == 1
    assert not any("guessed" in note for note in asked.notes)
    for pattern in ("(", "P1", "(a)(b)"):
        with pytest.raises(ConfigError, match="--patient-pattern"):
            read(tmp_path, patient_pattern=pattern)


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match="neither a label file nor a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match="no label file"):
        read(tmp_path, layout="csv")
    with pytest.raises(DataError, match="no such label file"):
        read(tmp_path, labels=Path("x.csv"))
    with pytest.raises(ConfigError, match="auto, nih, folders or csv"):
        read(tmp_path, layout="tree")
    touch(tmp_path, "one.csv")
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path)
    (tmp_path / "one.csv").write_text("image,patient,label\r\n\r\n")
    with pytest.raises(DataError, match="no rows below its header"):
        read(tmp_path)
    touch(tmp_path, "two.csv")
    with pytest.raises(DataError, match=r"several CSV files.*--labels"):
        read(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_delimiters_and_line_ends(tmp_path: Path, delimiter: str, encoding: str, newline: str) -> None:
    lines = [("image", "Größe, cm", "label"), ("a.png", "1;2,3", 'say "no"'), ("ü.png", "x", "y")]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(lines)
    (tmp_path / "l.csv").write_bytes(text.getvalue().encode(encoding))
    table = read_table(tmp_path / "l.csv")
    assert [table.header, *(row for _, row in table.rows)] == lines


plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    delimiter=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    order=st.permutations(["image", "patient", "label", "comment"]),
    rows=st.lists(
        st.tuples(
            st.integers(0, 4), st.integers(1, 9), st.sampled_from([*CLASSES, "Hernia", "?", "Mass|Nodule"]), plain
        ),
        min_size=1,
        max_size=20,
    ),
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_well_formed_label_file_gives_one_record_per_row(
    tmp_path: Path, delimiter: str, quoting: int, order: list[str], rows: list[tuple[int, int, str, str]]
) -> None:
    touch(tmp_path, *(f"{i}.png" for i in range(4)))  # 4.png is not there
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, order, delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    for image, patient, label, comment in rows:
        writer.writerow({"image": f"{image}.png", "patient": patient, "label": label, "comment": comment})
    (tmp_path / "labels.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    records = read(tmp_path).records
    assert len(records) == len(rows)
    seen: dict[int, set[tuple[int, str | None]]] = {}
    for image, patient, label, _ in rows:
        seen.setdefault(image, set()).add((patient, label if label in CLASSES else None))
    used = {record.path.stem: (int(record.patient), record.label) for record in records if record.label}
    expected = {
        str(image): next(iter(told))
        for image, told in seen.items()
        if image < 4 and len(told) == 1 and next(iter(told))[1] is not None
    }
    assert used == expected


@given(
    data=st.binary(max_size=300),
    head=st.sampled_from([b"", b"image,patient,label\n", b"\xef\xbb\xbfimage;patient;label\r\n"]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_never_raise_anything_but_xfed_errors(tmp_path: Path, data: bytes, head: bytes) -> None:
    (tmp_path / "labels.csv").write_bytes(head + data)
    try:
        records = read(tmp_path).records
    except XfedError:
        return
    assert all(record.label is None for record in records)  # there are no images
