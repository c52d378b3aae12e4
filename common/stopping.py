"""Stopping by a signal: a flag that a signal handler may set at any moment.

::

    SIGTERM, Ctrl-C --handler: a byte into a pipe, no lock--> StopFlag --is_set, wait--> the loop ends

Python runs a handler in the main thread between any two steps. `threading.Event.set` takes a lock there that the interrupted
`wait` may hold already, and the process then hangs for ever (found by the chaos bench, seed 57).
"""

from __future__ import annotations

import os
import select
import signal

__all__ = ["StopFlag"]


class StopFlag:
    """Like `threading.Event`, but safe in signal handlers; it is never cleared, and `wait` may be called in any thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._set = False

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)

    def set(self) -> None:
        """Stop: every `wait`, running or to come, returns at once."""
        if not self._set:
            self._set = True
            os.write(self._write, b"!")

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for `set`; whether it was called."""
        if not self._set:
            select.select([self._read], [], [], max(0.0, seconds))
        return self._set

    def set_on(self, *numbers: signal.Signals) -> None:
        """Let these signals set the flag. To be called in the main thread."""
        for number in numbers:
            signal.signal(number, lambda *_: self.set())
