"""Noised scores: without noise they are the scores, and their intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from xfed.common.errors import FederationError
from xfed.common.metrics import score_sums, summary
from xfed.common.noisy_scores import BINS, SENSITIVITY, count_scores, noisy_summary

CLASSES = ("a", "b", "c", "d")


def scored(rng: np.random.Generator, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    logits = rng.normal(size=(len(labels), len(sizes))) + 1.2 * np.eye(len(sizes))[labels]
    p = np.exp(logits)
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32), labels.astype(np.int64)


def arrays_of(p: np.ndarray, labels: np.ndarray, rng: np.random.Generator, deviation: float) -> dict[str, np.ndarray]:
    return {k: v.double().numpy() + deviation * rng.normal(size=v.shape) for k, v in count_scores(p, labels).items()}


def test_without_noise_the_figures_are_those_of_an_open_study() -> None:
    rng = np.random.default_rng(1)
    p, labels = scored(rng, (200, 80, 50, 120))
    exact = summary(score_sums(p, labels, np.arange(len(labels))), CLASSES)
    # whatever public figures let expect, the counts are known
    found = noisy_summary(arrays_of(p, labels, rng, 0.0), CLASSES, [1, 1000, 50, 0], 0.0)
    assert found["confusion"] == exact["confusion"]
    for key in ("accuracy", "balanced_accuracy", "n"):
        assert found[key] == pytest.approx(exact[key]), key
    for name in CLASSES:
        for key in ("sensitivity", "specificity", "n"):
            assert found["per_class"][name][key] == pytest.approx(exact["per_class"][name][key]), (name, key)
        assert found["per_class"][name]["auc"] == pytest.approx(exact["per_class"][name]["auc"], abs=0.02), "16 bins"


def test_one_patient_changes_all_counts_by_the_sensitivity() -> None:
    rng = np.random.default_rng(2)
    p, labels = scored(rng, (5, 5, 5, 5))
    whole, less = count_scores(p, labels), count_scores(p[1:], labels[1:])
    change = sum(float((whole[key] - less[key]).double().square().sum()) for key in whole)
    assert change**0.5 == pytest.approx(SENSITIVITY, rel=1e-5)


@pytest.mark.parametrize("deviation", [3.0, 16.0])
def test_intervals_hold_the_truth_as_often_as_they_say(deviation: float) -> None:
    """The truth is the classifier's, over all patients; the expectation is of the declared sizes, the test split by chance."""
    rng = np.random.default_rng(3)
    declared, share = np.array([400, 170, 240, 90]), 0.25
    p, labels = scored(np.random.default_rng(4), (40_000,) * 4)
    true_recall = np.array([(p[labels == c].argmax(1) == c).mean() for c in range(4)])
    held = {"balanced": 0, "sensitivity": 0, "naive": 0}
    turns = 300
    for _ in range(turns):
        sizes = tuple(rng.binomial((declared / (1 - share)).astype(int), share))
        q, own = scored(rng, sizes)
        found = noisy_summary(
            arrays_of(q, own, rng, deviation), CLASSES, (declared * share / (1 - share)).tolist(), deviation
        )
        low, high = found["balanced_accuracy_interval"]
        held["balanced"] += low <= true_recall.mean() <= high
        for c, name in enumerate(CLASSES):
            low, high = found["per_class"][name]["sensitivity_interval"]
            held["sensitivity"] += low <= true_recall[c] <= high
        held["naive"] += abs(found["balanced_accuracy"] - true_recall.mean()) < 0.01
    assert held["balanced"] >= 0.92 * turns, held
    assert held["sensitivity"] >= 0.92 * 4 * turns, held
    assert held["naive"] < 0.5 * turns, "an interval of one point would not do: the test can fail"


def test_public_sizes_help_where_the_noise_is_larger_than_a_class() -> None:
    rng = np.random.default_rng(5)
    truth, near, far = [], [], []
    for _ in range(200):
        p, labels = scored(rng, (60, 60, 60, 60))
        truth.append(float((p.argmax(1) == labels).mean()))
        arrays = arrays_of(p, labels, rng, 16.0)
        near.append(noisy_summary(arrays, CLASSES, [60.0] * 4, 16.0)["balanced_accuracy"])
        far.append(noisy_summary(arrays, CLASSES, [1e9] * 4, 16.0)["balanced_accuracy"])
    rows = np.array([near, far]) - truth
    assert abs(rows[0].mean()) < 0.03
    assert np.sqrt((rows[0] ** 2).mean()) < 0.15


def test_what_is_no_count_is_refused_and_nothing_is_divided_by_nothing() -> None:
    zeros = {"confusion": np.zeros((4, 4)), "histogram": np.zeros((4, 2, BINS))}
    empty = noisy_summary(zeros, CLASSES, [0.0] * 4, 0.0)
    assert empty["balanced_accuracy"] is None
    assert empty["accuracy"] is None
    assert empty["auc"] is None
    with pytest.raises(FederationError, match="must be"):
        noisy_summary({"confusion": np.zeros((4, 4))}, CLASSES, [1.0] * 4, 1.0)
    with pytest.raises(FederationError, match="NaN"):
        noisy_summary({**zeros, "confusion": np.full((4, 4), np.nan)}, CLASSES, [1.0] * 4, 1.0)
