"""Scores: against scikit-learn, federated against pooled, and intervals that cover what they promise."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from xfed.common.errors import DataError, FederationError
from xfed.common.intervals import (
    auc_interval,
    design_effect,
    difference_interval,
    mean_interval,
    student_quantile,
    wilson_interval,
)
from xfed.common.metrics import BINS, ScoreSums, add, from_arrays, score_sums, summary, to_arrays, zero

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")


def _images(seed: int, n: int = 600, classes: int = 5, patients: int = 200, skill: float = 1.5):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), labels, rng.integers(0, patients, n)


def _equal(a: ScoreSums, b: ScoreSums) -> bool:
    mine, other = to_arrays(a), to_arrays(b)
    return all(np.allclose(mine[name], other[name], rtol=1e-12, atol=0) for name in mine)


def test_agrees_with_scikit_learn():
    p, y, patients = _images(1)
    got = summary(score_sums(p, y, patients), CLASSES)
    predicted = p.argmax(axis=1)
    assert got["confusion"] == oracle.confusion_matrix(y, predicted).tolist()
    assert got["accuracy"] == pytest.approx(oracle.accuracy_score(y, predicted), abs=1e-12)
    assert got["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(y, predicted), abs=1e-12)
    assert got["loss"] == pytest.approx(oracle.log_loss(y, p), abs=1e-9)
    assert got["auc"] == pytest.approx(oracle.roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-3)
    recalls = oracle.recall_score(y, predicted, average=None)
    for c, name in enumerate(CLASSES):
        entry = got["per_class"][name]
        assert entry["n"] == (y == c).sum()
        assert entry["patients"] == len(set(patients[y == c]))
        assert entry["accuracy"] == entry["sensitivity"] == pytest.approx(recalls[c], abs=1e-12)
        specificity = oracle.recall_score(y != c, predicted != c)
        assert entry["specificity"] == pytest.approx(specificity, abs=1e-12)
        assert entry["auc"] == pytest.approx(oracle.roc_auc_score(y == c, p[:, c]), abs=1e-3)
    assert got["patients"] == len(set(patients))
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_auc_stays_accurate_for_confident_and_saturated_networks(scale):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 2000)
    logits = scale * (0.6 * np.eye(2)[y] + rng.normal(size=(2000, 2)) * 0.4)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    got = summary(score_sums(p.astype(np.float32), y, np.arange(2000)), ("a", "b"))["per_class"]["b"]["auc"]
    # beyond logit +-12 scores tie: at scale 30 that is a large share of the images, and still costs little
    assert got == pytest.approx(oracle.roc_auc_score(y, p[:, 1]), abs=1e-3 if scale < 10 else 2e-2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), classes=st.integers(2, 6), sites=st.integers(1, 4))
def test_a_federation_equals_the_pooled_images(seed, n, classes, sites):
    p, y, patients = _images(seed, n, classes, patients=max(1, n // 2))
    pooled = score_sums(p, y, patients)
    total = zero(classes)
    for site in range(sites):
        rows = patients % sites == site
        total = add(total, from_arrays(to_arrays(score_sums(p[rows], y[rows], patients[rows]))))
    assert _equal(total, pooled)
    names = [f"class {c}" for c in range(classes)]
    mine, theirs = summary(total, names), summary(pooled, names)
    assert mine.pop("loss") == pytest.approx(theirs.pop("loss"))
    assert mine == theirs


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 50),
    patients=st.integers(1, 50),
    skill=st.sampled_from([0.0, 2.0, 20.0]),
)
def test_a_score_lies_in_its_interval_and_the_interval_in_0_to_1(seed, n, patients, skill):
    p, y, owners = _images(seed, n, 3, patients, skill)
    got = summary(score_sums(p, y, owners), ("a", "b", "c"))
    pairs = [
        (got["accuracy"], got["accuracy_interval"]),
        (got["balanced_accuracy"], got["balanced_accuracy_interval"]),
    ]
    for entry in got["per_class"].values():
        pairs += [(entry[key], entry[f"{key}_interval"]) for key in ("accuracy", "sensitivity", "specificity", "auc")]
    for value, interval in pairs:
        assert (value is None) == (interval is None)
        if value is not None:
            low, high = interval
            assert 0 <= low <= value <= high <= 1
            assert high - low > 1e-6, "an estimate from some images is never certain"


def test_sums_do_not_depend_on_the_order_of_images_or_the_numbers_of_patients():
    p, y, patients = _images(9)
    shuffled = np.random.default_rng(0).permutation(len(y))
    assert _equal(score_sums(p, y, patients), score_sums(p[shuffled], y[shuffled], patients[shuffled] * 7 + 1000))


def test_moments_are_those_of_each_patients_own_confusion_matrix():
    p, y, patients = _images(3, n=40, classes=3, patients=11)
    expected = np.zeros((9, 9), np.int64)
    for owner in set(patients.tolist()):
        own = np.zeros(9, np.int64)
        for row in np.flatnonzero(patients == owner):
            own[y[row] * 3 + p[row].argmax()] += 1
        expected += np.outer(own, own)
    assert (score_sums(p, y, patients).moments == expected).all()


def test_a_class_without_images_has_no_scores_and_is_left_out_of_the_mean():
    p, y, patients = _images(5, classes=3)
    keep = y != 1
    got = summary(score_sums(p[keep], y[keep], patients[keep]), ("a", "b", "c"))
    assert got["per_class"]["b"]["sensitivity"] is None
    assert got["per_class"]["b"]["auc"] is None
    assert got["per_class"]["b"]["specificity"] is not None
    assert got["balanced_over"] == ["a", "c"]
    recalls = [got["per_class"][name]["sensitivity"] for name in ("a", "c")]
    assert got["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    nothing = summary(zero(3), ("a", "b", "c"))
    assert nothing["accuracy"] is None
    assert nothing["loss"] is None
    assert nothing["balanced_accuracy_interval"] is None
    json.dumps(nothing, allow_nan=False)


# ---- intervals


def test_wilson_golden_value():
    # Newcombe 1998, Stat. Med. 17:857, Table I, method 3: 81 of 263 -> 0.2553 to 0.3662
    assert wilson_interval(81 / 263, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_difference_golden_value():
    # Newcombe 1998, Stat. Med. 17:873, Table II, method 10: 56/70 - 48/80 -> 0.0524 to 0.3339
    a, b = 56 / 70, 48 / 80
    got = difference_interval(a, wilson_interval(a, 70, 0.95), b, wilson_interval(b, 80, 0.95))
    assert got == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize("freedom", [3, 5, 10, 40, 1000])
def test_student_quantile_against_scipy(freedom):
    for confidence in (0.8, 0.95):
        assert student_quantile(confidence, freedom) == pytest.approx(
            stats.t.ppf(0.5 + confidence / 2, freedom), rel=5e-3
        )


def test_mean_of_one_interval_is_that_interval():
    assert mean_interval([0.4], [(0.3, 0.6)]) == pytest.approx((0.3, 0.6))
    assert mean_interval([0.4] * 4, [(0.3, 0.6)] * 4) == pytest.approx((0.35, 0.5))


def test_design_effect_is_one_for_single_images_and_their_number_for_copies():
    rng = np.random.default_rng(0)
    k = rng.integers(0, 2, 500).astype(float)
    n = np.ones(500)

    def effect(k, n):
        return design_effect(int(k.sum()), int(n.sum()), (k * k).sum(), (k * n).sum(), (n * n).sum(), len(k))

    assert effect(k, n) == pytest.approx(1.0, abs=0.01)
    assert effect(6 * k, 6 * n) == pytest.approx(6.0, abs=0.05)
    assert effect(6 * n, 6 * n) == pytest.approx(6.0), "all right: images of a patient are taken as wholly alike"


def test_auc_interval_shrinks_with_more_images():
    widths = [np.ptp(auc_interval(0.8, n, 3 * n, 0.95)) for n in (5, 20, 80, 320)]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] / widths[3] == pytest.approx(2, rel=0.1)


def _clustered(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images whose difficulty is the patient's: 3 classes, 1 to 7 images, often two classes."""
    owner = np.repeat(np.arange(patients), rng.integers(1, 8, patients))
    main, second = rng.integers(0, 3, patients), rng.integers(0, 3, patients)
    y = np.where(rng.random(len(owner)) < 0.8, main[owner], second[owner])
    skill = (1.2 + 1.5 * rng.normal(size=patients))[owner]
    logits = 0.6 * rng.normal(size=(len(owner), 3)) + skill[:, None] * np.eye(3)[y]
    logits += 0.5 * rng.normal(size=(patients, 3))[owner]
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), y, owner


def test_intervals_cover_the_truth_when_images_come_in_patients():
    names = ("a", "b", "c")
    truth = summary(score_sums(*_clustered(np.random.default_rng(77), 60_000)), names)
    rng, repeats = np.random.default_rng(2018), 400
    keys = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auc")
    hits, naive = dict.fromkeys(keys, 0), 0
    for _ in range(repeats):
        got = summary(score_sums(*_clustered(rng, 80)), names)
        for key in keys:
            mine, real = (
                (got, truth) if key in got and key != "auc" else (got["per_class"]["b"], truth["per_class"]["b"])
            )
            low, high = mine[f"{key}_interval"]
            hits[key] += low <= real[key] <= high
        low, high = wilson_interval(got["accuracy"], got["n"], 0.95)
        naive += low <= truth["accuracy"] <= high
    shares = {key: count / repeats for key, count in hits.items()}
    assert all(share >= 0.92 for share in shares.values()), shares
    assert shares["accuracy"] <= 0.985, "an interval that always covers would say nothing"
    assert naive / repeats < 0.85, "counting images as independent must fail here, or this test shows nothing"


# ---- what a site may send


def _broken(name: str, change):
    arrays = {key: value.copy() for key, value in to_arrays(score_sums(*_images(2, n=50))).items()}
    arrays[name] = change(arrays[name])
    return arrays


def _set(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("confusion", _set((0, 0), -1), "negative"),
        ("confusion", lambda a: a + 1, "contradict"),
        ("confusion", lambda a: a.astype(np.float64), "expected"),
        ("confusion", lambda a: a[:, :4], "expected"),
        ("histogram", lambda a: a[:, :, : BINS - 1], "expected"),
        ("histogram", lambda a: a * 0, "histogram of a class"),
        ("loss", _set(0, np.nan), "impossible"),
        ("loss", _set(0, -1.0), "negative"),
        ("moments", _set((0, 1), 10**6), "not symmetric"),
        ("moments", lambda a: a * 0, "smaller than the counts"),
        ("moments", lambda a: a + 10**7, "larger than the counts"),
        ("patients", lambda a: a + 1000, "more patients than images"),
        ("patients", lambda a: a * 0, "images without patients"),
    ],
)
def test_nonsense_from_a_site_is_refused(name, change, reason):
    with pytest.raises(FederationError, match=reason):
        from_arrays(_broken(name, change))


def test_missing_arrays_and_other_class_counts_are_refused():
    arrays = to_arrays(zero(3))
    del arrays["moments"]
    with pytest.raises(FederationError, match="must carry"):
        from_arrays(arrays)
    with pytest.raises(FederationError, match="cannot be added"):
        add(zero(3), zero(4))
    with pytest.raises(FederationError, match="plan names 2"):
        summary(zero(3), ("a", "b"))
    with pytest.raises(FederationError, match="a loss without images"):
        from_arrays(to_arrays(dataclasses.replace(zero(3), loss=1.0)))


def test_only_probabilities_are_scored():
    p, y, patients = _images(0, n=10)
    for bad, match in ((p * np.nan, "diverged"), (p * 2, "softmax"), (p[:5], "n labels")):
        with pytest.raises(DataError, match=match):
            score_sums(bad, y, patients)
    with pytest.raises(DataError, match="label"):
        score_sums(p, y + 5, patients)
    with pytest.raises(ValueError, match="confidence"):
        summary(zero(2), ("a", "b"), confidence=95)
