"""Which image belongs to which patient and class, from the layouts people have.

::

    SOURCE --(client/source_files.py)----+
                                         +--> records: path, patient, class | reason --> importing
    labels CSV --(client/tables.py)------+

Three layouts: `nih` (ChestX-ray14: `Image Index`, `Finding Labels`, `Patient ID`), `csv` (any columns), `folders` (one
folder per class). `auto` decides and says so. Nothing is skipped silently: an image that is not used has a reason, and
a reason is a fixed phrase without any name in it, so that it may be counted and shown; `detail` says the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xfed.client.source_files import SourceFiles, has_image_name, list_files
from xfed.client.tables import Table, read_table
from xfed.common.errors import ConfigError, DataError

__all__ = ["Labelled", "Record", "find_label_file", "read_labels", "resolve_label"]

NIH_FINDINGS = {"nofinding": "Normal", "effusion": "Pleural Effusion", "edema": "Pulmonary Edema"}
_LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "labels.csv")
_IMAGE_COLUMNS = ("Image Index", "image", "filename", "file", "path", "image_path", "file_name", "image_id")
_PATIENT_COLUMNS = ("Patient ID", "patient", "patient_id", "PatientID", "subject_id", "subject")
_LABEL_COLUMNS = ("label", "class", "Finding Labels", "finding", "diagnosis", "target")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image: `label` is a class, or None with a `reason`; `fault`: somebody should look at the reason."""

    path: Path
    patient: str
    label: str | None
    reason: str = ""
    detail: str = ""
    fault: bool = False
    lateral: bool = False


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Everything a layout told. `layout` is what was decided; `notes` are for the person at the terminal only."""

    layout: str
    records: tuple[Record, ...]
    notes: tuple[str, ...]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def resolve_label(text: str, classes: Sequence[str], label_map: Mapping[str, str]) -> tuple[str | None, str]:
    """The class that a label as written stands for, or None with the reason.

    Several findings may be joined by ``|``. Each is looked up in `label_map`, then among the classes (case, spaces,
    ``_`` and ``-`` do not count), then among NIH's names. Findings that are no class are ignored as long as one is.
    """
    names = {_plain(name): name for name in classes}
    mapped = {_plain(key): value for key, value in label_map.items()}
    found = []
    whole = text.strip()
    for part in [whole] if _plain(whole) in names or _plain(whole) in mapped else whole.split("|"):
        key = _plain(part)
        name = mapped.get(key) or names.get(key) or names.get(_plain(NIH_FINDINGS.get(key, "")))
        if name is not None and name not in found:
            found.append(name)
    if len(found) == 1:
        return found[0], ""
    if not whole:
        return None, "has no label"
    return None, "carries several of the classes" if found else "carries none of the classes"


def read_labels(
    source: Path,
    *,
    layout: str = "auto",
    labels: Path | None = None,
    classes: Sequence[str],
    image_column: str | None = None,
    patient_column: str | None = None,
    label_column: str | None = None,
    label_map: Mapping[str, str] | None = None,
    patient_pattern: str | None = None,
) -> Labelled:
    """Read the layout of `source`. Records are in the order of the label file, or of the paths for `folders`.

    `labels` is a path, or relative to `source`; without it `Data_Entry_2017.csv`, `labels.csv` or the only CSV file is
    taken. `patient_pattern` (folders only) is a regular expression with one group that takes the patient out of a file
    name; without it the part before the first ``_`` is taken. Raises `DataError` (nothing to read) or `ConfigError` (a
    wrong option).
    """
    label_map = label_map or {}
    for key, value in label_map.items():
        if value not in classes:
            raise ConfigError(f"--map {key!r}={value!r}: the classes are {', '.join(classes)}")
    if layout not in {"auto", "nih", "folders", "csv"}:
        raise ConfigError(f"layout {layout!r} is not known; choose auto, nih, folders or csv")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Give the folder that holds the images.")
    table_path = None if layout == "folders" else find_label_file(source, labels, required=layout != "auto")
    files = list_files(source)
    if table_path is None:
        return _read_folders(source, files, classes, label_map, patient_pattern, decided=layout == "auto")
    table = read_table(table_path)
    notes = []
    if layout == "auto":
        nih = table.find("Image Index") is not None and image_column is None
        layout = "nih" if nih else "csv"
        notes.append(f"layout: {layout} (from the columns of {table_path.name})")
    if layout == "nih":
        image_column = image_column or "Image Index"
        patient_column = patient_column or "Patient ID"
        label_column = label_column or ("label" if table.find("label") is not None else "Finding Labels")
    columns = (
        table.column(image_column, _IMAGE_COLUMNS, "--image-column"),
        table.column(patient_column, _PATIENT_COLUMNS, "--patient-column"),
        table.column(label_column, _LABEL_COLUMNS, "--label-column"),
    )
    return _read_rows(table, columns, files, layout, classes, label_map, notes)


def find_label_file(source: Path, labels: Path | None, *, required: bool) -> Path | None:
    """The label file of a folder of images: `labels`, or the one with a known name, or the only CSV. Raises `DataError`."""
    if labels is not None:
        for path in (labels, source / labels):
            if path.is_file():
                return path
        raise DataError(f"{labels}: there is no such label file, neither here nor in {source}")
    found = sorted(path for path in source.glob("*.csv") if path.is_file() and not path.name.startswith("."))
    by_name = {path.name: path for path in found}
    known = [by_name[name] for name in _LABEL_FILES if name in by_name]
    if known or len(found) == 1:
        return (known or found)[0]
    if found:
        raise DataError(f"{source} holds several CSV files ({', '.join(by_name)}); say which with --labels")
    if required:
        raise DataError(f"{source} holds no label file. Give one with --labels, or use --layout folders.")
    return None


def _read_rows(
    table: Table,
    columns: tuple[int, int, int],
    files: SourceFiles,
    layout: str,
    classes: Sequence[str],
    label_map: Mapping[str, str],
    notes: list[str],
) -> Labelled:
    view = table.find("View Position")
    unmapped: Counter[str] = Counter()
    records: list[Record] = []
    position: dict[Path, int] = {}  # of the record that an image has already
    for line, row in table.rows:
        if len(row) <= max(columns):
            name = row[columns[0]] if len(row) > columns[0] else ""
            detail = f"line {line} has {len(row)} fields, the header {len(table.header)}"
            records.append(
                Record(
                    path=Path(name),
                    patient="",
                    label=None,
                    reason="row is too short",
                    detail=detail,
                    fault=True,
                )
            )
            continue
        name, patient, text = (row[column].strip() for column in columns)
        path, reason, detail = files.find(name)
        label = None
        if path is not None and not patient:
            reason, detail = "patient is missing", f"line {line}"
        fault = bool(reason)
        if not fault:
            label, reason = resolve_label(text, classes, label_map)
            if reason == "carries none of the classes":
                unmapped[text] += 1
        lateral = view is not None and len(row) > view and row[view].strip().upper() in {"LL", "RL", "LATERAL"}
        record = Record(
            path=path or Path(name),
            patient=patient,
            label=label,
            reason=reason,
            detail=detail,
            fault=fault,
            lateral=lateral,
        )
        if path is None or path not in position:
            if path is not None:
                position[path] = len(records)
            records.append(record)
            continue
        earlier = records[position[path]]
        if (earlier.patient, earlier.label, earlier.reason) == (patient, label, reason):
            records.append(Record(path=path, patient=patient, label=None, reason="listed more than once"))
        else:
            detail = f"line {line} says otherwise than an earlier line"
            reason = "listed with different labels or patients"
            records[position[path]] = Record(
                path=path, patient=earlier.patient, label=None, reason=reason, detail=detail, fault=True
            )
            records.append(Record(path=path, patient=patient, label=None, reason="listed more than once"))
    unlisted = sum(1 for path in files.paths.values() if has_image_name(path) and path.suffix and path not in position)
    if unlisted:
        notes.append(f"{unlisted:,} images under the source are not in the label file and were not looked at")
    if unmapped:
        shown = ", ".join(f"{text!r:.60} ({count:,})" for text, count in unmapped.most_common(8))
        notes.append(f"labels that are no class (use --map 'label=Class' to map one): {shown}")
    return Labelled(layout=layout, records=tuple(records), notes=tuple(notes))


def _read_folders(
    source: Path,
    files: SourceFiles,
    classes: Sequence[str],
    label_map: Mapping[str, str],
    patient_pattern: str | None,
    *,
    decided: bool,
) -> Labelled:
    try:
        pattern = re.compile(patient_pattern or r"^(.+?)(?:_|\.[^.]*$|$)")
    except re.error as error:
        raise ConfigError(f"--patient-pattern {patient_pattern!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise ConfigError(f"--patient-pattern {patient_pattern!r} needs exactly one group, for instance '^(P[0-9]+)-'")
    folders = {relative.split("/")[0] for relative in files.paths if "/" in relative}
    by_folder = {folder: resolve_label(folder, classes, label_map)[0] for folder in sorted(folders)}
    if not any(by_folder.values()):
        raise DataError(
            f"{source} holds neither a label file nor a folder named like a class ({', '.join(classes)}). "
            "Give the label file with --labels, or map folder names with --map 'folder=Class'."
        )
    notes = ["layout: folders (one folder per class)"] if decided else []
    if patient_pattern is None:
        notes.append(
            "patients are guessed from file names (the part before the first '_'); if that is wrong, images of one "
            "patient land in different splits: give --patient-pattern or a label file with a patient column"
        )
    if strange := [folder for folder, label in by_folder.items() if label is None]:
        notes.append(f"folders that are no class (use --map 'folder=Class'): {', '.join(map(repr, strange[:8]))}")
    records = []
    for relative, path in sorted(files.paths.items()):
        label = by_folder.get(relative.split("/")[0]) if "/" in relative else None
        match = pattern.search(path.name)
        patient = (match.group(1) or "").strip() if match else ""
        reason, detail, fault = "", "", False
        if not has_image_name(path):
            reason = "is not named like an image"
        elif label is None:
            reason = "carries none of the classes"
        elif not patient:
            reason, detail, fault = "patient is missing", "the pattern does not match the file name", True
        records.append(
            Record(
                path=path,
                patient=patient,
                label=None if reason else label,
                reason=reason,
                detail=detail,
                fault=fault,
            )
        )
    return Labelled(layout="folders", records=tuple(records), notes=tuple(notes))
