"""The coordinator's signature under a report: whoever reads it later can tell that nothing was changed.

::

    report.json, report.html --SHA-256--> report.sig.json (xfed.server.run_signature)
    report.key (0600, made with the run's first signature; stays with the coordinator)

It is checked by `xfed-audit verify` (xfed.common.auditor.evidence).
"""

from __future__ import annotations

from pathlib import Path

from xfed.common.durable import sha256_file
from xfed.common.signing_key import signing_key
from xfed.server.run_signature import RUN_KEY, write_signature

__all__ = ["sign_report"]

SIGNED = ("report.json", "report.html")


def sign_report(folder: Path) -> None:
    """Write report.sig.json for the report in `folder`. Raises `StorageError`, `IdentityError` on a damaged key."""
    digests = {name: sha256_file(folder / name) for name in SIGNED}
    write_signature(folder / "report.sig.json", "report", signing_key(folder / RUN_KEY), digests)
