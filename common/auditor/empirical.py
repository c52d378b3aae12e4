"""`xfed-audit empirical`: a lower bound of epsilon from one run of the mechanism on canaries, beside the claim.

::

    m canaries, each included with probability 1/2 (drawn here) --> python -m xfed.simulations.canaries (audited, own process)
        --> released sums --score: log-likelihood ratio--> the surest guesses: in, out; the others: none
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

from xfed.common.errors import CheckpointError

__all__ = ["empirical", "lower_bound", "scores_of"]

Array = npt.NDArray[np.float64]


def scores_of(released: npt.NDArray[np.float32], q: float, sigma: float, clip: float) -> Array:
    """Log-likelihood ratio of "in" against "out" for each canary, float64 [m]; `released` [steps, m], sigma as claimed."""
    x = released.astype(np.float64) / clip
    ratio = (2 * x - 1) / (2 * sigma**2)
    result: Array = np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + ratio).sum(axis=0)
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


def empirical(
    *,
    q: float,
    sigma: float,
    steps: int,
    delta: float,
    canaries: int = 50_000,
    confidence: float = 0.95,
    run_sigma: float | None = None,
) -> dict[str, Any]:
    """Audit the installed mechanism at the claimed q, sigma and steps; `run_sigma`: run it with other noise than claimed (tests).

    The number of guesses is fixed beforehand (a hundredth of the canaries): the confidence holds for the one bound that is said.
    """
    guesses = 2 * max(1, canaries // 200)
    seed = secrets.randbits(128)
    included = np.random.default_rng(seed).random(canaries) < 0.5
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
        options = ["--q", str(q), "--sigma", str(run_sigma or sigma), "--steps", str(steps)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"the audited software failed on canaries:\n{done.stderr[-2000:]}")
        released = np.load(folder / "out.npy", allow_pickle=False)
    right = best_guesses(scores_of(released, q, sigma, 1.0), included, guesses)
    return {
        "canaries": canaries,
        "guesses": guesses,
        "right": right,
        "confidence": confidence,
        "epsilon_lower_bound": lower_bound(right, guesses, canaries, delta, confidence),
        "delta": delta,
        "claimed": {"q": q, "sigma": sigma, "steps": steps},
    }
