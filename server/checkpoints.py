"""The coordinator's rounds on disk: one whole file per round, the last two kept.

::

    checkpoints/<phase>-000007.safetensors      arrays + facts (study digest, round, history, done)

A file appears whole or not at all (`xfed.common.durable`). After a kill the run goes on from the last whole
round; a damaged last file (a disk that lied about fsync) is put aside as `*.damaged` and the one before it is
used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from xfed.common.errors import CheckpointError
from xfed.common.weights import load_arrays, save_arrays

__all__ = ["Checkpoint", "Checkpoints"]

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a phase had after `round` rounds: named arrays and JSON facts."""

    round: int
    arrays: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one study in one folder."""

    def __init__(self, folder: Path, study: str) -> None:
        self._folder = folder
        self._study = study

    def _files(self, phase: str) -> list[tuple[int, Path]]:
        pattern = re.compile(rf"{re.escape(phase)}-(\d{{6}})\.safetensors")
        found = [(pattern.fullmatch(path.name), path) for path in self._folder.glob(f"{phase}-*.safetensors")]
        return sorted((int(match.group(1)), path) for match, path in found if match)

    def save(self, phase: str, round: int, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Write one round, then drop all but the last two. Raises `StorageError`."""
        path = self._folder / f"{phase}-{round:06d}.safetensors"
        save_arrays(path, arrays, {"study": self._study, "facts": dict(facts)})
        for _, old in self._files(phase)[:-KEPT]:
            old.unlink(missing_ok=True)

    def latest(self, phase: str) -> Checkpoint | None:
        """The last whole round of a phase, or None. Raises `CheckpointError` when it belongs to another study."""
        for round, path in reversed(self._files(phase)):
            try:
                arrays, metadata = load_arrays(path)
            except CheckpointError:
                path.rename(path.with_suffix(".damaged"))
                continue
            if metadata.get("study") != self._study:
                raise CheckpointError(
                    f"{path} belongs to another study (digest {str(metadata.get('study'))[:12]}, this one is "
                    f"{self._study[:12]}). Choose another --out, or delete the folder to start again."
                )
            return Checkpoint(round, arrays, metadata["facts"])
        return None
