"""Attacks on an archive: figures against oracles, a memoriser found, an honest one not, and small counts that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from xfed.client.attacks import attack_archive, link_patients, membership_scores
from xfed.client.store import Store, write_store
from xfed.common.membership import (
    ATTACKS,
    BINS,
    RANKS,
    histogram,
    linkage_figures,
    membership_figures,
    no_counts,
    rank_histogram,
)
from xfed.common.randomness import numpy_generator
from xfed.simulations.phantom import phantom_arrays
from xfed.simulations.planted_copies import hospital, toy_study

CPU = torch.device("cpu")
STUDY = toy_study(32, 5)
PATIENTS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return hospital(STUDY, tmp_path_factory.mktemp("hospital"), PATIENTS, images_per_patient=2.0)


@pytest.fixture(scope="module")
def fresh() -> tuple[Any, Any]:
    """Phantoms of other patients: what a generator would make that knows the kind and nobody."""
    images, labels, _ = phantom_arrays(
        classes=STUDY.classes,
        patients=dict.fromkeys(STUDY.classes, 40),
        images_per_patient=1.0,
        size=32,
        seed=77,
    )
    return images, labels


def _attacked(store: Store, images: Any, labels: Any, **more: Any) -> dict[str, Any]:
    return attack_archive(store, images, labels, CPU, **{"trained": store.counts()[0] >= 2, "smallest": 0, **more})


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_area_is_that_of_the_scores_pooled(attack: str) -> None:
    rng = numpy_generator(1, attack)
    sites = [(rng.gamma(8, 0.02, 150), rng.gamma(9, 0.025, 60)) for _ in range(3)]
    counts = sum(np.stack([histogram(attack, part) for part in site]) for site in sites)
    assert isinstance(counts, np.ndarray)
    figures = membership_figures(counts)
    members, others = (np.concatenate([site[i] for site in sites]) for i in (0, 1))
    truth = np.repeat([1, 0], [len(members), len(others)])
    binned = np.repeat(np.concatenate([np.arange(BINS)] * 2), np.concatenate([counts[0], counts[1]]))
    assert figures["auc"] == pytest.approx(roc_auc_score(truth, -binned), abs=1e-12)
    assert figures["auc"] == pytest.approx(roc_auc_score(truth, -np.concatenate([members, others])), abs=5e-3)
    assert (figures["members"], figures["held_out"]) == (450, 180)
    low, high = figures["auc_interval"]
    assert low < figures["auc"] < high


def test_members_found_at_a_rate_of_false_alarms_is_the_slow_version() -> None:
    rng = numpy_generator(2, "rates")
    members, others = rng.gamma(6, 0.02, 300), rng.gamma(9, 0.025, 250)
    counts = np.stack([histogram("distance", members), histogram("distance", others)])
    figures = membership_figures(counts)
    for rate in (0.01, 0.05):
        best = 0.0
        for threshold in range(BINS):
            if counts[1, :threshold].sum() <= rate * 250:
                best = counts[0, :threshold].sum() / 300
        name = f"tpr_at_{100 * rate:g}_percent_fpr"
        assert figures[name] == pytest.approx(best)
        low, high = figures[f"{name}_interval"]
        assert low <= best <= high


def test_rates_that_so_few_cannot_show_are_not_told() -> None:
    counts = np.stack([histogram("distance", np.full(50, 0.1)), histogram("distance", np.full(19, 0.2))])
    figures = membership_figures(counts)
    assert figures["tpr_at_5_percent_fpr"] is None
    assert figures["tpr_at_1_percent_fpr_interval"] is None
    assert figures["auc"] == 1.0
    assert figures["auc_interval"][0] < 1
    just = np.stack(
        [histogram("distance", np.repeat([0.1, 0.3], 25)), histogram("distance", np.repeat([0.1, 0.2], [1, 19]))]
    )
    assert membership_figures(just)["tpr_at_5_percent_fpr"] == 0.5, "one false alarm of 20 is 5%"
    nobody = membership_figures(np.zeros((2, BINS), np.int64))
    assert nobody["auc"] is None
    counts[1] = histogram("distance", np.full(19, 0.2)) * 2
    assert membership_figures(counts)["tpr_at_5_percent_fpr"] == 1.0


def test_intervals_hold_what_they_promise() -> None:
    """Under no leak the interval holds 1/2 about 95 times in 100, and it does not when members are nearer."""
    rng = numpy_generator(3, "cover")
    held = shown = 0
    for _ in range(300):
        others, honest, leaky = rng.gamma(9, 0.02, 40), rng.gamma(9, 0.02, 90), rng.gamma(9, 0.016, 90)
        counts = [np.stack([histogram("distance", part), histogram("distance", others)]) for part in (honest, leaky)]
        low, high = membership_figures(counts[0])["auc_interval"]
        held += low <= 0.5 <= high
        shown += membership_figures(counts[1])["auc_interval"][0] > 0.5
    assert 0.92 <= held / 300 <= 0.985
    assert shown / 300 > 0.7


def test_every_score_has_a_bin() -> None:
    for attack in ATTACKS:
        scores = np.array([0.0, 1e-9, 0.01, 0.5, 1.41421, 19.0, 1e6, np.inf])
        counts = histogram(attack, scores)
        assert counts.sum() == len(scores)
        assert counts.shape == (BINS,)
        assert counts[-1] >= 2
    assert rank_histogram(np.array([0.0, 0.049, 0.05, 1.0])).tolist() == [2, 1] + [0] * (RANKS - 3) + [1]


def test_a_generator_that_repeats_its_training_images_is_found(store: Store) -> None:
    rows = store.rows("train")
    counts = _attacked(store, np.asarray(store.images[rows]), store.labels[rows])
    for number, attack in enumerate(ATTACKS):
        for label in range(5):
            figures = membership_figures(counts["membership"][number, label])
            assert figures["auc"] > 0.99, attack
            assert figures["auc_interval"][0] > 0.75, attack
            assert figures["members"] == len(np.unique(store.patients[store.rows("train", label)]))


def test_one_that_repeats_half_of_them_is_found_and_half_of_them_are(store: Store) -> None:
    rows = store.rows("train")
    people = np.unique(store.patients[rows])
    repeated = rows[np.isin(store.patients[rows], people[::2])]
    counts = _attacked(store, np.asarray(store.images[repeated]), store.labels[repeated])
    pooled = counts["membership"].sum(1)
    for number in range(len(ATTACKS)):
        figures = membership_figures(pooled[number])
        assert 0.65 < figures["auc"] < 0.9
        assert figures["auc_interval"][0] > 0.55
        assert 0.4 < figures["tpr_at_5_percent_fpr"] < 0.65


def test_an_honest_one_is_not(store: Store, fresh: tuple[Any, Any]) -> None:
    counts = _attacked(store, *fresh)
    for number, attack in enumerate(ATTACKS):
        figures = membership_figures(counts["membership"][number].sum(0))
        low, high = figures["auc_interval"]
        assert low < 0.5 < high, attack
        assert 0.35 < figures["auc"] < 0.65
        assert figures["tpr_at_5_percent_fpr"] < 0.2


def test_places_are_those_of_a_slow_version(store: Store, fresh: tuple[Any, Any]) -> None:
    from xfed.common.nearest import distance_matrix

    (places, chance), _ = link_patients(store, fresh[0], [1], CPU)
    expected, guessed = [], 0.0
    mine, everybody = list(store.rows("train", 1)), list(np.flatnonzero(store.labels == 1))
    for patient in sorted({int(store.patients[row]) for row in mine}):
        own = [row for row in mine if store.patients[row] == patient]
        if len(own) < 2:
            continue
        led_to = fresh[0][distance_matrix(np.asarray(store.images[own[:1]]), fresh[0]).argmin()]
        gallery = {}
        for row in everybody:
            gallery.setdefault(int(store.patients[row]), row)
        rest = [row for other, row in gallery.items() if other != patient]
        to = distance_matrix(led_to[None], np.asarray(store.images[[own[1], *rest]]))[0]
        expected.append(((to[1:] < to[0]).sum() + (to[1:] == to[0]).sum() / 2) / len(rest))
        guessed += 1 / (len(rest) + 1)
    assert len(expected) >= 3
    np.testing.assert_allclose(places, expected)
    assert chance == pytest.approx(guessed)


def test_an_archive_of_training_images_gives_away_whose_they_are(store: Store, fresh: tuple[Any, Any]) -> None:
    """Where image 1 is in the archive it leads to itself, and image 2 is where it lies for two real images of one patient."""
    rows = store.rows("train")
    figures = {}
    for name, archive in (("copied", (np.asarray(store.images[rows]), store.labels[rows])), ("honest", fresh)):
        counts = _attacked(store, *archive)
        figures[name] = linkage_figures(counts["ranks"], counts["first"], counts["chance"])
    assert figures["copied"]["excess"]["interval"][0] > 0
    assert figures["copied"]["training"]["first"] > 2 * figures["copied"]["held_out"]["first"]
    low, high = figures["honest"]["excess"]["interval"]
    assert low < 0 < high
    assert figures["honest"]["training"]["first_by_chance"] == pytest.approx(1 / PATIENTS, rel=0.15)


def test_linkage_without_a_link_is_one_half() -> None:
    rng = numpy_generator(4, "places")
    held = 0
    for _ in range(200):
        ranks = np.stack([rank_histogram(rng.random(60)), rank_histogram(rng.random(25))])
        figures = linkage_figures(ranks, np.array([1, 0]), np.array([1.0, 0.5]))
        low, high = figures["training"]["auc_interval"]
        held += low <= 0.5 <= high
    assert 0.9 <= held / 200 <= 0.99
    nobody = linkage_figures(np.zeros((2, RANKS), np.int64), np.zeros(2, np.int64), np.zeros(2))
    assert nobody["training"]["auc"] is None
    assert nobody["excess"] == {"auc": None, "interval": None}
    certain = linkage_figures(np.stack([rank_histogram(np.zeros(5))] * 2), np.array([5, 5]), np.ones(2))
    assert certain["training"]["first"] == 1.0
    assert certain["training"]["auc_interval"][0] < 0.9, "five patients prove little"


def test_a_class_that_was_not_trained_here_or_lacks_a_group_is_left_out_whole(
    store: Store, fresh: tuple[Any, Any], tmp_path: Path
) -> None:
    counts = _attacked(store, *fresh, trained=np.zeros(5, bool))
    assert all(not array.any() for array in counts.values())
    images, labels = fresh
    counts = _attacked(store, images[labels != 2], labels[labels != 2])
    assert not counts["membership"][:, 2].any()
    assert counts["membership"][:, 1].any()
    splits = store.splits.copy()
    splits[(store.labels == 3) & (splits > 0)] = -1
    part = write_store(
        tmp_path / "part",
        classes=store.classes,
        images=np.asarray(store.images),
        labels=store.labels,
        patients=store.patients,
        splits=splits,
    )
    assert membership_scores(part, images[labels == 3], 3, CPU) == {}
    counts = _attacked(part, *fresh)
    assert not counts["membership"][:, 3].any()
    assert {name: array.shape for name, array in counts.items()} == {k: v.shape for k, v in no_counts(5).items()}


def test_places_of_few_patients_stay(store: Store, fresh: tuple[Any, Any]) -> None:
    counts = _attacked(store, *fresh)
    totals = counts["ranks"].sum(1)
    assert totals.min() >= 2
    few = _attacked(store, *fresh, smallest=int(totals.max()))
    assert few["ranks"].sum(1).tolist() == [totals.max() if total == totals.max() else 0 for total in totals]
    assert (few["chance"] > 0).tolist() == (few["ranks"].sum(1) > 0).tolist()
    none = _attacked(store, *fresh, smallest=int(totals.max()) + 1)
    assert not none["ranks"].any()
    assert not none["first"].any()
    assert not none["chance"].any()
