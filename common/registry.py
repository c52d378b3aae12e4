"""Models by the name that a study file uses; adding one is one file and one line here.

::

    study.classifier.model --build_classifier--> module with forward(images) -> logits and features(images) -> vectors
    classifier-<arm>.safetensors --load_classifier--> the same module + its facts, with no study file at hand
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from xfed.common import dcgan, pggan
from xfed.common.config import Study
from xfed.common.dcnn import DCNN
from xfed.common.errors import CheckpointError
from xfed.common.gan import AnyGenerator
from xfed.common.generator_family import PRIORS
from xfed.common.googlenet import GoogLeNet
from xfed.common.weights import Weights, load_arrays, load_parameters, save_arrays

__all__ = [
    "CLASSIFIERS",
    "GENERATORS",
    "ReleasedClassifier",
    "build_classifier",
    "load_classifier",
    "load_generator",
    "save_classifier",
    "save_generator",
]


class _ClassifierFactory(Protocol):
    def __call__(
        self, size: int, classes: int, width: int, dropout: float, generator: torch.Generator | None = None
    ) -> nn.Module: ...


CLASSIFIERS: Mapping[str, _ClassifierFactory] = {"dcnn": DCNN, "googlenet": GoogLeNet}
GENERATORS: Mapping[str, Callable[[int, int, int], AnyGenerator]] = {"dcgan": dcgan.Generator, "pggan": pggan.Generator}
PREPROCESSING = "grey, padded to a square, antialiased resize, /255, zero mean and unit deviation per image"


def build_classifier(study: Study, rng: torch.Generator | None = None) -> nn.Module:
    """The study's classifier with weights drawn from `rng` (without it: to be loaded)."""
    settings = study.classifier
    make = CLASSIFIERS[settings.model]
    return make(study.image_size, len(study.classes), settings.width, settings.dropout, rng)


@dataclass(frozen=True)
class ReleasedClassifier:
    """A classifier read from a file, ready to score: the module, its classes, image size, and all facts of the file."""

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    facts: dict[str, Any]


def save_classifier(path: Path, study: Study, weights: Weights, facts: Mapping[str, Any]) -> None:
    """Write a classifier with everything needed to use it."""
    settings = study.classifier
    metadata = {
        "kind": "classifier",
        "model": settings.model,
        "width": settings.width,
        "dropout": settings.dropout,
        "image_size": study.image_size,
        "classes": list(study.classes),
        "preprocessing": PREPROCESSING,
        "study": study.digest,
        **facts,
    }
    save_arrays(path, weights, metadata)


def load_classifier(path: Path) -> ReleasedClassifier:
    """Read a file of `save_classifier`. Raises `DataError` (absent) or `CheckpointError` (not one of ours, or damaged)."""
    weights, facts = load_arrays(path)
    if facts.get("kind") != "classifier" or facts.get("model") not in CLASSIFIERS:
        raise CheckpointError(
            f"{path} is not a classifier of xfed (kind {facts.get('kind')!r}, model {facts.get('model')!r})"
        )
    try:
        make = CLASSIFIERS[facts["model"]]
        model = make(facts["image_size"], len(facts["classes"]), facts["width"], facts["dropout"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata does not describe a classifier ({error})") from error
    load_parameters(model, weights)
    return ReleasedClassifier(model.eval(), tuple(facts["classes"]), int(facts["image_size"]), facts)


def save_generator(path: Path, study: Study, class_name: str, weights: Weights, facts: Mapping[str, Any]) -> None:
    """Write one generator with everything needed to draw from it; `class_name` is its name, "all" for one of all images."""
    metadata = {
        "kind": "generator",
        "model": study.gan.family,
        "width": study.gan.width,
        "latent": study.gan.latent,
        "latent_prior": PRIORS[study.gan.family],
        "image_size": study.image_size,
        "class": class_name,
        "study": study.digest,
        **facts,
    }
    save_arrays(path, weights, metadata)


def load_generator(path: Path) -> tuple[AnyGenerator, dict[str, Any]]:
    """Read a file of `save_generator`: the module and its facts. Raises like `load_classifier`."""
    weights, facts = load_arrays(path)
    if facts.get("kind") != "generator" or facts.get("model") not in GENERATORS:
        raise CheckpointError(
            f"{path} is not a generator of xfed (kind {facts.get('kind')!r}, model {facts.get('model')!r})"
        )
    try:
        generator = GENERATORS[facts["model"]](facts["image_size"], facts["width"], facts["latent"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata does not describe a generator ({error})") from error
    load_parameters(generator, weights)
    return generator.calibrate(), facts
