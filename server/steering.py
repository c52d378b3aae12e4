"""The steering classifier: what a generator of all images is labelled by, taught by the sites before phase 2.

::

    round r:  weights --TrainClassifier(arm "steering")--> every site --ClassifierUpdate--> mean --> moving average over rounds
              --> checkpoints/steering-<r>           last round: models/classifier-steering.safetensors
    archive's images --(DS1, which steered nothing)--> agreement per target: the judge's word, not the steering classifier's own

It has the recipe of DS1 (`xfed.common.arms`), a start and random streams of its own, and real images of the training patients
alone. It is never scored at the sites: the judge is another classifier. Open studies only: labels that it gives carry what it
remembers of patients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.arms import STEERING, recipe
from xfed.common.classifier import predict
from xfed.common.config import Study
from xfed.common.devices import choose_device
from xfed.common.errors import FederationError
from xfed.common.messages import ClassifierUpdate, Reply, Request, TrainClassifier
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier, save_classifier
from xfed.common.weights import Weights, load_parameters, parameters_of, under
from xfed.server.aggregate import RunningMean, check_update, moving_average
from xfed.server.run import ALL_SITES, Run

__all__ = ["agreement", "judged_by", "targets_of", "train_steering"]

PHASE = STEERING


def train_steering(run: Run) -> Weights:
    """Run all rounds that are not done yet; returns the moving average after the last. Raises `FederationError`."""
    study, rounds = run.study, run.study.gan.steering.rounds
    current = parameters_of(build_classifier(study, torch_generator(study.seed, "classifier", STEERING)))
    average, losses, done = current, list[float](), 0
    if (checkpoint := run.checkpoints.latest(PHASE)) is not None:
        done, losses = checkpoint.round, checkpoint.facts["losses"]
        current, average = under(checkpoint.arrays, "current/"), under(checkpoint.arrays, "average/")
    run.journal.write("phase", phase=PHASE, round=done, rounds=rounds)
    for round in range(done + 1, rounds + 1):
        current, loss = _one_round(run, round, current)
        average = moving_average(average, current, min(study.classifier.average, (round - 1) / (round + 4)))
        losses.append(loss)
        arrays = {f"current/{key}": value for key, value in current.items()}
        arrays |= {f"average/{key}": value for key, value in average.items()}
        run.checkpoints.save(PHASE, round, arrays, {"losses": losses})
        run.journal.write("round", phase=PHASE, round=round, rounds=rounds, loss=loss)
    facts = {"arm": STEERING, "title": recipe(STEERING).title, "rounds": rounds, "precision": study.precision}
    save_classifier(run.folder / "models" / f"classifier-{STEERING}.safetensors", study, average, facts)
    return average


def _one_round(run: Run, round: int, current: Weights) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
    mean, total = RunningMean(), 0.0
    request = TrainClassifier(
        study=run.study.digest,
        arm=STEERING,
        round=round,
        weights=dict(current),
        total=run.census.training() if run.study.secure else 0,
    )

    def fold(site: str, request: Request, reply: Reply) -> None:
        nonlocal total
        if not isinstance(reply, ClassifierUpdate):
            raise FederationError(f"{site} answered {type(reply).__name__} to TrainClassifier")
        check_update(reply.weights, current, site)
        held = reply.images if site == ALL_SITES else run.census.training(site)
        mean.add(reply.weights, held)
        total += held * reply.loss

    willing = [site for site in run.exchange.sites if run.study.secure or run.census.training(site)]
    run.sum(PHASE, round, [request], [willing], fold)
    return mean.mean(), total / mean.total


def agreement(
    study: Study, weights: Weights, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> dict[str, float | None]:
    """Share of each label's images that the classifier `weights` sees the same in; None where there is no image.

    `images` uint8 [n, S, S]; `labels` int64 [n] in `study.labels`. A combination of k findings counts as seen where they are
    the k likeliest classes.
    """
    model, device = build_classifier(study), choose_device(study.runtime.device)
    load_parameters(model, weights)
    order = predict(model.to(device), images, device=device, precision=study.precision).argsort(1)[:, ::-1]
    result: dict[str, float | None] = {}
    for label, name in enumerate(study.labels):
        wanted = targets_of(study)[name]
        own = order[labels == label][:, : len(wanted)]
        seen = (np.sort(own, 1) == sorted(study.classes.index(one) for one in wanted)).all(1)
        result[name] = float(seen.mean()) if len(seen) else None
    return result


def targets_of(study: Study) -> dict[str, tuple[str, ...]]:
    """What each label of the archive shows: a class itself, a combination its classes."""
    return {name: (name,) for name in study.classes} | dict(study.archive.findings)


def judged_by(facts: dict[str, Any], found: dict[str, float | None], by: str) -> dict[str, Any]:
    """The manifest's `steering` with what the judge `by` says of each target."""
    targets = {name: {**values, "judge": found.get(name)} for name, values in facts["targets"].items()}
    return {**facts, "judged_by": by, "targets": targets}
