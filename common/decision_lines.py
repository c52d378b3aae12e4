"""The lines of a log of decisions: how they are written, signed and checked, and what continues what.

::

    {"kind": "log" | "decision" | "withdrawal" | "torn", ...} --write_line(key)--> bytes of one line, newline included
    lines --DecisionChain.take--> archive, public key, decisions that stand, head | ValueError: what is wrong, in words

A line is canonical JSON (keys sorted, no spaces, UTF-8). `hash` is the SHA-256 (hex) of the line without `hash` and `sig`; `sig`
is the Ed25519 signature (base64) over ``b"xfed decision v1\\n"`` and the hash in hex; `prev` is the hash of the line before, 64
zeros in the first, which holds the public key. Nothing here is on disk.

Formal guarantees
    `DecisionChain.take` accepts exactly the bytes that `write_line` writes: no other spelling of the same values passes.
    It finds every changed byte, and every line taken out, put in, moved or exchanged, except at the end.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xfed.common.errors import ConfigError, IdentityError
from xfed.common.identity import canonical_json

__all__ = ["ACCEPT", "DECISION_FIELDS", "REJECT", "Decision", "DecisionChain", "Head", "key_text", "write_line"]

ACCEPT, REJECT = "accept", "reject"
LONGEST_TEXT = 500
_LONGEST_LINE = 16_384

Head = tuple[int, str]
"""Number and hash of a log's last line."""
START: Head = (0, "0" * 64)
DECISION_FIELDS = ("image", "sha256", "verdict", "reason", "reader")
_FRAME = {"seq": int, "time": str, "kind": str, "prev": str, "hash": str, "sig": str}
_FIELDS: dict[str, dict[str, type]] = {
    "log": {"archive": dict, "public_key": str, "software": str},
    "decision": dict.fromkeys(DECISION_FIELDS, str),
    "withdrawal": {"withdraws": int, "reader": str},
    "torn": {"bytes": int, "sha256": str},
}


@dataclass(frozen=True)
class Decision:
    """One reader's word on one image: `image` is its file_name in the archive, `time` is UTC (ISO 8601).

    `verdict` is "accept" or "reject"; `reason` is "" for what is accepted; `sha256` is that of the file that was shown.
    Raises `ConfigError` for values that are none.
    """

    image: str
    verdict: str
    reason: str
    reader: str
    time: str
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in (ACCEPT, REJECT):
            raise ConfigError(f"verdict {self.verdict!r:.40} is not one of {ACCEPT}, {REJECT}")
        if (self.verdict == REJECT) != bool(self.reason.strip()):
            raise ConfigError("what is rejected needs a reason, and what is accepted has none")
        for name, text in (("image", self.image), ("reader", self.reader), ("reason", self.reason)):
            if len(text) > LONGEST_TEXT or not text.isprintable() or (not text.strip() and name != "reason"):
                raise ConfigError(f"{name} {text!r:.60} must be one line of 1 to {LONGEST_TEXT} characters")


class DecisionChain:
    """What the lines so far say: archive, public key (None before the first line), decisions that stand by their line's number.

    `hashes`: of all lines, the 64 zeros first; `size`: bytes of all lines; `last`: the last line.
    """

    def __init__(self) -> None:
        self.archive: dict[str, str] = {}
        self.public_key: Ed25519PublicKey | None = None
        self.decisions: dict[int, Decision] = {}
        self.hashes = [START[1]]
        self.size, self.last = 0, b""

    @property
    def head(self) -> Head:
        """Number and hash of the last line."""
        return len(self.hashes) - 1, self.hashes[-1]

    def take(self, line: bytes) -> None:
        """Continue with one line, newline included. Raises `ValueError` for one that does not belong there."""
        values = _read_line(line)
        number = len(self.hashes)
        if (values["kind"] == "log") != (number == 1):
            raise ValueError("the first line, and no other, must say whose log it is")
        key = _public_key(values["public_key"]) if self.public_key is None else self.public_key
        try:
            key.verify(_plain_base64(values["sig"]), _signed(values["hash"]))
        except (InvalidSignature, ValueError) as error:
            raise ValueError("forged: the key of this log did not sign it") from error
        if values["seq"] != number:
            raise ValueError(f"{'gap' if values['seq'] > number else 'rewrite'}: it says it is line {values['seq']}")
        if values["prev"] != self.hashes[-1]:
            raise ValueError("fork: it continues another line than the one before it")
        self._note(values)
        self.public_key = key
        self.hashes.append(values["hash"])
        self.size, self.last = self.size + len(line), line

    def _note(self, values: dict[str, Any]) -> None:
        match values["kind"]:
            case "log":
                self.archive = {str(name): str(value) for name, value in values["archive"].items()}
            case "decision":
                fields = {name: values[name] for name in DECISION_FIELDS}
                try:
                    self.decisions[values["seq"]] = Decision(time=values["time"], **fields)
                except ConfigError as error:
                    raise ValueError(str(error)) from error
            case "withdrawal":
                taken = self.decisions.get(values["withdraws"])
                if taken is None or taken.reader != values["reader"]:
                    raise ValueError(f"line {values['withdraws']} is no decision of its reader that stands")
                del self.decisions[values["withdraws"]]


def write_line(kind: str, fields: dict[str, Any], after: Head, key: Ed25519PrivateKey) -> bytes:
    """The line behind `after`, newline included, dated now (UTC)."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    values = {"seq": after[0] + 1, "time": time, "kind": kind, "prev": after[1], **fields}
    digest = hashlib.sha256(canonical_json(values)).hexdigest()
    signature = base64.b64encode(key.sign(_signed(digest))).decode()
    return canonical_json({**values, "hash": digest, "sig": signature}) + b"\n"


def key_text(key: Ed25519PublicKey) -> str:
    """A log's public key as it stands in the first line: base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def _read_line(line: bytes) -> dict[str, Any]:
    """The values of a line whose hash is right and whose bytes are the ones that are written. Raises `ValueError`."""
    try:
        values: dict[str, Any] = dict(json.loads(line)) if len(line) <= _LONGEST_LINE else {}
        right = canonical_json(values) + b"\n" == line
    except (ValueError, TypeError, RecursionError, IdentityError) as error:
        raise ValueError("changed: it is not JSON") from error
    fields = _FIELDS.get(str(values.get("kind")), {}) if right else {}
    if not fields or values.keys() != _FRAME.keys() | fields.keys():
        raise ValueError("changed: it is not written as the lines of this log are")
    if any(type(values[name]) is not kind for name, kind in {**_FRAME, **fields}.items()):
        raise ValueError("changed: a value is of another type")
    bare = {name: value for name, value in values.items() if name not in ("hash", "sig")}
    if values["hash"] != hashlib.sha256(canonical_json(bare)).hexdigest():
        raise ValueError("changed: its hash is not that of its content")
    return values


def _signed(digest: str) -> bytes:
    return b"xfed decision v1\n" + digest.encode()


def _plain_base64(text: str) -> bytes:
    """What `text` encodes, if it is the one way to encode it. Raises `ValueError`."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("it is not written as base64 is")
    return data


def _public_key(text: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(_plain_base64(text))
    except ValueError as error:
        raise ValueError("changed: its public key is none") from error
