"""The one-run audit: a right mechanism is not contradicted, one with half the noise is, and the bound is that of the theorem."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from tests.audited import SiteLedger, once, poisson, run_folder, study
from xfed.common.auditor.cli import app
from xfed.common.auditor.empirical import best_guesses, empirical, lower_bound, scores_of

SIGMA = 3.7391  # epsilon 1 at delta 1e-5, one Gaussian release (Balle and Wang 2018)


def test_a_right_mechanism_is_not_contradicted_and_half_its_noise_is() -> None:
    right = empirical(((1.0, SIGMA, 1),), delta=1e-5)
    assert 0.2 < right["epsilon_lower_bound"] < 1, "an attack that sees nothing would prove nothing"
    half = empirical(((1.0, SIGMA, 1),), delta=1e-5, noise=0.5)
    assert half["epsilon_lower_bound"] > 1, half


def test_events_are_attacked_together() -> None:
    # four releases with twice the noise are one release (a closed form), sampled ones add to them
    alone = empirical(((1.0, 2 * SIGMA, 1),), delta=1e-5)["epsilon_lower_bound"]
    together = empirical(((0.02, 3.0, 20), (1.0, 2 * SIGMA, 4)), delta=1e-5)["epsilon_lower_bound"]
    assert alone < together < 1.1
    assert empirical(((0.02, 3.0, 20), (1.0, 2 * SIGMA, 4)), delta=1e-5, noise=0.5)["epsilon_lower_bound"] > 1


def test_the_command_attacks_what_a_ledger_tells(tmp_path: Path) -> None:
    ledger = SiteLedger("site-01", study().digest)
    ledger.attempt("generators", "Normal", 0, [once(4.0)])
    ledger.attempt("classifier", None, 1, [poisson(0.05, 2.0, 30)])
    ledger.attempt("scores", None, 1, [once(8.0)])
    run = run_folder(tmp_path / "run", study(), [ledger])
    done = CliRunner().invoke(app, ["empirical", str(run), "--json"])
    assert done.exit_code == 0, done.output
    site = json.loads(done.stdout)["sites"]["site-01"]
    assert {(one["q"], one["sigma"], one["steps"]) for one in site["events"]} == {
        (1.0, 4.0, 1),
        (0.05, 2.0, 30),
        (1.0, 8.0, 1),
    }
    assert 0 < site["epsilon_lower_bound"] <= site["epsilon_claimed"]
    assert not site["contradicted"]


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
