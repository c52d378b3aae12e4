"""Phase 2: the synthetic archive, drawn from the moving-average generators, and its way to the sites.

::

    counts of real images per class --plan--> how many synthetic each class needs
    generator + seed of each image --render in fixed blocks--> quality filter (xfed.server.archive_filter)
      (one generator of all images: its latents are steered first, xfed.server.steered_archive)
      --> archive/images/<class>/<id>.png, metadata.csv, manifest.json
      --> shards of uint8 arrays --OfferArchive / KeepArchive--> sites

The folder is built beside its place and renamed whole. Every image can be made again from its class's
generator, the study's seed and its number (the one in its name): latents come from a stream of their own per image, and
images are always rendered in the same blocks of 32. Documents and signature come with the release (xfed.server.archive_release).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, PngImagePlugin

from xfed.common.config import Study
from xfed.common.config_family import ALL, slug
from xfed.common.dcgan import draw_latent
from xfed.common.durable import link_or_copy, remove_tree, translate_os_errors, write_json
from xfed.common.errors import CheckpointError, ConfigError, DataError, FederationError
from xfed.common.gan import ready_generator, render
from xfed.common.messages import ArchiveKept, ArchiveWanted, KeepArchive, OfferArchive, Reply, Request
from xfed.common.randomness import seed_for, torch_generator
from xfed.common.synthetic_mark import MARK
from xfed.common.version import SOFTWARE
from xfed.common.weights import Weights, digest_of
from xfed.server.archive_filter import COLUMNS, Sieve
from xfed.server.archive_manifest import MANIFEST, METADATA, labels_of, open_archive, root_of, write_rows
from xfed.server.archive_signature import verify_archive
from xfed.server.run import Run
from xfed.server.steered_archive import COLUMNS as STEERED
from xfed.server.steered_archive import Searches, Target

__all__ = [
    "adopt_archive",
    "build_archive",
    "deliver_archive",
    "plan_counts",
    "read_archive",
    "render_block",
    "reused_archive",
    "slug",
    "verify_archive",
]

BLOCK = 32
SHARD = 2048
ROW = ("file_name", "label", "label_index", "seed", "generator_sha256", "synthetic")
STATEMENT = (
    "Synthetic images: no picture shows a patient. They were made by generators trained on patients' images WITHOUT differential "
    "privacy: the privacy loss (epsilon) is infinite, and memorised features of training images cannot be ruled out."
)


def _statement(study: Study) -> str:
    """What the archive costs a patient, in words, from the study's budget: sites refuse what would exceed it."""
    if not study.private:
        return STATEMENT
    privacy = study.privacy
    return (
        "Synthetic images: no picture shows a patient. They follow from releases with differential privacy for every patient "
        f"(add or remove one) of every hospital: epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g}, everything "
        "else that the study releases included. The hospitals' ledgers say what was spent."
    )


def plan_counts(study: Study, real: Mapping[str, int]) -> dict[str, int]:
    """Synthetic images per class, from the real training images per class over all sites (paper, section 3.3.2 and Figure 4).

    Of each combination of `archive.findings` the least number.
    """
    settings = study.archive
    if settings.balance == "fixed":
        return dict.fromkeys(study.labels, settings.per_class)
    goal = math.ceil(settings.target * max(real.values()))
    wanted = {name: max(settings.minimum, goal - real[name]) for name in study.classes}
    return wanted | dict.fromkeys(study.archive.findings, settings.minimum)


def render_block(study: Study, class_name: str, generator: Any, block: int) -> npt.NDArray[np.uint8]:
    """Images number ``32 block`` to ``32 block + 31`` of a class, uint8 [32, S, S]."""
    rows = [
        draw_latent(1, study.gan.latent, torch_generator(study.seed, "archive", class_name, number))
        for number in range(block * BLOCK, (block + 1) * BLOCK)
    ]
    return render(generator, torch.cat(rows))


def build_archive(run: Run, weights: Mapping[str, Weights], steering: Weights | None = None) -> dict[str, Any]:
    """Write archive/ unless it is there; returns its manifest. Raises `StorageError`.

    `steering`: the classifier that labels the images of a generator of all images (`xfed.server.steering`).
    """
    study, place = run.study, run.folder / "archive"
    if (place / MANIFEST).is_file():
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text())
        if manifest.get("study") == study.digest:
            return manifest
        raise CheckpointError(f"{place} is the archive of another study. Choose another --out.")
    real = {name: int(run.census.counts[0, label]) for label, name in enumerate(study.classes)}
    planned = plan_counts(study, real)
    run.journal.write("phase", phase="archive", round=0, rounds=sum(planned.values()))
    building = run.folder / ".archive.building"
    remove_tree(building)
    digests = {name: digest_of(weights[name]) for name in study.generators}
    searches = Searches(run, weights[ALL], steering) if steering is not None else None
    sieve = Sieve(on=study.archive.filter)
    rows: list[dict[str, str]] = []
    files: dict[str, str] = {}
    with translate_os_errors(building):
        for name in study.labels:
            (building / "images" / name).mkdir(parents=True)
            target = Target(searches, name, planned[name]) if searches else None
            if target is not None:
                draw: Callable[[int], npt.NDArray[np.uint8]] = target.block
            else:
                draw = partial(render_block, study, name, ready_generator(study, weights[name]))
            for image in sieve.sift(name, planned[name], draw):
                if image.reason:
                    continue
                relative = f"images/{name}/{slug(name)}-{image.number:06d}.png"
                data = _png(image.pixels)
                (building / relative).write_bytes(data)
                files[relative] = hashlib.sha256(data).hexdigest()
                rows.append(
                    {
                        "file_name": relative,
                        "label": name,
                        "label_index": str(study.labels.index(name)),
                        "seed": str(seed_for(study.seed, "archive", name, image.number)),
                        "generator_sha256": digests[ALL if target else name],
                        "synthetic": "true",
                        **image.scores,
                        **(target.row(image.number) if target else {}),
                    }
                )
                if len(rows) % BLOCK == 0:
                    run.journal.write("round", phase="archive", round=len(rows), rounds=sum(planned.values()))
            if target is not None:
                target.end()
    made = Counter(row["label"] for row in rows)
    _note_what_is_short(run, sieve.facts())
    files[METADATA] = write_rows(building, rows, (*ROW, *(STEERED if searches else ()), *COLUMNS))
    manifest = {
        "schema": 2,
        "study": study.digest,
        "name": study.name,
        "software": SOFTWARE,
        "image_size": study.image_size,
        "classes": list(study.classes),
        "counts": {name: made[name] for name in study.labels},
        "planned": planned,
        **({"findings": study.archive.findings, "steering": searches.facts()} if searches else {}),
        "filter": sieve.facts(),
        "generators": digests,
        "seed": study.seed,
        "privacy": _statement(study),
        "curation": {"summary": "none: no person has looked at these images yet"},
        "root_sha256": root_of(files),
        "files": files,
    }
    write_json(building / MANIFEST, manifest)
    with translate_os_errors(place):
        building.rename(place)
    return manifest


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file that says of itself that it shows nobody."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Comment", MARK)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def _note_what_is_short(run: Run, facts: Mapping[str, Any]) -> None:
    """Classes that the filter left smaller go to the journal, and so to the report. Raises `DataError` if all are empty."""
    for name, missing in facts["short"].items():
        if run.study.unlabelled:
            text = f"{name}: {missing} images fewer than planned: steering found no more in gan.steering.attempts"
            run.journal.write("problem", phase="archive", round=0, site="", text=text, attempt=1)
            continue
        reasons = ", ".join(f"{count} {reason}" for reason, count in facts["rejected"][name].items())
        text = f"{name}: {missing} images fewer than planned: of {facts['drawn'][name]} drawn, rejected: {reasons}"
        run.journal.write("problem", phase="archive", round=0, site="", text=text, attempt=1)
    if not any(sum(facts["rejected"][name].values()) < drawn for name, drawn in facts["drawn"].items()):
        raise DataError(
            "no synthetic image of any class passed the quality filter: the generators have collapsed. Train them for longer "
            "(gan.rounds, gan.steps_per_round), or look at what they make with archive.filter: false, in a study of its own."
        )


def reused_archive(folder: Path, study: Study) -> dict[str, Any]:
    """The manifest of the archive that `study` asks for by `archive.reuse`. Raises `CheckpointError`, `ConfigError`."""
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} holds no archive: the study is on one that exists (archive.reuse). Copy it there, or give --archive DIR"
        )
    manifest = dict(open_archive(folder).manifest)
    if manifest["root_sha256"] != study.archive.reuse:
        raise ConfigError(
            f"{folder} has root {manifest['root_sha256'][:12]}, the study asks for {(study.archive.reuse or '')[:12]}"
        )
    if manifest["image_size"] != study.image_size or labels_of(manifest) != study.labels:
        raise ConfigError(
            f"{folder}: {manifest['image_size']} px images of {', '.join(labels_of(manifest))}; the study wants "
            f"{study.image_size} px of {', '.join(study.labels)}"
        )
    return manifest


def adopt_archive(source: Path, folder: Path) -> None:
    """Copy archive `source` to `folder` unless there is one: hard links where the disk has them, the manifest last.

    Raises `CheckpointError` when `source` is no archive, `StorageError`.
    """
    if (folder / MANIFEST).is_file():
        return
    archive = open_archive(source)
    building = folder.with_name(f".{folder.name}.building")
    remove_tree(building)
    with translate_os_errors(building):
        for name in archive.manifest["files"]:
            place = building / name
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source / name, place)
        write_json(building / MANIFEST, archive.manifest)
        building.rename(folder)


def read_archive(folder: Path, classes: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All images uint8 [n, S, S] and labels int64 [n] of an archive, in the order of its metadata."""
    rows = open_archive(folder).rows
    images = []
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            images.append(np.asarray(image))
    return np.stack(images), np.array([classes.index(row["label"]) for row in rows], dtype=np.int64)


def deliver_archive(run: Run, root: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    """Bring the archive to every site that lacks it, shard by shard."""
    shards: list[dict[str, npt.NDArray[Any]]] = [
        {"images": images[start : start + SHARD], "labels": labels[start : start + SHARD]}
        for start in range(0, len(images), SHARD)
    ]
    digests = [digest_of(shard) for shard in shards]
    wanted: dict[str, list[int]] = {}

    def fold_wanted(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ArchiveWanted):
            raise FederationError(f"{site} answered {type(reply).__name__} to OfferArchive")
        wanted[site] = [int(position) for position in reply.missing.split(",") if position]

    def fold_kept(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ArchiveKept) or not isinstance(request, KeepArchive) or reply.digest != request.digest:
            raise FederationError(f"{site} did not keep the archive shard it was sent")

    offer = OfferArchive(study=run.study.digest, root=root, digests=",".join(digests))
    run.ask("archive", 0, [(site, offer) for site in run.exchange.sites], fold_wanted)
    for position, shard in enumerate(shards):
        takers = [site for site, missing in wanted.items() if position in missing]
        if takers:
            request = KeepArchive(study=run.study.digest, shard=position, digest=digests[position], arrays=shard)
            run.ask("archive", position + 1, [(site, request) for site in takers], fold_kept)
