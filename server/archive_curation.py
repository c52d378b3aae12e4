"""A curated archive: what people rejected is left out, and who decided what is written down.

::

    archive (verified) + decision logs (xfed.common.decision_log: signed, chained; the review page writes them)
      --> the last decision per image of each log counts; what any log rejects is left out
      --> OUT/ images, metadata.csv, manifest.json {curation: readers, times, reasons, logs}, documents, signature

OUT is built beside its place and renamed whole. The archive that was curated stays as it is, and is named by its root digest.
Figures were measured before: the passport is taken along under the name passport-before-curation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfed.common.decision_log import REJECT, Decision, read_log
from xfed.common.durable import sha256_file, sync_folder, translate_os_errors
from xfed.common.errors import ConfigError, DataError
from xfed.common.signing_key import signing_key
from xfed.server.archive_export import building_beside, open_verified, picture
from xfed.server.archive_manifest import METADATA, OpenArchive, root_of, write_rows
from xfed.server.archive_release import publish

__all__ = ["Review", "curate_archive", "read_reviews"]


@dataclass(frozen=True)
class Review:
    """One log: its digest, its key's fingerprint, its head (number and hash of the last line), and what counts per image."""

    path: Path
    sha256: str
    fingerprint: str
    head: tuple[int, str]
    last: Mapping[str, Decision]


def read_reviews(archive: OpenArchive, logs: Sequence[Path]) -> list[Review]:
    """The logs, checked against the archive.

    Raises `CheckpointError` (a log is not whole), `DataError` (a log of another study, about other pixels, without decisions).
    """
    reviews = []
    for path in logs:
        facts = read_log(path)
        if facts.archive.get("study") != archive.manifest["study"]:
            raise DataError(
                f"{path} is a review of another archive ({facts.archive.get('name', 'unnamed')}). Name the logs of this one."
            )
        last = {decision.image: decision for decision in facts.decisions}
        files = archive.manifest["files"]
        known = {name: decision for name, decision in last.items() if name in files and name != METADATA}
        if not known:
            raise DataError(f"{path} decides about no image of {archive.folder}. Name the logs of this archive.")
        for name, decision in known.items():
            if decision.sha256 not in ("", files[name]):
                raise DataError(f"{path}: {name} was another image when it was looked at. Have this archive reviewed.")
        reviews.append(Review(path, sha256_file(path), facts.fingerprint, facts.head, known))
    return reviews


def curate_archive(
    folder: Path,
    logs: Sequence[Path],
    out: Path,
    *,
    key: Path,
    accepted_only: bool = False,
    unsigned: bool = False,
    known_key: str | None = None,
) -> dict[str, Any]:
    """Write the archive in `folder` without its rejected images into the new folder `out`; returns its manifest.

    `key` signs it and is made when absent. `accepted_only` leaves out what nobody decided about, too. `unsigned`, `known_key`:
    see `check_archive`. Raises `CheckpointError` (archive or log changed), `DataError` (no image is left; foreign logs),
    `ConfigError` (`out`, `key`), `StorageError`.
    """
    if key.resolve().is_relative_to(out.resolve()) or key.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--signing-key {key}: a key must never lie in an archive. Choose another place.")
    archive, _ = open_verified(folder, unsigned=unsigned, known_key=known_key)
    reviews = read_reviews(archive, logs)
    rejected = {name: d for review in reviews for name, d in review.last.items() if d.verdict == REJECT}
    decided = {name for review in reviews for name in review.last}
    rows = [
        row
        for row in archive.rows
        if row["file_name"] not in rejected and (not accepted_only or row["file_name"] in decided)
    ]
    if not rows:
        raise DataError(f"{folder}: no image is left after curation. Look at the logs, or draw another archive.")
    building = building_beside(folder, out)
    with translate_os_errors(out):
        files = _copy(archive, rows, building)
        counts = Counter(row["label"] for row in rows)
        manifest = {
            **{name: value for name, value in archive.manifest.items() if name not in ("documents", "files")},
            "counts": {name: counts[name] for name in archive.labels},
            "curation": _facts(archive, reviews, rejected, len(rows), accepted_only),
            "root_sha256": root_of(files),
            "files": files,
        }
        _copy_passport(folder, building)
        result = publish(building, manifest, signing_key(key))
        if out.is_dir():
            out.rmdir()
        building.rename(out)
        sync_folder(out.resolve().parent)
    return result


def _copy(archive: OpenArchive, rows: Sequence[Mapping[str, str]], building: Path) -> dict[str, str]:
    """Images and metadata of `rows` into `building`; name to SHA-256."""
    files = {}
    for row in rows:
        name = row["file_name"]
        path = building / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(archive, name))
        files[name] = archive.manifest["files"][name]
    files[METADATA] = write_rows(building, rows, list(archive.rows[0]))
    return files


def _copy_passport(folder: Path, building: Path) -> None:
    for ending in ("html", "json"):
        for name in (f"passport-before-curation.{ending}", f"passport.{ending}"):
            if (folder / name).is_file():
                (building / f"passport-before-curation.{ending}").write_bytes((folder / name).read_bytes())
                break


def _facts(
    archive: OpenArchive, reviews: Sequence[Review], rejected: Mapping[str, Decision], kept: int, accepted_only: bool
) -> dict[str, Any]:
    """The manifest's `curation`: who, when, how many, why, and the logs' digests."""
    decisions = [decision for review in reviews for decision in review.last.values()]
    readers = sorted({decision.reader for decision in decisions})
    times = sorted(decision.time for decision in decisions)
    decided = {decision.image for decision in decisions}
    label = {row["file_name"]: row["label"] for row in archive.rows}
    total = len(archive.rows)
    undecided = total - len(decided)
    by = f"{len(readers)} reader{'s' * (len(readers) != 1)}"
    what = f"{len(rejected):,} of {total:,} images were rejected and left out by {by}"
    fate = "left out too" if accepted_only else "kept"
    looked = f"{undecided:,} were not looked at and {fate}" if undecided else "all were looked at"
    return {
        "summary": f"{what}; {looked}",
        "readers": readers,
        "first": times[0],
        "last": times[-1],
        "decided": len(decided),
        "rejected": len(rejected),
        "undecided": undecided,
        "kept": kept,
        "reasons": ", ".join(f"{reason} {n}" for reason, n in _tally(d.reason for d in rejected.values())),
        "rejected_per_class": dict(_tally(label[name] for name in rejected)),
        "disagreements": _disagreements(reviews),
        "logs": [
            {"sha256": review.sha256, "key": review.fingerprint, "lines": review.head[0], "head": review.head[1]}
            for review in reviews
        ],
        "source_root_sha256": archive.manifest["root_sha256"],
    }


def _tally(values: Any) -> list[tuple[str, int]]:
    """Values and how often they occur, most frequent first, equal ones by name."""
    return sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))


def _disagreements(reviews: Sequence[Review]) -> int:
    """Images that one log accepts and another rejects."""
    verdicts: dict[str, set[str]] = {}
    for review in reviews:
        for name, decision in review.last.items():
            verdicts.setdefault(name, set()).add(decision.verdict)
    return sum(len(found) > 1 for found in verdicts.values())
