"""What people decided about the images of an archive: a file that only grows, each line signed and chained to the one before.

::

    DecisionLog.append, withdraw --> lock --> one line more, fsync --> unlock
    NAME.jsonl   the archive and the public key first, then decisions (xfed.common.decision_lines), mode 0600, only ever longer
    NAME.key     Ed25519 (xfed.common.signing_key), mode 0600, made with the log
    NAME.jsonl --verify--> [] or what is wrong, in words        --read_decisions--> list[Decision], the last one per image counts

Nothing is ever taken out: who thinks again withdraws a decision by its number, and the one before it stands again.

Formal guarantees
    A decision is on disk before `append` returns.
    `verify` and `read_decisions` find every changed byte, and every line taken out, put in, moved or exchanged, except at the
    end.
    A torn last line (power cut) was never answered for: readers pass over it, the next writer cuts it off and notes its digest.
Not covered
    Whole lines cut off at the end, and a log made anew with another key: both are found by whoever noted the head (number and
    hash of the last line) and the key's fingerprint; `xfed-server review` and `xfed-client review` print both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfed.common.decision_lines import (
    ACCEPT,
    DECISION_FIELDS,
    REJECT,
    Decision,
    DecisionChain,
    Head,
    key_text,
    write_line,
)
from xfed.common.durable import translate_os_errors
from xfed.common.errors import CheckpointError, IdentityError
from xfed.common.line_file import locked, put, tail
from xfed.common.signing_key import fingerprint, signing_key
from xfed.common.version import SOFTWARE

__all__ = ["ACCEPT", "REJECT", "Decision", "DecisionLog", "Head", "LogFacts", "read_decisions", "read_log", "verify"]


@dataclass(frozen=True, kw_only=True)
class LogFacts:
    """A whole log: its archive (name, study, root_sha256), the decisions that stand, oldest first, its key and its end."""

    archive: Mapping[str, str]
    decisions: list[Decision]
    fingerprint: str
    head: Head


class DecisionLog:
    """The log at `path` about the archive with these facts (name, study, root_sha256); made, with its key, if it is not there.

    Safe for several processes and threads. Raises `CheckpointError` when a line was changed or the log is about another study's
    archive, `IdentityError` when the key is missing or another one, `StorageError` when the disk refuses.
    """

    def __init__(self, path: Path, archive: Mapping[str, str]) -> None:
        self._path, key_path = path, path.with_suffix(".key")
        if path.exists() and path.stat().st_size and not key_path.exists():
            raise IdentityError(
                f"{path} is there, but not its key. Restore {key_path.name} from a backup, or begin another log with --log"
            )
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._key = signing_key(key_path)
        self._chain = DecisionChain()
        with locked(path) as file:
            self._catch_up(file)
            if not self._chain.head[0]:
                public = key_text(self._key.public_key())
                self._write(file, "log", {"archive": dict(archive), "public_key": public, "software": SOFTWARE})
        if self._chain.public_key != self._key.public_key():
            raise IdentityError(
                f"{key_path} is not the key of {path}: restore it from a backup, or choose another --log"
            )
        if self._chain.archive.get("study") != archive.get("study"):
            raise CheckpointError(
                f"{path} holds decisions about another archive ({self._chain.archive.get('name', '?')}): choose another --log"
            )

    @property
    def fingerprint(self) -> str:
        """Of the log's key, SHA256:..."""
        return fingerprint(self._key.public_key())

    @property
    def head(self) -> Head:
        """Number and hash of the last line that this object knows of."""
        return self._chain.head

    def decisions(self) -> list[Decision]:
        """All that were not withdrawn, oldest first."""
        with locked(self._path) as file:
            self._catch_up(file)
            return list(self._chain.decisions.values())

    def append(self, image: str, verdict: str, reason: str, *, reader: str, sha256: str = "") -> Decision:
        """Write one decision. Raises `ConfigError` for values that are none, `StorageError`, `CheckpointError`."""
        made = Decision(image, verdict, reason, reader, "", sha256)
        with locked(self._path) as file:
            self._catch_up(file)
            self._write(file, "decision", {name: getattr(made, name) for name in DECISION_FIELDS})
            return self._chain.decisions[self._chain.head[0]]

    def withdraw(self, reader: str) -> Decision | None:
        """Take back `reader`'s last decision that stands, and return it; None when there is none."""
        with locked(self._path) as file:
            self._catch_up(file)
            standing = self._chain.decisions
            number = next((seq for seq in reversed(standing) if standing[seq].reader == reader), None)
            if number is None:
                return None
            taken = standing[number]
            self._write(file, "withdrawal", {"withdraws": number, "reader": reader})
            return taken

    def _catch_up(self, file: int) -> None:
        """Take in what other processes wrote; cut off a torn line and note it."""
        chain, size = self._chain, os.fstat(file).st_size
        if size < chain.size or os.pread(file, len(chain.last), chain.size - len(chain.last)) != chain.last:
            raise CheckpointError(
                f"{self._path} became shorter, or was replaced, while it was in use: put it back from a copy"
            )
        torn = tail(file, size)[1] if size > chain.size else b""
        _take_all(chain, os.pread(file, size - chain.size - len(torn), chain.size), self._path)
        if torn:
            os.ftruncate(file, chain.size)
            if chain.head[0]:
                self._write(file, "torn", {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()})

    def _write(self, file: int, kind: str, fields: dict[str, Any]) -> None:
        line, at = write_line(kind, fields, self._chain.head, self._key), self._chain.size
        try:
            with translate_os_errors(self._path):
                put(file, line, at)
        except BaseException:
            os.ftruncate(file, at)  # half a line is no line: the next one starts where this one did
            raise
        self._chain.take(line)


def _take_all(chain: DecisionChain, data: bytes, path: Path) -> None:
    """Continue with all whole lines of `data`. Raises `CheckpointError`."""
    for line in data.split(b"\n")[:-1]:
        try:
            chain.take(line + b"\n")
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not whole: line {chain.head[0] + 1}: {error}. Put it back from a copy, or keep it as evidence"
            ) from error


def _read(path: Path) -> tuple[DecisionChain, LogFacts, int]:
    """A log and the bytes of its torn last line. Raises `CheckpointError`."""
    chain = DecisionChain()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): name the .jsonl file of a review") from error
    _take_all(chain, data, path)
    if chain.public_key is None:
        raise CheckpointError(f"{path} holds no whole line: name the .jsonl file of a review")
    decisions, key = list(chain.decisions.values()), fingerprint(chain.public_key)
    facts = LogFacts(archive=chain.archive, decisions=decisions, fingerprint=key, head=chain.head)
    return chain, facts, len(data) - chain.size


def read_log(path: Path) -> LogFacts:
    """What a log says. Raises `CheckpointError` when it is not whole; a torn last line alone is passed over."""
    return _read(path)[1]


def read_decisions(path: Path) -> list[Decision]:
    """All decisions that were not withdrawn, oldest first: the last one per image counts. Raises `CheckpointError`."""
    return read_log(path).decisions


def verify(path: Path, *, known_fingerprint: str | None = None, known_head: Head | None = None) -> list[str]:
    """What is wrong with a log, in words; empty when it is as it was written.

    `known_fingerprint` of its key, `known_head` of a line: as they were noted elsewhere.
    """
    try:
        chain, facts, torn = _read(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if torn:
        problems.append(f"line {facts.head[0] + 1}: torn: {torn} bytes without an end; the next start cuts them off")
    if known_fingerprint not in (None, facts.fingerprint):
        problems.append(f"its key is {facts.fingerprint}, not {known_fingerprint}: another log, or one made anew")
    if known_head is not None and known_head not in set(enumerate(chain.hashes)):
        problems.append(f"line {known_head[0]} with hash {known_head[1][:12]} is not in it: lines are gone")
    return problems
