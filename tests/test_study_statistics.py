"""Study statistics: against scikit-learn and SciPy, by hand, and by simulated studies whose true values are known."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import sqrt

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from xfed.common.errors import DataError
from xfed.common.metrics import score_sums, summary
from xfed.simulations.study_bootstrap import Ratio, lasting_folds, quantile, rarest_class, ratios, spread, two_sided_p
from xfed.simulations.study_statistics import (
    SCORES,
    Comparison,
    Outcomes,
    compare,
    corrected_t,
    holm,
    interval,
    scores,
    verdict,
)

SIZES = (12, 40, 20, 10, 15)
"""Patients by their main class, in simulated studies."""
RECALLS = np.array([0.35, 0.6, 0.45, 0.4, 0.5])


def _outcomes(seed: int, n: int = 300, classes: int = 4, models: int = 1, skill: float = 1.0) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    p = np.exp(rng.normal(size=(models, n, classes)) + skill * np.eye(classes)[labels])
    patients = rng.integers(0, n // 2, n)
    return Outcomes(
        patients=patients,
        labels=labels,
        folds=patients % 5,
        probabilities=(p / p.sum(axis=2, keepdims=True)).astype(np.float32),
    )


class _Hospital:
    """Simulated studies: 15% of a patient's images show another class than his own, and he is hard or easy for every arm
    (sd 0.7), for one arm (0.7), as a training run leans (`noise`, per arm, seed, fold and class), and each image by itself (1).
    """

    def __init__(self, seed: int, noise: float, folds: int = 2) -> None:
        self.rng, self.noise, self.folds = np.random.default_rng(seed), noise, folds
        main = np.repeat(np.arange(5), SIZES)
        per_patient = np.minimum(self.rng.geometric(0.35, len(main)), 12)
        self.patients = np.repeat(np.arange(len(main)), per_patient)
        other = self.rng.random(len(self.patients)) < 0.15
        self.labels = (main[self.patients] + other) % 5
        self.fold_of = self.rng.integers(0, folds, len(main))[self.patients]
        self.common = self.rng.normal(0, 0.7, len(main))

    def arm(self, seeds: int, gain: float) -> list[Outcomes]:
        rng, n = self.rng, len(self.labels)
        own = self.common + rng.normal(0, 0.7, len(self.common))
        bar = stats.norm.ppf(RECALLS + gain) * sqrt(1 + 2 * 0.7**2 + self.noise**2)
        runs = []
        for _ in range(seeds):
            lean = rng.normal(0, self.noise, (self.folds, 5))[self.fold_of, self.labels]
            right = bar[self.labels] + own[self.patients] + lean + rng.normal(size=n) > 0
            called = np.where(right, self.labels, (self.labels + rng.integers(1, 5, n)) % 5)
            runs.append(
                Outcomes(
                    patients=self.patients,
                    labels=self.labels,
                    folds=self.fold_of,
                    probabilities=(0.1 + 0.5 * np.eye(5, dtype=np.float32)[called])[None],
                )
            )
        return runs


def _covered(
    studies: int, seeds: int, noise: float, gains: tuple[float, ...], unit: str = "patient"
) -> dict[str, float]:
    """Shares of studies in which all simultaneous, the first single and the first arm's interval hold the true value."""
    held = {"together": 0, "single": 0, "arm": 0, "shown": 0}
    for study in range(studies):
        hospital = _Hospital(study, noise)
        base = hospital.arm(seeds, 0.0)
        arms = [hospital.arm(seeds, gain) for gain in gains]
        if unit == "image":
            images = np.arange(len(hospital.labels))
            base, *arms = ([replace(run, patients=images) for run in runs] for runs in (base, *arms))
        found = [
            compare(arm, base, "balanced_accuracy", comparisons=len(gains), replicates=200, seed=study) for arm in arms
        ]
        held["together"] += all(one.low <= gain <= one.high for one, gain in zip(found, gains, strict=True))
        held["single"] += found[0].low_single <= gains[0] <= found[0].high_single
        held["shown"] += any(one.shown for one in found)
        _, low, high = interval(base, "balanced_accuracy", replicates=200, seed=study)
        held["arm"] += low <= RECALLS.mean() <= high
    return {name: count / studies for name, count in held.items()}


def _least(studies: int, confidence: float = 0.95) -> float:
    """What a right coverage falls below in one of a thousand trials."""
    return float(stats.binom.ppf(0.001, studies, confidence)) / studies


@pytest.mark.parametrize("gains", [(0.0, 0.0, 0.0), (0.08, 0.0, -0.1)])
def test_intervals_cover_together_sample(gains: tuple[float, ...]) -> None:
    studies = 150
    shares = _covered(studies, 3, 0.3, gains)
    assert min(shares[name] for name in ("together", "single", "arm")) >= _least(studies), shares
    if not any(gains):
        assert shares["shown"] == pytest.approx(1 - shares["together"])


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "noise"), [(1, 0.0), (2, 0.3), (3, 0.3), (5, 0.0), (5, 0.3), (5, 0.8)])
@pytest.mark.parametrize("gains", [(0.0,) * 4, (0.08, 0.08, 0.0, -0.1)])
def test_intervals_cover_together(seeds: int, noise: float, gains: tuple[float, ...]) -> None:
    studies = 400
    shares = _covered(studies, seeds, noise, gains)
    print(f"seeds {seeds}, noise {noise}, gains {gains}: {shares}")
    # one seed, few patients: the standard error itself is uncertain, and the nominal level is missed by a point or two
    allowed = 0.02 if seeds == 1 else 0.0
    assert min(shares[name] for name in ("together", "single", "arm")) >= _least(studies, 0.95 - allowed), shares


def test_the_image_as_the_unit_would_not_cover() -> None:
    # the simulation can tell: with images as the unit, one seed and no noise of training, too many gains are seen
    shares = _covered(150, 1, 0.0, (0.0, 0.0, 0.0), unit="image")
    assert shares["together"] < _least(150) - 0.02, shares


def test_one_seed_does_not_cover_the_noise_of_training() -> None:
    shares = _covered(120, 1, 1.5, (0.0, 0.0, 0.0))
    assert shares["together"] < 0.75, shares
    assert _covered(120, 3, 1.5, (0.0, 0.0, 0.0))["together"] >= _least(120, 0.93)


def _binary(rng: np.random.Generator, seeds: int, gain: float) -> tuple[list[Outcomes], list[Outcomes]]:
    """Two arms of two classes; a patient's images share half of their variance, and each seed separates a little differently."""
    patients = np.repeat(np.arange(80), rng.integers(1, 4, 80))
    labels = (patients < 30).astype(np.int64)
    ease = rng.normal(0, sqrt(0.4), 80)[patients]
    arms = []
    for extra in (gain, 0.0):
        own = rng.normal(0, sqrt(0.1), 80)[patients]
        runs = []
        for _ in range(seeds):
            shift = (1.0 + extra + rng.normal(0, 0.2)) * labels
            score = shift + ease + own + rng.normal(0, sqrt(0.5), len(labels))
            p = stats.norm.cdf(score / 2).astype(np.float32)
            runs.append(
                Outcomes(
                    patients=patients,
                    labels=labels,
                    folds=patients % 3,
                    probabilities=np.stack([1 - p, p], axis=1)[None],
                )
            )
        arms.append(runs)
    return arms[0], arms[1]


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_auc_is_covered_too(gain: float) -> None:
    truth = [stats.norm.cdf((1.0 + extra) / sqrt(2 + 0.2**2)) for extra in (gain, 0.0)]
    rng, studies = np.random.default_rng(8), 80
    held = {"difference": 0, "arm": 0}
    for study in range(studies):
        a, b = _binary(rng, 3, gain)
        found = compare(a, b, "auc", comparisons=1, replicates=200, seed=study)
        held["difference"] += found.low <= truth[0] - truth[1] <= found.high
        _, low, high = interval(a, "auc", replicates=200, seed=study)
        held["arm"] += low <= truth[0] <= high
    assert min(held.values()) / studies >= _least(studies), held


def test_scores_are_scikit_learns() -> None:
    for seed in range(5):
        run = _outcomes(seed)
        y, p = run.labels, run.probabilities[0].astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)
        got = scores(run, 4)
        assert got.balanced_accuracy == pytest.approx(oracle.balanced_accuracy_score(y, p.argmax(1)), abs=1e-12)
        assert got.accuracy == pytest.approx(oracle.accuracy_score(y, p.argmax(1)), abs=1e-12)
        assert got.auc == pytest.approx(oracle.roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-9)
        assert got.sensitivity == pytest.approx(oracle.recall_score(y, p.argmax(1), average=None), abs=1e-12)
        for c in range(4):
            assert got.class_auc[c] == pytest.approx(oracle.roc_auc_score(y == c, run.probabilities[0, :, c]), abs=1e-9)
    tied = replace(run, probabilities=np.round(run.probabilities, 1))
    assert scores(tied, 4).class_auc[2] == pytest.approx(oracle.roc_auc_score(y == 2, tied.probabilities[0, :, 2]))


def test_scores_agree_with_those_of_a_run_and_leave_out_absent_classes() -> None:
    run = _outcomes(7)
    there = run.rows(run.labels != 2)
    got = scores(there, 4)
    told = summary(score_sums(there.probabilities[0], there.labels, there.patients), list("abcd"))
    assert got.balanced_accuracy == pytest.approx(told["balanced_accuracy"])
    assert got.sensitivity[2] is got.class_auc[2] is None
    assert got.auc == pytest.approx(told["auc"], abs=1e-3)
    value, low, high = interval([there], "balanced_accuracy", replicates=200)
    assert low < value < high
    assert value == got.balanced_accuracy
    with pytest.raises(DataError, match="class_auc:2 cannot be measured"):
        interval([there], "class_auc:2", replicates=200)
    alike = scores(run.rows(run.labels == 1), 4)
    assert alike.auc is None
    assert alike.balanced_accuracy == alike.accuracy


def test_several_models_count_as_their_mean() -> None:
    run = _outcomes(3, models=3)
    each = [scores(replace(run, probabilities=run.probabilities[m : m + 1]), 4) for m in range(3)]
    got = scores(run, 4)
    for name in ("balanced_accuracy", "accuracy", "auc"):
        assert getattr(got, name) == pytest.approx(np.mean([getattr(one, name) for one in each]))
    assert got.class_auc[1] == pytest.approx(np.mean([one.class_auc[1] for one in each]))


@pytest.mark.parametrize("score", ["balanced_accuracy", "accuracy", "auc", "sensitivity:1", "class_auc:3"])
def test_the_replicates_are_scores_of_resampled_patients(score: str) -> None:
    run = _outcomes(4)
    people = np.unique(run.patients)
    counts = np.random.default_rng(0).multinomial(len(people), np.full(len(people), 1 / len(people)), size=3)
    shares = [ratio.values(counts.astype(np.float32)) for ratio in ratios(run, score, people)]
    rows = [np.repeat(np.arange(300), each[np.searchsorted(people, run.patients)]) for each in counts]
    name, _, chosen = score.partition(":")
    for place, copies in enumerate(rows):
        slow = run.rows(copies)  # type: ignore[arg-type]
        told = getattr(scores(slow, 4), name)
        told = told[int(chosen)] if chosen else told
        assert np.mean([share[place] for share in shares]) == pytest.approx(told, abs=1e-5)


def test_the_error_is_that_of_a_mean_over_patients_and_seeds() -> None:
    # one image per patient, one stratum: the closed form s / sqrt(n), and over seeds sd / sqrt(seeds) where patients agree
    rng = np.random.default_rng(2)
    hits = rng.random(40)
    one = Ratio(top=hits, bottoms=(np.ones(40),))
    found = spread([[one]], *[np.zeros(40, np.int64)] * 2, "accuracy", 20_000, 0)
    assert found.error == pytest.approx(hits.std(ddof=1) / sqrt(40), rel=0.03)
    assert found.freedom == 39
    levels = np.array([0.4, 0.5, 0.7])
    runs = [[Ratio(top=np.full(40, level), bottoms=(np.ones(40),))] for level in levels]
    found = spread(runs, *[np.zeros(40, np.int64)] * 2, "accuracy", 20_000, 0)
    assert found.error == pytest.approx(levels.std(ddof=1) / sqrt(3), rel=0.03)
    assert found.freedom == 2
    # four folds of ten patients that agree: runs are drawn in each fold for itself
    levels = rng.random((3, 4))
    folds = np.arange(40) % 4
    runs = [[Ratio(top=level[folds], bottoms=(np.ones(40),))] for level in levels]
    found = spread(runs, folds, folds, "accuracy", 20_000, 0)
    assert found.error == pytest.approx(sqrt((levels.var(axis=0, ddof=1) / 3).sum() / 4**2), rel=0.03)
    parts = levels.var(axis=0, ddof=1)
    assert found.freedom == int(parts.sum() ** 2 / (parts**2 / 2).sum())


def test_students_t_is_scipys() -> None:
    for freedom in (1, 2, 3, 4, 7, 30, 99, 200):
        for t in (0.0, 0.3, 1.96, 4.0, -9.0):
            assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-8, abs=1e-13)
        for alpha in (0.5, 0.05, 0.005, 0.0001):
            assert quantile(alpha, freedom) == pytest.approx(stats.t.isf(alpha / 2, freedom), rel=1e-8)


def test_pairing_narrows_and_shuffling_widens() -> None:
    hospital = _Hospital(1, 0.1)
    hospital.common *= 3
    first = np.unique(hospital.patients, return_index=True)[1]
    a, b = ([run.rows(first) for run in hospital.arm(1, gain)] for gain in (0.05, 0.0))
    paired = compare(a, b, "accuracy", comparisons=1)
    # the same answers per class, given to other patients of the class: pairs no longer share what makes a patient hard
    rng, place = np.random.default_rng(0), np.arange(len(first))
    for c in range(5):
        rows = np.flatnonzero(a[0].labels == c)
        place[rows] = rng.permutation(rows)
    loose = compare(
        a, [replace(run, probabilities=run.probabilities[:, place]) for run in b], "accuracy", comparisons=1
    )
    assert loose.value == pytest.approx(paired.value)
    assert loose.high - loose.low > 1.2 * (paired.high - paired.low)


def test_copies_of_images_do_not_narrow() -> None:
    hospital = _Hospital(5, 0.2)
    a, b = hospital.arm(2, 0.1), hospital.arm(2, 0.0)

    def widths(copies: np.ndarray) -> tuple[float, float]:
        one, other = ([run.rows(copies) for run in runs] for runs in (a, b))
        found = compare(one, other, "balanced_accuracy", comparisons=1)
        _, low, high = interval(one, "balanced_accuracy")
        return found.high - found.low, high - low

    once = np.arange(len(hospital.labels))
    assert widths(np.repeat(once, 2)) == pytest.approx(widths(once))
    many = np.concatenate([once, np.repeat(np.flatnonzero(hospital.patients == 8), 20)])
    assert all(after > before for after, before in zip(widths(many), widths(once), strict=True))


def test_more_comparisons_widen_and_shown_is_the_p_value() -> None:
    hospital = _Hospital(11, 0.2)
    a, b = hospital.arm(3, 0.25), hospital.arm(3, 0.0)
    found = [compare(a, b, "balanced_accuracy", comparisons=m, replicates=500) for m in (1, 3, 20, 10_000)]
    widths = [one.high - one.low for one in found]
    assert widths == sorted(widths)
    assert (found[0].low, found[0].high) == (found[0].low_single, found[0].high_single)
    assert found[3].low_single == found[0].low
    assert all(one.shown == (one.p < 0.05 / one.comparisons) == (one.low > 0 or one.high < 0) for one in found)
    assert [one.shown for one in found] == [True, True, True, False]
    assert -1 <= found[3].low <= found[3].value <= found[3].high <= 1
    assert compare(b, a, "balanced_accuracy", comparisons=3, replicates=500).low == pytest.approx(-found[1].high)
    json.dumps(asdict(found[0]), allow_nan=False)


def test_differences_by_seed_and_fold() -> None:
    hospital = _Hospital(6, 0.2, folds=3)
    a, b = hospital.arm(2, 0.1), hospital.arm(2, 0.0)
    told = [
        oracle.balanced_accuracy_score(one.labels[rows], one.probabilities[0, rows].argmax(1))
        - oracle.balanced_accuracy_score(other.labels[rows], other.probabilities[0, rows].argmax(1))
        for one, other in zip(a, b, strict=True)
        for rows in (one.folds == fold for fold in range(3))
    ]
    assert compare(a, b, "balanced_accuracy", comparisons=1, replicates=50).per_fold == pytest.approx(told)


def test_arms_that_agree_everywhere_are_not_certain_to() -> None:
    a = _Hospital(2, 0.2).arm(2, 0.0)
    found = compare(a, a, "balanced_accuracy", comparisons=4, replicates=100)
    assert (found.value, found.p, found.shown) == (0, 1, False)
    assert found.low < -0.005
    assert found.high > 0.005
    right = [replace(run, probabilities=np.eye(5, dtype=np.float32)[run.labels][None]) for run in a]
    for score in ("balanced_accuracy", "accuracy", "auc", "sensitivity:3"):
        value, low, high = interval(right, score, replicates=100)
        assert (value, high) == (1, 1)
        assert 0.5 < low < 0.99
        value, low, high = interval(
            [replace(run, labels=(run.labels + 1) % 5) for run in right], "accuracy", replicates=100
        )
        assert (value, low) == (0, 0)
        assert high > 0.01


def test_no_class_vanishes_from_a_replicate() -> None:
    patients = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8])
    labels = np.array([0, 1, 0, 1, 1, 2, 1, 2, 2, 2, 2, 2, 2])
    run = Outcomes(
        patients=patients, labels=labels, folds=patients % 2, probabilities=np.full((1, 13, 3), 1 / 3, np.float32)
    )
    # classes 0, 1 and 2 are held by 2, 4 and 7 patients
    assert rarest_class([run], np.arange(9)).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    # a class of one patient cannot be resampled alone
    single = run.rows(patients != 1)
    assert rarest_class([single], np.unique(single.patients)).tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    lonely = np.array([0, 0, 1, 1, 2])
    last = Outcomes(
        patients=np.arange(5), labels=lonely, folds=lonely, probabilities=np.full((1, 5, 3), 0.3, np.float32)
    )
    assert rarest_class([last], np.arange(5)).tolist() == [1, 1, 2, 2, 1]


def test_runs_are_drawn_by_fold_only_where_patients_keep_their_fold() -> None:
    run = _outcomes(9)
    people = np.unique(run.patients)
    assert lasting_folds([run, run], people).tolist() == (people % 5).tolist()
    assert not lasting_folds([run, replace(run, folds=(run.folds + 1) % 5)], people).any()
    assert not lasting_folds([replace(run, folds=np.arange(300) % 5)], people).any()


def test_pairs_must_be_the_same_images() -> None:
    hospital = _Hospital(3, 0.1)
    a, b = hospital.arm(2, 0.0), hospital.arm(2, 0.0)
    labels = b[1].labels.copy()
    labels[:4] = (labels[:4] + 1) % 5
    wrong = {
        "one arm has 2 seeds, the other 1": b[:1],
        r"seed 2 of 2: \d+ test images in one arm, \d+ in the other": [b[0], b[1].rows(b[1].folds == 0)],
        "seed 2 of 2: the two arms' labels differ at 4 of": [b[0], replace(b[1], labels=labels)],
        "seed 1 of 2: the two arms' patients differ": [replace(b[0], patients=b[0].patients + 1), b[1]],
        "seed 1 of 2: the two arms' folds differ": [replace(b[0], folds=1 - b[0].folds), b[1]],
    }
    for message, other in wrong.items():
        with pytest.raises(DataError, match=message):
            compare(a, other, "accuracy", comparisons=1)


def test_what_cannot_be_scored_is_refused() -> None:
    run = _outcomes(1)
    nan = run.probabilities.copy()
    nan[0, 5, 1] = np.nan
    for message, make in (
        ("not finite", lambda: replace(run, probabilities=nan)),
        (r"label lies outside 0\.\.3", lambda: replace(run, labels=run.labels + 1)),
        (r"need probabilities \[m, n, C\]", lambda: replace(run, probabilities=run.probabilities[0])),
        ("without an image", lambda: run.rows(run.labels > 9)),
        ("without a finished seed", lambda: interval([], "auc")),
        ("classes in a study of 5", lambda: scores(run, 5)),
        ("different numbers of classes", lambda: interval([run, _outcomes(1, classes=3)], "auc")),
        (
            "cannot be measured on the test images of 1 patients",
            lambda: interval([run.rows(run.patients == run.patients[0])], "accuracy"),
        ),
    ):
        with pytest.raises(DataError, match=message):
            make()
    for score in ("f1", "sensitivity", "auc:1", "sensitivity:4", "accuracy:0"):
        with pytest.raises(ValueError, match="no score is called"):
            interval([run], score)
    with pytest.raises(ValueError, match="confidence"):
        interval([run], "auc", confidence=95)
    with pytest.raises(ValueError, match="comparisons"):
        compare([run], [run], "auc", comparisons=0)


def test_the_corrected_t_by_hand() -> None:
    values = [0.02, -0.01, 0.03, 0.04, 0.00, 0.01]
    mean, low, high = corrected_t(values, 0.2)
    error = sqrt((1 / 6 + 0.25) * np.var(values, ddof=1))
    assert mean == pytest.approx(0.015)
    assert (low, high) == pytest.approx((0.015 - error * stats.t.ppf(0.975, 5), 0.015 + error * stats.t.ppf(0.975, 5)))
    # wider than the t interval that takes folds as independent
    assert high - low > 1.5 * np.diff(stats.t.interval(0.95, 5, 0.015, np.std(values, ddof=1) / sqrt(6)))[0]
    assert corrected_t([0.3], 0.2) == (0.3, -1, 1)
    with pytest.raises(DataError, match="no fold"):
        corrected_t([], 0.2)
    with pytest.raises(ValueError, match="test_share"):
        corrected_t(values, 1.0)


def test_holm_by_hand() -> None:
    # 0.005 x 4; 0.01 x 3; 0.03 x 2; 0.04 x 1, but not below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def _comparison(value: float, low: float, high: float, seeds: int = 5, score: str = "balanced_accuracy") -> Comparison:
    return Comparison(
        score=score, value=value, low=low, high=high, low_single=low, high_single=high, per_fold=[], p=0.5,
        shown=low > 0 or high < 0, seeds=seeds, comparisons=9, confidence=0.95,
    )  # fmt: skip


def test_the_verdict_in_words() -> None:
    tail = "(95% interval, corrected for 9 comparisons; 5 seeds)."
    assert verdict("DS3", "DS1", _comparison(0.031, 0.0121, 0.05), 9) == (
        f"DS3 is better than DS1: balanced accuracy +0.031 [+0.012, +0.050] {tail}"
    )
    assert verdict("DS3", "DS1", _comparison(-0.031, -0.05, -0.0121), 9) == (
        f"DS3 is worse than DS1: balanced accuracy -0.031 [-0.050, -0.012] {tail}"
    )
    assert verdict("DS3", "DS1", _comparison(0.004, -0.01, 0.018), 9) == (
        f"DS3 against DS1: no gain shown, nor a loss: balanced accuracy +0.004 [-0.010, +0.018] {tail}"
    )
    # a bound is never rounded to the other side's 0
    assert "[+0.0001, +0.050]" in verdict("a", "b", _comparison(0.02, 0.0001, 0.05), 9)
    one = verdict("a", "b", replace(_comparison(0.0, -0.1, 0.1, seeds=1, score="class_auc:2"), comparisons=1), 1)
    assert one == (
        "a against b: no gain shown, nor a loss: AUC of class 2 +0.000 [-0.100, +0.100] "
        "(95% interval, one comparison; one training run of each fold)."
    )
    with pytest.raises(ValueError, match="corrected for 9"):
        verdict("a", "b", _comparison(0.0, -0.1, 0.1), 4)
    assert set(SCORES) == {"balanced_accuracy", "accuracy", "auc", "sensitivity", "class_auc"}


def test_the_same_seed_gives_the_same_interval() -> None:
    run = [_outcomes(1), _outcomes(1, skill=0.5)]
    first, again, other = (interval(run, "auc", replicates=300, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first[0] == other[0]
    assert first != other
