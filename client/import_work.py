"""The work area of an import: pixels decoded so far and a journal, so that a kill loses one block at the most.

::

    records --(threads, in order)--> block of outcomes --> rows.bin (append, fsync) --> journal.jsonl (a line, fsync)

Only what the journal tells counts: on resuming, longer rows are cut off and a torn last line is dropped. Files are
written, not memory-mapped, because a full disk kills a process that writes through a memory map.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.client.decode import decode
from xfed.common.durable import append_line, remove_tree, translate_os_errors, write_json, write_text
from xfed.common.errors import DataError, StorageError

__all__ = ["BLOCK", "Outcome", "WorkArea", "decode_all"]

BLOCK = 128
"""Images between two journal lines."""


@dataclass(frozen=True)
class Outcome:
    """One file decoded: the original's height and width and what its header said; or `error`, and no row."""

    height: int
    width: int
    lateral: bool
    error: str


@dataclass
class WorkArea:
    """`outcomes` holds one entry per file done so far, in order; `rows` has one row per entry without error."""

    folder: Path
    size: int
    outcomes: list[Outcome]

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any], *, size: int) -> WorkArea:
        """Go on with the work area of the same plan, or start one. Raises `DataError` when it belongs to another plan."""
        with translate_os_errors(folder):
            if not (folder / "plan.json").exists():
                remove_tree(folder)
                write_text(folder / "journal.jsonl", "")
                (folder / "rows.bin").touch()
                write_json(folder / "plan.json", plan)
            outcomes = _read_journal(folder, plan)
            good = sum(1 for outcome in outcomes if not outcome.error)
            rows = folder / "rows.bin"
            if rows.stat().st_size < good * size * size:
                raise DataError(f"{folder} is damaged: it holds fewer pixels than its journal says. Use --restart.")
            os.truncate(rows, good * size * size)
        return cls(folder=folder, size=size, outcomes=outcomes)

    def append(self, block: Sequence[tuple[Outcome, npt.NDArray[np.uint8] | None]]) -> None:
        """Add a block of outcomes with their pixels (None with an error), durably. Raises `StorageError`."""
        path = self.folder / "rows.bin"
        with translate_os_errors(path), path.open("ab") as file:
            for _, pixels in block:
                if pixels is not None:
                    file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())
        append_line(self.folder / "journal.jsonl", json.dumps([astuple(outcome) for outcome, _ in block]))
        self.outcomes.extend(outcome for outcome, _ in block)

    def rows(self, count: int) -> npt.NDArray[np.uint8]:
        """The decoded pixels as a read-only memory map, uint8 [count, size, size]; `count` > 0."""
        return np.memmap(self.folder / "rows.bin", np.uint8, "r", shape=(count, self.size, self.size))


def _read_journal(folder: Path, plan: dict[str, Any]) -> list[Outcome]:
    try:
        earlier = json.loads((folder / "plan.json").read_text())
        text = (folder / "journal.jsonl").read_text()
        whole = text[: text.rfind("\n") + 1]
        outcomes = [Outcome(*entry) for line in whole.splitlines() for entry in json.loads(line)]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({error}). Use --restart to begin the import again.") from error
    if earlier != plan:
        raise DataError(
            f"{folder.parent} holds an unfinished import with other settings, images or labels. "
            "Choose another --store, or --restart to begin again."
        )
    if whole != text:
        write_text(folder / "journal.jsonl", whole)
    return outcomes


def _decode_one(path: Path, size: int) -> tuple[Outcome, npt.NDArray[np.uint8] | None]:
    try:
        image = decode(path, size)
    except DataError as error:
        return Outcome(0, 0, False, str(error).removeprefix(f"{path}: ")), None
    return Outcome(image.height, image.width, image.lateral, ""), image.pixels


def decode_all(
    paths: Sequence[Path],
    work: WorkArea,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Decode the files that `work` does not have yet, in order, with few in memory at a time. Raises `StorageError`."""
    if progress is not None:
        progress(len(work.outcomes), len(paths))
    block: list[tuple[Outcome, npt.NDArray[np.uint8] | None]] = []
    with warnings.catch_warnings():  # here and not in the threads: filters belong to the whole process
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for done in _in_order(paths[len(work.outcomes) :], work.size, workers):
            block.append(done)
            count = len(work.outcomes) + len(block)
            if len(block) == BLOCK or count == len(paths):
                work.append(block)
                block = []
            if progress is not None:
                progress(count, len(paths))
    if len(work.outcomes) != len(paths):
        raise StorageError(f"{work.folder}: {len(work.outcomes)} of {len(paths)} files are done. Use --restart.")
    return work.outcomes


def _in_order(paths: Sequence[Path], size: int, workers: int) -> Iterator[tuple[Outcome, npt.NDArray[np.uint8] | None]]:
    """Outcomes in the order of `paths`; at most 4 files per worker are under way or waiting."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[Future[tuple[Outcome, npt.NDArray[np.uint8] | None]]] = deque()
    try:
        for path in paths:
            waiting.append(pool.submit(_decode_one, path, size))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
