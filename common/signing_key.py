"""Ed25519 keys in files of their own: what signs ledgers and decisions.

::

    PATH (OpenSSH, mode 0600) --signing_key--> made if it is not there, whole after any kill, never replaced --> Ed25519PrivateKey
    public key --fingerprint--> SHA256:... as `ssh-keygen -lf` prints it
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xfed.common.durable import write_bytes
from xfed.common.errors import IdentityError
from xfed.common.identity import read_bounded

__all__ = ["fingerprint", "signing_key"]


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The key in `path`; made when there is none.

    Raises `IdentityError` when it is damaged, another kind of key, or readable by others; `StorageError` when the disk refuses.
    """
    if not path.exists():
        _make(path)
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


def _make(path: Path) -> None:
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


def fingerprint(key: Ed25519PublicKey) -> str:
    """``SHA256:...``: short enough to be told by telephone."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
