"""What a check found: a name, ok | warning | failed, words, a remedy; and checks that cannot hang.

::

    check --in a thread of its own, for so many seconds--> Finding | TooSlowError
    findings --exit_code--> 0, or the code of the most telling failure

Nothing is written.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from xfed.common.errors import XfedError

__all__ = ["Finding", "TooSlowError", "bounded", "exit_code", "failed", "ok", "unchecked", "warning"]

T = TypeVar("T")

PRECEDENCE = (9, 3, 5, 6, 4, 2, 1, 7, 8)
"""What a site can see for itself comes before what may be the other side's: a coordinator that sleeps explains no bad store."""


class TooSlowError(XfedError):
    """A check took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check. `exit_code` is 0 unless it failed; `remedy` is empty when there is nothing to do."""

    name: str
    status: Literal["ok", "warning", "failed"]
    what: str
    remedy: str = ""
    exit_code: int = 0


def ok(name: str, what: str) -> Finding:
    """All is as it should be."""
    return Finding(name=name, status="ok", what=what)


def warning(name: str, what: str, remedy: str) -> Finding:
    """It works, or cannot be known, but somebody should look."""
    return Finding(name=name, status="warning", what=what, remedy=remedy)


def failed(name: str, kind: type[XfedError], what: str, remedy: str) -> Finding:
    """It does not work; `kind` is the error that a command would end with."""
    return Finding(name=name, status="failed", what=what, remedy=remedy, exit_code=kind.exit_code)


def unchecked(name: str, cause: str) -> Finding:
    """It could not be looked at because of an earlier finding."""
    return warning(name, f"not checked, because {cause} failed", "")


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when none failed, else the first code of `PRECEDENCE` that a finding has."""
    codes = {finding.exit_code for finding in findings if finding.status == "failed"}
    return next((code for code in PRECEDENCE if code in codes), max(codes, default=0))


def bounded(call: Callable[[], T], limit_s: float) -> T:
    """What `call` returns or raises, if it does so within `limit_s` seconds. Raises `TooSlowError`.

    A call that hangs (a name server, a network file system) is left behind in a daemon thread, which ends with the process.
    """
    answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(call())
        except Exception as error:  # handed to the caller's thread, which raises it
            answers.put(error)

    threading.Thread(target=work, name="check", daemon=True).start()
    try:
        answer = answers.get(timeout=limit_s)
    except queue.Empty:
        raise TooSlowError(f"no result within {limit_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
