"""The release: every change of every file is found, documents say what is so, and a killed release goes on."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from tests.archives import VERDICT, built, released, report_of
from tests.conftest import tiny
from xfed.common.errors import CheckpointError, IdentityError
from xfed.common.identity import canonical_json
from xfed.server.archive_manifest import DOCUMENTS, inside, open_archive, read_manifest
from xfed.server.archive_release import release_archive
from xfed.server.archive_signature import check_archive, sign_archive, verify_archive
from xfed.server.cli import app
from xfed.server.croissant import croissant

CLASSES = tiny().classes
RDFLIB = pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib.*")  # of what mlcroissant stands on


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a released archive, a passport among its documents."""
    folder = tmp_path_factory.mktemp("release")
    built(folder, per_class=3)
    (folder / "archive" / "passport.html").write_text("<p>a passport</p>\n")
    (folder / "archive" / "passport.json").write_text('{"fid": 1}\n')
    release_archive(folder, report_of(CLASSES), VERDICT)
    return folder


@pytest.fixture
def archive(run: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(run / "archive", tmp_path / "archive"))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _found(folder: Path, name: str) -> bool:
    """Whether the check finds something, and names the file (or says that the manifest, which lists it, changed)."""
    try:
        problems = verify_archive(folder)
    except CheckpointError as error:
        return "manifest" in str(error)
    return any(problem.startswith((name, "manifest")) for problem in problems)


def test_a_released_archive_verifies_and_names_its_signer(run: Path) -> None:
    checked = check_archive(run / "archive")
    assert checked.problems == ()
    manifest = read_manifest(run / "archive")
    assert checked.fingerprint == manifest["signed_by"]
    assert set(manifest["documents"]) == {name for name in DOCUMENTS if "curation" not in name}
    assert stat.S_IMODE((run / "report.key").stat().st_mode) == 0o600
    assert not list((run / "archive").rglob("*.key"))
    assert verify_archive(run / "archive", known_key=checked.fingerprint) == []


def test_any_changed_byte_of_any_file_is_found(archive: Path) -> None:
    """Every file: its first and last byte and eight random ones, each with a random other value, and each single bit once."""
    rng = random.Random(1)
    tried = 0
    for path in _files(archive):
        name, whole = path.relative_to(archive).as_posix(), path.read_bytes()
        places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))}
        changes = [(place, whole[place] ^ rng.randrange(1, 256)) for place in places]
        changes += [(rng.randrange(len(whole)), None) for _ in range(8)]
        for number, (place, value) in enumerate(changes):
            other = whole[place] ^ (1 << number % 8) if value is None else value
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            assert _found(archive, name), (name, place, other)
            tried += 1
        path.write_bytes(whole)
    assert tried > 15 * len(_files(archive))
    assert verify_archive(archive) == []


def test_every_byte_of_the_signature_file_counts(archive: Path) -> None:
    """Also those which JSON and base64 would let pass: spaces, line ends, spare bits."""
    path = archive / "manifest.sig.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for other in {whole[place] ^ 1, whole[place] ^ 4, 0x20, 0x09} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            assert verify_archive(archive), (place, other)
    path.write_bytes(whole)
    assert verify_archive(archive) == []


def test_cut_grown_missing_and_added_files_are_found(archive: Path) -> None:
    for path in _files(archive):
        name, whole = path.relative_to(archive).as_posix(), path.read_bytes()
        for spoilt in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n", whole + b"\0"):
            path.write_bytes(spoilt)
            assert _found(archive, name), (name, len(spoilt))
        path.unlink()
        assert _found(archive, name), name
        path.write_bytes(whole)
    for name in ("images/Normal/extra.png", "README", ".hidden", "images/Other/a.png", "manifest.json.bak"):
        extra = archive / name
        extra.parent.mkdir(exist_ok=True)
        extra.write_bytes(b"x")
        assert verify_archive(archive) == [f"{name}: not in the manifest"]
        extra.unlink()


def test_links_are_found(archive: Path, tmp_path: Path) -> None:
    victim = next((archive / "images" / "Normal").iterdir())
    shutil.move(victim, tmp_path / "elsewhere.png")
    victim.symlink_to(tmp_path / "elsewhere.png")
    assert "a link stands in its place" in " ".join(verify_archive(archive))
    victim.unlink()
    shutil.move(tmp_path / "elsewhere.png", victim)
    (archive / "link").symlink_to(tmp_path)
    assert verify_archive(archive) == ["link: not in the manifest"]


def test_exchanged_images_are_found(archive: Path) -> None:
    """Two images of the archive in each other's place: every digest is in the manifest, at another name."""
    a, b = list((archive / "images" / "Normal").iterdir())[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert len(verify_archive(archive)) == 2


def test_another_signature_over_the_same_manifest_is_found(archive: Path) -> None:
    sign_archive(archive, Ed25519PrivateKey.generate())
    (problem,) = verify_archive(archive)
    assert "exchanged" in problem


def test_a_signature_of_another_archive_or_of_a_report_is_found(archive: Path, run: Path, tmp_path: Path) -> None:
    other = released(tmp_path / "other", per_class=2)
    shutil.copy(other / "manifest.sig.json", archive / "manifest.sig.json")
    assert any("not the file that was signed" in problem for problem in verify_archive(archive))
    values = json.loads((run / "archive" / "manifest.sig.json").read_text())
    del values["sig"]
    key = Ed25519PrivateKey.generate()
    values["public_key"] = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    as_report = {**values, "sig": base64.b64encode(key.sign(b"xfed report v1\n" + canonical_json(values))).decode()}
    (archive / "manifest.sig.json").write_text(json.dumps(as_report, indent=2) + "\n")
    assert any("does not fit" in problem for problem in verify_archive(archive))


def test_a_whole_forgery_is_told_from_the_real_one_by_the_fingerprint(run: Path, tmp_path: Path) -> None:
    forged = released(tmp_path, per_class=3)
    assert verify_archive(forged) == []  # whole in itself
    real = check_archive(run / "archive").fingerprint
    (problem,) = verify_archive(forged, known_key=real)
    assert f"not by {real}" in problem


def test_an_unsigned_archive_passes_only_when_that_is_said(tmp_path: Path) -> None:
    folder = built(tmp_path, per_class=2)
    (problem,) = verify_archive(folder)
    assert "not signed" in problem
    assert verify_archive(folder, unsigned=True) == []
    assert verify_archive(folder, unsigned=True, known_key="SHA256:x")
    assert check_archive(folder, unsigned=True).fingerprint is None


def test_a_signature_that_was_taken_away_is_missed(archive: Path) -> None:
    """Whoever says --unsigned still learns that this archive was signed once."""
    (archive / "manifest.sig.json").unlink()
    assert verify_archive(archive, unsigned=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "images/../../secret", "a\\b", "", ".", "images//a.png"])
def test_names_that_leave_the_archive_are_refused(archive: Path, name: str) -> None:
    assert not inside(name)
    manifest = json.loads((archive / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (archive / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="files lists"):
        verify_archive(archive)


def test_metadata_that_names_other_files_is_refused(archive: Path) -> None:
    rows = (archive / "metadata.csv").read_text().replace("images/Normal", "../Normal")
    (archive / "metadata.csv").write_text(rows)
    with pytest.raises(CheckpointError, match="no image of the manifest"):
        open_archive(archive)


def test_releasing_again_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in _files(run / "archive")}
    release_archive(run, report_of(CLASSES), VERDICT)
    assert {path: path.read_bytes() for path in _files(run / "archive")} == before


def test_a_changed_document_is_signed_anew_and_the_root_stays(tmp_path: Path) -> None:
    folder = released(tmp_path, per_class=2)
    before = {**read_manifest(folder), "released": "2018-04-15T09:30:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(before))
    (folder / "passport.html").write_text("new")
    assert "passport.html: not in the manifest" in verify_archive(folder)
    after = release_archive(tmp_path, report_of(CLASSES), VERDICT)
    assert verify_archive(folder) == []
    assert after["root_sha256"] == before["root_sha256"]
    assert after["released"] == before["released"]
    assert "passport.html" in after["documents"]


def test_an_archive_that_changed_since_it_was_built_is_not_signed(tmp_path: Path) -> None:
    folder = built(tmp_path, per_class=2)
    victim = next((folder / "images" / "Normal").iterdir())
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="not as it was built"):
        release_archive(tmp_path, report_of(CLASSES), VERDICT)
    assert not (folder / "manifest.sig.json").exists()


def test_a_damaged_key_is_said(tmp_path: Path) -> None:
    built(tmp_path, per_class=2)
    (tmp_path / "report.key").write_text("no key")
    (tmp_path / "report.key").chmod(0o600)
    with pytest.raises(IdentityError, match="damaged"):
        release_archive(tmp_path, report_of(CLASSES), VERDICT)


def test_killed_at_any_write_the_release_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a kill leaves behind verifies, and the same call ends as the unbroken one."""
    wanted = released(tmp_path / "whole", per_class=2)
    (tmp_path / "whole" / "report.key").chmod(0o600)
    real, states = os.fsync, 0
    for stop in range(1, 40):
        folder = tmp_path / f"killed-{stop}"
        archive = built(folder, per_class=2)
        shutil.copy2(tmp_path / "whole" / "report.key", folder / "report.key")
        calls = 0

        def fsync(handle: int, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            release_archive(folder, report_of(CLASSES), VERDICT)
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(os, "fsync", real)
        if not finished:
            states += 1
            # the last fsync is that of the folder, after the signature has its name
            assert verify_archive(archive) or (archive / "manifest.sig.json").exists()
            (archive / ".manifest.json.tmp").write_text("half")  # what SIGKILL would leave
        release_archive(folder, report_of(CLASSES), VERDICT)
        assert verify_archive(archive) == []
        same = {"root_sha256", "counts", "files", "about", "signed_by"}
        assert {k: v for k, v in read_manifest(archive).items() if k in same} == {
            k: v for k, v in read_manifest(wanted).items() if k in same
        }
        shutil.rmtree(folder)
        if finished:
            break
    else:  # pragma: no cover
        raise AssertionError("the release has more writes than were tried")
    assert states >= 6


@RDFLIB
def test_croissant_is_valid_and_gives_every_record(run: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    dataset = mlcroissant.Dataset(str(run / "archive" / "croissant.json"))
    assert dataset.metadata.issues.errors == set()
    assert dataset.metadata.issues.warnings == set()
    assert dataset.metadata.ctx.conforms_to.value == "http://mlcommons.org/croissant/1.0"
    records = list(dataset.records("images"))
    rows = open_archive(run / "archive").rows
    assert [record["images/file_name"].decode() for record in records] == sorted(row["file_name"] for row in rows)
    by_name = {row["file_name"]: row for row in rows}
    for record in records:
        row = by_name[record["images/file_name"].decode()]
        assert record["images/label"].decode() == row["label"]
        assert record["images/seed"].decode() == row["seed"]
        assert record["images/contrast"] == float(row["contrast"])
        assert record["images/image"].size == (32, 32)


@RDFLIB
def test_croissant_that_is_broken_is_told(run: Path, tmp_path: Path) -> None:
    """The validation can fail: a record that names no file set is an error."""
    mlcroissant = pytest.importorskip("mlcroissant")
    values = croissant(read_manifest(run / "archive"))
    values["recordSet"][0]["field"][1]["source"]["fileSet"]["@id"] = "nothing"
    (tmp_path / "croissant.json").write_text(json.dumps(values))
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(str(tmp_path / "croissant.json"))


def test_the_datasheet_says_what_is_so(run: Path) -> None:
    text = (run / "archive" / "datasheet.md").read_text()
    for heading in ("Motivation", "Composition", "Collection", "Preprocessing", "Uses", "Distribution", "Maintenance"):
        assert f"\n## {heading}" in text
    manifest = read_manifest(run / "archive")
    assert manifest["privacy"] in text
    assert "| Normal | 3 | 3 | 3 | 0 |" in text
    assert "120 patients of 2 hospitals" in text
    assert VERDICT in text
    assert "| Normal | 12.5 | 3.25 | 0.5 |" in text  # KID was not measured: it has no column
    assert manifest["root_sha256"] in text
    assert "No attack on this archive was measured" in text
    assert "not stated" in text
    assert "{{" not in text
    assert "None" not in text


def test_the_datasheet_tells_vetoes_and_attacks_and_what_was_measured_before(tmp_path: Path) -> None:
    folder = built(tmp_path, per_class=2)
    manifest = read_manifest(folder)
    vetoes = {"sites": 3, "images": 9, "vetoed": 3, "vetoed_per_class": {"Normal": 3, "Cardiomegaly": 0}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "vetoes": vetoes}))
    report = report_of(CLASSES)
    report["archive"] |= {
        "root_sha256": "ab" * 32,
        "privacy_tests": {"vote": {"statement": "three hospitals voted."}, "membership": {"left_out": "by the study."}},
    }
    release_archive(tmp_path, report, VERDICT)
    text = (folder / "datasheet.md").read_text()
    assert (
        "3 hospitals compared the images with their patients'; 3 of 9 were too near to one and are left out (Normal 3)"
        in text
    )
    assert "- vote: three hospitals voted." in text
    assert "- membership: by the study." in text
    assert f"root `{'ab' * 8}`, **before images were taken out**" in text


def test_a_datasheet_without_any_facts_says_so(tmp_path: Path) -> None:
    built(tmp_path, per_class=2)
    release_archive(tmp_path, {"source": "phantom"}, "")
    text = (tmp_path / "archive" / "datasheet.md").read_text()
    assert "an unstated number of hospitals" in text
    assert "phantoms" in text
    assert "Not measured." in text
    assert "None" not in text


def test_the_command_verifies(run: Path, archive: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["archive", "verify", *arguments])

    fingerprint = str(check_archive(archive).fingerprint)
    good = call(str(archive))
    assert good.exit_code == 0
    assert "untouched" in good.output
    assert fingerprint in good.output
    assert call(str(archive), "--key", fingerprint).exit_code == 0
    assert "not by SHA256:other" in str(call(str(archive), "--key", "SHA256:other").exception)
    values = json.loads(call(str(archive), "--json").output)
    assert values == {
        "untouched": True,
        "problems": [],
        "fingerprint": fingerprint,
        "signed_at": values["signed_at"],
    }
    (archive / "metadata.csv").write_text("x")
    bad = call(str(archive))
    assert isinstance(bad.exception, CheckpointError)
    assert "metadata.csv: changed" in str(bad.exception)
    assert json.loads(call(str(archive), "--json").output)["problems"] == ["metadata.csv: changed"]
    assert isinstance(call(str(run)).exception, CheckpointError)  # no archive at all
