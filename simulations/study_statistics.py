"""What a study shows: scores of arms with intervals, paired differences corrected for their number, and the verdict in words.

::

    Outcomes of an arm, one per seed --scores--> Scores (all folds of a seed pooled)
      --interval--> value [low, high] of one arm
    Outcomes of two arms, the same images --compare--> Comparison --verdict--> "... no gain shown ..."
      per_fold --corrected_t--> a second view      p of all comparisons --holm--> adjusted p

The patient is the unit; patients and training runs are resampled (`study_bootstrap`). An interval is value +- Student's t x the
standard error of the replicates. Percentiles were tried and left: at 1 - 0.05/m they need far more replicates, and cannot say
that two seeds tell little. One arm's score is lopsided near 0 and 1: Wilson's interval at the number of trials of the same error.

Guarantees, for patients and training runs like these: a single interval covers the true value in at least `confidence` of
studies; all intervals of `comparisons` cover theirs together (Bonferroni). A difference is `shown` exactly where its simultaneous
interval is without 0, which is where p is below (1 - confidence) / comparisons. Not covered: other training patients or hospitals
(`corrected_t` tells more of it), wrong labels, arms chosen after looking; with one seed, the noise of training. Pooled AUCs
compare probabilities of different folds' models: an arm whose confidence differs between folds is scored lower for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, sqrt
from statistics import NormalDist

import numpy as np

from xfed.common.errors import DataError
from xfed.common.intervals import wilson_interval
from xfed.simulations.study_bootstrap import (
    SCORES,
    Integers,
    Outcomes,
    lasting_folds,
    mean_of_known,
    quantile,
    rarest_class,
    ratios,
    spread,
    two_sided_p,
)

__all__ = [
    "REPLICATES",
    "SCORES",
    "Comparison",
    "Outcomes",
    "Scores",
    "compare",
    "corrected_t",
    "holm",
    "interval",
    "scores",
    "verdict",
]

REPLICATES = 4000


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores in 0..1 of one arm and seed; None where there is nothing to measure on.

    `balanced_accuracy`: mean over the classes that have test images. `auc`: mean over the classes that can be told from others.
    """

    balanced_accuracy: float
    accuracy: float
    auc: float | None
    sensitivity: tuple[float | None, ...]
    class_auc: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The paired difference a - b of one score, mean over seeds of the pooled folds.

    `low`, `high` hold for all `comparisons` together, `low_single` and `high_single` for this one alone. `per_fold`: differences
    by (seed, fold), those left out in which the score cannot be measured. `p`: two-sided, of this one alone. `shown`: the
    simultaneous interval is without 0. With `seeds` of 1 the noise of training is not in the intervals.
    """

    score: str
    value: float
    low: float
    high: float
    low_single: float
    high_single: float
    per_fold: list[float]
    p: float
    shown: bool
    seeds: int
    comparisons: int
    confidence: float


def _share(outcomes: Outcomes, score: str) -> float:
    """The score of one arm and seed; NaN where it cannot be measured."""
    people = np.unique(outcomes.patients)
    parts = [ratio.values(np.ones((1, len(people)))) for ratio in ratios(outcomes, score, people)]
    return float(mean_of_known(np.concatenate(parts)))


def _known(share: float) -> float | None:
    return None if isnan(share) else share


def scores(outcomes: Outcomes, classes: int) -> Scores:
    """All scores of one arm and seed over `classes` classes. Raises `DataError` for outcomes over other classes."""
    if outcomes.probabilities.shape[2] != classes:
        raise DataError(
            f"outcomes over {outcomes.probabilities.shape[2]} classes in a study of {classes}: they are of another study"
        )
    return Scores(
        balanced_accuracy=_share(outcomes, "balanced_accuracy"),
        accuracy=_share(outcomes, "accuracy"),
        auc=_known(_share(outcomes, "auc")),
        sensitivity=tuple(_known(_share(outcomes, f"sensitivity:{c}")) for c in range(classes)),
        class_auc=tuple(_known(_share(outcomes, f"class_auc:{c}")) for c in range(classes)),
    )


def _check(runs: Sequence[Outcomes], confidence: float, replicates: int) -> Integers:
    """The patients of all runs, sorted."""
    if not 0 < confidence < 1 or replicates < 2:
        raise ValueError(f"confidence lies between 0 and 1, replicates from 2, not {confidence!r} and {replicates!r}")
    if not runs:
        raise DataError("an arm without a finished seed cannot be scored: run the study again, it goes on where it was")
    if len({run.probabilities.shape[2] for run in runs}) > 1:
        raise DataError("the seeds of an arm are over different numbers of classes: they are of different studies")
    return np.unique(np.concatenate([run.patients for run in runs]))


def interval(
    runs: Sequence[Outcomes], score: str, *, confidence: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float, float]:
    """One arm's score with its interval: (value, low, high), `runs` one per seed, value the mean over seeds.

    Raises `DataError` where the score cannot be measured, `ValueError` for a score that there is not.
    """
    people = _check(runs, confidence, replicates)
    shares = [ratios(run, score, people) for run in runs]
    found = spread(shares, rarest_class(runs, people), lasting_folds(runs, people), score, replicates, seed)
    value = min(max(found.value, 0.0), 1.0)
    # where all is right or all is wrong the replicates agree: a patient is worth one trial, as in common.intervals
    trials = len(found.sizes) ** 2 / float((1 / found.sizes).sum())
    if 0 < value < 1 and found.error > 0:
        trials = value * (1 - value) / found.error**2
    shrink = NormalDist().inv_cdf(0.5 + confidence / 2) / quantile(1 - confidence, found.freedom)
    low, high = wilson_interval(value, trials * shrink**2, confidence)
    return value, low, high


def _check_pairs(a: Sequence[Outcomes], b: Sequence[Outcomes]) -> None:
    advice = "compare arms of one study, and leave out the folds and seeds that either lacks"
    if len(a) != len(b):
        raise DataError(f"one arm has {len(a)} seeds, the other {len(b)}: {advice}")
    for number, (one, other) in enumerate(zip(a, b, strict=True), start=1):
        if len(one.labels) != len(other.labels):
            raise DataError(
                f"seed {number} of {len(a)}: {len(one.labels)} test images in one arm, {len(other.labels)} in the other: {advice}"
            )
        for name in ("patients", "labels", "folds"):
            differ = int((getattr(one, name) != getattr(other, name)).sum())
            if differ:
                raise DataError(
                    f"seed {number} of {len(a)}: the two arms' {name} differ at {differ} of {len(one.labels)} images, so "
                    f"these are no pairs: {advice}, images in one order"
                )


def compare(
    a: Sequence[Outcomes],
    b: Sequence[Outcomes],
    score: str,
    *,
    comparisons: int,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """The paired difference a - b, `a` and `b` one per seed in one order, of the same images in one order.

    An interval is never narrower than two patients per class who disagree, one each way, would make it (Bonett and Price 2012,
    J. Educ. Behav. Stat. 37:479): arms that happen to agree on all images are not certain to. Raises `DataError` where the images
    are not the same or the score cannot be measured, `ValueError` for a score that there is not.
    """
    if comparisons < 1:
        raise ValueError(f"comparisons counts this one too: from 1, not {comparisons!r}")
    _check_pairs(a, b)
    people = _check([*a, *b], confidence, replicates)
    differences = [
        [
            replace(x, top=x.top - y.top)
            for x, y in zip(ratios(one, score, people), ratios(other, score, people), strict=True)
        ]
        for one, other in zip(a, b, strict=True)
    ]
    found = spread(differences, rarest_class(a, people), lasting_folds(a, people), score, replicates, seed)
    error = max(found.error, sqrt(float((2 / (found.sizes + 2) ** 2).sum())) / len(found.sizes))
    half, half_single = (error * quantile((1 - confidence) / m, found.freedom) for m in (comparisons, 1))
    low, high = found.value - half, found.value + half
    return Comparison(
        score=score,
        value=found.value,
        low=max(-1.0, low),
        high=min(1.0, high),
        low_single=max(-1.0, found.value - half_single),
        high_single=min(1.0, found.value + half_single),
        per_fold=_per_fold(a, b, score),
        p=two_sided_p(found.value / error, found.freedom),
        shown=low > 0 or high < 0,
        seeds=len(a),
        comparisons=comparisons,
        confidence=confidence,
    )


def _per_fold(a: Sequence[Outcomes], b: Sequence[Outcomes], score: str) -> list[float]:
    differences = []
    for one, other in zip(a, b, strict=True):
        for fold in np.unique(one.folds):
            mine, theirs = (_share(run.rows(run.folds == fold), score) for run in (one, other))
            if not isnan(mine - theirs):
                differences.append(mine - theirs)
    return differences


def corrected_t(per_fold: Sequence[float], test_share: float, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and interval of paired differences over folds and seeds, whose training sets overlap: (mean, low, high).

    Nadeau and Bengio 2003, Machine Learning 52:239, the corrected resampled t: the variance of the mean of J differences is taken
    as (1 / J + test / training) of their variance. `test_share`: share of the images that a fold tests, in (0, 1). It tells of
    other training patients, but treats folds as alike and normal; one fold tells nothing: [-1, 1]. Raises `DataError` for none.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share lies between 0 and 1, not {test_share!r}")
    if len(per_fold) == 0:
        raise DataError("no fold in which both arms can be scored: nothing to compare")
    values = np.asarray(per_fold, np.float64)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return mean, -1.0, 1.0
    error = sqrt((1 / count + test_share / (1 - test_share)) * float(values.var(ddof=1)))
    half = error * quantile(1 - confidence, count - 1)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in their order (Holm 1979, Scand. J. Stat. 6:65): reject where at most alpha."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _signed(x: float) -> str:
    """Three decimals, or as many (to nine) as it takes to see that it is not 0."""
    decimals = next((d for d in range(3, 9) if round(x, d) != 0), 9 if x else 3)
    return f"{x:+.{decimals}f}"


def verdict(name_a: str, name_b: str, comparison: Comparison, comparisons: int) -> str:
    """One sentence: better, worse or no gain shown, with the simultaneous interval and what it was corrected for."""
    if comparisons != comparison.comparisons:
        raise ValueError(f"corrected for {comparison.comparisons} comparisons, not {comparisons}: compare again")
    name, _, chosen = comparison.score.partition(":")
    what = SCORES[name] + (f" of class {chosen}" if chosen else "")
    if not comparison.shown:
        found = f"{name_a} against {name_b}: no gain shown, nor a loss"
    else:
        found = f"{name_a} is {'better' if comparison.value > 0 else 'worse'} than {name_b}"
    corrected = "one comparison" if comparisons == 1 else f"corrected for {comparisons} comparisons"
    seeds = "one training run of each fold" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    figures = f"{_signed(comparison.value)} [{_signed(comparison.low)}, {_signed(comparison.high)}]"
    return f"{found}: {what} {figures} ({100 * comparison.confidence:g}% interval, {corrected}; {seeds})."
