"""An archive measured at a hospital, against its own images, in the features of any network: offline, beside a study.

::

    archive (manifest, images, digests checked) --extractor--> 64 numbers per image --+
    store of the hospital (all images in a split) --same extractor--> 64 numbers -----+--> figures per class, shown here
                                                        sums over the two halves -----+--> --sums FILE, to be sent by hand
    files of several hospitals --xfed-server archive score--> the figures of the pooled images

The sums obey the site's policy as the answer to MeasureArchive does (`xfed.client.reply_bounds`): small halves are zeros, and
nothing is written where the policy lets no archive_scores out, or the archive's study is private: sums without noise would
be one more release.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.client.measures import real_sums, site_scores
from xfed.client.policy import Policy
from xfed.client.reply_bounds import check_reply
from xfed.client.store import open_store
from xfed.common.archive_figures import SUMS_FILE, RealSums, add_site, class_figures, scale_of, thinning
from xfed.common.diversity import pair_similarity
from xfed.common.errors import DataError, RefusedError
from xfed.common.extractors import Extractor
from xfed.common.messages import ArchiveMeasured
from xfed.common.randomness import numpy_generator
from xfed.common.review_archive import open_archive
from xfed.common.weights import save_arrays

__all__ = ["read_images", "score_archive", "write_sums"]

Pixels = npt.NDArray[np.uint8]
Arrays = dict[str, npt.NDArray[Any]]


def read_images(folder: Path) -> tuple[Any, Pixels, npt.NDArray[np.int64]]:
    """An archive and its images uint8 [n, S, S] and labels int64 [n]; every digest is checked. Raises `DataError`."""
    archive = open_archive(folder)
    images = []
    for name in archive.images:
        path = archive.folder / name
        if not path.resolve().is_relative_to(archive.folder.resolve()) or not path.is_file():
            raise DataError(f"{folder}: {name} is not there. Run xfed-server archive verify {archive.folder}")
        archive.check_image(path, name)
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("L")))
    return archive, np.stack(images), np.array(archive.labels, dtype=np.int64)


def score_archive(folder: Path, store_folder: Path, extractor: Extractor, hospitals: int = 1) -> dict[str, Any]:
    """Figures per class (`quality`), what they were made with, and the sums behind them (`arrays`, `facts`).

    `hospitals`: how many will be summed, so that their second halves together have no more images than the archive. Raises
    `DataError` when archive and store differ in classes or size.
    """
    archive, images, labels = read_images(folder)
    store = open_store(store_folder)
    single = archive.classes[: len(archive.classes) - archive.combinations]
    if single != store.classes or images.shape[-1] != store.size:
        raise DataError(
            f"{archive.folder} has {images.shape[-1]} px images of {', '.join(single)}; {store_folder} has "
            f"{store.size} px of {', '.join(store.classes)}. Import the images again with the archive's size and classes."
        )
    classes = len(store.classes)
    images, labels = images[labels < classes], labels[labels < classes]
    fakes = [extractor.features(images[labels == label]) for label in range(classes)]
    # a power of two, so that hospitals with other processors find the same one
    scale = 2.0 ** round(math.log2(scale_of(fakes)))
    times = thinning(store.counts().sum(axis=0) * hospitals, np.bincount(labels, minlength=classes))
    arrays: Arrays = {}
    quality = {}
    for label, name in enumerate(store.classes):
        rows = np.flatnonzero((store.labels == label) & (store.splits >= 0))
        patients = store.patients[rows]
        real = extractor.features(store.images[rows])
        alike = pair_similarity(store.images[rows], numpy_generator(0, "pairs of real images"), groups=patients)
        part = real_sums(real, patients, scale, int(times[label]))
        part["scores"] = site_scores(real, fakes[label], scale, alike)
        arrays |= {f"{label}/{key}": value for key, value in part.items()}
        quality[name] = class_figures(add_site(RealSums.nothing(), part), fakes[label], scale)
        quality[name]["ms_ssim"] = pair_similarity(images[labels == label], numpy_generator(0, "pairs", name))
    facts = {
        "kind": SUMS_FILE,
        "archive": archive.facts["root_sha256"],
        "classes": list(store.classes),
        "extractor": extractor.digest,
        "extractor_name": extractor.name,
        "scale": scale,
    }
    return {
        "quality": quality,
        "features": extractor.name,
        "extractor": extractor.digest,
        "arrays": arrays,
        "facts": facts,
    }


def write_sums(path: Path, scored: dict[str, Any], folder: Path, policy: Policy) -> None:
    """Write what `policy` lets out of the sums of `score_archive`. Raises `RefusedError`, `StorageError`."""
    manifest = json.loads((open_archive(folder).folder / "manifest.json").read_bytes())
    if (manifest.get("about") or {}).get("private"):
        raise RefusedError(
            f"{folder} is of a private study: sums of features without noise would be one more release of patients, that its "
            "budget does not plan. The figures can be looked at here; the sums are not written."
        )
    reply = check_reply(ArchiveMeasured(site="", arrays=scored["arrays"]), policy)
    if not isinstance(reply, ArchiveMeasured):  # pragma: no cover - a gate that answers with another kind
        raise RefusedError("the site's gate lets no sums out")
    save_arrays(path, dict(reply.arrays), scored["facts"])
