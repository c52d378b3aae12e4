"""A reader study under way: who has seen which image, what they said, on disk with each answer.

::

    SITE/reader/<archive>/
      design.json               which image is which (xfed.client.reader_design), mode 0600; shown to no reader
      answers/<reader>.jsonl    reader and digest of design.json, then a line per answer: fsynced, only ever longer
      reader-study.json         the figures, of the readers who have finished

    design + reader's name --order--> the images in an order of their own --record--> one line more --readings--> statistics

After a kill the same command goes on at the first image without an answer. A line that a power cut left half-written was never
answered for: it is cut off by the next answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.client.reader_design import REAL, SYNTHETIC, Design, parse_design
from xfed.common.errors import CheckpointError, ConfigError, DataError, RefusedError
from xfed.common.line_file import locked, put, tail
from xfed.common.randomness import numpy_generator
from xfed.common.reader_statistics import Reading, summarise

__all__ = ["ReaderStudy", "load_study"]

_READER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_CONFIDENCES = (None, 1, 2, 3)


def load_study(folder: Path) -> ReaderStudy:
    """The study in a folder. Raises `DataError` where there is none or its design is damaged."""
    path = folder / "design.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no reader study: begin one with xfed-client reader --archive DIR") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    return ReaderStudy(folder, parse_design(data, str(path)), hashlib.sha256(data).hexdigest())


class ReaderStudy:
    """A design and the readers' answers in `folder`; `digest` is that of design.json, which every file of answers names."""

    def __init__(self, folder: Path, design: Design, digest: str) -> None:
        self.folder, self.design, self._digest = folder, design, digest

    def __len__(self) -> int:
        """Number of images."""
        return len(self.design.items)

    def order(self, reader: str) -> npt.NDArray[np.int64]:
        """Positions of the images in the order in which this reader sees them. Raises `ConfigError` on a name that is none."""
        if not _READER.fullmatch(reader):
            raise ConfigError(f"--reader {reader!r}: use letters, digits, '.', '_' and '-', at most 32")
        return numpy_generator(self.design.seed, "order", reader).permutation(len(self)).astype(np.int64)

    def answers(self, reader: str) -> list[dict[str, Any]]:
        """The reader's answers so far, in their order. Raises `CheckpointError` when the file was changed."""
        path = self._path(reader)
        data = path.read_bytes() if path.is_file() else b""
        return self._parse(reader, data[: data.rfind(b"\n") + 1])

    def record(self, reader: str, number: int, called: str, confidence: int | None) -> int:
        """Keep the answer to the reader's image `number` (0, 1, ...), on disk before it returns; returns how many there are.

        The same answer again changes nothing. Raises `RefusedError` for every image but the next, and for what is no answer.
        """
        if called not in (REAL, SYNTHETIC) or confidence not in _CONFIDENCES or isinstance(confidence, bool):
            raise RefusedError("an answer is real or synthetic, with a confidence of 1, 2, 3 or none")
        order = self.order(reader)
        with locked(self._path(reader)) as file:
            size = os.fstat(file).st_size
            whole = size - len(tail(file, size)[1])
            known = self._parse(reader, os.pread(file, whole, 0))
            if 0 <= number < len(known) and (known[number]["called"], known[number]["confidence"]) == (
                called,
                confidence,
            ):
                return len(known)
            if number != len(known) or number >= len(order):
                raise RefusedError(
                    "this image has been answered, and there is no going back. Reload the page to go on."
                )
            facts = {"number": number, "item": int(order[number]), "called": called, "confidence": confidence}
            line = _line({**facts, "time": datetime.now(UTC).isoformat(timespec="seconds")})
            os.ftruncate(file, whole)
            put(file, line if whole else _line(self._first(reader)) + line, whole)
            return number + 1

    def readers(self) -> dict[str, int]:
        """Every reader who has begun, with the number of their answers."""
        names = sorted(path.stem for path in (self.folder / "answers").glob("*.jsonl"))
        return {name: len(self.answers(name)) for name in names}

    def readings(self) -> dict[str, Reading]:
        """The answers of every reader who has finished, in the design's order of images."""
        found = {}
        for name, count in self.readers().items():
            if count == len(self):
                answers = sorted(self.answers(name), key=lambda answer: int(answer["item"]))
                found[name] = Reading(
                    called=np.array([answer["called"] == SYNTHETIC for answer in answers]),
                    confidence=np.array([answer["confidence"] or 0 for answer in answers], dtype=np.int64),
                )
        return found

    def figures(self) -> dict[str, Any]:
        """All figures over the readers who have finished. Raises `DataError` where nobody has."""
        design, readings = self.design, self.readings()
        if not readings:
            counts = ", ".join(f"{name} {count}" for name, count in self.readers().items()) or "nobody has begun"
            raise DataError(f"no reader has answered all {len(self)} images yet ({counts})")
        return {
            "schema": 1,
            "archive_root": design.archive_root,
            "images": len(self),
            "image_size": design.image_size,
            "drawn": design.created,
            "real_images_from": design.held_out,
            "notes": list(design.notes),
            **summarise(design.truth, design.labels, design.classes, readings),
        }

    def _path(self, reader: str) -> Path:
        self.order(reader)  # is it a name?
        return self.folder / "answers" / f"{reader}.jsonl"

    def _first(self, reader: str) -> dict[str, str]:
        return {"reader": reader, "design": self._digest}

    def _parse(self, reader: str, data: bytes) -> list[dict[str, Any]]:
        path = self._path(reader)
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            if lines and lines[0] != self._first(reader):
                raise ValueError("it is of another reader, or of another design.json")
            answers = lines[1:]
            shown = [(number, int(item)) for number, item in enumerate(self.order(reader)[: len(answers)])]
            if [(answer["number"], answer["item"]) for answer in answers] != shown:
                raise ValueError("the images are not those that this reader was shown, in their order")
            if any(a["called"] not in (REAL, SYNTHETIC) or a["confidence"] not in _CONFIDENCES for a in answers):
                raise ValueError("an answer is neither real nor synthetic")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} was changed ({error}): restore it from a backup, or move it away") from error
        return answers


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
