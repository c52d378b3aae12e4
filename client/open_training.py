"""What a site trains in an open study: a generator of a class or of all images, an arm's classifier; each for one round.

::

    request + store --> rows of the training split --(arm's recipe)--> train_gan_round / train_round --> weights, counts, losses
    state/: D and both optimizers, written before the answer; read again in the next round

Where the rows come from is the only difference between arms (`xfed.common.arms`). `xfed.client.private_site` is the private twin.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.gan_states import GanStates
from xfed.client.shards import Shards
from xfed.client.store import Store
from xfed.common import messages as m
from xfed.common.arms import STEERING, recipe, settings_of_arm
from xfed.common.classifier import sigmoid_decay, train_round
from xfed.common.config import Study
from xfed.common.config_family import ALL
from xfed.common.devices import memory_format
from xfed.common.errors import RefusedError
from xfed.common.generator_family import new_state, train_generator
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import load_parameters, parameters_of, rounded

__all__ = ["OpenTraining", "balanced_rows", "class_position", "generator_rows", "ready_model"]

Rows = npt.NDArray[np.int64]


def class_position(study: Study, class_name: str) -> int:
    """Position of a class in the study. Raises `RefusedError`."""
    if class_name not in study.classes:
        raise RefusedError(f"{class_name!r} is not a class of this study")
    return study.classes.index(class_name)


def _all_classes_alike(store: Store, study: Study) -> Rows:
    """Training rows of every class that the site holds enough of, each class repeated to the size of the largest."""
    least = study.gan.minimum_images
    of_class = [rows for label in range(len(study.classes)) if len(rows := store.rows("train", label)) >= least]
    most = max((len(rows) for rows in of_class), default=0)
    return np.concatenate([*(np.resize(rows, most) for rows in of_class), np.zeros(0, np.int64)])


def generator_rows(store: Store, study: Study, name: str) -> Rows:
    """Training rows of generator `name`: of its class, or all of them, whatever their labels. Raises `RefusedError`."""
    if name == ALL and study.gan.shared_rounds:
        return _all_classes_alike(store, study)
    if name not in study.generators:
        raise RefusedError(f"{name!r} is not a generator of this study; they are {', '.join(study.generators)}")
    return store.rows("train", None if study.unlabelled else class_position(study, name))


def ready_model(study: Study, weights: m.Arrays, device: torch.device) -> torch.nn.Module:
    """The study's classifier with `weights` on `device`. Raises `CheckpointError`."""
    model = build_classifier(study)
    load_parameters(model, weights)
    return model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def balanced_rows(rows: Rows, labels: npt.NDArray[np.int64], generator: np.random.Generator) -> Rows:
    """`rows` with as many of each class that is there as of its rarest one, drawn by `generator`; int64, sorted.

    `labels` int64 [len(rows)] are the classes of the rows.
    """
    present, counts = np.unique(labels, return_counts=True)
    least = int(counts.min()) if len(counts) else 0
    kept = [generator.permutation(rows[labels == label])[:least] for label in present]
    return np.sort(np.concatenate([*kept, np.zeros(0, np.int64)]))


@dataclass(frozen=True, kw_only=True)
class OpenTraining:
    """A site's means of training: its name, the study, the images that take part, states and shards on its disk."""

    name: str
    study: Study
    store: Store
    states: GanStates
    shards: Shards
    device: torch.device

    def gan(self, request: m.TrainGan) -> m.GanUpdate:
        """One round of one generator. Raises `RefusedError` with too few images."""
        study, store = self.study, self.store
        rows = generator_rows(store, study, request.class_name)
        if len(rows) < study.gan.minimum_images:
            raise RefusedError(
                f"too few training images of {request.class_name}: {len(rows)} < {study.gan.minimum_images}"
            )
        started = time.perf_counter()
        state = new_state(study, self.device, "discriminator", self.name, request.class_name)
        previous = self.states.before(request.class_name, request.round)
        if previous is None and study.gan.shared_rounds:
            previous = self.states.before(ALL, request.round)
        if previous is not None:
            state.restore(previous)
        load_parameters(state.generator, request.weights)
        rng = torch_generator(study.seed, "gan", self.name, request.class_name, request.round)
        losses = train_generator(study, state, store.images, rows, rng, request.round)
        self.states.save(request.class_name, request.round, state.arrays(), study.digest)
        return m.GanUpdate(
            site=self.name,
            images=len(np.unique(rows)),
            loss_g=losses.generator,
            loss_d=losses.discriminator,
            seconds=time.perf_counter() - started,
            payload=request.payload,
            weights=rounded(parameters_of(state.generator), request.payload),
        )

    def classifier(self, request: m.TrainClassifier) -> m.ClassifierUpdate:
        """One round of an arm's classifier. Raises `RefusedError` without training images, or for an arm that is not planned."""
        study, store = self.study, self.store
        held = store.rows("train")
        if not len(held):
            raise RefusedError("this site has no training images")
        if request.arm not in (*study.classifier.arms, *([STEERING] if study.unlabelled else [])):
            raise RefusedError(f"{request.arm!r} is not an arm of this study")
        started = time.perf_counter()
        taught = recipe(request.arm)
        settings = settings_of_arm(study, request.arm)
        rows = self._real(taught.real, held)
        synthetic: tuple[Any, Any] = self._synthetic() if taught.synthetic else (None, None)
        model = ready_model(study, request.weights, self.device)
        loss = train_round(
            model,
            store.images[rows],
            store.labels[rows],
            *synthetic,
            settings=settings,
            learning_rate=sigmoid_decay(settings.learning_rate, request.round - 1, settings.rounds),
            steps=taught.steps(settings, len(held)),  # by the images held, not by those that the arm uses
            generator=torch_generator(study.seed, "classifier", self.name, request.arm, request.round),
            precision=study.precision,
            device=self.device,
        )
        return m.ClassifierUpdate(
            site=self.name,
            images=len(held),
            loss=loss,
            seconds=time.perf_counter() - started,
            weights=parameters_of(model),
        )

    def _synthetic(self) -> tuple[Any, Any]:
        """The archive, less its combinations of findings: an arm's classifier has one class per image."""
        images, labels = self.shards.read()
        one = labels < len(self.study.classes)
        return (images, labels) if one.all() else (images[one], labels[one])

    def _real(self, which: str, held: Rows) -> Rows:
        if which == "none":
            return held[:0]
        if which == "balanced":
            generator = numpy_generator(self.study.seed, "balanced", self.name)
            return balanced_rows(held, self.store.labels[held], generator)
        return held
