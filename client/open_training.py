"""What a site trains in an open study: a class's generator, an arm's classifier; each for one round.

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
from xfed.common.arms import recipe
from xfed.common.classifier import sigmoid_decay, train_round
from xfed.common.config import Study
from xfed.common.devices import memory_format
from xfed.common.errors import RefusedError
from xfed.common.gan import new_gan_state, train_gan_round
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import load_parameters, parameters_of, rounded

__all__ = ["OpenTraining", "balanced_rows", "class_position", "ready_model"]

Rows = npt.NDArray[np.int64]


def class_position(study: Study, class_name: str) -> int:
    """Position of a class in the study. Raises `RefusedError`."""
    if class_name not in study.classes:
        raise RefusedError(f"{class_name!r} is not a class of this study")
    return study.classes.index(class_name)


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
        """One round of a class's generator. Raises `RefusedError` with too few images."""
        study, store = self.study, self.store
        rows = store.rows("train", class_position(study, request.class_name))
        if len(rows) < study.gan.minimum_images:
            raise RefusedError(
                f"too few training images of {request.class_name}: {len(rows)} < {study.gan.minimum_images}"
            )
        started = time.perf_counter()
        state = new_gan_state(study, self.device, "discriminator", self.name, request.class_name)
        previous = self.states.before(request.class_name, request.round)
        if previous is not None:
            state.restore(previous)
        load_parameters(state.generator, request.weights)
        rng = torch_generator(study.seed, "gan", self.name, request.class_name, request.round)
        losses = train_gan_round(state, store.images, rows, study.gan, rng, study.precision)
        self.states.save(request.class_name, request.round, state.arrays(), study.digest)
        return m.GanUpdate(
            site=self.name,
            images=len(rows),
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
        if request.arm not in study.classifier.arms:
            raise RefusedError(f"{request.arm!r} is not an arm of this study")
        started = time.perf_counter()
        taught = recipe(request.arm)
        settings = taught.settings(study.classifier)
        rows = self._real(taught.real, held)
        synthetic: tuple[Any, Any] = self.shards.read() if taught.synthetic else (None, None)
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

    def _real(self, which: str, held: Rows) -> Rows:
        if which == "none":
            return held[:0]
        if which == "balanced":
            generator = numpy_generator(self.study.seed, "balanced", self.name)
            return balanced_rows(held, self.store.labels[held], generator)
        return held
