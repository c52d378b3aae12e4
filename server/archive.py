"""Phase 2: the synthetic archive, drawn from the moving-average generators, and its way to the sites.

::

    counts of real images per class --plan--> how many synthetic each class needs
    generator + seed of each image --render in fixed blocks--> archive/images/<class>/<id>.png, metadata.csv, manifest.json
                                                                  --> shards of uint8 arrays --OfferArchive / KeepArchive--> sites

The folder is built beside its place and renamed whole. Every image can be made again from its class's
generator, the study's seed and its number: latents come from a stream of their own per image, and images are
always rendered in the same blocks of 32.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from xfed.common.config import Study
from xfed.common.dcgan import draw_latent
from xfed.common.durable import remove_tree, sha256_file, translate_os_errors, write_json, write_text
from xfed.common.errors import CheckpointError, FederationError
from xfed.common.gan import ready_generator, render
from xfed.common.messages import ArchiveKept, ArchiveWanted, KeepArchive, OfferArchive, Reply, Request
from xfed.common.randomness import seed_for, torch_generator
from xfed.common.version import SOFTWARE
from xfed.common.weights import Weights, digest_of
from xfed.server.run import Run

__all__ = ["build_archive", "deliver_archive", "plan_counts", "read_archive", "render_block", "slug", "verify_archive"]

BLOCK = 32
SHARD = 2048
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


def slug(class_name: str) -> str:
    """The class in file names: lower case, hyphens."""
    return class_name.strip().lower().replace(" ", "-")


def plan_counts(study: Study, real: Mapping[str, int]) -> dict[str, int]:
    """Synthetic images per class, from the real training images per class over all sites (paper, section 3.3.2 and Figure 4)."""
    settings = study.archive
    if settings.balance == "fixed":
        return dict.fromkeys(study.classes, settings.per_class)
    goal = math.ceil(settings.target * max(real.values()))
    return {name: max(settings.minimum, goal - real[name]) for name in study.classes}


def render_block(study: Study, class_name: str, generator: Any, block: int) -> npt.NDArray[np.uint8]:
    """Images number ``32 block`` to ``32 block + 31`` of a class, uint8 [32, S, S]."""
    rows = [
        draw_latent(1, study.gan.latent, torch_generator(study.seed, "archive", class_name, number))
        for number in range(block * BLOCK, (block + 1) * BLOCK)
    ]
    return render(generator, torch.cat(rows))


def build_archive(run: Run, weights: Mapping[str, Weights]) -> dict[str, Any]:
    """Write archive/ unless it is there; returns its manifest. Raises `StorageError`."""
    study, place = run.study, run.folder / "archive"
    if (place / "manifest.json").is_file():
        manifest: dict[str, Any] = json.loads((place / "manifest.json").read_text())
        if manifest.get("study") == study.digest:
            return manifest
        raise CheckpointError(f"{place} is the archive of another study. Choose another --out.")
    real = {name: int(run.census.counts[0, label]) for label, name in enumerate(study.classes)}
    counts = plan_counts(study, real)
    run.journal.write("phase", phase="archive", round=0, rounds=sum(counts.values()))
    building = run.folder / ".archive.building"
    remove_tree(building)
    made = 0
    digests = {name: digest_of(weights[name]) for name in study.classes}
    rows: list[tuple[str, ...]] = []
    files: dict[str, str] = {}
    with translate_os_errors(building):
        for name in study.classes:
            generator = ready_generator(study, weights[name])
            (building / "images" / name).mkdir(parents=True)
            for block in range(math.ceil(counts[name] / BLOCK)):
                for number, pixels in enumerate(render_block(study, name, generator, block), start=block * BLOCK):
                    if number >= counts[name]:
                        break
                    relative = f"images/{name}/{slug(name)}-{number:06d}.png"
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    (building / relative).write_bytes(buffer.getvalue())
                    files[relative] = hashlib.sha256(buffer.getvalue()).hexdigest()
                    seed = seed_for(study.seed, "archive", name, number)
                    rows.append((relative, name, str(study.classes.index(name)), str(seed), digests[name], "true"))
                    made += 1
                run.journal.write("round", phase="archive", round=made, rounds=sum(counts.values()))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file_name", "label", "label_index", "seed", "generator_sha256", "synthetic"))
    writer.writerows(rows)
    write_text(building / "metadata.csv", table.getvalue())
    files["metadata.csv"] = sha256_file(building / "metadata.csv")
    manifest = {
        "schema": 1,
        "study": study.digest,
        "name": study.name,
        "software": SOFTWARE,
        "image_size": study.image_size,
        "classes": list(study.classes),
        "counts": counts,
        "generators": digests,
        "seed": study.seed,
        "privacy": _statement(study),
        "curation": "none: no person has looked at these images yet",
        "root_sha256": _root(files),
        "files": files,
    }
    write_json(building / "manifest.json", manifest)
    with translate_os_errors(place):
        building.rename(place)
    return manifest


def _root(files: Mapping[str, str]) -> str:
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def verify_archive(folder: Path) -> list[str]:
    """What differs between an archive and its manifest, in words; empty when all is untouched. Raises `CheckpointError`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files: dict[str, str] = manifest["files"]
        root = manifest["root_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no readable archive manifest ({error})") from error
    problems = [] if _root(files) == root else ["manifest.json: the list of files does not match its root digest"]
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != digest:
            problems.append(f"{name}: changed")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    problems += [f"{name}: not in the manifest" for name in sorted(present - files.keys() - {"manifest.json"})]
    return problems


def read_archive(folder: Path, classes: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All images uint8 [n, S, S] and labels int64 [n] of an archive, in the order of its metadata."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
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
