"""The audit log: every change is found, a torn line is kept in sight, two processes share one chain, no content is in it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from xfed.client import audit as module
from xfed.client.audit import KINDS, ZEROS, AuditLog, head, read_audit, verify_audit
from xfed.client.audit_cli import audit
from xfed.common import line_file
from xfed.common import messages as m
from xfed.common.errors import CheckpointError, ConfigError, StorageError
from xfed.common.packing import digest_of_request

WHO = {"run": "7", "message": "abc", "coordinator": "thorax"}
WEIGHTS = {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "layer.bias": np.zeros(0, np.float32)}
REQUEST = m.TrainGan(study="S" * 64, class_name="Pleural Effusion", round=3, weights=WEIGHTS)
REPLY = m.GanUpdate(site="ward-a", images=12, loss_g=float("nan"), loss_d=0.5, seconds=1.5, weights=WEIGHTS)


def _write(path: Path) -> AuditLog:
    log = AuditLog(path)
    log.write("started", software="xfed 1")
    log.asked(WHO, REQUEST)
    log.left(WHO, REQUEST, REPLY)
    log.refused(WHO, None, "the request could not be read")
    log.write("plan", action="approved", digest="d" * 64, by="Zoë")
    log.write("stopped")
    return log


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    _write(path)
    return path.read_bytes()


def test_a_log_is_whole_and_says_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "site" / "audit.jsonl"
    _write(path)
    assert verify_audit(path) == []
    events = list(read_audit(path))
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event["kind"] for event in events] == ["started", "asked", "left", "refused", "plan", "stopped"]
    assert all(event["time"].endswith("+00:00") for event in events)
    assert [event["prev"] for event in events] == [ZEROS, *(event["hash"] for event in events[:-1])]
    asked, left, refused = events[1:4]
    assert asked["who"] == left["who"] == refused["who"] == WHO
    assert (asked["request"], asked["key"], asked["study"]) == ("TrainGan", REQUEST.key, "S" * 64)
    assert (asked["digest"], asked["bytes"]) == (digest_of_request(REQUEST), 24)
    assert (left["reply"], left["bytes"]) == ("GanUpdate", 24)
    numbers = {"images": 12, "loss_g": "nan", "loss_d": 0.5, "seconds": 1.5}
    assert left["facts"] == {"site": "ward-a", "payload": "float32", **numbers}
    assert left["arrays"]["weights/layer.weight"] == {
        "shape": [2, 3],
        "dtype": "float32",
        "bytes": 24,
        "sha256": hashlib.sha256(WEIGHTS["layer.weight"].tobytes()).hexdigest(),
    }
    assert refused["request"] is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_hash_can_be_computed_by_anybody(tmp_path: Path) -> None:
    """As documented: SHA-256 of the canonical JSON of the line without its hash."""
    _write(tmp_path / "audit.jsonl")
    for line in (tmp_path / "audit.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        stated = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode("utf-8")).hexdigest() == stated


def test_no_content_of_an_array_is_in_the_log(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(100, 255, (2, 16, 16), dtype=np.uint8)
    log = AuditLog(tmp_path / "audit.jsonl")
    log.left(WHO, m.ShowExamples(study="S", count=1), m.Examples(site="ward-a", arrays={"images": pixels}))
    text = (tmp_path / "audit.jsonl").read_text()
    assert len(text) < 1000
    for row in pixels.reshape(-1, 16):
        assert json.dumps(row.tolist())[1:20] not in text
        assert bytes(row).hex()[:16] not in text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_of_a_single_byte_is_found(tmp_path: Path, written: bytes, data: st.DataObject) -> None:
    path = tmp_path / "audit.jsonl"
    position = data.draw(st.integers(0, len(written) - 1))
    change = data.draw(st.sampled_from(["replace", "delete", "insert"]))
    byte = data.draw(st.integers(0, 255).filter(lambda b: change != "replace" or b != written[position]))
    middle = {"replace": bytes([byte]), "delete": b"", "insert": bytes([byte, written[position]])}[change]
    path.write_bytes(written[:position] + middle + written[position + 1 :])
    assert verify_audit(path)


def test_every_byte_of_a_log_is_covered(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    for position in range(0, len(written), 7):
        for flip in (1, 0x20):
            changed = bytearray(written)
            changed[position] ^= flip
            path.write_bytes(bytes(changed))
            assert verify_audit(path), position


@given(data=st.data())
def test_lines_taken_out_swapped_doubled_or_made_up_are_found(
    tmp_path_factory: pytest.TempPathFactory, written: bytes, data: st.DataObject
) -> None:
    lines = written.splitlines(keepends=True)
    first = data.draw(st.integers(0, len(lines) - 2))
    second = data.draw(st.integers(first + 1, len(lines) - 1))
    match data.draw(st.sampled_from(["delete", "swap", "double", "make up"])):
        case "delete":
            del lines[first]
        case "swap":
            lines[first], lines[second] = lines[second], lines[first]
        case "double":
            lines.insert(second, lines[first])
        case _:
            lines.insert(first, module._line(first + 1, "stopped", {}, "f" * 64)[0])
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_bytes(b"".join(lines))
    assert verify_audit(path)


@pytest.mark.parametrize(
    ("seq", "prev", "words"), [(8, "right", "entry 7 belongs there"), (7, "f" * 64, "line before it")]
)
def test_number_and_link_are_each_checked(tmp_path: Path, written: bytes, seq: int, prev: str, words: str) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(written)
    line, _ = module._line(seq, "stopped", {}, head(path)[1] if prev == "right" else prev)
    path.write_bytes(written + line)
    (problem,) = verify_audit(path)
    assert problem.startswith("line 7")
    assert words in problem


def test_the_same_facts_written_in_another_way_are_found(tmp_path: Path, written: bytes) -> None:
    """Spaces, the order of keys and escapes change no value, and are changes all the same."""
    lines = written.splitlines()
    entry = json.loads(lines[1])
    nested = {**entry, "who": dict(reversed(entry["who"].items()))}
    for text in (
        json.dumps(entry, ensure_ascii=False),
        json.dumps(dict(reversed(entry.items())), separators=(",", ":"), ensure_ascii=False),
        json.dumps(nested, separators=(",", ":"), ensure_ascii=False),
    ):
        assert json.loads(text) == entry
        (tmp_path / "audit.jsonl").write_bytes(b"\n".join([lines[0], text.encode(), *lines[2:]]) + b"\n")
        assert any(problem.startswith("line 2") for problem in verify_audit(tmp_path / "audit.jsonl"))
    zoe = json.loads(lines[4])
    escaped = json.dumps(zoe, separators=(",", ":"), ensure_ascii=True).encode()
    assert escaped != lines[4]
    (tmp_path / "audit.jsonl").write_bytes(b"\n".join([*lines[:4], escaped, lines[5]]) + b"\n")
    assert any(problem.startswith("line 5") for problem in verify_audit(tmp_path / "audit.jsonl"))


def test_a_tail_cut_off_is_found_against_a_head_noted_elsewhere_and_not_without_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    _write(path)
    noted = head(path)
    assert noted[0] == 6
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    assert verify_audit(path) == []
    assert head(path)[0] == 4
    assert any("noted elsewhere" in problem for problem in verify_audit(path, noted))
    path.write_bytes(b"".join(lines))
    assert verify_audit(path, noted) == []
    assert verify_audit(path, (4, noted[1])), "the right hash under another number"
    AuditLog(path).write("started")
    assert verify_audit(path, noted) == [], "a later log still holds it"
    path.unlink()
    assert len(verify_audit(path, noted)) == 2
    assert head(path) == (0, ZEROS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.integers(1, 300))
def test_a_torn_line_is_put_aside_in_sight_wherever_it_tore(tmp_path: Path, written: bytes, kept: int) -> None:
    path, aside = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.torn"
    aside.unlink(missing_ok=True)
    lines = written.splitlines(keepends=True)
    torn = lines[2][: min(kept, len(lines[2]) - 1)]
    path.write_bytes(b"".join(lines[:2]) + torn)
    assert ["torn" in problem for problem in verify_audit(path)] == [True]
    log = AuditLog(path)
    log.write("stopped")
    events = list(read_audit(path))
    assert [event["kind"] for event in events] == ["started", "asked", "torn", "stopped"]
    assert events[2]["sha256"] == hashlib.sha256(torn).hexdigest()
    assert verify_audit(path) == []
    record = json.loads(aside.read_text())
    assert record["text"].encode("utf-8", "surrogateescape") == torn
    assert record["after"] == 2
    aside.unlink()
    assert any("audit.jsonl.torn" in problem for problem in verify_audit(path)), "what was put aside was thrown away"


@pytest.mark.parametrize("garbage", [b"\x00" * 5000, b"\xff\xfe", b"{" * 3])
def test_whatever_a_power_cut_leaves_is_kept(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(garbage)
    AuditLog(path).write("started")
    assert [event["kind"] for event in read_audit(path)] == ["torn", "started"]
    assert verify_audit(path) == []
    kept = json.loads((tmp_path / "audit.jsonl.torn").read_text())["text"].encode("utf-8", "surrogateescape")
    assert kept == garbage


def test_a_kill_while_the_torn_line_is_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the event is written over the torn bytes, then the power goes again."""
    path = tmp_path / "audit.jsonl"
    AuditLog(path).write("started")
    torn = b'{"seq":2,"time":"' + b"x" * 400
    with path.open("ab") as file:
        file.write(torn)
    real = os.pwrite

    def half(file: int, data: bytes, at: int) -> int:
        real(file, data[:40], at)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(KeyboardInterrupt):
        AuditLog(path)
    monkeypatch.undo()
    AuditLog(path).write("stopped")
    assert verify_audit(path) == []
    assert [event["kind"] for event in read_audit(path)] == ["started", "torn", "stopped"]
    first = json.loads((tmp_path / "audit.jsonl.torn").read_text().splitlines()[0])
    assert first["sha256"] == hashlib.sha256(torn).hexdigest()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("started")
    before = path.read_bytes()
    real = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if at > len(before):
            raise OSError(28, "No space left on device")
        return real(file, data[:10], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"audit\.jsonl"):
        log.write("stopped")
    monkeypatch.undo()
    assert path.read_bytes() == before
    log.write("stopped")
    assert [event["seq"] for event in read_audit(path)] == [1, 2]
    assert verify_audit(path) == []


def test_each_line_is_on_disk_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    steps: list[str] = []
    write, sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *a: (steps.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("sync"), sync(file))[1])
    for _ in range(3):
        log.write("connection", state="up")
    assert steps == ["write", "sync"] * 3


def test_nothing_is_written_behind_a_changed_last_line(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(written.replace(b'"kind":"stopped"', b'"kind":"started"'))
    with pytest.raises(CheckpointError, match="last line was changed"):
        AuditLog(path)
    with pytest.raises(CheckpointError):
        head(path)


def test_a_log_cut_while_it_is_in_use_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _write(path)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(CheckpointError, match="this process wrote line 6"):
        log.write("stopped")
    path.unlink()
    with pytest.raises(CheckpointError, match="this process wrote line 6"):
        log.write("stopped")
    path.write_bytes(whole)
    log.write("stopped")
    assert verify_audit(path) == []


def test_appending_reads_the_last_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    read: list[int] = []
    real = os.pread

    def counted(file: int, length: int, at: int) -> bytes:
        read.append(length)
        return real(file, length, at)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(line_file, "_BLOCK", 512)
    for number in range(200):
        log.write("connection", number=number)
    assert path.stat().st_size > 200 * 180
    assert max(read) <= 1024
    log.write("connection", text="x" * 3000)
    log.write("connection", text="behind a line that is longer than a block")
    assert verify_audit(path) == []


def test_two_processes_share_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = (
        "import sys; from pathlib import Path; from xfed.client.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\n"
        "for number in range(40): log.write('connection', writer=sys.argv[2], number=number)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("agent", "worker")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert verify_audit(path) == []
    events = list(read_audit(path))
    assert [event["seq"] for event in events] == list(range(1, 81))
    for name in ("agent", "worker"):
        assert [event["number"] for event in events if event["writer"] == name] == list(range(40))


def test_the_log_needs_no_torch() -> None:
    code = "import sys, xfed.client.audit, xfed.client.audit_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FIELDS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in {"seq", "time", "kind", "prev", "hash"}),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(KINDS[:-1]), fields=FIELDS)
def test_whatever_comes_from_outside_can_be_written(kind: str, fields: dict[str, Any]) -> None:
    line, last = module._line(1, kind, fields, ZEROS)
    assert line.count(b"\n") == 1
    entry = module._entry(line)
    assert entry is not None
    assert (entry["seq"], entry["hash"]) == last


def test_odd_texts_and_numbers(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write("refused", reason="lone \ud800", much="é" * 5000, number=np.int64(3), inf=float("inf"), path=Path("x"))
    (event,) = read_audit(tmp_path / "audit.jsonl")
    assert event["reason"] == "lone \\ud800"
    assert (event["number"], event["inf"], event["path"]) == (3, "inf", "x")
    assert event["much"]["characters"] == 5000
    assert event["much"]["sha256"] == hashlib.sha256(("é" * 5000).encode()).hexdigest()
    assert verify_audit(tmp_path / "audit.jsonl") == []


@pytest.mark.parametrize("bad", [{"kind": "erased"}, {"kind": "started", "seq": 1}, {"kind": "started", "prev": ""}])
def test_only_known_events_are_written(tmp_path: Path, bad: dict[str, Any]) -> None:
    fields = dict(bad)
    with pytest.raises((ValueError, TypeError)):
        AuditLog(tmp_path / "audit.jsonl").write(fields.pop("kind"), **fields)


# the command

app = typer.Typer()
app.command()(audit)


def _run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(options), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_table_says_when_who_what_and_how_much(tmp_path: Path) -> None:
    _write(tmp_path / "audit.jsonl")
    code, output = _run("--dir", str(tmp_path))
    assert code == 0
    for words in (
        "thorax 7",
        "asked TrainGan",
        "left GanUpdate",
        "24 B",
        "could not be read",
        "approved",
        "6 of 6 events",
    ):
        assert words in output
    code, output = _run("--dir", str(tmp_path), "--last", "2")
    assert "2 of 6 events" in output
    assert "GanUpdate" not in output
    assert "6 of 6" in _run("--dir", str(tmp_path), "--last", "0")[1]


def test_verify_ends_with_0_when_untouched_and_4_when_damaged(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(written)
    code, output = _run("--dir", str(tmp_path), "--verify")
    assert code == 0
    assert "Untouched" in output
    number, digest = head(path)
    noted = f"{number}:{digest}"
    assert noted in output.replace("\n", "")
    path.write_bytes(b"".join(written.splitlines(keepends=True)[:-1]))
    assert _run("--dir", str(tmp_path), "--verify")[0] == 0
    assert _run("--dir", str(tmp_path), "--verify", "--head", noted)[0] == 4
    path.write_bytes(written.replace(b"GanUpdate", b"GanUpdaTe"))
    code, output = _run("--dir", str(tmp_path), "--verify")
    assert code == 4
    assert "Damaged" in output
    assert "line 3: changed" in output
    assert "changed or torn: see --verify" in output


def test_json_for_machines(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(written)
    code, output = _run("--dir", str(tmp_path), "--json", "--last", "1")
    assert code == 0
    result = json.loads(output)
    assert (len(result["events"]), result["total"]) == (1, 6)
    assert "verify" not in result
    number, digest = head(path)
    result = json.loads(_run("--dir", str(tmp_path), "--json", "--verify")[1])
    assert result["verify"] == {"untouched": True, "problems": [], "head": f"{number}:{digest}"}
    path.write_bytes(written[1:])
    code, output = _run("--dir", str(tmp_path), "--json", "--verify")
    assert code == 4
    assert not json.loads(output)["verify"]["untouched"]
    assert json.loads(output)["verify"]["head"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dir", "nowhere"], "no audit log"),
        (["--verify", "--head", "six"], "NUMBER:HASH"),
        (["--verify", "--head", "6:xyz"], "NUMBER:HASH"),
        (["--head", "6:" + "0" * 64], "give both"),
    ],
)
def test_wrong_options_are_said(tmp_path: Path, written: bytes, options: list[str], words: str) -> None:
    (tmp_path / "audit.jsonl").write_bytes(written)
    where = [] if "--dir" in options else ["--dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=words):
        _run(*where, *options)


def test_what_came_from_outside_cannot_repaint_the_terminal(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.refused({"coordinator": "\x1b[2J[red]evil", "run": "1"}, None, "\x1b]0;title\x07 [bold]\nnext")
    output = _run("--dir", str(tmp_path))[1]
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "[red]evil" in output
    assert "[bold]" in output
