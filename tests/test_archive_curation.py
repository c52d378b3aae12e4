"""Curation: what was rejected is left out, who decided is written down, and the curated archive verifies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.archives import VERDICT, released, report_of
from tests.conftest import tiny
from xfed.common.decision_log import DecisionLog
from xfed.common.errors import CheckpointError, ConfigError, DataError
from xfed.server.archive import read_archive
from xfed.server.archive_curation import curate_archive
from xfed.server.archive_manifest import open_archive, read_manifest
from xfed.server.archive_release import release_archive
from xfed.server.archive_signature import check_archive, verify_archive
from xfed.server.cli import app

CLASSES = tiny().classes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curation")
    released(folder, 4)
    return folder


@pytest.fixture
def archive(run: Path, tmp_path: Path) -> Path:
    shutil.copy2(run / "report.key", tmp_path / "report.key")
    return Path(shutil.copytree(run / "archive", tmp_path / "archive"))


def _names(archive: Path) -> list[str]:
    return [row["file_name"] for row in open_archive(archive).rows]


def _log(archive: Path, path: Path, reader: str, *decisions: tuple[int, str]) -> Path:
    """A log with decisions on images by their place: an empty reason accepts."""
    manifest = read_manifest(archive)
    log = DecisionLog(path, {name: manifest[name] for name in ("name", "study", "root_sha256")})
    names = _names(archive)
    for place, reason in decisions:
        name = names[place]
        verdict = "reject" if reason else "accept"
        log.append(name, verdict, reason, reader=reader, sha256=manifest["files"][name])
    return path


def test_rejected_images_are_left_out_and_everything_is_written_down(archive: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    names = _names(archive)
    log = _log(
        archive,
        tmp_path / "a.jsonl",
        "Dr A",
        (0, "blurred"),
        (1, ""),
        (2, "wrong class"),
        (2, ""),  # thought again: the last one counts
        (5, ""),
        (5, "blurred"),
        (9, "duplicate"),
    )
    out = tmp_path / "curated"
    manifest = curate_archive(archive, [log], out, key=tmp_path / "report.key")
    gone = {names[0], names[5], names[9]}
    assert _names(out) == [name for name in names if name not in gone]
    assert verify_archive(out, known_key=check_archive(archive).fingerprint) == []
    assert {path: path.read_bytes() for path in archive.rglob("*") if path.is_file()} == before
    source = read_manifest(archive)
    assert manifest == read_manifest(out)
    assert manifest["root_sha256"] != source["root_sha256"]
    assert manifest["counts"] == {"Cardiomegaly": 3, "Normal": 3, "Pleural Effusion": 3}
    curation = manifest["curation"]
    assert curation["readers"] == ["Dr A"]
    assert curation["first"] <= curation["last"]
    assert (curation["decided"], curation["rejected"], curation["undecided"], curation["kept"]) == (5, 3, 7, 9)
    assert curation["reasons"] == "blurred 2, duplicate 1"
    assert curation["rejected_per_class"] == {"Cardiomegaly": 1, "Normal": 1, "Pleural Effusion": 1}
    assert curation["source_root_sha256"] == source["root_sha256"]
    assert curation["logs"][0]["lines"] == 8
    text = (out / "datasheet.md").read_text()
    assert "3 of 12 images were rejected and left out by 1 reader; 7 were not looked at and kept" in text
    assert "before images were taken out" in text
    assert read_archive(out, CLASSES)[0].shape == (9, 32, 32)
    rows = {row["file_name"]: row for row in open_archive(archive).rows}
    assert all(dict(row) == rows[row["file_name"]] for row in open_archive(out).rows)


def test_two_readers_what_either_rejects_goes(archive: Path, tmp_path: Path) -> None:
    a = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"), (1, ""), (2, ""))
    b = _log(archive, tmp_path / "b.jsonl", "B", (0, ""), (1, ""), (2, "blurred"))
    curation = curate_archive(archive, [a, b], tmp_path / "out", key=tmp_path / "report.key")["curation"]
    assert (curation["rejected"], curation["disagreements"], curation["readers"]) == (2, 2, ["A", "B"])
    assert len({log["key"] for log in curation["logs"]}) == 2


def test_only_what_was_accepted(archive: Path, tmp_path: Path) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"), (1, ""), (7, ""))
    manifest = curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key", accepted_only=True)
    assert _names(tmp_path / "out") == [_names(archive)[1], _names(archive)[7]]
    assert manifest["counts"] == {"Cardiomegaly": 1, "Normal": 1, "Pleural Effusion": 0}
    assert "left out too" in manifest["curation"]["summary"]


def test_a_withdrawn_decision_does_not_count(archive: Path, tmp_path: Path) -> None:
    path = _log(archive, tmp_path / "a.jsonl", "A", (1, ""), (0, "blurred"))
    log = DecisionLog(path, {name: read_manifest(archive)[name] for name in ("name", "study", "root_sha256")})
    assert log.withdraw("A") is not None
    assert curate_archive(archive, [path], tmp_path / "out", key=tmp_path / "report.key")["curation"]["rejected"] == 0


def test_it_can_be_curated_again_and_the_passport_is_taken_along_as_what_it_is(archive: Path, tmp_path: Path) -> None:
    (archive / "passport.html").write_text("<p>figures</p>")
    release_archive(tmp_path, report_of(CLASSES), VERDICT)
    first = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"))
    once = curate_archive(archive, [first], tmp_path / "once", key=tmp_path / "report.key")
    assert "passport.html" not in once["documents"]
    assert (tmp_path / "once" / "passport-before-curation.html").read_text() == "<p>figures</p>"
    second = _log(tmp_path / "once", tmp_path / "b.jsonl", "B", (0, "blurred"))
    twice = curate_archive(tmp_path / "once", [second], tmp_path / "twice", key=tmp_path / "report.key")
    assert verify_archive(tmp_path / "twice") == []
    assert twice["curation"]["source_root_sha256"] == once["root_sha256"]
    assert "passport-before-curation.html" in twice["documents"]
    assert len(_names(tmp_path / "twice")) == 10


def test_a_changed_log_is_refused(archive: Path, tmp_path: Path) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"), (1, ""))
    log.write_bytes(log.read_bytes().replace(b'"accept"', b'"reject"').replace(b'"reason":""', b'"reason":"x"'))
    with pytest.raises(CheckpointError, match="not whole"):
        curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")
    assert not (tmp_path / "out").exists()


def test_a_log_of_another_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    other = released(tmp_path / "other", 4, seed=7)
    log = _log(other, tmp_path / "a.jsonl", "A", (0, "blurred"))
    with pytest.raises(DataError, match="another archive"):
        curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")


def test_decisions_about_other_pixels_are_refused(archive: Path, tmp_path: Path) -> None:
    manifest = read_manifest(archive)
    log = DecisionLog(tmp_path / "a.jsonl", {name: manifest[name] for name in ("name", "study", "root_sha256")})
    log.append(_names(archive)[0], "reject", "blurred", reader="A", sha256="0" * 64)
    with pytest.raises(DataError, match="was another image"):
        curate_archive(archive, [tmp_path / "a.jsonl"], tmp_path / "out", key=tmp_path / "report.key")
    empty = DecisionLog(tmp_path / "b.jsonl", {name: manifest[name] for name in ("name", "study", "root_sha256")})
    assert empty.head[0] == 1
    with pytest.raises(DataError, match="decides about no image"):
        curate_archive(archive, [tmp_path / "b.jsonl"], tmp_path / "out", key=tmp_path / "report.key")


def test_nothing_left_is_said(archive: Path, tmp_path: Path) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", *((place, "blurred") for place in range(12)))
    with pytest.raises(DataError, match="no image is left"):
        curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")


def test_a_changed_archive_is_not_curated(archive: Path, tmp_path: Path) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"))
    (archive / "datasheet.md").write_text("all is well")
    with pytest.raises(CheckpointError, match=r"datasheet\.md: changed"):
        curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")


@pytest.mark.parametrize("place", ["archive/my.key", "out/my.key"])
def test_a_key_never_lies_in_an_archive(archive: Path, tmp_path: Path, place: str) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"))
    with pytest.raises(ConfigError, match="must never lie"):
        curate_archive(archive, [log], tmp_path / "out", key=tmp_path / place)


def test_a_curation_that_was_cut_short_leaves_nothing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"))

    def cut(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("xfed.server.archive_curation.publish", cut)
        with pytest.raises(KeyboardInterrupt):
            curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")
    assert not (tmp_path / "out").exists()
    curate_archive(archive, [log], tmp_path / "out", key=tmp_path / "report.key")
    assert verify_archive(tmp_path / "out") == []


def test_the_command_curates(archive: Path, tmp_path: Path) -> None:
    a = _log(archive, tmp_path / "a.jsonl", "A", (0, "blurred"))
    b = _log(archive, tmp_path / "b.jsonl", "B", (3, "blurred"))
    arguments = ["archive", "curate", str(archive), "--decisions", str(a), "--decisions", str(b), "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["curation"]["rejected"] == 2
    assert verify_archive(tmp_path / "out", known_key=check_archive(archive).fingerprint) == []
    (tmp_path / "report.key").unlink()
    refused = CliRunner().invoke(app, [*arguments, str(tmp_path / "two")])
    assert "--signing-key" in str(refused.exception)
    again = CliRunner().invoke(app, [*arguments, str(tmp_path / "two"), "--signing-key", str(tmp_path / "mine.key")])
    assert again.exit_code == 0, again.output
    assert verify_archive(tmp_path / "two") == []
    assert check_archive(tmp_path / "two").fingerprint != check_archive(archive).fingerprint
