"""What a ledger's lines tell, attempt by attempt: reserved, spent, released, broken off; and whether that order is lawful.

::

    attempt n of (study, phase, class, round):
        reserve (one line per mechanism) --> spend (one per reservation, at most its steps) --> release (one)
                                         \\-> resume: broken off, nothing was kept and nothing left
        refuse: over budget, no patient was read

Pure. A reservation without spend or resume stands: it is the worst case of what may have been done, and is counted apart.

Formal guarantees
    Every spend of the lines is in exactly one attempt, lawful or not: what is unlawful is reported and counted all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xfed.common.auditor.lines import Event, Line

__all__ = ["Attempt", "follow"]

_Round = tuple[str | None, str | None, str | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of a round. `reserved` and `spent` are in the order of their lines."""

    study: str
    phase: str
    class_name: str | None
    round: int
    number: int
    reserved: tuple[Event, ...]
    spent: tuple[Event, ...]
    standing: tuple[Event, ...]
    released: bool
    broken_off: bool


@dataclass(kw_only=True)
class _Open:
    of: Line
    reserved: list[Event] = field(default_factory=list)
    waiting: list[Event] = field(default_factory=list)
    spent: list[Event] = field(default_factory=list)
    released: bool = False
    broken_off: bool = False

    def finished(self) -> Attempt:
        of = self.of
        return Attempt(
            study=of.study or "",
            phase=of.phase or "",
            class_name=of.class_name,
            round=of.round or 0,
            number=of.attempt or 0,
            reserved=tuple(self.reserved),
            spent=tuple(self.spent),
            standing=() if self.broken_off else tuple(self.waiting),
            released=self.released,
            broken_off=self.broken_off,
        )


def follow(lines: Iterable[Line]) -> tuple[tuple[Attempt, ...], list[tuple[int, str]]]:
    """All attempts in the order they began, and (line, what is unlawful about it)."""
    found: dict[tuple[_Round, int | None], _Open] = {}
    reserved: dict[_Round, int] = {}  # last attempt that reserved
    refused: dict[_Round, int] = {}
    problems: list[tuple[int, str]] = []
    for line in lines:
        if line.torn:
            continue
        of: _Round = (line.study, line.phase, line.class_name, line.round)
        number = line.attempt or 0
        attempt = found.get((of, number))
        text = None
        match line.kind:
            case "reserve":
                if attempt is None:
                    before = reserved.get(of, 0)
                    if number not in (before + 1, max(before, refused.get(of, 0)) + 1):
                        text = f"attempt {number} of its round follows attempt {before}: attempts do not count up"
                    attempt = found[of, number] = _Open(of=line)
                    reserved[of] = number
                elif attempt.spent or attempt.released or attempt.broken_off:
                    text = f"it reserves for attempt {number} of its round, which was spent, released or broken off"
                if line.event is not None:
                    attempt.reserved.append(line.event)
                    attempt.waiting.append(line.event)
            case "spend":
                if attempt is None:
                    text = "it spends what was never reserved"
                    attempt = found[of, number] = _Open(of=line)
                    reserved[of] = max(number, reserved.get(of, 0))
                if line.event is not None:
                    text = _spend(attempt, line.event) or text
            case "release":
                if attempt is None or not attempt.spent:
                    text = "it releases what was never spent"
                elif attempt.released:
                    text = "it releases the same attempt a second time"
                if attempt is not None:
                    attempt.released = True
            case "resume":
                if attempt is None or attempt.released or attempt.broken_off:
                    text = "it breaks off an attempt that was not open"
                else:
                    attempt.broken_off = True
            case "refuse":
                if number > max(reserved.get(of, 0), refused.get(of, 0)) + 1:
                    text = f"it refuses attempt {number} of its round: attempts do not count up"
                refused[of] = max(number, refused.get(of, 0))
        if text is not None:
            problems.append((line.seq, text))
    return tuple(attempt.finished() for attempt in found.values()), problems


def _spend(attempt: _Open, event: Event) -> str | None:
    """Count the spend; what is unlawful about it."""
    attempt.spent.append(event)
    if attempt.broken_off:
        return "it spends an attempt that was broken off"
    late = "it spends after the release of its attempt" if attempt.released else None
    for reservation in attempt.waiting:
        if reservation.mechanism == event.mechanism:
            attempt.waiting.remove(reservation)
            if event.steps > reservation.steps:
                return f"it spends {event.steps:,} steps of {reservation.steps:,} that were reserved"
            return late
    if any(reservation.mechanism == event.mechanism for reservation in attempt.reserved):
        return "it spends the same reservation a second time"
    if not attempt.reserved:
        return "it spends what was never reserved"
    return "it spends another mechanism (q, sigma, clip) than was reserved"
