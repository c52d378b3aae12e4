"""The one-run audit: a right mechanism is not contradicted, one with half the noise is, and the bound is that of the theorem."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from xfed.common.auditor.empirical import best_guesses, empirical, lower_bound, scores_of

SIGMA = 3.7391  # epsilon 1 at delta 1e-5, one Gaussian release (Balle and Wang 2018)


def test_a_right_mechanism_is_not_contradicted_and_half_its_noise_is() -> None:
    right = empirical(q=1.0, sigma=SIGMA, steps=1, delta=1e-5)
    assert 0.2 < right["epsilon_lower_bound"] < 1, "an attack that sees nothing would prove nothing"
    half = empirical(q=1.0, sigma=SIGMA, steps=1, delta=1e-5, run_sigma=SIGMA / 2)
    assert half["epsilon_lower_bound"] > 1, half


@pytest.mark.parametrize(("right", "guesses"), [(80, 100), (150, 200), (990, 1000), (100, 100)])
def test_without_delta_the_bound_is_the_binomial_one(right: int, guesses: int) -> None:
    epsilon = lower_bound(right, guesses, 1000, 0.0, 0.95)
    p = 1 / (1 + math.exp(-epsilon))
    assert binom.sf(right - 1, guesses, p) == pytest.approx(0.05, rel=1e-6)
    # delta can only lower it, and so can fewer right guesses or more confidence
    assert lower_bound(right, guesses, 1000, 1e-5, 0.95) <= epsilon
    assert lower_bound(right - 1, guesses, 1000, 0.0, 0.95) < epsilon
    assert lower_bound(right, guesses, 1000, 0.0, 0.99) < epsilon


def test_guessing_proves_nothing() -> None:
    assert lower_bound(50, 100, 1000, 0.0, 0.95) == 0.0
    with pytest.raises(ValueError, match="cannot be"):
        lower_bound(11, 10, 1000, 0.0, 0.95)


def test_the_score_is_the_log_likelihood_ratio() -> None:
    rng = np.random.default_rng(7)
    released = rng.normal(size=(3, 5)).astype(np.float32)
    q, sigma = 0.3, 1.7

    def density(x: float, mean: float) -> float:
        return math.exp(-((x - mean) ** 2) / (2 * sigma**2))

    for canary, score in enumerate(scores_of(released, q, sigma, 1.0)):
        by_hand = sum(
            math.log(((1 - q) * density(x, 0) + q * density(x, 1)) / density(x, 0))
            for x in map(float, released[:, canary])
        )
        assert score == pytest.approx(by_hand, rel=1e-5)


def test_the_surest_guesses_are_counted() -> None:
    scores = np.array([-3.0, 5.0, 0.1, -4.0, 4.0, 0.0])
    included = np.array([False, True, True, True, True, False])
    assert best_guesses(scores, included, 4) == 3  # in: 1 and 4, right; out: 3 (wrong) and 0 (right)
