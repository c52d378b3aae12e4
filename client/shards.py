"""The synthetic archive at a site: shards named by their digest, fetched once, kept over restarts and over studies' rounds.

::

    OfferArchive --digests--> which are not here? --> offer.json --> ArchiveWanted
    KeepArchive  --offered? digest right? sizes right?--> <digest>.safetensors --> ArchiveKept
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xfed.common.config import Study
from xfed.common.durable import write_json
from xfed.common.errors import CheckpointError, DataError, RefusedError
from xfed.common.messages import Arrays, KeepArchive, OfferArchive
from xfed.common.packing import digest_of
from xfed.common.weights import load_arrays, save_arrays

__all__ = ["Shards"]


class Shards:
    """The shards in one folder, for one study."""

    def __init__(self, folder: Path, study: Study) -> None:
        self._folder, self._study = folder, study

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise RefusedError(f"{digest[:80]!r} is not the digest of a shard")
        return self._folder / f"{digest}.safetensors"

    def _offered(self) -> list[str]:
        path = self._folder / "offer.json"
        if not path.is_file():
            raise RefusedError("the synthetic archive has not been offered to this site yet")
        return [str(digest) for digest in json.loads(path.read_text())["shards"]]

    def _root(self) -> str:
        return str(json.loads((self._folder / "offer.json").read_text())["root"])

    def offer(self, request: OfferArchive) -> list[int]:
        """Note what is offered; returns the positions of the shards that are not here whole. Raises `RefusedError`."""
        digests = request.digests.split(",")
        missing = [position for position, digest in enumerate(digests) if not _is_whole(self._path(digest), digest)]
        write_json(self._folder / "offer.json", {"root": request.root, "shards": digests})
        return missing

    def keep(self, request: KeepArchive) -> None:
        """Write one shard. Raises `RefusedError` unless it was offered and is what its digest and the study say."""
        path, side = self._path(request.digest), self._study.image_size
        if request.digest not in self._offered() or not _is_shard(request.arrays, side, len(self._study.labels)):
            raise RefusedError(f"archive shard {request.shard} was not offered, or is not what this study says")
        if digest_of(request.arrays) != request.digest:
            raise RefusedError(f"archive shard {request.shard} is not what its digest says")
        save_arrays(path, request.arrays, {})

    def read(
        self, root: str | None = None, count: int | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """All synthetic images uint8 [n, S, S] and labels int64 [n] that were offered, under `root` and `count` of them if given.

        Raises `RefusedError`, `DataError`.
        """
        images, labels = _read(tuple(self._path(digest) for digest in self._offered()))
        if root is not None and (root, count) != (self._root(), len(labels)):
            raise RefusedError(
                f"the request is about {count} images with root {root[:12]}; this site was offered {len(labels)} with root "
                f"{self._root()[:12]}. Offer the archive that is meant first."
            )
        return images, labels


def _is_shard(arrays: Arrays, side: int, classes: int) -> bool:
    images, labels = arrays.get("images"), arrays.get("labels")
    return (
        images is not None
        and labels is not None
        and images.dtype == np.uint8
        and images.shape == (len(labels), side, side)
        and labels.dtype == np.int64
        and bool(not len(labels) or (labels.min() >= 0 and labels.max() < classes))
    )


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return digest_of(load_arrays(path)[0]) == digest
    except (DataError, CheckpointError):  # absent, or damaged since: it is fetched (again)
        return False


@lru_cache(maxsize=4)
def _read(paths: tuple[Path, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    shards = [load_arrays(path)[0] for path in paths]
    return (
        np.concatenate([shard["images"] for shard in shards]),
        np.concatenate([shard["labels"] for shard in shards]),
    )
