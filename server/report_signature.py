"""The coordinator's signature under a report: whoever reads it later can tell that nothing was changed.

::

    report.json, report.html --SHA-256--> report.sig.json {"sha256": {name: hex}, "public_key", "time", "sig"}
    report.key (0600, made with the first report; stays with the coordinator)

Ed25519 over ``b"xfed report v1\\n"`` and the canonical JSON of the rest. The key is the run's own: that it is the
coordinator's key is known from its fingerprint, which the run prints, not from the file.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.durable import sha256_file, write_bytes, write_json
from xfed.common.errors import CheckpointError
from xfed.common.identity import canonical_json

__all__ = ["sign_report"]

SIGNED = ("report.json", "report.html")


def _key(path: Path) -> Ed25519PrivateKey:
    if not path.is_file():
        key = Ed25519PrivateKey.generate()
        raw = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_bytes(path, raw, private=True)
        return key
    try:
        loaded = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Delete it: the report is then signed with a new key."
        ) from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise CheckpointError(f"{path} is not an Ed25519 key. Delete it: the report is then signed with a new key.")
    return loaded


def sign_report(folder: Path) -> None:
    """Write report.sig.json for the report in `folder`. Raises `StorageError`, `CheckpointError` on a damaged key."""
    key = _key(folder / "report.key")
    values = {
        "sha256": {name: sha256_file(folder / name) for name in SIGNED},
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    signature = key.sign(b"xfed report v1\n" + canonical_json(values))
    write_json(folder / "report.sig.json", {**values, "sig": base64.b64encode(signature).decode()})
