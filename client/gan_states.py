"""The GAN states of a site: discriminators and optimizers, the last two rounds of each class. They never leave the site.

::

    state/gan-<class>-<round>.safetensors      whole or absent; round r stays until round r + 2 is written
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from xfed.common.weights import load_arrays, save_arrays

__all__ = ["GanStates"]


class GanStates:
    """The states in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _stem(self, class_name: str) -> str:
        return f"gan-{class_name.replace(' ', '_')}-"

    def _all(self, class_name: str) -> list[tuple[int, Path]]:
        stem = self._stem(class_name)
        paths = self._folder.glob(f"{stem}??????.safetensors")
        return sorted((int(path.stem.removeprefix(stem)), path) for path in paths)

    def before(self, class_name: str, round: int) -> dict[str, npt.NDArray[Any]] | None:
        """The state that `round` begins with, or None at the start. Raises `CheckpointError` when it is damaged."""
        earlier = [path for number, path in self._all(class_name) if number < round]
        return load_arrays(earlier[-1])[0] if earlier else None

    def save(self, class_name: str, round: int, arrays: Mapping[str, npt.NDArray[Any]], study: str) -> None:
        """Write the state after `round`, then drop those before the last two. Raises `StorageError`."""
        path = self._folder / f"{self._stem(class_name)}{round:06d}.safetensors"
        save_arrays(path, arrays, {"study": study})
        for number, old in self._all(class_name):
            if number < round - 1:
                old.unlink(missing_ok=True)
