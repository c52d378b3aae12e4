"""Phase 3: one federated classifier per arm, with early stopping on federated validation; the best round is kept.

::

    before: an arm may start from the archive alone (classifier.pretraining steps, here: no real image is read)
    round r, all arms at once:
      weights_arm --TrainClassifier--> every site --ClassifierUpdate--> running mean (--> moving average over rounds)
      candidate   --ScoreClassifier(validation)--> every site --Scores--> sums --> better than the best so far? keep it
                                                                   --> checkpoints/classifier-<r>
    end: best weights --ScoreClassifier(test)--> every site --> per-arm summary, pooled and per site

    private study: no validation (every score is a release), the last round is taken;
                   end: --ScorePrivately--> every site --> noised counts, summed --> summary with the noise in its intervals

DS1 trains on real images, DS3 on real and synthetic ones (Salehinejad et al. 2018, section 3.3.2); `xfed.common.arms` has
them all. What an arm's recipe does not name is alike in every arm: steps, batch, learning rate, rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.arms import recipe
from xfed.common.devices import choose_device
from xfed.common.errors import FederationError
from xfed.common.messages import (
    ClassifierUpdate,
    NoisyScores,
    Reply,
    Request,
    ScoreClassifier,
    ScorePrivately,
    Scores,
    TrainClassifier,
)
from xfed.common.metrics import ScoreSums, add, from_arrays, summary, zero
from xfed.common.noisy_scores import BINS, noisy_summary
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier, save_classifier
from xfed.common.synthetic_training import train_on_synthetic
from xfed.common.weights import Weights, parameters_of, under
from xfed.server.aggregate import RunningMean, check_update, moving_average
from xfed.server.budgets import budgets_of, noise_of_scores
from xfed.server.run import ALL_SITES, Run

__all__ = ["ArmResult", "score_on_test_patients", "train_classifiers"]

PHASE = "classifier"

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass
class _Arm:
    """One arm under way: what the next round starts from, the moving average, the best so far."""

    name: str
    current: Arrays
    average: Arrays
    best: Arrays
    best_round: int = 0
    best_score: float = float("-inf")
    stopped: bool = False
    rounds: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's end: best weights and round, curves, the summary on test patients pooled and per site."""

    weights: Arrays
    best_round: int
    stopped: str
    rounds: list[dict[str, Any]]
    test: dict[str, Any]
    sites: dict[str, dict[str, Any]]


def train_classifiers(run: Run, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> dict[str, ArmResult]:
    """Run all rounds of phase 3 that are not done yet, score the best ones, write models/classifier-<arm>.safetensors.

    `images` uint8 [n, S, S] and `labels` int64 [n]: the archive, for pretraining.
    """
    study, settings = run.study, run.study.classifier
    arms, done = _resume(run, images, labels)
    run.journal.write("phase", phase=PHASE, round=done, rounds=settings.rounds)
    for round in range(done + 1, settings.rounds + 1):
        active = [arm for arm in arms if not arm.stopped]
        if not active:
            break
        losses = _train_round(run, round, active)
        if study.private:
            for arm in active:
                arm.best, arm.best_round = arm.average, round
                arm.rounds.append({"round": round, "loss": None})
        else:
            scored = _score(run, round, "validation", {arm.name: arm.average for arm in active})
            for arm in active:
                _judge(run, arm, round, losses[arm.name], scored[arm.name][0])
        _save(run, round, arms)
        run.journal.write(
            "round", phase=PHASE, round=round, rounds=settings.rounds, arms={arm.name: arm.rounds[-1] for arm in active}
        )
    tested = score_on_test_patients(run, {arm.name: arm.best for arm in arms})
    results = {}
    for arm in arms:
        pooled, by_site = tested[arm.name]
        facts = {"arm": arm.name, "best_round": arm.best_round, "precision": study.precision}
        save_classifier(run.folder / "models" / f"classifier-{arm.name}.safetensors", study, arm.best, facts)
        results[arm.name] = ArmResult(
            weights=arm.best,
            best_round=arm.best_round,
            stopped="early" if arm.stopped else "rounds",
            rounds=arm.rounds,
            test=pooled,
            sites=by_site,
        )
    return results


def score_on_test_patients(
    run: Run, weights: Mapping[str, Weights]
) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Per arm of `weights` the summary over all sites and, in an open study, per site. Raises `FederationError`."""
    classes = run.study.classes
    if run.study.private:
        return {name: (facts, {}) for name, facts in _test_privately(run, weights).items()}
    tested = _score(run, run.study.classifier.rounds + 1, "test", weights)
    return {
        name: (summary(pooled, classes), {site: summary(sums, classes) for site, sums in sorted(by_site.items())})
        for name, (pooled, by_site) in tested.items()
    }


def _test_privately(run: Run, weights: Mapping[str, Weights]) -> dict[str, dict[str, Any]]:
    """Noised counts of every site, added. The noise of each site is part of its public budget."""
    classes = len(run.study.classes)
    shapes = {"confusion": (classes, classes), "histogram": (classes, 2, BINS)}
    totals = {name: {key: np.zeros(shape) for key, shape in shapes.items()} for name in weights}
    answered: set[str] = set()

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, NoisyScores) or not isinstance(request, ScorePrivately):
            raise FederationError(f"{site} answered {type(reply).__name__} to ScorePrivately")
        if {key: array.shape for key, array in reply.arrays.items()} != shapes:
            raise FederationError(f"{site} sent noised scores of another form; they are left out")
        for key, array in reply.arrays.items():
            totals[request.arm][key] += array
        if site != ALL_SITES:
            answered.add(site)

    requests = [ScorePrivately(study=run.study.digest, arm=name, weights=arrays) for name, arrays in weights.items()]
    run.sum(f"{PHASE}-test", run.study.classifier.rounds + 1, requests, [run.exchange.sites] * len(requests), fold)
    # a site that was lost adds neither counts nor noise; in a secure sum its name is not known, and the larger figure is said
    deviation = noise_of_scores(budgets_of(run), sorted(answered) if answered else list(run.exchange.sites))
    declared = sum(
        run.descriptions[site].counts["counts"][0] for site in (sorted(answered) if answered else run.exchange.sites)
    )
    share = run.study.data.splits.test
    expected = np.asarray(declared, np.float64) * share / (1 - share)
    return {
        name: noisy_summary(arrays, run.study.classes, expected.tolist(), deviation) for name, arrays in totals.items()
    }


def _resume(run: Run, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> tuple[list[_Arm], int]:
    study = run.study
    # both arms start from the same weights, so that they differ in their data alone
    start = parameters_of(build_classifier(study, torch_generator(study.seed, "classifier")))
    arms = [_Arm(name, start, start, start) for name in study.classifier.arms]
    checkpoint = run.checkpoints.latest(PHASE)
    if checkpoint is None:
        for arm in arms:
            if steps := recipe(arm.name).pretraining(study.classifier):
                run.journal.write("phase", phase="pretraining", round=0, rounds=steps)
                device = choose_device(study.runtime.device)
                ready = dict(
                    train_on_synthetic(study, images, labels, steps=steps, purpose="pretraining", device=device)
                )
                arm.current = arm.average = arm.best = ready
        return arms, 0
    for arm in arms:
        for part in ("current", "average", "best"):
            setattr(arm, part, under(checkpoint.arrays, f"{arm.name}/{part}/"))
        facts = checkpoint.facts[arm.name]
        arm.best_round, arm.best_score = facts["best_round"], facts["best_score"]
        arm.stopped, arm.rounds = facts["stopped"], facts["rounds"]
    return arms, checkpoint.round


def _save(run: Run, round: int, arms: list[_Arm]) -> None:
    arrays = {
        f"{arm.name}/{part}/{key}": value
        for arm in arms
        for part in ("current", "average", "best")
        for key, value in getattr(arm, part).items()
    }
    facts = {
        arm.name: {
            "best_round": arm.best_round,
            "best_score": arm.best_score,
            "stopped": arm.stopped,
            "rounds": arm.rounds,
        }
        for arm in arms
    }
    run.checkpoints.save(PHASE, round, arrays, facts)


def _sites_with(run: Run, split: int) -> list[str]:
    return [site for site in run.exchange.sites if run.study.secure or run.census.sites[site][split].sum() > 0]


def _train_round(run: Run, round: int, active: list[_Arm]) -> dict[str, float]:
    means = {arm.name: RunningMean() for arm in active}
    losses = dict.fromkeys(means, 0.0)
    start = {arm.name: arm.current for arm in active}
    requests = [
        TrainClassifier(
            study=run.study.digest,
            arm=arm.name,
            round=round,
            weights=arm.current,
            total=run.census.training() if run.study.secure else 0,
        )
        for arm in active
    ]

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ClassifierUpdate) or not isinstance(request, TrainClassifier):
            raise FederationError(f"{site} answered {type(reply).__name__} to TrainClassifier")
        check_update(reply.weights, start[request.arm], site)
        held = reply.images if site == ALL_SITES else run.census.training(site)
        means[request.arm].add(reply.weights, held)
        losses[request.arm] += held * reply.loss  # 0 in a private study: sites do not say it

    run.sum(PHASE, round, requests, [_sites_with(run, 0)] * len(requests), fold)
    for arm in active:
        arm.current = means[arm.name].mean()
        decay = min(run.study.classifier.average, (round - 1) / (round + 4))
        arm.average = moving_average(arm.average, arm.current, decay)
    return {name: losses[name] / mean.total for name, mean in means.items()}


def _score(
    run: Run, round: int, split: str, weights: Mapping[str, Weights]
) -> dict[str, tuple[ScoreSums, dict[str, ScoreSums]]]:
    classes = len(run.study.classes)
    totals = {name: zero(classes) for name in weights}
    by_site: dict[str, dict[str, ScoreSums]] = {name: {} for name in weights}
    requests = [
        ScoreClassifier(study=run.study.digest, arm=name, round=round, split=split, weights=arrays)
        for name, arrays in weights.items()
    ]

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, Scores) or not isinstance(request, ScoreClassifier):
            raise FederationError(f"{site} answered {type(reply).__name__} to ScoreClassifier")
        sums = from_arrays(reply.sums)
        if sums.classes != classes:
            raise FederationError(f"{site} sent scores of {sums.classes} classes, expected {classes}")
        totals[request.arm] = add(totals[request.arm], sums)
        if site != ALL_SITES:
            by_site[request.arm][site] = sums

    holders = [_sites_with(run, 1 if split == "validation" else 2)] * len(requests)
    run.sum(f"{PHASE}-{split}", round, requests, holders, fold)
    return {name: (totals[name], by_site[name]) for name in weights}


def _judge(run: Run, arm: _Arm, round: int, loss: float, validation: ScoreSums) -> None:
    """Note the round, keep it if it is the best, stop the arm when none was better for `patience` rounds."""
    facts = summary(validation, run.study.classes)
    arm.rounds.append(
        {
            "round": round,
            "loss": loss,
            "validation_balanced_accuracy": facts["balanced_accuracy"],
            "validation_accuracy": facts["accuracy"],
            "validation_auc": facts["auc"],
            "validation_loss": facts["loss"],
        }
    )
    score = _validation_score(arm.rounds)
    if score > arm.best_score:
        arm.best, arm.best_round, arm.best_score = arm.average, round, score
    arm.stopped = round - arm.best_round >= run.study.classifier.patience


def _validation_score(rounds: list[dict[str, Any]]) -> float:
    """What the best round is chosen by: macro AUC on validation patients, averaged over the last five rounds.

    Few validation patients of the rare classes make a round's balanced accuracy so noisy that choosing by it was measured
    worse than taking the last round (docs/experiments.md); AUC is steadier.
    """
    return float(np.mean([r["validation_auc"] or 0.0 for r in rounds[-5:]]))
