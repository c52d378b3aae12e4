"""The figures of pooled images in the features of any network, from files of sums that hospitals wrote by hand.

::

    hospital: xfed-client score ARCHIVE --features NET --sums FILE      (the real images are there)
    here:     FILE ... + ARCHIVE + the same NET --> FID and KID as if all images were in one place

Every file must be of this archive, these classes, this network and one scale: else the figures would mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xfed.common.archive_figures import SUMS_FILE, RealSums, add_site, class_figures
from xfed.common.diversity import pair_similarity
from xfed.common.errors import DataError
from xfed.common.extractors import Extractor
from xfed.common.randomness import numpy_generator
from xfed.common.weights import digest_of, load_arrays, under
from xfed.server.archive import read_archive
from xfed.server.archive_manifest import labels_of, read_manifest

__all__ = ["score_pooled"]


def score_pooled(folder: Path, extractor: Extractor, files: Sequence[Path]) -> dict[str, Any]:
    """Figures per class over all `files`. Raises `DataError` (they do not belong together), `FederationError` (nonsense)."""
    manifest = read_manifest(folder)
    classes = tuple(manifest["classes"])
    images, labels = read_archive(folder, labels_of(manifest))
    fakes = [extractor.features(images[labels == label]) for label in range(len(classes))]
    totals = [RealSums.nothing()] * len(classes)
    scales: set[float] = set()
    seen: set[str] = set()
    for path in files:
        arrays, facts = load_arrays(path)
        expected = {
            "kind": SUMS_FILE,
            "archive": manifest["root_sha256"],
            "classes": list(classes),
            "extractor": extractor.digest,
        }
        if odd := [key for key, value in expected.items() if facts.get(key) != value]:
            raise DataError(
                f"{path} is not of this archive and network (it differs in {', '.join(odd)}). Write it again with "
                f"xfed-client score, this archive and the network {extractor.digest}."
            )
        scales.add(float(facts["scale"]))
        if (digest := digest_of(arrays)) in seen:
            raise DataError(f"{path} holds the same sums as another file: name each hospital's once")
        seen.add(digest)
        totals = [add_site(total, under(arrays, f"{label}/")) for label, total in enumerate(totals)]
    if len(scales) != 1:
        raise DataError(f"the files were made with scales {sorted(scales)}; they must agree, or KID has no meaning")
    quality = {}
    for label, name in enumerate(classes):
        quality[name] = class_figures(totals[label], fakes[label], next(iter(scales)))
        quality[name]["ms_ssim"] = pair_similarity(images[labels == label], numpy_generator(0, "pairs", name))
    return {"quality": quality, "features": extractor.name, "extractor": extractor.digest, "hospitals": len(files)}
