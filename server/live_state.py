"""What events.jsonl says about a study so far, kept up to date line by line, for the live page.

::

    events.jsonl --EventTail.new (whole lines only)--> Story.take --> phases, curves, sites, problems
                                                       Story.view(now) --> plain values, curves thinned

Only read, never written. A last line without its end is a line that is being written, or that a power cut tore: it is
looked at again next time. A file that became shorter is another run: everything begins anew.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["EventTail", "Story"]

POINTS = 240
PROBLEMS = 50
PACE = 10
TITLES = {
    "embeddings": "Embeddings",
    "fits": "Fitting",
    "shared": "Shared start",
    "gan": "Generators",
    "steering": "Steering classifier",
    "steered": "Search of latents",
    "archive": "Archive",
    "classifier": "Classifiers",
    "quality": "Quality",
    "tstr": "Synthetic alone",
    "pretraining": "Pre-training",
    "census": "Counts",
    "examples": "Examples",
    "ledgers": "Ledger",
    "vote": "Vote",
    "attacks": "Attacks",
}
EXPECTED = ("gan", "archive", "classifier", "quality")
_STUDY = re.compile(r"study \S+ ([0-9a-f]{12}) with ")
SCORES = ("validation_balanced_accuracy", "validation_auc", "loss", "validation_loss")


class EventTail:
    """The whole lines of a file that grows; `begun_anew` after `new` found the file replaced or cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at, self._inode = 0, 0
        self.begun_anew = False

    def new(self) -> Iterator[dict[str, Any]]:
        """Events since the last call. Lines that are no events (torn ones that were ended later) are passed over."""
        self.begun_anew = False
        try:
            with self._path.open("rb") as file:
                size, inode = file.seek(0, 2), self._path.stat().st_ino
                if size < self._at or (self._at and inode != self._inode):
                    self._at, self.begun_anew = 0, True
                self._inode = inode
                file.seek(self._at)
                data = file.read(size - self._at)
        except FileNotFoundError:
            self.begun_anew, self._at = self._at > 0, 0
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("kind"), str):
                yield event


class _Phase:
    """One phase: how far, since when, and its pace within the present process."""

    def __init__(self) -> None:
        self.done = self.rounds = 0
        self.first = self.last = 0.0
        self.pace: deque[tuple[float, int]] = deque(maxlen=PACE + 1)

    def note(self, event: Mapping[str, Any], time: float) -> None:
        if event["kind"] == "phase":
            self.pace.clear()  # what lies between is no work: a stop and a start
        self.done, self.rounds = int(event["round"]), int(event["rounds"])
        self.first, self.last = self.first or time, time
        self.pace.append((time, self.done))

    def remaining(self, now: float) -> float | None:
        """Seconds to the end of the phase at the pace of the last rounds; None while nothing says."""
        if self.done >= self.rounds:
            return 0.0
        (start, first), (end, last) = (self.pace[0], self.pace[-1]) if self.pace else ((0.0, 0), (0.0, 0))
        if last <= first:
            return None
        return max(0.0, (end - start) / (last - first) * (self.rounds - last) - (now - end))


class _Site:
    """One site, as the coordinator's events tell of it."""

    def __init__(self) -> None:
        self.online: bool | None = None
        self.seen: float | None = None
        self.said = self.phase = ""
        self.round = self.sent = self.received = self.refusals = self.problems = 0


class Story:
    """All that the events say. `sites` are names known beforehand; others appear when they are heard of.

    `digest` is the beginning of the study's digest, as the process that ran it wrote it down.
    """

    def __init__(self, sites: Sequence[str] = ()) -> None:
        self.sites = {name: _Site() for name in sites}
        self.phases: dict[str, _Phase] = {}
        self.phase: str | None = None
        self.losses: dict[str, dict[int, tuple[float, float]]] = {}
        self.arms: dict[str, dict[int, Mapping[str, Any]]] = {}
        self.problems: deque[dict[str, Any]] = deque(maxlen=PROBLEMS)
        self.first = self.last = 0.0
        self.resumed = self.events = 0
        self.finished = False
        self.digest: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event; one that lacks what its kind has is passed over."""
        try:
            time = datetime.fromisoformat(str(event["time"])).timestamp()
            self._note(event, time)
        except (KeyError, ValueError, TypeError, AttributeError):
            return
        self.first, self.last = self.first or time, time
        self.events += 1

    def _note(self, event: Mapping[str, Any], time: float) -> None:
        match event["kind"]:
            case "started" | "resumed":
                self.resumed += event["kind"] == "resumed"
                self.finished = False
                if found := _STUDY.match(str(event["text"])):
                    self.digest = found[1]
            case "finished":
                self.finished = True
            case "phase" | "round":
                self.phase = str(event["phase"])
                self.phases.setdefault(self.phase, _Phase()).note(event, time)
                for name, loss in event.get("losses", {}).items():
                    self.losses.setdefault(name, {})[int(event["round"])] = (loss["loss_d"], loss["loss_g"])
                for name, facts in event.get("arms", {}).items():
                    self.arms.setdefault(name, {})[int(event["round"])] = facts
            case "exchange":
                for name, entry in event["traffic"].items():
                    site = self._site(name)
                    site.sent, site.received = site.sent + entry["sent"], site.received + entry["received"]
                    if entry["messages"]:
                        site.seen, site.phase, site.round = time, str(event["phase"]), int(event["round"])
            case "joining":
                self._site(event["site"]).said = str(event["text"])
                self._site(event["site"]).seen = time
            case "presence":
                site = self._site(event["site"])
                site.said = str(event["text"])
                site.online = {"went offline": False, "is back": True}.get(site.said, site.online)
                if site.online:
                    site.seen = time
            case "problem":
                text = str(event["text"])
                site, refused = self._site(event["site"]), text.startswith("refused")
                site.refusals, site.problems = site.refusals + refused, site.problems + (not refused)
                self.problems.append(
                    {
                        "time": time,
                        "where": f"{_title(str(event['phase']))}, round {event['round']}",
                        "site": str(event["site"]),
                        "text": text,
                    }
                )

    def _site(self, name: str) -> _Site:
        return self.sites.setdefault(str(name), _Site())

    def view(self, now: float) -> dict[str, Any]:
        """Everything as plain values; `now` in seconds since 1970 (UTC), as are all times."""
        return {
            "events": self.events,
            "first": self.first or None,
            "last": self.last or None,
            "resumed": self.resumed,
            "phases": self._phases(now),
            "gan": {
                name: _thinned([(r, d, g) for r, (d, g) in sorted(one.items())]) for name, one in self.losses.items()
            },
            "arms": {
                name: _thinned([(r, *(facts.get(score) for score in SCORES)) for r, facts in sorted(one.items())])
                for name, one in self.arms.items()
            },
            "sites": {
                name: {
                    "online": site.online,
                    "seen": site.seen,
                    "said": site.said,
                    "phase": _title(site.phase),
                    "round": site.round,
                    "sent": site.sent,
                    "received": site.received,
                    "refusals": site.refusals,
                    "problems": site.problems,
                }
                for name, site in sorted(self.sites.items())
            },
            "problems": list(self.problems),
        }

    def _phases(self, now: float) -> list[dict[str, Any]]:
        begun = list(self.phases)
        names = [*begun, *(name for name in EXPECTED if name not in self.phases)]
        result = []
        for name in names:
            phase = self.phases.get(name, _Phase())
            over = name in self.phases and (
                phase.done >= phase.rounds or begun.index(name) < len(begun) - 1 or self.finished
            )
            state = "ahead" if name not in self.phases else "done" if over else "now"
            result.append(
                {
                    "name": name,
                    "title": _title(name),
                    "state": state,
                    "done": phase.done,
                    "rounds": phase.rounds,
                    "seconds": round(phase.last - phase.first, 1),
                    "remaining": phase.remaining(now) if state == "now" else None,
                }
            )
        return result


def _title(phase: str) -> str:
    """A phase in words: gan is Generators, classifier-validation is Classifiers, validation."""
    name, _, part = phase.partition("-")
    return ", ".join(word for word in (TITLES.get(name, name), part) if word)


def _thinned(points: list[tuple[Any, ...]]) -> list[list[Any]]:
    """At most `POINTS` points, evenly chosen, the first and the last among them; four digits are enough to draw."""
    if len(points) > POINTS:
        step = (len(points) - 1) / (POINTS - 1)
        points = [points[round(i * step)] for i in range(POINTS)]
    return [[float(f"{value:.4g}") if isinstance(value, float) else value for value in point] for point in points]
