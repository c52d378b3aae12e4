"""The warm worker: one process that has torch loaded and the site open, and answers packed requests through its pipes.

::

    agent --stdin: length, header, data--> worker: Desk.answer --stdout: length, header, data--> agent
    agent --lifeline (a pipe nobody writes to)--> worker: when it breaks the agent is dead, and so is the worker, at once

The worker may be killed at any time (out of memory, a driver fault): the agent starts another and asks the same again, and
what was stored is sent, not computed. While a worker lives it holds `.lock` in the site's folder, so two never train on one
state.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from xfed.common.durable import exclusive
from xfed.common.errors import FederationError, StorageError

__all__ = ["Worker", "WorkerLostError", "main", "read_frame", "write_frame"]

_LENGTHS = 20
LOCK_PATIENCE_S = 30.0


class WorkerLostError(FederationError):
    """The worker process died while it worked."""


def write_frame(stream: IO[bytes], header: str, data: bytes | memoryview) -> None:
    """One message: two lengths of twenty decimal digits each, the header (UTF-8), the data."""
    encoded = header.encode()
    stream.write(f"{len(encoded):0{_LENGTHS}d}{len(data):0{_LENGTHS}d}".encode())
    stream.write(encoded)
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[str, bytes] | None:
    """The next message, or None when the other side is gone."""
    lengths = stream.read(2 * _LENGTHS)
    if len(lengths) < 2 * _LENGTHS:
        return None
    header, data = stream.read(int(lengths[:_LENGTHS])), stream.read(int(lengths[_LENGTHS:]))
    if len(header) < int(lengths[:_LENGTHS]) or len(data) < int(lengths[_LENGTHS:]):
        return None
    return header.decode(), data


class Worker:
    """The agent's handle on its worker, which is started when first needed and again when it died."""

    def __init__(self, folder: Path, log: Path, on_start: Callable[[int], None] = lambda pid: None) -> None:
        self._folder = folder
        self._log = log
        self._on_start = on_start
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None

    def start(self) -> None:
        """Start the process unless it runs; it loads its packages while the agent connects."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "xfed.client.worker", str(self._folder), str(ours)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(ours,),
            )
        os.close(ours)
        self._lifeline = theirs
        self._on_start(self._process.pid)

    def ask(self, who: dict[str, Any], header: str, data: bytes) -> tuple[str, bytes]:
        """Have a packed request answered. Raises `WorkerLostError` when the worker dies over it."""
        self.start()
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerLostError("the worker could not be started")
        try:
            write_frame(process.stdin, json.dumps(who), b"")
            write_frame(process.stdin, header, data)
            answer = read_frame(process.stdout)
        except (BrokenPipeError, ConnectionError, ValueError) as error:
            raise WorkerLostError(f"the worker died ({error}); {self._log} has its last words") from error
        if answer is None:
            code = process.wait()
            raise WorkerLostError(f"the worker died (exit code {code}); {self._log} has its last words")
        return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _die_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


def main() -> None:
    """Entry point of the worker process: `python -m xfed.client.worker DIR LIFELINE`."""
    folder, lifeline = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the frames
    from xfed.client.desk import Desk  # torch takes seconds: the lifeline is watched before

    with contextlib.ExitStack() as held:
        _lock(held, folder)
        desk = Desk(folder)
        while (who := read_frame(requests)) is not None and (asked := read_frame(requests)) is not None:
            write_frame(answers, *desk.answer_packed(json.loads(who[0]), *asked))


def _lock(held: contextlib.ExitStack, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            held.enter_context(exclusive(folder))
            return
        except StorageError:
            # the worker of a killed agent may need a moment to die
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
