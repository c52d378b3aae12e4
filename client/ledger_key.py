"""The key of a site's ledger, and who vouches for it.

::

    SITE/key (P-384, admitted) --endorse--> ledger.pub {"site", "public_key", "endorsed_by", "signature"} --> coordinator
    SITE/ledger.key (Ed25519, 0600, made once, never replaced) --> signs lines and heads, nothing else

A kill leaves no key, or a whole one; ledger.pub is written again when it is missing or the site's key was rotated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.durable import write_json
from xfed.common.errors import IdentityError
from xfed.common.identity import load_private_key
from xfed.common.ledger_lines import endorse
from xfed.common.signing_key import signing_key

__all__ = ["ledger_key"]


def ledger_key(folder: Path, site: str) -> Ed25519PrivateKey:
    """The key that signs a site's ledger; made once, never replaced, and vouched for in ledger.pub by the site's own key.

    ledger.pub is written again when the site's key was rotated. Raises `IdentityError`, `StorageError`.
    """
    path = folder / "ledger.key"
    if not path.exists() and (folder / "ledger.jsonl").exists():
        raise IdentityError(f"{folder}: a ledger is there, but not its key. Restore ledger.key from a backup")
    key = signing_key(path)
    identity = folder / "key"
    if identity.exists():
        values = endorse(site, key.public_key(), load_private_key(identity))
        if not _is_written(folder / "ledger.pub", values):
            write_json(folder / "ledger.pub", values)
    return key


def _is_written(path: Path, values: dict[str, Any]) -> bool:
    """Whether ledger.pub says so already; ECDSA signatures differ each time, so all but the signature is compared."""
    try:
        known = json.loads(path.read_bytes())
        return isinstance(known, dict) and {**known, "signature": ""} == {**values, "signature": ""}
    except (OSError, ValueError):
        return False
