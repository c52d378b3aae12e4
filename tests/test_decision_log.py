"""A log of decisions: whole after any kill, and every change of it is found."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common import decision_log as module
from xfed.common.decision_lines import Decision, DecisionChain, key_text, write_line
from xfed.common.decision_log import DecisionLog, read_decisions, read_log, verify
from xfed.common.errors import CheckpointError, ConfigError, IdentityError, StorageError
from xfed.common.signing_key import fingerprint, signing_key

ARCHIVE = {"name": "tiny", "study": "5" * 64, "root_sha256": "a" * 64}


def _log(folder: Path) -> DecisionLog:
    return DecisionLog(folder / "anna.jsonl", ARCHIVE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of six lines: four decisions of two readers, and one withdrawal."""
    log = _log(tmp_path)
    log.append("images/Normal/normal-1.png", "accept", "", reader="Änna", sha256="1" * 64)
    log.append("images/Normal/normal-2.png", "reject", "wrong class", reader="Änna", sha256="2" * 64)
    log.append("images/Normal/normal-1.png", "reject", "duplicate", reader="Änna")
    log.append("images/Normal/normal-2.png", "accept", "", reader="Bo")
    assert log.withdraw("Änna") is not None
    return tmp_path / "anna.jsonl"


# --- what it says


def test_decisions_come_back_in_order_and_withdrawn_ones_do_not(path: Path) -> None:
    found = [(one.image[-5:-4], one.verdict, one.reason, one.reader) for one in read_decisions(path)]
    assert found == [("1", "accept", "", "Änna"), ("2", "reject", "wrong class", "Änna"), ("2", "accept", "", "Bo")]
    facts = read_log(path)
    assert facts.archive == ARCHIVE
    assert facts.head[0] == 6
    assert facts.decisions[0].sha256 == "1" * 64
    assert facts.decisions[0].time.endswith("+00:00")
    assert verify(path) == []


def test_a_withdrawal_takes_the_readers_last_standing_decision_each_time(path: Path) -> None:
    log = _log(path.parent)
    assert [log.withdraw("Änna"), log.withdraw("Änna"), log.withdraw("Änna"), log.withdraw("nobody")][2:] == [
        None,
        None,
    ]
    assert [one.reader for one in log.decisions()] == ["Bo"]
    assert verify(path) == []


def test_the_key_and_the_log_are_the_owners_alone(path: Path) -> None:
    assert {stat.S_IMODE(one.stat().st_mode) for one in (path, path.with_suffix(".key"))} == {0o600}
    key = signing_key(path.with_suffix(".key"))
    first = json.loads(path.read_bytes().splitlines()[0])
    assert first["public_key"] == key_text(key.public_key())
    assert read_log(path).fingerprint == fingerprint(key.public_key()) == _log(path.parent).fingerprint


def test_a_decision_is_on_disk_before_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _log(tmp_path)
    order: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file))[1])
    log.append("a.png", "accept", "", reader="a")
    assert order == ["fsync"]


@pytest.mark.parametrize(
    "values",
    [
        ("a.png", "maybe", ""),
        ("a.png", "accept", "why"),
        ("a.png", "reject", ""),
        ("a.png", "reject", " "),
        ("", "accept", ""),
        ("a\nb.png", "accept", ""),
        ("a.png", "reject", "x\ny"),
        ("a.png", "reject", "x" * 501),
    ],
)
def test_what_is_no_decision_is_not_written(tmp_path: Path, values: tuple[str, str, str]) -> None:
    log = _log(tmp_path)
    before = (tmp_path / "anna.jsonl").read_bytes()
    with pytest.raises(ConfigError):
        log.append(*values, reader="a")
    with pytest.raises(ConfigError):
        log.append("a.png", "accept", "", reader="")
    assert (tmp_path / "anna.jsonl").read_bytes() == before


# --- what is found


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_every_changed_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    last_newline = len(whole) - 1
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1, 0x20, 0x80)[at % 3]]) + whole[at + 1 :])
        assert verify(path), (at, whole[at : at + 1])
        if at % 5 == 0 and at != last_newline:  # without its end the last line is torn: passed over, and verify says so
            with pytest.raises(CheckpointError):
                read_decisions(path)


def test_a_signature_written_otherwise_is_found(path: Path) -> None:
    # the last character of the base64 of 64 bytes carries four bits that decode to nothing
    lines = _lines(path)
    entry = json.loads(lines[-1])
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = alphabet[alphabet.index(entry["sig"][-3]) ^ 1]
    twisted = entry["sig"][:-3] + other + "=="
    assert base64.b64decode(twisted) == base64.b64decode(entry["sig"])
    path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(entry["sig"].encode(), twisted.encode()))
    assert "forged" in verify(path)[0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda lines: lines[:2] + lines[3:], "gap"),
        (lambda lines: lines[1:], "first line"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "gap"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "rewrite"),
        (lambda lines: [*lines, lines[0]], "first line"),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], "changed"),
        (lambda lines: [*lines[:2], b" " + lines[2], *lines[3:]], "changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b":", b": ", 1), *lines[3:]], "changed"),
        (lambda lines: [*lines[:2], b"[" * 9000 + b"\n", *lines[3:]], "changed"),
        (lambda lines: [*lines[:2], b"x" * 20_000 + b"\n", *lines[3:]], "changed"),
    ],
)
def test_lines_taken_out_put_in_and_moved_are_found(
    path: Path, change: Callable[[list[bytes]], list[bytes]], word: str
) -> None:
    path.write_bytes(b"".join(change(_lines(path))))
    assert word in verify(path)[0]
    with pytest.raises(CheckpointError, match=word):
        read_decisions(path)
    with pytest.raises(CheckpointError, match=word):
        _log(path.parent)


def test_a_fork_and_a_foreign_signature_are_found(path: Path) -> None:
    lines, key = _lines(path), signing_key(path.with_suffix(".key"))
    fields = {"image": "x.png", "sha256": "", "verdict": "accept", "reason": "", "reader": "Änna"}
    path.write_bytes(b"".join(lines) + write_line("decision", fields, (6, "0" * 64), key))
    assert "fork" in verify(path)[0]
    head = (6, json.loads(lines[-1])["hash"])
    path.write_bytes(b"".join(lines) + write_line("decision", fields, head, Ed25519PrivateKey.generate()))
    assert "forged" in verify(path)[0]
    path.write_bytes(b"".join(lines) + write_line("decision", fields, head, key))
    assert verify(path) == []


def test_a_line_that_its_key_signed_is_still_weighed(path: Path) -> None:
    lines, key = _lines(path), signing_key(path.with_suffix(".key"))
    head = (6, json.loads(lines[-1])["hash"])
    for kind, fields in [
        ("withdrawal", {"withdraws": 4, "reader": "Änna"}),  # withdrawn before
        ("withdrawal", {"withdraws": 5, "reader": "Änna"}),  # Bo's
        ("withdrawal", {"withdraws": True, "reader": "Änna"}),
        ("decision", {"image": "x", "sha256": "", "verdict": "maybe", "reason": "", "reader": "Änna"}),
        ("decision", {"image": "x", "sha256": "", "verdict": "accept", "reason": "", "reader": "Änna", "more": 1}),
        ("decision", {"image": 7, "sha256": "", "verdict": "accept", "reason": "", "reader": "Änna"}),
        ("praise", {"reader": "Änna"}),
    ]:
        path.write_bytes(b"".join(lines) + write_line(kind, fields, head, key))
        assert "line 7" in verify(path)[0], (kind, fields)


def test_lines_cut_off_at_the_end_are_found_by_who_noted_the_head(path: Path) -> None:
    facts = read_log(path)
    path.write_bytes(b"".join(_lines(path)[:-1]))
    assert verify(path) == []
    assert "lines are gone" in verify(path, known_head=facts.head)[0]
    assert verify(path, known_head=read_log(path).head, known_fingerprint=facts.fingerprint) == []


def test_a_log_made_anew_is_found_by_who_noted_the_key(path: Path, tmp_path: Path) -> None:
    known = read_log(path).fingerprint
    other = DecisionLog(tmp_path / "other" / "anna.jsonl", ARCHIVE)
    assert "made anew" in verify(tmp_path / "other" / "anna.jsonl", known_fingerprint=known)[0]
    assert other.fingerprint != known


def test_what_is_no_log_is_said(tmp_path: Path) -> None:
    for name, content in (("none", None), ("empty", b""), ("torn", b'{"archive"'), ("text", b"hello\n")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            read_decisions(tmp_path / name)
        assert verify(tmp_path / name)


# --- power cuts, other processes, other archives, other keys


def test_a_kill_at_any_byte_leaves_all_whole_decisions(path: Path, tmp_path: Path) -> None:
    whole, ends = path.read_bytes(), [0]
    for line in _lines(path):
        ends.append(ends[-1] + len(line))
    decided = {end: [] if at == 0 else _decisions(whole[:end]) for at, end in enumerate(ends)}
    key = path.with_suffix(".key").read_bytes()
    for cut in range(1, len(whole), 17):
        place = tmp_path / f"cut-{cut}"
        place.mkdir()
        (place / "anna.jsonl").write_bytes(whole[:cut])
        (place / "anna.key").write_bytes(key)
        (place / "anna.key").chmod(0o600)
        end = max(one for one in ends if one <= cut)
        log = _log(place)
        assert log.decisions() == decided[end]
        log.append("new.png", "accept", "", reader="Bo")
        assert verify(place / "anna.jsonl") == []
        kinds = [json.loads(line)["kind"] for line in _lines(place / "anna.jsonl")]
        assert kinds.count("torn") == (cut not in ends and end > 0)


def _decisions(data: bytes) -> list[Decision]:
    chain = DecisionChain()
    for line in data.splitlines(keepends=True):
        chain.take(line)
    return list(chain.decisions.values())


def test_readers_pass_over_a_torn_end_and_verify_says_so(path: Path) -> None:
    before = read_decisions(path)
    path.write_bytes(path.read_bytes() + b'{"hash":')
    assert read_decisions(path) == before
    assert "line 7: torn: 8 bytes" in verify(path)[0]


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, before = _log(path.parent), path.read_bytes()

    def full(file: int, data: bytes, at: int) -> None:
        os.pwrite(file, data[:20], at)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "put", full)
        with pytest.raises(StorageError, match="Free some space"):
            log.append("x.png", "accept", "", reader="a")
    assert path.read_bytes() == before
    log.append("x.png", "accept", "", reader="a")
    assert verify(path) == []


def _write_many(folder: Path, reader: str) -> None:
    log = _log(folder)
    for number in range(25):
        log.append(f"{number}.png", "accept", "", reader=reader)


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(tmp_path, reader)) for reader in ("Änna", "Bo")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert verify(tmp_path / "anna.jsonl") == []
    found = read_decisions(tmp_path / "anna.jsonl")
    assert {reader: sum(one.reader == reader for one in found) for reader in ("Änna", "Bo")} == {"Änna": 25, "Bo": 25}


def test_a_log_that_became_shorter_while_in_use_is_not_continued(path: Path) -> None:
    log = _log(path.parent)
    path.write_bytes(b"".join(_lines(path)[:-1]))
    with pytest.raises(CheckpointError, match="became shorter"):
        log.append("x.png", "accept", "", reader="a")


def test_a_log_about_another_archive_is_not_continued(path: Path) -> None:
    with pytest.raises(CheckpointError, match="another archive"):
        DecisionLog(path, {**ARCHIVE, "study": "6" * 64})
    DecisionLog(path, {**ARCHIVE, "root_sha256": "b" * 64})  # the same study's, some images less


def test_another_key_or_none_is_refused(path: Path) -> None:
    key = path.with_suffix(".key")
    whole = key.read_bytes()
    key.unlink()
    with pytest.raises(IdentityError, match="not its key"):
        _log(path.parent)
    assert not key.exists()
    signing_key(key)
    with pytest.raises(IdentityError, match="not the key"):
        _log(path.parent)
    key.write_bytes(whole)
    key.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        _log(path.parent)
    key.write_bytes(b"x")
    key.chmod(0o600)
    with pytest.raises(IdentityError, match="damaged"):
        _log(path.parent)
