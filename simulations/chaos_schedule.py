"""A schedule: which faults hit which party, where and when; made from a seed and nothing else.

::

    seed --even: open, odd: secure--> one kill at the seed's own point   (200 seeds pass every point)
         --seed--> one fault of disk, damage, network, clock in turn     (at a random point)
         --seed--> none to two more kills                                (random points, random parties)

A fault comes when its party calls its point for the n-th time since it was started. A fault whose call never comes (the
study is further on by then) is counted as not reached, never as passed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xfed.common.config import Study, parse_study
from xfed.simulations.chaos_points import KINDS, POINTS, Kind, Point, Role, points_of

__all__ = ["FAULTS", "Fault", "FaultKind", "Schedule", "chaos_study", "make_schedule", "point_named"]

FaultKind = Literal["kill", "damage", "disk", "network", "clock"]
FAULTS: tuple[FaultKind, ...] = ("kill", "damage", "disk", "network", "clock")
_IN_TURN: tuple[FaultKind, ...] = ("damage", "disk", "network", "clock")

_SMALL_SHIFTS_S = (3.0, -120.0, -280.0)
_LARGE_SHIFTS_S = (30.0, 86400.0, -600.0, -86400.0)
CUTS = ("cut", "stall", "reset", "slow")
HOW = ("truncate", "garble", "empty")
MOST_KILLS = 2
_LAST = ("server.quality", "server.report", "server.end")

# what is damaged between a kill and the restart, and the points of the kill: the newest file of the kind is hit
_DAMAGE: tuple[tuple[str, tuple[str, ...], Kind | None], ...] = (
    ("checkpoint", ("server.checkpoint.after", "server.journal.torn", "server.judge.after", "server.push.after"), None),
    ("events", ("server.checkpoint.after", "server.push.before"), None),
    ("answer", ("worker.answer.after", "worker.left.before", "worker.left.after", "worker.reply.after"), None),
    ("state", ("worker.state.rename.after",), None),
    ("shard", ("worker.shard.after", "worker.classifier.before", "worker.measure.after"), None),
    ("node", ("agent.connect.after", "agent.send.after", "agent.ask.before"), None),
    ("session", ("worker.keys.after", "worker.shares.after", "worker.mask.after", "worker.unmask.after"), "secure"),
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. `party`: "server", a site, or "<site>/worker". `detail` by kind:

    damage: what, how. disk: seconds. network: what, seconds. clock: shift_s, seconds.
    """

    number: int
    kind: FaultKind
    party: str
    point: str
    call: int
    detail: dict[str, Any]

    @property
    def ends_the_process(self) -> bool:
        """Whether the party dies of it."""
        return self.kind in ("kill", "damage")

    @property
    def words(self) -> str:
        """For a table."""
        more = " ".join(str(value) for value in self.detail.values())
        return f"{self.kind} {more + ' ' if more else ''}at {self.party} {self.point} call {self.call}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The faults of one seed, for a study of `kind`."""

    seed: int
    kind: Kind
    faults: tuple[Fault, ...]


def chaos_study(kind: Kind) -> Study:
    """The study that is broken: two sites in the open, or three that sum securely; two rounds of each phase."""
    values: dict[str, Any] = {
        "name": f"chaos-{kind}",
        "image_size": 32,
        "classes": ["Cardiomegaly", "Normal"],
        "data": {"phantom": {"patients": {"Cardiomegaly": 24, "Normal": 24}}},
        "sites": {"count": 2 if kind == "open" else 3},
        "gan": {"width": 4, "rounds": 2, "steps_per_round": 1, "batch": 8, "minimum_images": 2},
        "archive": {"minimum": 33},
        "classifier": {
            "model": "googlenet",  # the smallest in bytes: these studies are about messages and disks
            "width": 4,
            "rounds": 2,
            "steps_per_round": 1,
            "batch": 8,
            "arms": ["DS3"],
        },
        "federation": {"join_limit_s": 60, "time_limit_s": 30, "absence_limit_s": 30, "retries": 2},
    }
    return parse_study(values, "chaos")


def make_schedule(seed: int, only: FaultKind | None = None) -> Schedule:
    """The schedule of a seed, the same at every call. With `only`, that kind of fault takes the turn's place."""
    kind = KINDS[seed % 2]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"xfed chaos {seed}".encode()).digest()[:8], "big"))
    sites = chaos_study(kind).site_names()
    own = points_of(kind)
    point = own[(seed // 2) % len(own)]
    faults = [_kill(0, point, sites, rng)]
    turn = only or _IN_TURN[(seed // 2) % len(_IN_TURN)]
    if turn != "kill":
        faults.append(_other(1, turn, kind, sites, rng))
    for _ in range(int(rng.integers(0, MOST_KILLS + 1))):
        faults.append(_kill(len(faults), own[int(rng.integers(len(own)))], sites, rng))
    return Schedule(seed=seed, kind=kind, faults=tuple(faults))


def _party(role: Role, sites: tuple[str, ...], rng: np.random.Generator) -> str:
    site = sites[int(rng.integers(len(sites)))]
    return {"server": "server", "agent": site, "worker": f"{site}/worker"}[role]


def _call(point: Point, rng: np.random.Generator) -> int:
    return int(rng.integers(1, point.calls + 1))


def _kill(number: int, point: Point, sites: tuple[str, ...], rng: np.random.Generator) -> Fault:
    party, call = _party(point.role, sites, rng), _call(point, rng)
    return Fault(number=number, kind="kill", party=party, point=point.name, call=call, detail={})


def _other(number: int, kind: FaultKind, study: Kind, sites: tuple[str, ...], rng: np.random.Generator) -> Fault:
    detail: dict[str, Any]
    if kind == "damage":
        rows = [row for row in _DAMAGE if row[2] in (None, study)]
        what, names, _ = rows[int(rng.integers(len(rows)))]
        at = tuple(point for point in points_of(study) if point.name in names)
        detail = {"what": what, "how": str(rng.choice(HOW))}
    else:
        roles = {"disk": ("server", "worker"), "network": ("server", "agent"), "clock": ("server", "agent")}[kind]
        role = roles[int(rng.integers(len(roles)))]
        at = tuple(point for point in points_of(study) if point.role == role and point.when != "torn")
        if kind == "clock":  # nobody asks any more at the end of a study, so nobody would notice
            at = tuple(point for point in at if not point.name.startswith(_LAST))
        seconds = round(float(rng.uniform(0.5, 2.0)), 1)
        if kind == "disk":
            detail = {"seconds": seconds}
        elif kind == "network":
            detail = {"what": str(rng.choice(CUTS)), "seconds": seconds}
        else:
            shifts = _LARGE_SHIFTS_S if rng.random() < 0.7 else _SMALL_SHIFTS_S
            detail = {"shift_s": float(rng.choice(shifts)), "seconds": seconds}
    point = at[int(rng.integers(len(at)))]
    party, call = _party(point.role, sites, rng), _call(point, rng)
    return Fault(number=number, kind=kind, party=party, point=point.name, call=call, detail=detail)


def point_named(name: str) -> Point:
    """The point of a fault."""
    return next(point for point in POINTS if point.name == name)
