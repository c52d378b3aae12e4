"""The page on which a person goes through an archive: every image is accepted, or rejected with a reason.

::

    ReviewArchive --GET /api/archive, /files/images/<class>/<id>.png--> review_page.html, .js, .css: grid, single view, keys
    DecisionLog <--POST /api/decisions, /api/undo-- one request per decision, on disk before it is answered
                --GET /api/decisions--> what this reader has decided so far, after a reload or a restart

The page shows a reader's own decisions only: readers who share a log do not see each other's. A decision names the SHA-256 of
the file that was shown, so that it never counts for another image of the same name.
"""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from xfed.common.decision_log import REJECT, Decision, DecisionLog
from xfed.common.errors import ConfigError, DataError
from xfed.common.pages import add_page, page_app, safe_file, serve_page
from xfed.common.review_archive import ReviewArchive, open_archive

__all__ = ["REASONS", "Review", "default_log", "open_review", "review_app", "review_folder"]

REASONS = ("not a chest film", "anatomy impossible", "wrong class", "blurred or artefact", "duplicate")
"""What a reviewer may say in one key; anything else is "other: " and a few words."""
OTHER = "other: "
_HERE = Path(__file__).parent
_ASSETS = ("review_page.js", "review_grid.js", "review_server.js", "review_page.css")


@dataclass(frozen=True, kw_only=True)
class Review:
    """One reader at one archive, and the log that keeps what they decide."""

    archive: ReviewArchive
    log: DecisionLog
    reader: str

    def decisions(self) -> dict[str, Decision]:
        """The reader's standing decision per image, of images that are in this archive as they were shown."""
        return {
            decision.image: decision
            for decision in self.log.decisions()
            if decision.reader == self.reader and self.archive.digests.get(decision.image) == decision.sha256
        }


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    image: str
    verdict: Literal["accept", "reject"]
    reason: str = ""


def review_app(review: Review, token: str, port: int) -> FastAPI:
    """The page of one review."""
    archive, log, reader = review.archive, review.log, review.reader
    app = page_app(title=archive.facts["name"], token=token, port=port)
    add_page(
        app,
        token=token,
        page=_HERE / "review_page.html",
        assets={name: _HERE / name for name in _ASSETS},
    )
    known = frozenset(archive.images)
    about = json.dumps(
        {
            "name": archive.facts["name"],
            "reader": reader,
            "reasons": REASONS,
            "other": OTHER,
            "classes": archive.classes,
            "images": archive.images,
            "labels": archive.labels,
            "scores": archive.scores,
        },
        ensure_ascii=False,
    ).encode()

    def path_of(image: str) -> Path:
        if image not in known:
            raise HTTPException(404, "There is no such image in this archive.")
        return safe_file(archive.folder, image)

    @app.get("/api/archive")
    async def describe() -> Response:
        return Response(about, media_type="application/json")

    @app.get("/api/decisions")
    def decided() -> dict[str, tuple[str, str]]:
        return {image: (one.verdict, one.reason) for image, one in review.decisions().items()}

    @app.get("/files/{image:path}")
    async def picture(image: str) -> Response:
        return Response(path_of(image).read_bytes(), media_type="image/png")

    @app.post("/api/decisions")
    def decide(said: _Said) -> dict[str, str]:
        if said.verdict == REJECT and not _is_reason(said.reason):
            raise HTTPException(422, f"A reason is one of: {', '.join(REASONS)}; or {OTHER!r} and a few words.")
        try:
            digest = archive.check_image(path_of(said.image), said.image)
            made = log.append(said.image, said.verdict, said.reason, reader=reader, sha256=digest)
        except (ConfigError, DataError) as error:
            raise HTTPException(409, str(error)) from error
        return {"time": made.time}

    @app.post("/api/undo")
    def undo() -> dict[str, str | tuple[str, str] | None]:
        taken = log.withdraw(reader)
        if taken is None:
            return {"image": None, "decision": None}
        left = review.decisions().get(taken.image)
        return {"image": taken.image, "decision": (left.verdict, left.reason) if left else None}

    return app


def _is_reason(reason: str) -> bool:
    return reason in REASONS or (reason.startswith(OTHER) and bool(reason.removeprefix(OTHER).strip()))


def default_log(archive: Path, reader: str) -> Path:
    """Where a reader's log goes: beside the archive, never in it."""
    name = re.sub(r"[^a-z0-9]+", "-", reader.casefold()).strip("-") or "reader"
    place = archive.resolve()
    return place.with_name(f"{place.name}-review-{name}.jsonl")


def open_review(folder: Path, *, reader: str | None, log: Path | None) -> tuple[Review, Path]:
    """The archive of a run or archive folder, with the reader's log (returned with its path), made if it is not there.

    `reader` defaults to the name of the account. Raises `ConfigError`, `DataError`, `CheckpointError`, `IdentityError`,
    `StorageError`.
    """
    name = getpass.getuser() if reader is None else reader.strip()
    if not name or not name.isprintable() or len(name) > 80:
        raise ConfigError(f"--reader {name!r:.90} must be a name of 1 to 80 characters")
    archive = open_archive(folder)
    path = (log or default_log(archive.folder, name)).absolute()
    if path.resolve().is_relative_to(archive.folder.resolve()):
        raise ConfigError(f"--log {path} is inside the archive, which it would change: choose a place outside")
    return Review(archive=archive, log=DecisionLog(path, archive.facts), reader=name), path


def review_folder(
    folder: Path, *, reader: str | None, log: Path | None, port: int, tell: Callable[[str], None]
) -> None:
    """Serve the review of an archive until Ctrl-C; `tell` gets the lines that the person reads. Raises as `open_review` does."""
    review, path = open_review(folder, reader=reader, log=log)

    def announce(url: str) -> None:
        tell(f"{len(review.archive.images):,} images, {len(review.decisions()):,} of them decided by {review.reader}")
        tell(f"Log: {path}   key: {review.log.fingerprint}")
        tell(f"Open {url}")
        tell("Ctrl-C ends it; everything that was decided is kept.")

    serve_page(lambda token, number: review_app(review, token, number), port=port, announce=announce)
    number, digest = review.log.head
    tell(f"{len(review.decisions()):,} decided. Head of the log: {number}:{digest}")
