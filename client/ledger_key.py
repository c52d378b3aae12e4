"""The key of a site's ledger, and who vouches for it.

::

    SITE/key (P-384, admitted) --endorse--> ledger.pub {"site", "public_key", "endorsed_by", "signature"} --> coordinator
    SITE/ledger.key (Ed25519, 0600, made once, never replaced) --> signs lines and heads, nothing else

A kill leaves no key, or a whole one; ledger.pub is written again when it is missing or the site's key was rotated.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.durable import write_bytes, write_json
from xfed.common.errors import IdentityError
from xfed.common.identity import load_private_key, read_bounded
from xfed.common.ledger_lines import endorse

__all__ = ["ledger_key"]


def ledger_key(folder: Path, site: str) -> Ed25519PrivateKey:
    """The key that signs a site's ledger; made once, never replaced, and vouched for in ledger.pub by the site's own key.

    ledger.pub is written again when the site's key was rotated. Raises `IdentityError`, `StorageError`.
    """
    path = folder / "ledger.key"
    if not path.exists():
        if (folder / "ledger.jsonl").exists():
            raise IdentityError(f"{folder}: a ledger is there, but not its key. Restore ledger.key from a backup")
        _make_key(path)
    key = _load_key(path)
    identity = folder / "key"
    if identity.exists():
        values = endorse(site, key.public_key(), load_private_key(identity))
        if not _is_written(folder / "ledger.pub", values):
            write_json(folder / "ledger.pub", values)
    return key


def _make_key(path: Path) -> None:
    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_bytes(whole, data, private=True)
        with suppress(FileExistsError):  # another process made one meanwhile: that one is used
            os.link(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def _load_key(path: Path) -> Ed25519PrivateKey:
    data, mode = read_bounded(path, 16_384)
    if mode & 0o077:
        raise IdentityError(f"{path} can be read by others than its owner (mode {mode:04o}): run chmod 600 {path}")
    try:
        key = serialization.load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path} is damaged: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path} is not an Ed25519 key: restore it from a backup")
    return key


def _is_written(path: Path, values: dict[str, Any]) -> bool:
    """Whether ledger.pub says so already; ECDSA signatures differ each time, so all but the signature is compared."""
    try:
        known = json.loads(path.read_bytes())
        return isinstance(known, dict) and {**known, "signature": ""} == {**values, "signature": ""}
    except (OSError, ValueError):
        return False
