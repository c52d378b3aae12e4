"""What the coordinator signs with the run's key: reports and archives.

::

    RUN/report.key (Ed25519, 0600, made when first needed; stays with the coordinator; xfed.common.signing_key)
      + {"sha256": {file: hex}, "public_key", "time"} --Ed25519 over b"xfed <kind> v1\\n" + canonical JSON--> NAME.sig.json
    NAME.sig.json --read_signature--> Signed (digests, time, fingerprint), or what is wrong with it

The key is the run's own: that it is the coordinator's key is known from its fingerprint, told by another way than the files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.auditor.keys import ed25519_fingerprint, ed25519_signed, plain_base64
from xfed.common.durable import write_json
from xfed.common.errors import CheckpointError
from xfed.common.identity import canonical_json

__all__ = ["RUN_KEY", "Signed", "read_signature", "write_signature"]

RUN_KEY = "report.key"


def write_signature(path: Path, kind: str, key: Ed25519PrivateKey, digests: Mapping[str, str]) -> None:
    """Sign the SHA-256 digests of files as `kind` ("report", "archive") into `path`, atomically. Raises `StorageError`."""
    values = {
        "sha256": dict(digests),
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    signature = key.sign(_signed_as(kind) + canonical_json(values))
    write_json(path, {**values, "sig": base64.b64encode(signature).decode()})


@dataclass(frozen=True)
class Signed:
    """A signature that fits: the digests it covers, its time (UTC, ISO 8601) and the signer's fingerprint."""

    digests: Mapping[str, str]
    time: str
    fingerprint: str


def read_signature(path: Path, kind: str) -> Signed:
    """Check a file of `write_signature`, every byte of it. Raises `CheckpointError` that says what is wrong."""
    try:
        data = path.read_bytes()
        values = json.loads(data)
        # JSON has many spellings of one value, and a signature over values would not notice
        spelled = isinstance(values, dict) and data.decode() == json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: changed: it cannot be read ({type(error).__name__})") from error
    if not spelled:
        raise CheckpointError(f"{path.name}: changed: it is not spelled as it was written")
    public = plain_base64(values.get("public_key"))
    if values.keys() != {"sha256", "public_key", "time", "sig"} or public is None or len(public) != 32:
        raise CheckpointError(f"{path.name}: changed: it must hold sha256, public_key, time and sig")
    rest = {name: value for name, value in values.items() if name != "sig"}
    if not ed25519_signed(public, _signed_as(kind) + canonical_json(rest), str(values["sig"])):
        raise CheckpointError(f"{path.name}: changed: the signature does not fit, or belongs to something else")
    return Signed(values["sha256"], str(values["time"]), ed25519_fingerprint(public))


def _signed_as(kind: str) -> bytes:
    return f"xfed {kind} v1\n".encode()
