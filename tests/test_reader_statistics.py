"""Figures of a reader study against SciPy, scikit-learn, Fleiss' own example and closed forms; intervals by simulation."""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import pytest
from scipy import stats
from scipy.special import betainc
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from xfed.common import reader_statistics as rs
from xfed.common.errors import DataError
from xfed.common.reader_statistics import (
    Reading,
    binomial_p,
    clopper_pearson,
    cohen_kappa,
    discrimination,
    fleiss_kappa,
    rating_auc,
    summarise,
)

# Fleiss 1971, Psychological Bulletin 76:378, table 1: 30 patients, 6 psychiatrists, 5 diagnoses
FLEISS = """
0 0 0 6 0  0 3 0 0 3  0 1 4 0 1  0 0 0 0 6  0 3 0 3 0  2 0 4 0 0  0 0 4 0 2  2 0 3 1 0  2 0 0 4 0  0 0 0 0 6
1 0 0 5 0  1 1 0 4 0  0 3 3 0 0  1 0 0 5 0  0 2 0 3 1  0 0 5 0 1  3 0 0 1 2  5 1 0 0 0  0 2 0 4 0  1 0 2 0 3
0 0 0 0 6  0 1 0 5 0  0 2 0 1 3  2 0 0 4 0  1 0 0 4 1  0 5 0 1 0  4 0 0 0 2  0 2 0 4 0  1 0 5 0 0  0 0 0 0 6
"""


def _reading(called: list[int] | np.ndarray, confidence: int | np.ndarray = 0) -> Reading:
    said = np.asarray(called, dtype=bool)
    return Reading(called=said, confidence=np.broadcast_to(np.asarray(confidence, dtype=np.int64), said.shape))


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (10, 20), (20, 20), (31, 60), (47, 60), (780, 1500)]
)
def test_the_exact_interval_and_p_value_are_scipys(k: int, n: int) -> None:
    oracle = stats.binomtest(k, n, 0.5)
    low, high = oracle.proportion_ci(0.95, method="exact")
    assert clopper_pearson(k, n) == pytest.approx((low, high), abs=1e-12)
    assert binomial_p(k, n) == pytest.approx(oracle.pvalue, rel=1e-9)


def test_the_incomplete_beta_function_is_scipys_also_between_whole_numbers() -> None:
    rng = np.random.default_rng(5)
    for a, b, x in zip(rng.uniform(0.05, 400, 300), rng.uniform(0.05, 400, 300), rng.uniform(0, 1, 300), strict=True):
        assert rs._beta_share(x, a, b) == pytest.approx(betainc(a, b, x), rel=1e-8, abs=1e-12)


def test_d_prime_is_the_closed_form_and_survives_perfect_readers() -> None:
    facts = discrimination(25, 30, 8, 30)
    z = stats.norm.ppf
    assert facts["d_prime"] == pytest.approx(z(25.5 / 31) - z(8.5 / 31), abs=1e-9)
    assert facts["criterion"] == pytest.approx(-(z(25.5 / 31) + z(8.5 / 31)) / 2, abs=1e-9)
    assert discrimination(15, 30, 15, 30)["d_prime"] == pytest.approx(0)
    # two-alternative area of the equal-variance model: d' = sqrt(2) z(AUC), here through the rates of an unbiased observer
    for d in (0.5, 1.0, 2.0):
        rate = stats.norm.cdf(d / 2)
        many = discrimination(rate * 1e7, 1e7, (1 - rate) * 1e7, 1e7)
        assert many["d_prime"] == pytest.approx(d, abs=1e-5)
        assert many["criterion"] == pytest.approx(0, abs=1e-5)
    perfect = discrimination(30, 30, 0, 30)
    assert perfect["d_prime"] == pytest.approx(2 * z(30.5 / 31), abs=1e-9)
    low, high = perfect["d_prime_interval"]
    assert 0 < low < perfect["d_prime"] < high < inf


def test_the_area_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(60) % 2 == 0
    scores = rng.choice([-3, -2, -1, 1, 2, 3], 60)
    assert rating_auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    assert isnan(rating_auc(scores, np.ones(60, dtype=bool)))


def test_cohens_kappa_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        a = rng.random(40) < 0.4
        b = np.where(rng.random(40) < 0.7, a, rng.random(40) < 0.5)
        assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert isnan(cohen_kappa(np.ones(5, dtype=bool), np.ones(5, dtype=bool)))


def test_fleiss_kappa_is_the_one_in_his_paper() -> None:
    table = np.array([int(word) for word in FLEISS.split()]).reshape(30, 5)
    assert (table.sum(1) == 6).all()
    assert table.sum(0).tolist() == [26, 26, 30, 55, 43]
    assert fleiss_kappa(table) == pytest.approx(0.430, abs=5e-4)
    with pytest.raises(DataError, match="same number"):
        fleiss_kappa(np.array([[2, 0], [1, 0]]))
    assert isnan(fleiss_kappa(np.array([[3, 0], [3, 0]])))


def test_fleiss_kappa_of_two_readers_is_scotts_pi() -> None:
    a = np.array([1, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    b = np.array([1, 0, 0, 1, 0, 1, 1, 1], dtype=bool)
    said = a.astype(int) + b
    observed, p = (a == b).mean(), np.concatenate([a, b]).mean()
    expected = p**2 + (1 - p) ** 2
    table = np.stack([2 - said, said], axis=1)
    assert fleiss_kappa(table) == pytest.approx((observed - expected) / (1 - expected))


def test_a_study_of_one_reader_by_hand() -> None:
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    facts = summarise(truth, labels, ["A", "B"], {"ada": _reading([1, 1, 1, 0, 0, 0, 1, 1], 2)})
    one = facts["readers"]["ada"]
    assert (one["n"], one["correct"], one["accuracy"]) == (8, 5, 5 / 8)
    assert (one["sensitivity"], one["specificity"]) == (0.75, 0.5)
    assert one["real"] == {"n": 4, "called_synthetic": 2}
    assert one["synthetic"] == {"n": 4, "called_synthetic": 3}
    assert one["p_value"] == pytest.approx(stats.binomtest(5, 8).pvalue)
    assert one["per_class"]["A"]["accuracy"] == 1
    assert one["per_class"]["B"]["accuracy"] == 0.25
    assert one["per_class"]["B"]["real"] == {"n": 2, "called_synthetic": 2}
    assert one["auc"] == pytest.approx(roc_auc_score(truth, [2, 2, 2, -2, -2, -2, 2, 2]))
    assert {**facts["pooled"], "readers": None} == {"readers": None, **one}
    assert facts["agreement"]["kappa"] is None


def test_pooled_readers_who_copy_each_other_are_worth_one() -> None:
    rng = np.random.default_rng(3)
    truth = np.arange(80) % 2 == 0
    labels = np.zeros(80, dtype=np.int64)
    said = np.where(rng.random(80) < 0.65, truth, ~truth)
    alone = summarise(truth, labels, ["A"], {"a": _reading(said)})["pooled"]
    copied = summarise(truth, labels, ["A"], {name: _reading(said) for name in "abc"})
    pooled = copied["pooled"]
    assert pooled["n"] == 240
    assert pooled["accuracy"] == alone["accuracy"]
    # no narrower than one reader's interval; a naive 240 answers would claim far less
    width, one = (np.diff(each["accuracy_interval"])[0] for each in (pooled, alone))
    assert one <= width < 1.1 * one
    assert np.diff(clopper_pearson(pooled["correct"], 240))[0] < 0.65 * one
    assert pooled["p_value"] >= alone["p_value"] * 0.99
    assert copied["agreement"]["kappa"] == 1
    assert copied["agreement"]["method"] == "Fleiss 1971"


def test_one_answer_without_a_confidence_means_no_area() -> None:
    truth, labels = np.arange(10) % 2 == 0, np.zeros(10, dtype=np.int64)
    given = np.full(10, 2)
    assert summarise(truth, labels, ["A"], {"a": _reading(truth, given)})["pooled"]["auc"] == 1
    given[3] = 0
    assert summarise(truth, labels, ["A"], {"a": _reading(truth, given)})["pooled"]["auc"] is None


def test_studies_that_say_nothing_are_refused() -> None:
    truth, labels = np.arange(10) % 2 == 0, np.zeros(10, dtype=np.int64)
    for kinds, readings in (
        (truth, {}),
        (np.ones(10, dtype=bool), {"a": _reading(truth)}),
        (truth, {"a": _reading(truth[:9])}),
    ):
        with pytest.raises(DataError, match="reader"):
            summarise(kinds, labels, ["A"], readings)


def _simulated(seed: int, d: float, readers: int, images: int = 60) -> tuple[np.ndarray, list[np.ndarray]]:
    """Readers of an equal-variance normal model whose impressions of an image correlate by a half."""
    rng = np.random.default_rng(seed)
    truth = np.arange(images) % 2 == 0
    shared = rng.standard_normal(images)
    seen = [np.sqrt(0.5) * (shared + rng.standard_normal(images)) + d * truth for _ in range(readers)]
    return truth, [impression > d / 2 for impression in seen]


@pytest.mark.parametrize("readers", [1, 3])
def test_intervals_cover_what_they_claim(readers: int) -> None:
    d, runs = 1.0, 200
    rate = stats.norm.cdf(d / 2)
    covered = dict.fromkeys(("accuracy", "d_prime", "kappa"), 0)
    # two readers agree unless one is right and the other wrong; over both kinds each answer is given half of the time
    both = stats.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]]).cdf([d / 2, d / 2])
    kappa = 1 - 4 * (rate - both)
    for seed in range(runs):
        truth, called = _simulated(seed, d, readers)
        facts = summarise(
            truth, np.zeros(60, dtype=np.int64), ["A"], {str(i): _reading(c) for i, c in enumerate(called)}
        )
        for name, value in (("accuracy", rate), ("d_prime", d)):
            low, high = facts["pooled"][f"{name}_interval"]
            covered[name] += low <= value <= high
        if readers > 1:
            low, high = facts["agreement"]["kappa_interval"]
            covered["kappa"] += low <= kappa <= high
    shares = {name: count / runs for name, count in covered.items()}
    assert 0.92 <= shares["accuracy"] <= 1, shares
    assert 0.92 <= shares["d_prime"] <= 1, shares
    if readers > 1:
        assert 0.9 <= shares["kappa"] <= 0.99, shares
