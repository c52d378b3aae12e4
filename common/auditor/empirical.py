"""`xfed-audit empirical`: a lower bound of epsilon from one run of the mechanism on canaries, beside the claim.

::

    events (q, sigma, steps): given, or those that patients of a ledger's worst class were exposed to
    m canaries, each included with probability 1/2 (drawn here) --> python -m xfed.simulations.canaries (audited, own process)
        --> released sums of all events --score: log-likelihood ratio--> the surest guesses: in, out; the others: none
        --> how many were right --> the largest epsilon that so many right guesses contradict = lower bound

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2: under (epsilon, delta)-DP, of r
guesses the number of right ones is dominated by Binomial(r, e^eps / (1 + e^eps)), up to a term in delta. With confidence 1 - beta
the true epsilon is at least the bound. A bound above the claim proves the claim wrong; one below proves nothing.
"""

from __future__ import annotations

import importlib
import math
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.auditor.accountants import Mechanisms
from xfed.common.errors import CheckpointError, ConfigError

__all__ = ["empirical", "lower_bound", "scores_of"]

Array = npt.NDArray[np.float64]
FEWEST, MOST, MOST_VALUES = 1_000, 50_000, 60_000_000
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Of the canaries, guessed; few sure guesses where much noise is, many where little is."""
_ROWS = 64


def scores_of(released: npt.NDArray[np.float32], q: float, sigma: float, clip: float) -> Array:
    """Log-likelihood ratio of "in" against "out" for each canary, float64 [m]; `released` [steps, m], sigma as claimed."""
    result: Array = np.zeros(released.shape[1])
    for start in range(0, len(released), _ROWS):
        x = released[start : start + _ROWS].astype(np.float64) / clip
        ratio = (2 * x - 1) / (2 * sigma**2)
        result += np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + ratio).sum(axis=0)
    return result


def _excess(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, if the mechanism is (epsilon, delta)-DP."""
    binomial = importlib.import_module("scipy.stats").binom  # takes a second to load
    p = 1 / (1 + math.exp(-epsilon))
    tail = float(binomial.sf(right - 1, guesses, p))
    if delta == 0:
        return tail
    # the delta term: the best the adversary gains by shifting mass of i right guesses (theorem 5.2)
    steps = np.arange(1, right + 1)
    cumulated = np.cumsum(binomial.pmf(right - steps, guesses, p))
    return min(1.0, tail + 2 * canaries * delta * float(np.max(cumulated / steps, initial=0.0)))


def lower_bound(right: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """The largest epsilon (0 if none) that `right` of `guesses` right guesses among `canaries` contradict at that confidence."""
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses among {canaries} canaries cannot be")
    low, high = 0.0, 50.0
    if _excess(right, guesses, canaries, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _excess(right, guesses, canaries, middle, delta) <= 1 - confidence else (low, middle)
        )
    return low


def best_guesses(scores: Array, included: npt.NDArray[np.bool_], guesses: int) -> int:
    """How many of the `guesses` surest guesses (half of them "in", half "out") are right."""
    order = np.argsort(scores)
    half = guesses // 2
    return int((~included[order[:half]]).sum() + included[order[len(order) - half :]].sum())


def _rehearsed(events: Mechanisms, rng: np.random.Generator, canaries: int, delta: float, confidence: float) -> int:
    """The number of guesses (even) that gives the highest bound against a mechanism that is as claimed, made up here."""
    included = rng.random(canaries) < 0.5
    scores = np.zeros(canaries)
    for q, sigma, steps in events:
        for _ in range(steps):
            sampled = included & (rng.random(canaries) < q)
            released = rng.normal(sampled, sigma).astype(np.float32)
            scores += scores_of(released[None], q, sigma, 1.0)
    counts = [2 * max(1, round(canaries * share / 2)) for share in SHARES]
    bounds = [
        lower_bound(best_guesses(scores, included, count), count, canaries, delta, confidence) for count in counts
    ]
    return counts[int(np.argmax(bounds))]


def empirical(
    events: Mechanisms,
    *,
    delta: float,
    canaries: int | None = None,
    confidence: float = 0.95,
    noise: float = 1.0,
) -> dict[str, Any]:
    """Audit the installed mechanism at the claimed events, (q, sigma, steps) each, composed; the bound is of all together.

    `canaries`: by default as many as fit into 240 MB of releases, at most 50,000 and 1 / (2 delta) (the theorem's term in delta
    grows with them). `noise`: run it with so many times the claimed sigma (to see that a wrong mechanism is found). The number
    of guesses is fixed beforehand, in a rehearsal with noise of the auditor's own: the confidence holds for the one bound that
    is said. Raises `ConfigError` without an event.
    """
    if not events:
        raise ConfigError("there is no event to audit: nothing was released, and epsilon is 0")
    total = sum(steps for _, _, steps in events)
    canaries = canaries or max(FEWEST, min(MOST, MOST_VALUES // total, int(0.5 / max(delta, 1e-12))))
    rng = np.random.default_rng(secrets.randbits(128))
    guesses = _rehearsed(events, rng, canaries, delta, confidence)
    included = rng.random(canaries) < 0.5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "included.npy", included)
        command = [
            sys.executable,
            "-m",
            "xfed.simulations.canaries",
            str(folder / "included.npy"),
            str(folder / "out.npy"),
        ]
        options = [f"--event={q!r},{sigma * noise!r},{steps}" for q, sigma, steps in events]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"the audited software failed on canaries:\n{done.stderr[-2000:]}")
        released = np.load(folder / "out.npy", allow_pickle=False)
    ends = np.cumsum([steps for _, _, steps in events])
    parts = np.split(released, ends[:-1])
    scores = sum(scores_of(part, q, sigma, 1.0) for part, (q, sigma, _) in zip(parts, events, strict=True))
    right = best_guesses(np.asarray(scores), included, guesses)
    return {
        "canaries": canaries,
        "guesses": guesses,
        "right": right,
        "confidence": confidence,
        "epsilon_lower_bound": lower_bound(right, guesses, canaries, delta, confidence),
        "delta": delta,
        "events": [{"q": q, "sigma": sigma, "steps": steps} for q, sigma, steps in events],
    }
