"""Answers that a site has computed, kept until they are surely not asked for again.

::

    request --digest--> is there a stored answer to exactly this? -- yes --> send it again (nothing is trained or spent twice)
                                                                 -- no ---> compute, save state, save answer, send

One file per answer, named by the request's key, whole or absent. The last two rounds of each kind are kept.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from xfed.common.errors import CheckpointError
from xfed.common.messages import REPLIES, Reply, Request
from xfed.common.packing import digest_of_request
from xfed.common.weights import load_arrays, save_arrays, under

__all__ = ["Answers"]

KEPT = 2


class Answers:
    """The stored answers in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, request: Request) -> Path:
        return self._folder / (re.sub(r"[^A-Za-z0-9_.-]", "_", request.key) + ".safetensors")

    def find(self, request: Request) -> Reply | None:
        """The stored answer to this very request, or None (never asked, or asked with other weights)."""
        path = self._path(request)
        if not path.is_file():
            return None
        try:
            arrays, facts = load_arrays(path)
        except CheckpointError:
            return None
        if facts.get("request") != digest_of_request(request) or facts.get("kind") not in REPLIES:
            return None
        kind = REPLIES[facts["kind"]]
        values = dict(facts["values"])
        for field in dataclasses.fields(kind):
            if field.type == "Arrays":
                values[field.name] = under(arrays, f"{field.name}/")
        return kind(**values)

    def keep(self, request: Request, reply: Reply) -> None:
        """Store an answer before it is sent. Raises `StorageError`."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(reply):
            value = getattr(reply, field.name)
            if field.type == "Arrays":
                arrays |= {f"{field.name}/{name}": array for name, array in value.items()}
            else:
                values[field.name] = value
        facts = {"request": digest_of_request(request), "kind": type(reply).__name__, "values": values}
        save_arrays(self._path(request), arrays, facts)
        self._prune(request)

    def _prune(self, request: Request) -> None:
        round = getattr(request, "round", None)
        if round is None:
            return
        stem = self._path(request).name.removesuffix(f"-{round}.safetensors")
        for path in self._folder.glob(f"{stem}-*.safetensors"):
            number = path.stem.removeprefix(f"{stem}-")
            if number.isdigit() and int(number) <= round - KEPT:
                path.unlink(missing_ok=True)
