"""What a site's patients have lost, per class, artefact and study, from the attempts of its ledger.

::

    attempts --spends of the study--> phase x class x mechanism ("parts")
        class c loses: events of c + events of "every class"   (sequence: composed; classes: parallel, the largest counts)
        artefact:      generators, archive <- phase generators      classifier <- generators + classifier      all <- everything
        standing reservations: the same once more, with them; never mixed into the claim
    several studies at once: a patient may be of another class in each, so every combination of classes is composed

Pure. Figures by `xfed.common.auditor.accountants`; None stands for infinite (or unknown, which protects as much).

Formal guarantees
    The site's epsilon is the largest over classes, of composed events times the overlap; never a mean, never a sum of epsilons.
    A ledger with a line that cannot be read has no finite epsilon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xfed.common.auditor.accountants import Claim, Mechanisms, claim, curve, largest, mechanisms
from xfed.common.auditor.attempts import Attempt
from xfed.common.auditor.chain import SiteAudit
from xfed.common.auditor.lines import Event

__all__ = ["ARTEFACTS", "DELTAS", "EVERY_CLASS", "Scope", "site_facts"]

EVERY_CLASS = "(every class)"
ARTEFACTS: Mapping[str, tuple[str, ...]] = {
    "generators": ("generators",),
    "archive": ("generators",),
    "classifier": ("generators", "classifier"),
    "everything released": ("generators", "classifier", "scores"),
}
"""Artefact to the ledger's phases that it is computed from, end to end."""
DELTAS = tuple(10 ** (-2 - k / 4) for k in range(29))
MOST_COMBINATIONS = 64


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is asked: a study's digest (None: all studies together), delta, and how many sites one patient may attend.

    `trained`: the phases that read patients according to the study (config.yaml); empty where that is not known.
    """

    study: str | None
    delta: float
    overlap: int = 1
    trained: frozenset[str] = frozenset()
    budget: float | None = None


def site_facts(audit: SiteAudit, scope: Scope) -> dict[str, Any]:
    """Everything the report says of one site, as plain values (JSON)."""
    attempts = [one for one in audit.attempts if scope.study in (None, one.study)]
    groups = _groups(attempts, scope.overlap, standing=False)
    claims = {name: claim(of, scope.delta) for name, of in groups.items()}
    worst = max(claims, key=lambda name: claims[name].epsilon)
    known = audit.readable
    artefacts = {name: _artefact(attempts, phases, scope, known) for name, phases in ARTEFACTS.items()}
    epsilon = artefacts["everything released"]["epsilon"]
    with_standing = _groups(attempts, scope.overlap, standing=True)
    everything = _groups(audit.attempts, scope.overlap, standing=False) if scope.study is not None else groups
    releases = [one for one in attempts if one.released]
    spent = [one for one in attempts if one.spent]
    lines = [line for line in audit.lines if scope.study in (None, line.study)]
    return {
        "verified": audit.verified,
        "epsilon": epsilon,
        "delta": scope.delta,
        "worst_class": worst,
        "mechanisms": [{"q": q, "sigma": sigma, "steps": steps} for q, sigma, steps in groups[worst]],
        "budget": scope.budget,
        "budget_left": None if scope.budget is None or epsilon is None else scope.budget - epsilon,
        "accountants": _accountants(claims[worst]),
        "classes": {
            n: {"epsilon": c.epsilon if known else None, "accountants": _accountants(c)} for n, c in claims.items()
        },
        "artefacts": artefacts,
        "parts": _parts(attempts),
        "releases": len(releases),
        "noised_sums": sum(event.steps for one in spent for event in one.spent),
        "spent_attempts": len(spent),
        "retries": sum(one.number > 1 for one in spent),
        "spent_but_not_released": sum(not one.released for one in spent),
        "broken_off": sum(one.broken_off for one in attempts),
        "standing": _standing(attempts),
        "epsilon_with_standing": largest(with_standing.values(), scope.delta) if known else None,
        "refusals": [
            {"line": x.seq, "time": x.time, "phase": x.phase, "class": x.class_name, "reason": x.details["reason"]}
            for x in lines
            if x.kind == "refuse"
        ],
        "curve": [list(point) for point in curve(groups[worst], DELTAS)] if known else [],
        "studies": list(dict.fromkeys(one.study for one in audit.attempts)),
        "epsilon_all_studies": largest(everything.values(), scope.delta) if known else None,
        "software": list(dict.fromkeys(line.software for line in lines)),
        "first": lines[0].time if lines else None,
        "last": lines[-1].time if lines else None,
        "head": {"seq": audit.head[0], "hash": audit.head[1]},
        "endorsed_by": audit.endorsed_by,
    }


def _groups(attempts: Sequence[Attempt], overlap: int, *, standing: bool) -> dict[str, Mechanisms]:
    """What patients are exposed to: by class; over several studies, by combination of their classes in each."""
    studies = dict.fromkeys(one.study for one in attempts)
    per_study = [_by_class([one for one in attempts if one.study == study], standing) for study in studies]
    if not per_study:
        return {EVERY_CLASS: ()}
    if len(per_study) == 1:
        return {name: mechanisms(events, overlap) for name, events in per_study[0].items()}
    # classes with the same events are one choice
    choices = [{mechanisms(events): (name, events) for name, events in groups.items()}.values() for groups in per_study]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MOST_COMBINATIONS:
        together = [event for one in attempts for event in _exposed(one, standing)]
        return {"all classes of all studies at once (an upper bound)": mechanisms(together, overlap)}
    found = {}
    for combination in itertools.product(*choices):
        name = " + ".join(f"{name} in {study[:8]}" for (name, _), study in zip(combination, studies, strict=True))
        found[name] = mechanisms([event for _, events in combination for event in events], overlap)
    return found


def _by_class(attempts: Sequence[Attempt], standing: bool) -> dict[str, list[Event]]:
    names = list(dict.fromkeys(one.class_name for one in attempts if one.class_name is not None))
    found: dict[str, list[Event]] = {}
    for name in names or (None,):
        found[name or EVERY_CLASS] = [
            event for one in attempts if one.class_name in (None, name) for event in _exposed(one, standing)
        ]
    return found


def _exposed(attempt: Attempt, standing: bool) -> Iterable[Event]:
    return (*attempt.spent, *attempt.standing) if standing else attempt.spent


def _accountants(of: Claim) -> list[dict[str, Any]]:
    return [{"name": name, "epsilon": value} for name, value in zip(of.names, (of.first, of.second), strict=True)]


def _artefact(attempts: Sequence[Attempt], phases: tuple[str, ...], scope: Scope, known: bool) -> dict[str, Any]:
    """End-to-end epsilon: infinite where the study computes it from patients and the ledger knows of no such event."""
    found = {one.phase for one in attempts if one.spent}
    missing = [phase for phase in phases if phase in scope.trained and phase not in found]
    own = [one for one in attempts if one.phase in phases]
    groups = _groups(own, scope.overlap, standing=False)
    why = f"the study reads patients in {', '.join(missing)}, and the ledger holds no such event" if missing else None
    return {
        "epsilon": largest(groups.values(), scope.delta) if known and not missing else None,
        "phases": list(phases),
        "why": why,
    }


def _parts(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """One row per phase, class and mechanism: how often, how many sums, and in how many attempts."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in attempts:
        for event in one.spent:
            key = (one.study, one.phase, one.class_name, *event.mechanism)
            row = rows.setdefault(
                key,
                {
                    "study": one.study,
                    "phase": one.phase,
                    "class": one.class_name,
                    "sampling": "none" if event.q == 1 else "poisson",
                    "q": event.q,
                    "sigma": event.sigma,
                    "clip": event.clip,
                    "noise_deviation": event.sigma * event.clip,
                    "steps": 0,
                    "releases": 0,
                    "attempts": 0,
                    "retries": 0,
                },
            )
            row["steps"] += event.steps
            row["attempts"] += 1
            row["releases"] += one.released
            row["retries"] += one.number > 1
    return list(rows.values())


def _standing(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    return [
        {
            "phase": one.phase,
            "class": one.class_name,
            "round": one.round,
            "attempt": one.number,
            "steps": event.steps,
            "q": event.q,
            "sigma": event.sigma,
        }
        for one in attempts
        for event in one.standing
    ]
