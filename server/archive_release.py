"""The archive's release: documents beside the images, their digests in the manifest, and the signature under all of it.

::

    report --about_of--> manifest.about, released, signed_by
      --> datasheet.md, croissant.json (xfed.server.datasheet, .croissant); passport.html, passport.json are there before
      --> manifest.json {documents: name -> SHA-256} --> manifest.sig.json, last

Every file is written whole, in this order: an archive whose release was killed does not verify, and the same command goes on.
Releasing again changes nothing that has not changed: `released` stays the time of the first release of these images.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.common.durable import sha256_file, translate_os_errors, write_json, write_text
from xfed.common.errors import CheckpointError
from xfed.common.signing_key import fingerprint, signing_key
from xfed.server.archive_manifest import DOCUMENTS, MANIFEST, read_manifest
from xfed.server.archive_signature import check_archive, differences, sign_archive
from xfed.server.croissant import croissant
from xfed.server.datasheet import about_of, datasheet
from xfed.server.run_signature import RUN_KEY

__all__ = ["publish", "release_archive"]


def release_archive(run_folder: Path, report: Mapping[str, Any], verdict: str) -> dict[str, Any]:
    """Write documents, manifest and signature of `run_folder`/archive with the run's key; returns the manifest.

    `report`: see `xfed.server.report`; `verdict`: its sentence. Raises `CheckpointError` (the archive is not as it was built),
    `IdentityError` (a damaged key), `StorageError`.
    """
    folder = run_folder / "archive"
    manifest = read_manifest(folder)
    if changed := list(differences(folder, manifest["files"])):
        raise CheckpointError(
            f"{folder} is not as it was built, so it is not signed: {'; '.join(changed[:5])} ({len(changed)} in all). "
            "Delete the folder and run the same command again: the same images are drawn anew."
        )
    about = about_of(report, verdict, manifest["root_sha256"])
    return publish(folder, {**manifest, "about": about}, signing_key(run_folder / RUN_KEY))


def publish(folder: Path, manifest: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Write the documents that follow from `manifest`, the manifest and its signature; returns the manifest as written."""
    with translate_os_errors(folder):
        for left_behind in folder.glob(".*.tmp"):  # of a write that was killed
            left_behind.unlink()
    facts = {name: value for name, value in manifest.items() if name not in ("documents", "files")}
    facts["signed_by"] = fingerprint(key.public_key())
    facts["released"] = _released(manifest)
    facts["released_root_sha256"] = manifest["root_sha256"]
    whole = {**facts, "files": manifest["files"]}
    _keep(folder / "datasheet.md", datasheet(whole))
    write_json(folder / "croissant.json", croissant(whole))
    documents = {name: sha256_file(folder / name) for name in DOCUMENTS if (folder / name).is_file()}
    result = {**facts, "documents": documents, "files": manifest["files"]}
    written = (folder / MANIFEST).is_file() and read_manifest(folder) == result
    if not written or check_archive(folder).problems:
        write_json(folder / MANIFEST, result)
        sign_archive(folder, key)
    return result


def _released(manifest: Mapping[str, Any]) -> str:
    """When these images were first released (UTC, ISO 8601)."""
    if manifest.get("released_root_sha256") == manifest["root_sha256"]:
        return str(manifest["released"])
    return datetime.now(UTC).isoformat(timespec="seconds")


def _keep(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
