"""Where the two families of generators differ, so that sites and coordinator need not ask which one a study has.

::

    study --new_state, train_generator--> one round at a site: DCGAN of a class, or PGGAN of all images
          --draw_latents--> the family's prior     --shares_of--> which training images count for which generator
          --shown--> sample images of a generator that may not have grown to its end yet (--place_after--)

A PGGAN's size and fade follow from the round alone: ``step0 = (round - 1) * steps_per_round`` in a schedule over all
``rounds * steps_per_round`` steps, so that sites grow in lockstep whatever they hold (`xfed.common.growing`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xfed.common import dcgan, pggan
from xfed.common.config import Study
from xfed.common.gan import (
    AnyGenerator,
    GanLosses,
    GanState,
    build_generator,
    new_gan_state,
    ready_generator,
    render,
    train_gan_round,
)
from xfed.common.growing import Place, Schedule
from xfed.common.pggan_training import PgganSettings, new_pggan_state, train_pggan_round
from xfed.common.randomness import torch_generator
from xfed.common.weights import Weights, load_parameters

__all__ = [
    "PRIORS",
    "draw_latents",
    "new_state",
    "place_after",
    "settings_of",
    "shares_of",
    "shown",
    "train_generator",
]

PRIORS = {"dcgan": "uniform(-1, 1)", "pggan": "sphere of radius sqrt(latent)"}
Counts = npt.NDArray[np.int64]


def settings_of(study: Study) -> PgganSettings:
    """The study's settings as PGGAN's training takes them."""
    gan, own = study.gan, study.gan.pggan
    return PgganSettings(
        schedule=Schedule.spread(study.image_size, gan.rounds * gan.steps_per_round, fade=own.fade, growth=own.growth),
        steps_per_round=gan.steps_per_round,
        batch=gan.batch,
        width=gan.width,
        latent=gan.latent,
        learning_rate_g=own.learning_rate,
        learning_rate_d=own.learning_rate,
        penalty=own.penalty,
        drift=own.drift,
        augment=gan.augment,
    )


def place_after(study: Study, round: int) -> Place | None:
    """How far a PGGAN has grown at the end of `round` (0: before the first); None for a DCGAN, which does not grow."""
    if not study.unlabelled:
        return None
    return settings_of(study).schedule.at(max(0, round * study.gan.steps_per_round - 1))


def new_state(study: Study, device: torch.device, *seed_names: str | int) -> GanState:
    """A fresh D (from the stream `seed_names`), a G to load weights into, and their optimizers."""
    if study.unlabelled:
        return new_pggan_state(settings_of(study), device, torch_generator(study.seed, *seed_names))
    return new_gan_state(study, device, *seed_names)


def train_generator(
    study: Study,
    state: GanState,
    images: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    rng: torch.Generator,
    round: int,
) -> GanLosses:
    """Train round number `round` (from 1) on ``images[rows]`` (uint8 [n, S, S]); `state` changes in place.

    Raises `FederationError` when a PGGAN's loss is no longer finite.
    """
    if not study.unlabelled:
        return train_gan_round(state, images, rows, study.gan, rng, study.precision)
    step0 = (round - 1) * study.gan.steps_per_round
    return train_pggan_round(state, images, rows, settings_of(study), rng, study.precision, step0)


def draw_latents(study: Study, count: int, rng: torch.Generator) -> Tensor:
    """Latents of the family's prior, float32 [count, latent]."""
    draw = pggan.draw_latent if study.unlabelled else dcgan.draw_latent
    return draw(count, study.gan.latent, rng)


def shares_of(study: Study, training: Counts) -> tuple[Counts, Counts]:
    """From a site's training images per class, int64 [C]: those it trains on, and 1 per class whose generator it trains.

    A generator of all images counts for every class, also one that the site lacks.
    """
    least = study.gan.minimum_images
    if study.unlabelled:
        takes_part = int(training.sum()) >= least
        return training * takes_part, np.full_like(training, takes_part)
    return np.where(training >= least, training, 0), (training >= least).astype(np.int64)


def shown(study: Study, weights: Weights, round: int | None, name: str, count: int = 1) -> npt.NDArray[np.uint8]:
    """Images uint8 [count, S, S] of the generator `name` after `round` (None: when done), from latents that stay the same."""
    z = draw_latents(study, count, torch_generator(study.seed, "shown", name))
    place = None if round is None else place_after(study, round)
    if place is None:
        return render(ready_generator(study, weights), z)
    grown: AnyGenerator = build_generator(study)
    load_parameters(grown, weights)
    with torch.no_grad():
        images = pggan.enlarge(grown.calibrate()(z, place), study.image_size).squeeze(1)
    pixels: npt.NDArray[np.uint8] = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels
