"""The privacy section of a report: what each site released, and what that costs a patient, from the ledgers alone.

::

    open study:    nothing is private: epsilon None (infinite), and what left, in words
    private study: ledgers/<site>.jsonl (copies) --spend lines--> events per class --accounting--> epsilon per class, per site
                   study + declared sizes --budgets_of--> the plan beside it

A site's epsilon is the maximum over its classes of all that patients of the class were exposed to, other phases included; the
study's figure is the maximum over sites, never a mean. Reservations without a spend are listed apart: nothing left for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xfed.common.accounting import claim
from xfed.common.arms import STEERING
from xfed.common.config_family import ALL
from xfed.common.dp_events import Event, exposures
from xfed.common.ledger_lines import Line
from xfed.server.budgets import budgets_of
from xfed.server.run import Run

__all__ = ["privacy_section"]

NOT_PRIVATE = (
    "No differential privacy: epsilon is infinite. The discriminators stayed at the site; the generator's and classifier's "
    "weights, which were trained on its patients, left it."
)
SUMS_ONLY = (
    "Secure aggregation: the coordinator saw sums over the sites only, not this site's own weights, counts or scores. The sums "
    "themselves are exact, and what they reveal about a patient is not bounded."
)
PRIVATE = (
    "Differential privacy for every patient (add or remove one, with all their images): everything that left was released by "
    "Gaussian mechanisms, or follows from what was. Declared sizes are public figures of the site. Not covered: a patient "
    "known to attend more sites than privacy.overlap says, a compromised hospital machine, and how long answers took."
)


def privacy_section(run: Run, holders: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The report's `privacy`: per site unit, epsilon, delta, statement and what was released. Raises `FederationError`."""
    if run.study.private:
        return _private(run)
    return {
        "sites": {
            site: {
                "unit": "patient",
                "epsilon": None,
                "delta": None,
                "statement": f"{NOT_PRIVATE} {SUMS_ONLY}" if run.study.secure else NOT_PRIVATE,
                "released": _released(run, holders, site),
            }
            for site in run.exchange.sites
        },
    }


def _private(run: Run) -> dict[str, Any]:
    privacy, budgets = run.study.privacy, budgets_of(run)
    sites: dict[str, dict[str, Any]] = {}
    for site in run.exchange.sites:
        lines = run.ledgers.copy(site).lines()
        mine = [line for line in lines if line.content.study == run.study.digest]
        per_class = _epsilons(run, mine)
        released = [line for line in mine if line.content.kind == "release"]
        sites[site] = {
            "unit": privacy.unit,
            # a site whose ledger was never seen is not known to have spent nothing
            "epsilon": max(per_class.values()) if lines else None,
            "delta": privacy.delta,
            "epsilon_per_class": per_class,
            "budget": privacy.epsilon,
            "planned_epsilon": budgets[site].epsilon,
            "declared_patients": {
                name: int(count)
                for name, count in zip(run.study.classes, run.descriptions[site].counts["counts"][0], strict=True)
            },
            "releases": len(released),
            "reservations_without_release": _kinds(mine, "reserve") - _kinds(mine, "spend"),
            "warnings": list(budgets[site].warnings),
            "statement": PRIVATE,
            "released": _what(mine),
            "ledger": dict(zip(("seq", "hash"), lines[-1].head, strict=True)) if lines else None,
        }
    figures = [entry["epsilon"] for entry in sites.values()]
    worst = None if None in figures else max(figures)
    return {
        "unit": privacy.unit,
        "epsilon": worst,
        "delta": privacy.delta,
        "overlap": privacy.overlap,
        "artefacts": {"generators": worst, "archive": worst, "classifiers": worst, "scores": worst},
        "sites": sites,
    }


def _kinds(lines: Sequence[Line], kind: str) -> int:
    return sum(line.content.kind == kind for line in lines)


def _epsilons(run: Run, lines: Sequence[Line]) -> dict[str, float]:
    privacy = run.study.privacy
    spent: list[tuple[str | None, Event]] = [
        (line.content.class_name, line.event) for line in lines if line.content.kind == "spend"
    ]
    exposed = exposures(spent, overlap=privacy.overlap)
    return {
        name: claim(exposed.get(name, exposed[None]), float(privacy.delta or 0)).epsilon if spent else 0.0
        for name in run.study.classes
    }


def _what(lines: Sequence[Line]) -> list[str]:
    counted: dict[str, int] = {}
    for line in lines:
        if line.content.kind == "release":
            of = f" of {line.content.class_name}" if line.content.class_name else ""
            what = {
                "generators": "generator rounds or embeddings",
                "classifier": "classifier rounds",
                "scores": "scores",
            }
            key = f"{what.get(str(line.content.phase), str(line.content.phase))}{of}, with noise"
            counted[key] = counted.get(key, 0) + 1
    return [f"{count} x {what}" for what, count in counted.items()]


def _released(run: Run, holders: Mapping[str, Sequence[str]], site: str) -> list[str]:
    steered = run.study.unlabelled and run.study.archive.reuse is None
    arms = (*run.study.classifier.arms, *([STEERING] if steered else []))
    if run.study.secure:
        return [
            "its share of the sums over all sites, under masks:",
            *[_generator(name) for name in run.study.generators],
            *[f"classifier of {arm}" for arm in arms],
            "counts of images per class and split, confusion counts, score histograms, sums of features",
        ]
    released = [_generator(name) for name in run.study.generators if site in holders.get(name, ())]
    released += [f"classifier of {arm}" for arm in arms]
    return [
        *released,
        "counts of images per class and split",
        "confusion counts and score histograms",
        "sums of features",
    ]


def _generator(name: str) -> str:
    return "generator of all images" if name == ALL else f"generator of {name}"
