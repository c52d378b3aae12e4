"""Images of one target, found in a generator of all images: by moving latents, or by looking at each once.

::

    number n of the target --stream of its own--> z0 --in blocks of 64--> optimise_latents | reject_latents --> accepted or not
        accepted --render, the same blocks--> images 0, 1, 2, .. of the target --> quality filter (xfed.server.archive_filter)
    a target that is done --> checkpoints/steered-<target>      (images, columns, times: a killed run does not search again)

Every image can be made again from the generator, the steering classifier, the study's seed and the target's name: the search of
a block depends on nothing else, and always works on whole blocks. What the metadata say of an image: `findings`, joined by "|";
`latent`, the number n of its start; `probability` of the target in the steering classifier's eyes, at least `threshold`; `moves`
of the latent; `drift`, root mean square of its way. Times and yields are the manifest's: they are no property of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xfed.common.classifier import prepare
from xfed.common.config_family import slug
from xfed.common.devices import choose_device
from xfed.common.errors import CheckpointError
from xfed.common.gan import ready_generator, render
from xfed.common.generator_family import draw_latents
from xfed.common.latent_classes import (
    Sampled,
    Steering,
    as_pixels,
    join_sampled,
    optimise_latents,
    reject_latents,
    target_row,
)
from xfed.common.randomness import seed_for, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import Weights, digest_of, load_parameters
from xfed.server.run import Run
from xfed.server.steering import targets_of

__all__ = ["COLUMNS", "SEARCH", "Searches", "Target"]

SEARCH = 64
"""Latents that are searched, and drawn, together."""
GIVEN = 32
"""Images that `Target.block` gives at a time."""
COLUMNS = ("findings", "latent", "probability", "threshold", "moves", "drift")
HOW = (
    "Image with start n of a target: latents 64 b to 64 b + 63 (b = n // 64) from streams (seed, archive, target, n), all moved "
    "together by the settings here against the steering classifier, then drawn together by the generator. Needed: "
    "models/generator-all.safetensors, models/classifier-steering.safetensors, the seed."
)

Pixels = npt.NDArray[np.uint8]


class Searches:
    """The searches of one archive: generator and steering classifier, ready, and what became of each target."""

    def __init__(self, run: Run, generator: Weights, steering: Weights) -> None:
        study = run.study
        self.run = run
        self.device = choose_device(study.runtime.device)
        self.generator = ready_generator(study, generator).to(self.device).requires_grad_(False)
        model = build_classifier(study)
        load_parameters(model, steering)
        self.classifier = model.to(self.device).eval().requires_grad_(False)
        self.digests = {"generator": digest_of(generator), "classifier": digest_of(steering)}
        self.done: dict[str, dict[str, Any]] = {}

    @property
    def settings(self) -> Steering:
        """The study's, as the search takes them."""
        plan = self.run.study.gan.steering
        return Steering(
            threshold=plan.threshold,
            steps=plan.steps,
            rate=plan.learning_rate,
            proximity=plan.proximity,
            batch=SEARCH,
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest: settings, what is needed to make an image again, and per target the course of its search."""
        study = self.run.study
        settings = study.gan.steering.model_dump()
        return {**settings, "classifier_sha256": self.digests["classifier"], "again": HOW, "targets": dict(self.done)}


class Target:
    """The search of one target; at most `attempts` times `wanted` latents are tried."""

    def __init__(self, searches: Searches, name: str, wanted: int) -> None:
        self._all, self._name = searches, name
        study = searches.run.study
        self._study = study
        self._findings = targets_of(study)[name]
        self._target = target_row(study.classes, dict.fromkeys(self._findings, True)).to(searches.device)
        self._limit = -(-study.gan.steering.attempts * wanted // SEARCH) * SEARCH
        self._phase = f"steered-{slug(name)}"
        side = study.image_size
        self._images = np.zeros((0, side, side), np.uint8)
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._parts: list[Sampled] = []
        self._facts: dict[str, Any] = {}
        self._tried = 0
        if (checkpoint := searches.run.checkpoints.latest(self._phase)) is not None:
            if checkpoint.facts["made_of"] != searches.digests:
                raise CheckpointError(
                    f"{self._phase}: another generator or classifier made it. Delete the archive's checkpoints to search again."
                )
            arrays = dict(checkpoint.arrays)
            self._images, self._columns, self._facts = arrays.pop("images"), arrays, checkpoint.facts["facts"]
            self._tried = self._limit  # it had ended

    def block(self, number: int) -> Pixels:
        """Accepted images ``32 number`` to ``32 number + 31``, uint8 [32, S, S]; fewer where the search has ended."""
        while len(self._images) < (number + 1) * GIVEN and self._tried < self._limit:
            self._search()
        return self._images[number * GIVEN : (number + 1) * GIVEN]

    def row(self, number: int) -> dict[str, str]:
        """The columns of accepted image `number`, and its `seed`."""
        start = int(self._columns["latent"][number])
        return {
            "findings": "|".join(self._findings),
            "latent": str(start),
            "probability": f"{self._columns['probability'][number]:.4f}",
            "threshold": f"{self._study.gan.steering.threshold:g}",
            "moves": str(int(self._columns["moves"][number])),
            "drift": f"{self._columns['drift'][number]:.4f}",
            "seed": str(seed_for(self._study.seed, "archive", self._name, start)),
        }

    def end(self) -> None:
        """Note what came of it, and keep it for a run that goes on."""
        if not self._facts:
            found = join_sampled(self._parts)
            self._facts = {"findings": list(self._findings), **found.facts()}
            arrays = {"images": self._images, **self._columns}
            facts = {"facts": self._facts, "made_of": self._all.digests}
            self._all.run.checkpoints.save(self._phase, 1, arrays, facts)
        self._all.done[self._name] = self._facts

    def _search(self) -> None:
        study, settings = self._study, self._all.settings
        numbers = range(self._tried, self._tried + SEARCH)
        starts = [draw_latents(study, 1, torch_generator(study.seed, "archive", self._name, n)) for n in numbers]
        seek = optimise_latents if study.gan.steering.method == "lco" else reject_latents
        found = seek(self._images_of, self._scores, torch.cat(starts).to(self._all.device), self._target, settings)
        kept = found.accepted.numpy()
        drawn = render(self._all.generator, found.latents)[kept]
        columns = {
            "latent": np.asarray(numbers, np.int64)[kept],
            "probability": found.probability.numpy()[kept],
            "moves": found.steps.numpy()[kept],
            "drift": found.drift.numpy()[kept],
        }
        self._images = np.concatenate([self._images, drawn])
        self._columns = {
            name: np.concatenate([self._columns[name], values]) if self._columns else values
            for name, values in columns.items()
        }
        self._parts.append(found)
        self._tried += SEARCH
        self._all.run.journal.write(
            "round", phase=self._phase, round=self._tried, rounds=self._limit, accepted=len(self._images)
        )

    def _images_of(self, z: Tensor) -> Tensor:
        images: Tensor = as_pixels(self._all.generator(z))
        return images

    def _scores(self, images: Tensor) -> Tensor:
        scores: Tensor = self._all.classifier(prepare(images))
        return scores
