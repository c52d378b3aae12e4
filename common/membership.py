"""Can it be told from the archive who was trained on, and which images are of one patient? Counts at sites, figures from sums.

::

    site: patient's score --histogram--> counts per public bin, members (training) and others (held out) --sum over sites-->
      --membership_figures--> area under the ROC, share of members found at 1% and 5% false alarms, with intervals
    site: place of the patient's other image among others' --histogram--> counts per bin --sum--> --linkage_figures--> the same

A score is small where the archive has an image near the patient's: `distance`, to the nearest synthetic image of the class;
`relative`, that divided by the distance to the nearest held-out image of another patient (an attacker who has images of the kind:
Chen et al. 2020, GAN-Leaks, section 4.4). One score per patient, the smallest over their images, so that scores are independent.

Formal guarantees
    Figures of a sum of histograms are those of all patients pooled, up to the width of a bin (4 to 6%), where ties count half.
    A generator that is independent of who is a member has an expected area of 1/2 for `distance`.
Not covered
    That no stronger attack exists. Sites whose images are far from the archive and which have another share of held-out patients
    than the others: there membership and site are mixed up (splits have the same shares at every site, so this is small).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.intervals import auc_interval, difference_interval, wilson_interval

__all__ = [
    "ATTACKS",
    "BINS",
    "RANKS",
    "histogram",
    "linkage_figures",
    "membership_figures",
    "no_counts",
    "rank_histogram",
]

ATTACKS = ("distance", "relative")
BINS = 128
RANKS = 20
"""Bins of places, uniform in 0..1 (0: the nearest of all, 1: the farthest)."""
FALSE_ALARMS = (0.01, 0.05)
CONFIDENCE = 0.95
_EDGES: Mapping[str, npt.NDArray[np.float64]] = {
    "distance": np.geomspace(0.01, 1.42, BINS - 1),
    "relative": np.geomspace(0.01, 20.0, BINS - 1),
}

Counts = npt.NDArray[np.int64]


def histogram(attack: str, scores: npt.NDArray[np.floating[Any]]) -> Counts:
    """Counts int64 [BINS] of scores >= 0 over the attack's public bins; the first and the last are open."""
    places = np.searchsorted(_EDGES[attack], scores, side="right")
    return np.bincount(places, minlength=BINS).astype(np.int64)


def no_counts(classes: int) -> dict[str, npt.NDArray[Any]]:
    """The counts of a site that has none: names, shapes and types of all that a site sends of the attacks."""
    return {
        "membership": np.zeros((len(ATTACKS), classes, 2, BINS), np.int64),
        "ranks": np.zeros((2, RANKS), np.int64),
        "first": np.zeros(2, np.int64),
        "chance": np.zeros(2),
    }


def rank_histogram(places: npt.NDArray[np.floating[Any]]) -> Counts:
    """Counts int64 [RANKS] of places in 0..1."""
    bins = np.minimum((places * RANKS).astype(np.int64), RANKS - 1)
    return np.bincount(bins, minlength=RANKS).astype(np.int64)


def membership_figures(counts: Counts, confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Figures of one attack on one class from counts [2, BINS] of the scores of members and of others.

    "auc" with "auc_interval"; "tpr_at_1_percent_fpr" and "..5.." with intervals over members (the threshold taken as given): None
    where there are too few others for such a rate to be seen (100 and 20), or nobody at all.
    """
    members, others = counts
    n, m = int(members.sum()), int(others.sum())
    figures: dict[str, Any] = {"members": n, "held_out": m, "auc": None, "auc_interval": None}
    if n and m:
        below = np.cumsum(members) - members
        area = float((others * (below + members / 2)).sum() / (n * m))
        figures["auc"], figures["auc_interval"] = area, list(auc_interval(area, n, m, confidence))
    for rate in FALSE_ALARMS:
        name = f"tpr_at_{100 * rate:g}_percent_fpr"
        figures[name] = figures[f"{name}_interval"] = None
        if n and m * rate >= 1:
            allowed = np.cumsum(others) <= rate * m
            share = float(members[allowed].sum() / n)
            figures[name], figures[f"{name}_interval"] = share, list(wilson_interval(share, n, confidence))
    return figures


def linkage_figures(ranks: Counts, first: Counts, chance: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Figures of linking from `ranks` [2, RANKS], `first` [2] and `chance` [2]: row 0 training patients, row 1 held-out ones.

    "auc": chance that a patient's other image is nearer to the archive image than a random other patient's is; "first": share
    of patients whose other image is the nearest of all, beside what guessing would reach. "excess": auc of training patients
    minus that of held-out ones, None where either is missing.
    """
    groups: dict[str, Any] = {}
    spans: dict[str, tuple[float, tuple[float, float]]] = {}
    for row, name in enumerate(("training", "held_out")):
        n = int(ranks[row].sum())
        groups[name] = {"patients": n, "auc": None, "auc_interval": None, "first": None, "first_interval": None}
        groups[name]["first_by_chance"] = float(chance[row] / n) if n else None
        if n:
            area, span = _mean_place(ranks[row])
            share = float(first[row] / n)
            spans[name] = (area, span)
            groups[name] |= {"auc": area, "auc_interval": list(span)}
            groups[name] |= {"first": share, "first_interval": list(wilson_interval(share, n, CONFIDENCE))}
    excess: dict[str, Any] = {"auc": None, "interval": None}
    if len(spans) == 2:
        (a, a_span), (b, b_span) = spans["training"], spans["held_out"]
        excess = {"auc": a - b, "interval": list(difference_interval(a, a_span, b, b_span))}
    return groups | {"excess": excess}


def _mean_place(ranks: Counts) -> tuple[float, tuple[float, float]]:
    """1 - the mean place, with a normal interval whose variance is at least that of a uniform place (few patients)."""
    middles = (np.arange(RANKS) + 0.5) / RANKS
    n = int(ranks.sum())
    mean = float((ranks * middles).sum() / n)
    variance = max(float((ranks * (middles - mean) ** 2).sum() / max(1, n - 1)), 1 / 12 if n < RANKS else 0.0)
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * sqrt(variance / n)
    return 1 - mean, (max(0.0, 1 - mean - half), min(1.0, 1 - mean + half))
