"""Single lines of a site's privacy ledger: how they are written, signed and checked, and what continues what.

::

    LineContent --write_line(key)--> bytes of one line, newline included --read_line--> Line | ValueError
    lines --verify_chain(public key, site, after)--> Lines, oldest first | FederationError: fork, gap, rewrite, foreign site
    Head --sign_head--> {"site", "seq", "hash", "public_key", "time", "sig"} --check_head--> (seq, hash) | FederationError
    the site's P-384 key --endorse--> ledger.pub {"site", "public_key", "endorsed_by", "signature"} --check_endorsement--> key

A line is one JSON object without spaces, its keys in the order of `KEYS`, ASCII. `hash` is the SHA-256 (hex) of the line without
`hash`, `sig` and newline, that is of the bytes before ``,"hash"`` and ``}``; `sig` is the Ed25519 signature (base64) over
``b"xfed ledger-line v1\\n"`` and the hash in hex; `prev` is the hash of the line before, 64 zeros in the first.
Nothing here is on disk, and nothing knows whether it runs at a site or at the coordinator.

Formal guarantees
    `read_line` accepts exactly the bytes that `write_line` writes: no other spelling of the same values passes.
    `verify_chain` finds every changed byte, and every line taken out, put in, moved or exchanged, except at the end.
Not covered
    Lines cut off at the end: a shorter chain is whole. It is found by whoever knows a later head; the coordinator keeps them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xfed.common.dp_events import Event
from xfed.common.errors import FederationError, IdentityError
from xfed.common.identity import (
    PrivateKey,
    PublicKey,
    canonical_json,
    fingerprint,
    public_text,
    sign_json,
    verify_json,
)

__all__ = [
    "KEYS",
    "KINDS",
    "PHASES",
    "START",
    "Head",
    "Line",
    "LineContent",
    "check_endorsement",
    "check_head",
    "endorse",
    "public_bytes",
    "read_line",
    "sign_head",
    "verify_chain",
    "write_line",
]

KEYS = (
    "seq",
    "time",
    "site",
    "study",
    "phase",
    "class",
    "round",
    "attempt",
    "kind",
    "event",
    "software",
    "prev",
    "hash",
    "sig",
)
KINDS = ("reserve", "spend", "release", "refuse", "resume")
PHASES = ("generators", "classifier", "scores")
LONGEST_LINE = 16_384

Head = tuple[int, str]
"""Number and hash of a ledger's last line."""
START: Head = (0, "0" * 64)
_HEAD_KEYS = ("site", "seq", "hash", "public_key", "time")
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class LineContent:
    """What a line says. Raises `ValueError` where a value is none of the contract's.

    `study` is the digest of a study; `class_name` is None where patients of every class are read; only the line that tells of a
    torn one has no study, phase, round and attempt. `event` is an `Event` as JSON (reserve, spend), {"sha256"} of what leaves
    (release) or {"reason"} (refuse, resume; with "bytes" and "sha256" of a torn line).
    """

    kind: str
    event: Mapping[str, Any]
    study: str | None = None
    phase: str | None = None
    class_name: str | None = None
    round: int | None = None
    attempt: int | None = None

    def __post_init__(self) -> None:
        torn = self.kind == "resume" and self.event.keys() == {"reason", "bytes", "sha256"}
        about = (self.study, self.phase, self.round, self.attempt)
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r:.40}, and must be one of {', '.join(KINDS)}")
        if torn != (about == (None,) * 4) or (torn and self.class_name is not None):
            raise ValueError("study, phase, round and attempt are needed in every line but that of a torn one")
        if not torn:
            if not isinstance(self.study, str) or not self.study:
                raise ValueError(f"study is {self.study!r:.40}, not the digest of a study")
            if self.phase not in PHASES:
                raise ValueError(f"phase is {self.phase!r:.40}, and must be one of {', '.join(PHASES)}")
            if not isinstance(self.class_name, str | None) or self.class_name == "":
                raise ValueError(f"class is {self.class_name!r:.40}, neither a name nor null")
            if type(self.round) is not int or self.round < 0 or type(self.attempt) is not int or self.attempt < 1:
                raise ValueError(
                    f"round {self.round!r:.40} and attempt {self.attempt!r:.40} are not whole numbers from 0 and 1"
                )
        _check_event(self.kind, self.event, torn)


def _check_event(kind: str, event: Mapping[str, Any], torn: bool) -> None:
    if kind in ("reserve", "spend"):
        Event.from_json(event)
    elif kind == "release":
        if event.keys() != {"sha256"} or not _is_hash(event["sha256"]):
            raise ValueError('the event of a release is {"sha256": digest of what leaves}')
    elif not torn and (event.keys() != {"reason"} or not isinstance(event["reason"], str)):
        raise ValueError(f'the event of a {kind} is {{"reason": text}}')
    elif torn and (type(event["bytes"]) is not int or not _is_hash(event["sha256"])):
        raise ValueError("a torn line is told by its bytes and their sha256")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line as it stands in a ledger."""

    seq: int
    time: str
    site: str
    content: LineContent
    software: str
    prev: str
    hash: str
    sig: str

    @property
    def head(self) -> Head:
        """What the next line must continue."""
        return self.seq, self.hash

    @property
    def event(self) -> Event:
        """The event of a `reserve` or `spend`. Raises `ValueError` for other kinds."""
        return Event.from_json(self.content.event)


def public_bytes(key: Ed25519PublicKey) -> str:
    """A ledger's public key as text: base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def write_line(content: LineContent, after: Head, *, site: str, software: str, key: Ed25519PrivateKey) -> bytes:
    """The line behind `after`, newline included, dated now (UTC)."""
    values: dict[str, Any] = {
        "seq": after[0] + 1,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "site": site,
        "study": content.study,
        "phase": content.phase,
        "class": content.class_name,
        "round": content.round,
        "attempt": content.attempt,
        "kind": content.kind,
        "event": dict(content.event),
        "software": software,
        "prev": after[1],
    }
    values["hash"] = hashlib.sha256(_json(values)).hexdigest()
    values["sig"] = base64.b64encode(key.sign(_signed(values["hash"]))).decode()
    return _json(values) + b"\n"


def read_line(data: bytes) -> Line:
    """The line of these bytes, newline included; its hash is right, its signature not yet looked at. Raises `ValueError`."""
    if len(data) > LONGEST_LINE:
        raise ValueError(f"it is longer than {LONGEST_LINE} bytes")
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or tuple(values) != KEYS or _json(values) + b"\n" != data:
            raise ValueError("it is not written as the ledger's lines are")
    except (UnicodeError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    digest = hashlib.sha256(_json({key: values[key] for key in KEYS[:-2]})).hexdigest()
    texts = [values[key] for key in ("time", "site", "software", "prev", "hash", "sig")]
    if type(values["seq"]) is not int or not all(isinstance(text, str) for text in texts):
        raise ValueError("its frame is not one of a ledger")
    if values["hash"] != digest or not _is_hash(values["prev"]):
        raise ValueError("its hash is not that of its content")
    if not isinstance(values["event"], dict):
        raise ValueError("it has no event")
    content = LineContent(
        **{name: values[name] for name in ("kind", "event", "study", "phase", "round", "attempt")},
        class_name=values["class"],
    )
    return Line(
        content=content, **{name: values[name] for name in ("seq", "time", "site", "software", "prev", "hash", "sig")}
    )


def verify_chain(lines: Iterable[bytes], public_key: Ed25519PublicKey, *, site: str, after: Head = START) -> list[Line]:
    """The lines, all of them by `site` and signed by it, the first right behind `after` and each behind the one before.

    Raises `FederationError` that names the line and what is wrong: changed, forged, foreign, fork, gap or rewrite.
    """
    found: list[Line] = []
    for data in lines:
        number = after[0] + 1
        try:
            line = read_line(data)
        except ValueError as error:
            raise _broken(site, number, f"changed: {error}") from error
        if line.site != site:
            raise _broken(site, number, f"foreign: it is of the site {line.site!r:.80}")
        if not _is_signed(line, public_key):
            raise _broken(site, number, "forged: the key of this site's ledger did not sign it")
        if line.seq > number:
            raise _broken(site, number, f"gap: the next line that came says it is {line.seq}")
        if line.seq < number:
            raise _broken(
                site, number, f"rewrite: the line that came says it is {line.seq}, and that one is known already"
            )
        if line.prev != after[1]:
            raise _broken(site, number, f"fork: it continues another line {after[0]} than the one that is known")
        found.append(line)
        after = line.head
    return found


def _broken(site: str, number: int, what: str) -> FederationError:
    return FederationError(
        f"the privacy ledger of {site} does not continue at line {number}: {what}. Keep both copies, ask the site who changed "
        "its ledger, and let it take part in no private study until that is known"
    )


def sign_head(head: Head, *, site: str, key: Ed25519PrivateKey) -> dict[str, Any]:
    """A head that can be kept elsewhere as proof of what the ledger held, dated now."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    names = {"site": site, "seq": head[0], "hash": head[1], "public_key": public_bytes(key.public_key()), "time": time}
    return {**names, "sig": base64.b64encode(key.sign(_signed_head(names))).decode()}


def check_head(values: Mapping[str, Any], public_key: Ed25519PublicKey, *, site: str) -> Head:
    """Number and hash of a head that `site` signed with that key. Raises `FederationError`."""
    if values.keys() != {*_HEAD_KEYS, "sig"} or type(values["seq"]) is not int or values["seq"] < 0:
        raise FederationError(
            f"the head of the privacy ledger of {site} is not one: it needs {', '.join(_HEAD_KEYS)}, sig"
        )
    names = {name: values[name] for name in _HEAD_KEYS}
    right = _is_hash(names["hash"]) and names["site"] == site and names["public_key"] == public_bytes(public_key)
    if not right or not _verifies(_signed_head(names), values["sig"], public_key):
        raise FederationError(
            f"the head of the privacy ledger that came as {site}'s is not signed by its ledger's key: ask the site for it again"
        )
    return names["seq"], names["hash"]


def endorse(site: str, key: Ed25519PublicKey, identity: PrivateKey) -> dict[str, Any]:
    """What ledger.pub holds: the ledger's key, vouched for by the key with which the site was admitted."""
    values = {
        "site": site,
        "public_key": public_bytes(key),
        "endorsed_by": fingerprint(public_text(identity.public_key())),
    }
    return {**values, "signature": sign_json("ledger-key", values, identity)}


def check_endorsement(values: Mapping[str, Any], identity: PublicKey, *, site: str) -> Ed25519PublicKey:
    """The ledger's key, if the site's admitted key vouches for it. Raises `IdentityError`."""
    where = f"the ledger key of {site}"
    if values.keys() != {"site", "public_key", "endorsed_by", "signature"}:
        raise IdentityError(f"{where}: ledger.pub must hold site, public_key, endorsed_by and signature")
    names = {name: values[name] for name in ("site", "public_key", "endorsed_by")}
    if names["site"] != site or names["endorsed_by"] != fingerprint(public_text(identity)):
        raise IdentityError(
            f"{where} is vouched for by another key, or for the site {names['site']!r:.80}: send ledger.pub again"
        )
    if not isinstance(values["signature"], str):
        raise IdentityError(f"{where} is not signed")
    verify_json("ledger-key", names, values["signature"], identity, where)
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(names["public_key"], validate=True))
    except (ValueError, TypeError) as error:
        raise IdentityError(f"{where} is not an Ed25519 key in base64") from error


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX


def _signed(digest: str) -> bytes:
    return b"xfed ledger-line v1\n" + digest.encode()


def _signed_head(names: Mapping[str, Any]) -> bytes:
    return b"xfed ledger-head v1\n" + canonical_json(dict(names))


def _is_signed(line: Line, key: Ed25519PublicKey) -> bool:
    return _verifies(_signed(line.hash), line.sig, key)


def _verifies(data: bytes, signature: object, key: Ed25519PublicKey) -> bool:
    try:
        if not isinstance(signature, str):
            return False
        raw = base64.b64decode(signature.encode(), validate=True)
        # several texts of base64 stand for the same bytes; only one of them was written
        if base64.b64encode(raw).decode() != signature:
            return False
        key.verify(raw, data)
    except (InvalidSignature, ValueError):
        return False
    return True
