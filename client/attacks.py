"""Attacks on the archive that a hospital tries on its own patients: who was trained on, and which images are of one patient.

::

    patient's images --nearest synthetic image of the class--> score --> histogram, training and held-out patients apart
    patient's image 1 --nearest synthetic image s--> is image 2 nearer to s than other patients' images are? --> its place 0..1

Distances are those of `xfed.common.nearest`; what is made of the counts is in `xfed.common.membership`. Counts leave, per public
bin; no image, patient or distance does. A class that this hospital did not train a generator of, or that one of the two
groups lacks, is left out whole; so are places of fewer patients than may show in a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.store import Store
from xfed.common.membership import ATTACKS, histogram, no_counts, rank_histogram
from xfed.common.nearest import distance_matrix, nearest

__all__ = ["attack_archive", "link_patients", "membership_scores"]

MOST_PAIRS = 500
"""Patients of one class and group whose images are linked, at the most: memory grows with them."""
TINY = 1e-3

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


def attack_archive(
    store: Store, images: Images, labels: Labels, device: torch.device, *, trained: npt.NDArray[np.bool_], smallest: int
) -> dict[str, npt.NDArray[Any]]:
    """Counts of both attacks on `images` uint8 [n, S, S] with `labels` int64 [n] (what is released of the archive).

    "membership" int64 [2, C, 2, BINS] (attack, class, members or others); "ranks" int64 [2, RANKS], "first" int64 [2] and
    "chance" float64 [2] (training or held-out). `trained` bool [C]: classes whose images a generator was trained on here;
    `smallest`: fewest patients that may show in a count.
    """
    counts = no_counts(len(store.classes))
    shown = [name for name in range(len(store.classes)) if (labels == name).any()]
    attacked = [name for name in shown if trained[name]]
    for label in attacked:
        scores = membership_scores(store, images[labels == label], label, device)
        for attack, groups in scores.items():
            for group, values in enumerate(groups):
                counts["membership"][ATTACKS.index(attack), label, group] = histogram(attack, values)
    linked = link_patients(store, images, attacked, device)
    for group, (places, chance) in enumerate(linked):
        if len(places) >= smallest:
            counts["ranks"][group], counts["first"][group] = rank_histogram(places), (places == 0).sum()
            counts["chance"][group] = chance
    return counts


def membership_scores(
    store: Store, synthetic: Images, label: int, device: torch.device
) -> dict[str, tuple[Scores, Scores]]:
    """Per attack the scores of members and of held-out patients of one class; {} where a group has fewer than two patients."""
    rows = np.flatnonzero((store.labels == label) & (store.splits >= 0))
    patients, out = store.patients[rows], store.splits[rows] > 0
    if min(len(np.unique(patients[~out])), len(np.unique(patients[out]))) < 2:
        return {}
    own = np.asarray(store.images[rows])
    distance = nearest(own, synthetic, device=device).distance.astype(np.float64)
    usual = nearest(own, own[out], owners=(patients, patients[out]), device=device).distance
    scores = {"distance": distance, "relative": distance / (usual + TINY)}
    return {
        attack: (_smallest(values[~out], patients[~out]), _smallest(values[out], patients[out]))
        for attack, values in scores.items()
    }


def _smallest(values: Scores, patients: Labels) -> Scores:
    """Per patient the smallest of their values."""
    people, position = np.unique(patients, return_inverse=True)
    least = np.full(len(people), np.inf)
    np.minimum.at(least, position, values)
    return least


def link_patients(
    store: Store, images: Images, classes: Sequence[int], device: torch.device
) -> tuple[tuple[Scores, float], tuple[Scores, float]]:
    """Of training and of held-out patients: the places 0..1 of their second images, and how many first places guessing reaches.

    The first of a patient's two images of a class finds its nearest among `images`; the second's place is the share of other
    patients' first images of the class that are nearer to that one (ties count half).
    """
    places: tuple[list[Scores], list[Scores]] = ([np.zeros(0)], [np.zeros(0)])
    chance = [0.0, 0.0]
    pairs = [(label, group, *_pairs(store, label, group)) for label in classes for group in (0, 1)]
    firsts = np.concatenate([np.zeros(0, np.int64), *(first for _, _, first, _ in pairs)])
    led_to = nearest(np.asarray(store.images[firsts]), images, device=device).row
    for label, group, first, second in pairs:
        found, led_to = images[led_to[: len(first)]], led_to[len(first) :]
        everybody = np.flatnonzero((store.labels == label) & (store.splits >= 0))
        gallery = everybody[np.unique(store.patients[everybody], return_index=True)[1]]
        if not len(first) or len(gallery) < 2:
            continue
        others = distance_matrix(found, np.asarray(store.images[gallery]), device=device)
        others[store.patients[first, None] == store.patients[None, gallery]] = np.inf
        own = np.diag(distance_matrix(found, np.asarray(store.images[second]), device=device))[:, None]
        nearer = (others < own).sum(1) + (others == own).sum(1) / 2
        places[group].append(nearer / (len(gallery) - 1))
        chance[group] += len(first) / len(gallery)
    training, held = (np.concatenate(part) for part in places)
    return (training, chance[0]), (held, chance[1])


def _pairs(store: Store, label: int, group: int) -> tuple[Labels, Labels]:
    """First and second row of every patient with two or more of the class, by patients' numbers; at most `MOST_PAIRS`."""
    rows = np.flatnonzero((store.labels == label) & (store.splits == 0 if group == 0 else store.splits > 0))
    ordered = rows[np.argsort(store.patients[rows], kind="stable")]
    patients = store.patients[ordered]
    begins = np.append(True, patients[1:] != patients[:-1])[: len(ordered)]
    followed = np.append(patients[1:] == patients[:-1], False)[: len(ordered)]
    start = np.flatnonzero(begins & followed)[:MOST_PAIRS]
    return ordered[start], ordered[start + 1]
