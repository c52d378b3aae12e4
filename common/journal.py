"""events.jsonl: what happened, when (UTC), as JSON lines; the report is made from it.

Each line has `time` (ISO 8601, UTC), `kind`, and that kind's fields. Appended and fsynced; a torn last line (power cut) is
ignored when reading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xfed.common.durable import append_line

__all__ = ["Journal", "Listener"]

Listener = Callable[[dict[str, Any]], None]


class Journal:
    """Appends events to a file and tells a listener (the progress display) of each."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._path = path
        self._listener = listener
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
            if torn:
                append_line(path, "")

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Raises `StorageError`."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields}
        append_line(self._path, json.dumps(event, ensure_ascii=False, allow_nan=False))
        if self._listener is not None:
            self._listener(event)

    def read(self) -> Iterator[dict[str, Any]]:
        """All whole events so far, oldest first."""
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event
