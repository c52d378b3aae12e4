"""ledger.jsonl: every use of patients by a private study, signed and chained; what was spent, for ever, over all studies.

::

    would_exceed? -- yes --> refuse
          | no
    reserve (fsync) --> patients are read, noise is added --> answer kept (fsync) --> spend (fsync) --> release (fsync) --> sent
          |                        | killed: no answer was kept             | killed: the answer is kept
          |                        v                                        v
          |                     resume: nothing left the site            standing_for --> spend, release --> sent
    SITE/ledger.jsonl   one line per event (xfed.common.ledger_lines), mode 0600, only ever longer
    SITE/ledger.key     Ed25519, mode 0600      SITE/ledger.pub   its public half, vouched for by the site's admitted key

When the power goes, whole lines stay; a torn last line was never fsynced, so nothing that it speaks of went on: it is cut
off, and a `resume` line tells of it. Every call first reads what other processes have written meanwhile, under a lock.

Formal guarantees
    A reservation is on disk before `reserve` returns, a spend before `spend` returns, a release before `release` returns.
    What was released is spent, and what was spent was reserved: a spend beyond its reservation, a release without a spend, and
    two different answers for one spend are refused. Spending or releasing the same thing again writes nothing.
    Attempts of a round are counted from 1; each is an event of its own, whatever became of those before.
    `would_exceed` counts what was spent, what is reserved and still open, and what is asked, composed.
    A ledger with a changed line, a foreign line or another key is not opened; one that became shorter is not continued.
Not covered
    A ledger that was cut off or deleted between two runs of the site: the coordinator and the auditor, who keep heads, find it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xfed.client.ledger_key import ledger_key
from xfed.common.accounting import epsilon as epsilon_of
from xfed.common.accounting import epsilon_bound
from xfed.common.dp_events import Event, exposures, merged
from xfed.common.errors import CheckpointError, FederationError, RefusedError
from xfed.common.ledger_lines import (
    START,
    Head,
    Line,
    LineContent,
    public_bytes,
    read_line,
    sign_head,
    verify_chain,
    write_line,
)
from xfed.common.line_file import locked, put, tail
from xfed.common.version import SOFTWARE

__all__ = ["Ledger", "Reservation", "ledger_key", "open_ledger"]

_LONGEST_REASON = 1000
_Name = tuple[str, str, str | None, int, int]


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """One attempt at one round: what it may spend at the most. `class_name` None: patients of every class are read."""

    study: str
    phase: str
    class_name: str | None
    round: int
    attempt: int
    events: tuple[Event, ...]

    @property
    def _name(self) -> _Name:
        return self.study, self.phase, self.class_name, self.round, self.attempt


@dataclass(kw_only=True)
class _Attempt:
    """What the ledger says of one attempt, in the order of its lines."""

    reserved: list[Event] = field(default_factory=list)
    spent: list[Event] = field(default_factory=list)
    digest: str | None = None
    closed: bool = False

    @property
    def is_open(self) -> bool:
        return not self.closed and self.digest is None and bool(self.reserved)

    @property
    def counted(self) -> list[Event]:
        """What a budget must count: the worst case while the attempt is open."""
        return self.reserved if self.is_open else self.spent


class Ledger:
    """The ledger at `path` of the site of that name, made if it is not there.

    Raises `CheckpointError` when a line was changed, is another site's or another key's; `StorageError` when the disk refuses.
    """

    def __init__(self, path: Path, site: str, key: Ed25519PrivateKey, software: str = SOFTWARE) -> None:
        self._path, self._site, self._key, self._software = path, site, key, software
        self._public_key = key.public_key()
        self._attempts: dict[_Name, _Attempt] = {}
        self._head: Head = START
        self._size = 0
        self._last = b""
        with locked(path) as file:
            self._catch_up(file)

    def reserve(
        self, study: str, phase: str, class_name: str | None, round: int, events: Sequence[Event]
    ) -> Reservation:
        """Reserve `events`, at least one, for the next attempt at this round; call it before any patient is read."""
        events = tuple(merged(events))
        if not events:
            raise ValueError("a reservation needs an event: what reads no patient needs no reservation")
        with locked(self._path) as file:
            self._catch_up(file)
            attempt = 1 + self._attempts_at(study, phase, class_name, round)
            found = Reservation(
                study=study, phase=phase, class_name=class_name, round=round, attempt=attempt, events=events
            )
            for event in events:
                self._append(file, found, "reserve", event.as_json())
        return found

    def spend(self, reservation: Reservation, events: Sequence[Event] | None = None) -> None:
        """Record what was done, by default all that was reserved; call it when the answer is on disk, before it leaves.

        Raises `RefusedError` when this is more than was reserved, or the attempt was closed.
        """
        events = merged(reservation.events if events is None else events)
        with locked(self._path) as file:
            self._catch_up(file)
            attempt = self._known(reservation)
            reserved = {event.times(1): event.steps for event in merged(attempt.reserved)}
            if attempt.closed or any(event.steps > reserved.get(event.times(1), 0) for event in events):
                raise self._refused(reservation, "it was closed, or less was reserved than is to be spent")
            if not events or any(event not in events for event in attempt.spent):
                raise self._refused(reservation, "something else was spent in this attempt before")
            for event in events:
                if event not in attempt.spent:  # a kill between two lines of one spend
                    self._append(file, reservation, "spend", event.as_json())

    def release(self, reservation: Reservation, digest: str) -> None:
        """Record that the answer with this SHA-256 (hex) leaves; call it before it is sent. Raises `RefusedError`."""
        with locked(self._path) as file:
            self._catch_up(file)
            attempt = self._known(reservation)
            if not attempt.spent:
                raise self._refused(reservation, "nothing was spent for what is to leave")
            if attempt.digest not in (None, digest):
                raise self._refused(reservation, "another answer left in this attempt: a second one would cost again")
            if attempt.digest is None:
                self._append(file, reservation, "release", {"sha256": digest})

    def refuse(self, study: str, phase: str, class_name: str | None, round: int, reason: str) -> None:
        """Record that a request was refused before any patient was read."""
        with locked(self._path) as file:
            self._catch_up(file)
            attempt = 1 + self._attempts_at(study, phase, class_name, round)
            about = Reservation(
                study=study, phase=phase, class_name=class_name, round=round, attempt=attempt, events=()
            )
            self._append(file, about, "refuse", {"reason": _plain(reason)})

    def resume(
        self, study: str, phase: str, class_name: str | None, round: int, reason: str = "no answer was kept"
    ) -> int:
        """Close the attempts at this round of which no answer was kept; returns how many. What was spent stays spent.

        Only call it when no answer is stored: a closed attempt cannot be spent any more.
        """
        with locked(self._path) as file:
            self._catch_up(file)
            here = [found for found in self._open() if found._name[:4] == (study, phase, class_name, round)]
            stale = [found for found in here if not self._attempts[found._name].spent]
            for found in stale:
                self._append(file, found, "resume", {"reason": _plain(reason)})
        return len(stale)

    def standing(self) -> list[Reservation]:
        """Attempts that are reserved, neither released nor closed: under way, or broken off."""
        self._refresh()
        return list(self._open())

    def standing_for(self, study: str, phase: str, class_name: str | None, round: int) -> Reservation | None:
        """The last attempt at this round that is neither released nor closed."""
        wanted = (study, phase, class_name, round)
        return next((one for one in reversed(self.standing()) if one._name[:4] == wanted), None)

    def spent(self, study: str | None = None) -> list[tuple[str | None, Event]]:
        """(class, event) of all spends, of one study or of all; class None: patients of every class."""
        self._refresh()
        wanted = [(name[2], attempt) for name, attempt in self._attempts.items() if study in (None, name[0])]
        return [(class_name, event) for class_name, attempt in wanted for event in attempt.spent]

    def counted(self, study: str | None = None) -> list[tuple[str | None, Event]]:
        """As `spent`, with what is reserved and still open: what a budget is asked about."""
        self._refresh()
        return [
            (name[2], event)
            for name, attempt in self._attempts.items()
            if study in (None, name[0])
            for event in attempt.counted
        ]

    def studies(self) -> list[str]:
        """Digests of the studies that this site has reserved for, oldest first."""
        self._refresh()
        return list(dict.fromkeys(name[0] for name, attempt in self._attempts.items() if attempt.reserved))

    def epsilon_by_class(self, study: str | None, delta: float, *, overlap: int = 1) -> dict[str | None, float]:
        """What patients of each class have lost; under None those of classes with no event of their own."""
        exposed = exposures(self.spent(study), overlap=overlap)
        return {class_name: epsilon_of(events, delta) for class_name, events in exposed.items()}

    def site_epsilon(self, study: str | None, delta: float, *, overlap: int = 1) -> float:
        """What the patients of this site have lost who have lost most: the maximum over classes, never a mean."""
        return max(self.epsilon_by_class(study, delta, overlap=overlap).values())

    def would_exceed(
        self,
        events: Sequence[Event],
        class_name: str | None,
        study: str | None,
        epsilon: float,
        delta: float,
        *,
        overlap: int = 1,
    ) -> str | None:
        """Why doing `events` would exceed the budget `epsilon` at `delta` of a study, or of all (None); None if it would not."""
        spent = self.counted(study)
        asked = [(class_name, event) for event in events]
        before = exposures(spent, overlap=overlap)
        for name, composed in exposures([*spent, *asked], overlap=overlap).items():
            if class_name not in (None, name) or epsilon_bound(composed, delta) <= epsilon:
                continue
            if (after := epsilon_of(composed, delta)) > epsilon:
                own = before.get(name, before[None])
                where = f"patients of {name}" if name is not None else "patients of every class"
                return (
                    f"the privacy budget of {'this study' if study is not None else 'all studies together'} at {self._site} "
                    f"would be exceeded: {where} would have lost epsilon {after:.4g} at delta {delta:g}, and {epsilon:.4g} is "
                    f"allowed. Spent or reserved so far: {epsilon_of(own, delta):.4g}"
                )
        return None

    def head(self) -> dict[str, Any]:
        """The signed head: keep it elsewhere."""
        self._refresh()
        return sign_head(self._head, site=self._site, key=self._key)

    def head_text(self) -> str:
        """`head` as JSON."""
        return json.dumps(self.head())

    def key_text(self) -> str:
        """ledger.pub as JSON: the ledger's public key and who vouches for it."""
        path = self._path.with_name("ledger.pub")
        if path.exists():
            return path.read_text(encoding="utf-8")
        return json.dumps({"site": self._site, "public_key": public_bytes(self._public_key)})

    def lines_from(self, first: int) -> str:
        """The lines from number `first` (1 is the first) on, as they stand in the file."""
        self._refresh()
        with self._path.open("rb") as file:
            lines = file.read(self._size).split(b"\n")[:-1]
        return b"".join(line + b"\n" for line in lines[max(first, 1) - 1 :]).decode()

    # The file and what it says

    def _refresh(self) -> None:
        with locked(self._path) as file:
            self._catch_up(file)

    def _catch_up(self, file: int) -> None:
        """Take in what other processes wrote; cut off a torn line. Raises `CheckpointError`."""
        size = os.fstat(file).st_size
        if size < self._size or os.pread(file, len(self._last), self._size - len(self._last)) != self._last:
            raise CheckpointError(
                f"{self._path} became shorter, or was replaced, while it was in use. Put it back from a copy: without it nobody "
                "knows what was spent, and the coordinator refuses a ledger that does not continue the one it knows"
            )
        torn = tail(file, size)[1] if size > self._size else b""
        data = os.pread(file, size - self._size - len(torn), self._size)
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
        try:
            found = verify_chain(lines, self._public_key, site=self._site, after=self._head)
        except FederationError as error:
            raise CheckpointError(
                f"{self._path} is not whole: {error}. Put it back from a copy, or keep it as evidence"
            ) from error
        for line, written in zip(found, lines, strict=True):
            self._take(line, written)
        if torn:
            self._cut_off(file, torn)

    def _cut_off(self, file: int, torn: bytes) -> None:
        os.ftruncate(file, self._size)
        os.fsync(file)
        event = {
            "reason": "a line was torn by a power failure or a kill, and nothing followed it",
            "bytes": len(torn),
            "sha256": hashlib.sha256(torn).hexdigest(),
        }
        self._put(file, LineContent(kind="resume", event=event))

    def _append(self, file: int, about: Reservation, kind: str, event: dict[str, Any]) -> None:
        content = LineContent(
            kind=kind,
            event=event,
            study=about.study,
            phase=about.phase,
            class_name=about.class_name,
            round=about.round,
            attempt=about.attempt,
        )
        self._put(file, content)

    def _put(self, file: int, content: LineContent) -> None:
        written = write_line(content, self._head, site=self._site, software=self._software, key=self._key)
        try:
            put(file, written, self._size)
        except BaseException:
            os.ftruncate(file, self._size)  # half a line is no line: the next one starts where this one did
            raise
        self._take(read_line(written), written)

    def _take(self, line: Line, written: bytes) -> None:
        self._head, self._size, self._last = line.head, self._size + len(written), written
        what = line.content
        if what.study is None or what.phase is None or what.round is None or what.attempt is None:
            return
        attempt = self._attempts.setdefault(
            (what.study, what.phase, what.class_name, what.round, what.attempt), _Attempt()
        )
        match what.kind:
            case "reserve":
                attempt.reserved.append(line.event)
            case "spend":
                attempt.spent.append(line.event)
            case "release":
                attempt.digest = what.event["sha256"]
            case _:
                attempt.closed = True

    def _attempts_at(self, study: str, phase: str, class_name: str | None, round: int) -> int:
        return max((name[4] for name in self._attempts if name[:4] == (study, phase, class_name, round)), default=0)

    def _open(self) -> Iterator[Reservation]:
        for name, attempt in self._attempts.items():
            if attempt.is_open:
                study, phase, class_name, round, number = name
                yield Reservation(
                    study=study,
                    phase=phase,
                    class_name=class_name,
                    round=round,
                    attempt=number,
                    events=tuple(merged(attempt.reserved)),
                )

    def _known(self, reservation: Reservation) -> _Attempt:
        attempt = self._attempts.get(reservation._name)
        if attempt is None or not attempt.reserved:
            raise self._refused(reservation, "it was never reserved in this ledger")
        return attempt

    def _refused(self, about: Reservation, why: str) -> RefusedError:
        return RefusedError(
            f"{self._path.name} of {self._site}: {about.phase}, {about.class_name or 'every class'}, round {about.round}, "
            f"attempt {about.attempt}: {why}. Nothing was sent; ask for the round again"
        )


def _plain(reason: str) -> str:
    return reason.encode("utf-8", "backslashreplace").decode()[:_LONGEST_REASON]


def open_ledger(folder: Path, site: str) -> Ledger:
    """The ledger of a site's folder, and its key, made if they are not there. Raises as `ledger_key` and `Ledger` do."""
    return Ledger(folder / "ledger.jsonl", site, ledger_key(folder, site))
