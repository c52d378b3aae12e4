"""Whether an archive is what the coordinator released: signature, every digest, nothing missing, nothing added.

::

    manifest.json --SHA-256--> manifest.sig.json (xfed.server.run_signature, kind "archive")
    DIR --check_archive--> manifest.sig.json fits manifest.json's bytes --> manifest lists every file's SHA-256 --> Checked

Formal guarantees
    Without problems: every byte of every file is as it was when the holder of the key with that fingerprint signed, and the
    folder holds nothing else.
Not covered
    Whose the key is: whoever exchanges the whole folder signs with a key of their own. Compare the fingerprint with the one that
    the coordinator told by another way, and give it (`known_key`). Of an unsigned archive the digests are checked alone:
    whoever changes a file can change the manifest too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.durable import sha256_file
from xfed.common.errors import CheckpointError
from xfed.server.archive_manifest import MANIFEST, SIGNATURE, read_manifest, root_of
from xfed.server.run_signature import read_signature, write_signature

__all__ = ["Checked", "check_archive", "differences", "sign_archive", "verify_archive"]

KIND = "archive"


@dataclass(frozen=True)
class Checked:
    """What was found: `problems` in words, empty when all is untouched; who signed (None: nobody) and when."""

    problems: tuple[str, ...]
    fingerprint: str | None
    signed_at: str | None


def sign_archive(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write manifest.sig.json for the manifest in `folder`. Raises `StorageError`."""
    write_signature(folder / SIGNATURE, KIND, key, {MANIFEST: sha256_file(folder / MANIFEST)})


def verify_archive(folder: Path, *, unsigned: bool = False, known_key: str | None = None) -> list[str]:
    """The problems of `check_archive`; empty when all is untouched. Raises `CheckpointError` (no readable manifest)."""
    return list(check_archive(folder, unsigned=unsigned, known_key=known_key).problems)


def check_archive(folder: Path, *, unsigned: bool = False, known_key: str | None = None) -> Checked:
    """Compare an archive with its signature and its manifest.

    `unsigned`: an archive without any signature passes. `known_key`: the fingerprint that the signer must have, as
    the coordinator told it. Raises `CheckpointError` where there is no readable manifest.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    fingerprint = signed_at = None
    if (folder / SIGNATURE).exists():
        try:
            signed = read_signature(folder / SIGNATURE, KIND)
            fingerprint, signed_at = signed.fingerprint, signed.time
            problems += _against_signature(folder, manifest, signed.digests, fingerprint)
        except CheckpointError as error:
            problems.append(str(error))
    elif not unsigned or "signed_by" in manifest:
        problems.append(f"{SIGNATURE}: missing: the archive is not signed, so anybody may have changed it")
    if known_key is not None and fingerprint is not None and fingerprint != known_key:
        problems.append(f"{SIGNATURE}: signed by {fingerprint}, not by {known_key}")
    if known_key is not None and fingerprint is None and not problems:
        problems.append(f"{SIGNATURE}: nobody signed, least of all {known_key}")
    problems += _against_manifest(folder, manifest)
    return Checked(tuple(problems), fingerprint, signed_at)


def differences(folder: Path, listed: Mapping[str, str]) -> Iterator[str]:
    """Which of the files (name to SHA-256) are missing or changed, in words."""
    for name, digest in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            yield f"{name}: missing" + (" (a link stands in its place)" if path.is_symlink() else "")
        elif sha256_file(path) != digest:
            yield f"{name}: changed"


def _against_signature(
    folder: Path, manifest: Mapping[str, Any], digests: Mapping[str, str], fingerprint: str
) -> Iterator[str]:
    if digests != {MANIFEST: hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}:
        yield f"{MANIFEST}: changed: it is not the file that was signed"
    elif manifest.get("signed_by") != fingerprint:
        yield f"{SIGNATURE}: exchanged: the manifest names {manifest.get('signed_by')} as its signer, not {fingerprint}"


def _against_manifest(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    if root_of(manifest["files"]) != manifest["root_sha256"]:
        yield f"{MANIFEST}: changed: the list of files does not match its root digest"
    listed = {**manifest["files"], **manifest.get("documents", {})}
    yield from differences(folder, listed)
    own = listed.keys() | {MANIFEST, SIGNATURE}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in own and (path.is_symlink() or not path.is_dir()):
            yield f"{name}: not in the manifest"
