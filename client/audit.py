"""audit.jsonl: who asked this site for what, and what left it; lines chained by hashes, so that no change goes unnoticed.

::

    desk / agent --AuditLog.asked, left, refused, write--> lock --> last line (seq, hash) --> one line more, fsync --> unlock
    audit.jsonl        {"seq", "time" (UTC), "kind", the kind's fields by name, "prev", "hash"}      mode 0600, only ever longer
    audit.jsonl.torn   what a power cut left of a line: kept here, with an event "torn" in the log that names its SHA-256
    audit.jsonl --verify_audit--> [] or what was changed, in words          head --> (seq, hash) of the last line

`hash` is the SHA-256 of the line's canonical JSON (keys sorted, no spaces, UTF-8) without `hash`; `prev` is the hash of the line
before, 64 zeros in the first. A line is on disk before what it speaks of goes on: a kill loses at most what has not happened yet.

Formal guarantees
    `verify_audit` finds every changed byte, every line that was torn, and every line taken out, put in or moved, except
    at the end.
    While a process holds the log, it refuses to write on when the log has become shorter than it left it.
Not covered
    Lines cut off at the end: a shorter chain is a whole chain. And a chain that was written anew from some line on: it
    needs no secret. Both are found by whoever knows a later `head` from elsewhere: note it, or let replies carry it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from xfed.common.durable import append_line
from xfed.common.errors import CheckpointError
from xfed.common.line_file import locked, put, tail
from xfed.common.messages import Reply, Request
from xfed.common.packing import digest_of_request

__all__ = ["KINDS", "AuditLog", "Head", "head", "read_audit", "verify_audit"]

KINDS = ("asked", "left", "refused", "plan", "started", "stopped", "connection", "torn")
ZEROS = "0" * 64
_FRAME = frozenset({"seq", "time", "kind", "prev", "hash"})
_LONGEST_TEXT = 4000

Head = tuple[int, str]
"""Number and hash of a log's last line; (0, 64 zeros) before the first."""


class AuditLog:
    """The log at `path`, made if it is not there; a torn last line is put aside. Several processes may write to one.

    Raises `CheckpointError` when the last line was changed: what follows it would hide that; `StorageError` when
    the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._head: Head = (0, ZEROS)
        with locked(self._path) as file:
            self._head = self._continue(file)[0]

    def write(self, kind: str, **fields: Any) -> Head:
        """Append one event of `KINDS` and return the new head. The fields are values of JSON; floats may be nan or infinite."""
        if kind not in KINDS or _FRAME & fields.keys():
            raise ValueError(f"an audit event is one of {', '.join(KINDS)} with fields other than {sorted(_FRAME)}")
        with locked(self._path) as file:
            (seq, prev), size = self._continue(file)
            line, self._head = _line(seq + 1, kind, fields, prev)
            try:
                put(file, line, size)
            except BaseException:
                os.ftruncate(file, size)  # half a line is no line: the next one starts where this one did
                self._head = (seq, prev)
                raise
        return self._head

    def asked(self, who: Mapping[str, Any], request: Request) -> None:
        """A request has come in: from whom, its kind and key, its digest, the bytes of its arrays."""
        digest = digest_of_request(request)
        self.write("asked", who=dict(who), **_about(request), digest=digest, bytes=_bytes_of(request))

    def left(self, who: Mapping[str, Any], request: Request, reply: Reply) -> None:
        """A reply is about to leave: its numbers and short texts as they are, its arrays by digest and never by content."""
        scalars, arrays = {}, {}
        for field in dataclasses.fields(reply):
            value = getattr(reply, field.name)
            if field.type != "Arrays":
                scalars[field.name] = value
                continue
            for name, array in value.items():
                plain: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                digest = hashlib.sha256(plain).hexdigest()
                facts = {"shape": list(array.shape), "dtype": str(array.dtype), "bytes": array.nbytes, "sha256": digest}
                arrays[f"{field.name}/{name}"] = facts
        answer = {"reply": type(reply).__name__, "facts": scalars, "arrays": arrays, "bytes": _bytes_of(reply)}
        self.write("left", who=dict(who), **_about(request), **answer)

    def refused(self, who: Mapping[str, Any], request: Request | None, reason: str) -> None:
        """A request was refused, for `reason`; without `request` it could not even be read."""
        self.write("refused", who=dict(who), **_about(request), reason=reason)

    def _continue(self, file: int) -> tuple[Head, int]:
        """The head and the size of the log, after putting aside a torn line. Raises `CheckpointError`."""
        size = os.fstat(file).st_size
        last, torn = tail(file, size)
        found = _head_of(last, self._path)
        if found[0] < self._head[0] or (found[0] == self._head[0] and found[1] != self._head[1]):
            raise CheckpointError(
                f"{self._path} ends at line {found[0]}, and this process wrote line {self._head[0]}: somebody cut or "
                "replaced it. Find out who; put the file back from a copy, or move it aside to begin a new log."
            )
        if torn:
            start = size - len(torn)
            facts = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            text = torn.decode("utf-8", "surrogateescape")
            aside = {"after": found[0], **facts, "text": text}
            append_line(
                _torn_path(self._path), json.dumps(aside)
            )  # first: it is on disk before its place is used again
            line, found = _line(found[0] + 1, "torn", {"kept": _torn_path(self._path).name, **facts}, found[1])
            put(file, line, start)
            os.ftruncate(file, size := start + len(line))
            os.fsync(file)
        return found, size


def _torn_path(path: Path) -> Path:
    return path.with_name(path.name + ".torn")


def _head_of(line: bytes, path: Path) -> Head:
    if not line:
        return 0, ZEROS
    entry = _entry(line)
    if entry is None:
        raise CheckpointError(
            f"{path}: the last line was changed, so nothing is written behind it. See what with `xfed-client audit --verify`, "
            "keep the file as evidence under another name, and start again with a new log."
        )
    return entry["seq"], entry["hash"]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(entry: Mapping[str, Any]) -> str:
    """The hash of an entry: over all of it but `hash`."""
    rest = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


def _written(entry: Mapping[str, Any]) -> bytes:
    """The one way in which an entry is written: the frame first and last, the kind's fields by name."""
    names = ["seq", "time", "kind", *sorted(entry.keys() - _FRAME), "prev", "hash"]
    pairs = (f"{_canonical(name)}:{_canonical(entry[name])}" for name in names)
    return f"{{{','.join(pairs)}}}\n".encode()


def _line(seq: int, kind: str, fields: Mapping[str, Any], prev: str) -> tuple[bytes, Head]:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {"seq": seq, "time": time, "kind": kind, **_plain(dict(fields)), "prev": prev}
    entry["hash"] = _digest(entry)
    return _written(entry), (seq, entry["hash"])


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry on a line, or None when the line is not, to the byte, what was written."""
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and _written(entry) == line and entry["hash"] == _digest(entry):
            return entry if type(entry["seq"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: keys sorted, no nan, no lone surrogates, long texts by their beginning and digest."""
    match value:
        case str():
            clean = value.encode("utf-8", "backslashreplace")
            text = clean.decode()
            if len(text) > _LONGEST_TEXT:
                return {"begins": text[:80], "characters": len(text), "sha256": hashlib.sha256(clean).hexdigest()}
            return text
        case float() if not math.isfinite(value):
            return str(value)
        case bool() | int() | float() | None:
            return value
        case Mapping():
            return {str(_plain(str(name)[:200])): _plain(value[name]) for name in sorted(value, key=str)}
        case list() | tuple():
            return [_plain(item) for item in value]
        case np.generic():
            return _plain(value.item())
    return _plain(str(value))


def _about(request: Request | None) -> dict[str, Any]:
    if request is None:
        return {"request": None, "key": None, "study": None}
    return {"request": type(request).__name__, "key": request.key, "study": request.study}


def _bytes_of(message: Request | Reply) -> int:
    groups = [getattr(message, field.name) for field in dataclasses.fields(message) if field.type == "Arrays"]
    return sum(array.nbytes for group in groups for array in group.values())


def _lines(path: Path) -> Iterator[bytes]:
    """The log's lines up to its present end, ending included; a line that is being written meanwhile is not among them."""
    if not path.exists():
        return
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        left = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        while left and (line := file.readline(left)):
            left -= len(line)
            yield line


def read_audit(path: Path) -> Iterator[dict[str, Any]]:
    """All events, oldest first, none when there is no log.

    A line that was changed or torn is the event {"kind": "unreadable", "line": its number}.
    """
    for number, line in enumerate(_lines(path), start=1):
        yield _entry(line) or {"kind": "unreadable", "line": number}


def head(path: Path) -> Head:
    """Number and hash of the last whole line. Raises `CheckpointError` when that line was changed."""
    if not path.exists():
        return 0, ZEROS
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return _head_of(tail(file.fileno(), os.fstat(file.fileno()).st_size)[0], path)


def verify_audit(path: Path, known: Head | None = None) -> list[str]:
    """What was changed in a log, in words; empty when it is as it was written.

    `known`: a head of this log that was noted elsewhere; without it a log that was cut off at its end looks whole.
    """
    problems = [] if path.exists() else [f"{path.name}: there is no such log"]
    expected, prev, found = 1, ZEROS, known is None or known == (0, ZEROS)
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            problems.append(f"line {number}: torn: {len(line)} bytes without an end; the next start puts them aside")
            break
        entry = _entry(line)
        if entry is None:
            problems.append(f"line {number}: changed: it is not what was written there")
            prev, expected = "", expected + 1
            continue
        if entry["seq"] != expected:
            problems.append(f"line {number}: it says it is entry {entry['seq']}, and entry {expected} belongs there")
        if prev and entry["prev"] != prev:
            problems.append(f"line {number}: the line before it is not the one that it was written behind")
        if entry["kind"] == "torn" and entry.get("sha256") not in _kept_digests(_torn_path(path)):
            problems.append(f"line {number}: what was put aside of a torn line is not in {_torn_path(path).name}")
        found = found or (entry["seq"], entry["hash"]) == known
        prev, expected = entry["hash"], entry["seq"] + 1
    if not found and known is not None:
        problems.append(
            f"entry {known[0]} with hash {known[1][:12]}, noted elsewhere, is not in the log: lines are gone"
        )
    return problems


def _kept_digests(path: Path) -> set[str]:
    digests = set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            digests.add(hashlib.sha256(json.loads(line)["text"].encode("utf-8", "surrogateescape")).hexdigest())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return digests
