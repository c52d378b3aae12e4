"""`python -m xfed.simulations.pggan_trial`: one unlabelled PGGAN on phantoms, and what latent class optimisation makes of it.

::

    phantoms A --(labels unused)--> PGGAN, centrally, through every stage --> FID of the moving average after each stage
    phantoms A --> steering classifier --+--> optimise_latents --+--> accepted images of each class
                                         +--> reject_latents ----+         |
    phantoms B, other patients --> judge classifier (other seed) ----------+--> share it calls by the class; FID to B's class

The judge never steers and has seen none of A's patients. FID is the Frechet distance in the judge's projected features to B's
images; its floor is that of as many images of A. FID falls with the number of images, so the methods are also compared at equal
numbers. One run, one seed: read differences, not decimals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from xfed.common.classifier import predict, prepare
from xfed.common.config import Study, parse_study
from xfed.common.console import EXIT_CODES, print_result, run_app
from xfed.common.durable import write_json
from xfed.common.errors import ConfigError
from xfed.common.features import project_features
from xfed.common.frechet import FeatureSums, feature_sums, frechet_distance
from xfed.common.growing import Place, Schedule
from xfed.common.latent_classes import (
    Sampled,
    Steering,
    as_pixels,
    gather_accepted,
    optimise_latents,
    reject_latents,
    target_row,
)
from xfed.common.pggan import Generator, draw_latent, enlarge
from xfed.common.pggan_training import PgganSettings, new_pggan_state, train_pggan_round
from xfed.common.randomness import torch_generator
from xfed.common.weights import Weights, load_parameters, parameters_of
from xfed.server.aggregate import moving_average
from xfed.simulations.judge import taught_classifier
from xfed.simulations.phantom import phantom_arrays

__all__ = ["Trial", "World", "grow", "label", "world"]

CPU = torch.device("cpu")
PER_ROUND = 10
DECAY = 0.95
REJECTION = 20
Search = Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor, Tensor, Steering], Sampled]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried. `steps`: training steps of the PGGAN over all stages; `latents`: tried per class and method."""

    size: int = 32
    patients: int = 200
    width: int = 2
    latent: int = 128
    batch: int = 16
    steps: int = 2000
    growth: float = 1.5
    learning_rate: float = 3e-3
    augment: str = "none"
    precision: str = "float32"
    classifier_steps: int = 700
    latents: int = 100
    steering: Steering = field(default_factory=Steering)
    seed: int = 2018


@dataclass(frozen=True, kw_only=True)
class World:
    """Images [n, S, S] and labels [n] of A and of B, and both classifiers, frozen."""

    study: Study
    images: Pixels
    labels: Labels
    others: Pixels
    others_labels: Labels
    steering: nn.Module
    judge: nn.Module

    def sums(self, images: Pixels) -> FeatureSums:
        """Feature sums in the judge's eyes."""
        return feature_sums(project_features(self.judge, images, CPU, "float32"))

    def agreement(self, images: Pixels, label: int) -> float:
        """Share of `images` that the judge calls by class `label`."""
        return float((predict(self.judge, images, device=CPU, precision="float32").argmax(1) == label).mean())


def _classifier(study: Study, images: Pixels, labels: Labels, steps: int, name: str) -> nn.Module:
    start, draws = (torch_generator(study.seed, stream, name) for stream in ("classifier", "training"))
    model = taught_classifier(study, images, labels, steps=steps, start=start, draws=draws)
    return model.eval().requires_grad_(False)


def world(trial: Trial) -> World:
    """The phantoms of both groups of patients, and the two classifiers."""
    settings = {"width": 16, "batch": 64}
    study = parse_study(
        {"name": "pggan", "image_size": trial.size, "seed": trial.seed, "classifier": settings}, "the trial"
    )

    def drawn(seed: int) -> tuple[Pixels, Labels]:
        patients = dict.fromkeys(study.classes, trial.patients)
        images, labels, _ = phantom_arrays(
            classes=study.classes, patients=patients, images_per_patient=1, size=trial.size, seed=seed
        )
        return images, labels

    images, labels = drawn(trial.seed)
    others, others_labels = drawn(trial.seed + 1)
    return World(
        study=study,
        images=images,
        labels=labels,
        others=others,
        others_labels=others_labels,
        steering=_classifier(study, images, labels, trial.classifier_steps, "steering"),
        judge=_classifier(study, others, others_labels, trial.classifier_steps, "judge"),
    )


@torch.no_grad()
def _pictures(generator: Generator, z: Tensor, place: Place, size: int) -> Pixels:
    """Images uint8 [B, size, size] of latents, at `place`, repeated to full size; drawn in parts of 250."""
    parts = [enlarge(generator(z[start : start + 250], place), size)[:, 0] for start in range(0, max(1, len(z)), 250)]
    pixels: Pixels = torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def _settings(trial: Trial) -> PgganSettings:
    return PgganSettings(
        schedule=Schedule.spread(trial.size, trial.steps, growth=trial.growth),
        steps_per_round=PER_ROUND,
        batch=trial.batch,
        width=trial.width,
        latent=trial.latent,
        learning_rate_g=trial.learning_rate,
        learning_rate_d=trial.learning_rate,
        augment=trial.augment,
    )


def grow(
    trial: Trial, world: World, told: Callable[[dict[str, Any]], None] = lambda _: None
) -> tuple[Generator, list[dict[str, Any]]]:
    """Train on A without labels; the moving average of G, and FID to B per stage. `told` gets each stage as it ends."""
    settings = _settings(trial)
    state = new_pggan_state(settings, CPU, torch_generator(trial.seed, "discriminator"))
    average = Generator(trial.size, trial.width, trial.latent, torch_generator(trial.seed, "generator"))
    load_parameters(state.generator, parameters_of(average))
    mean: Weights = parameters_of(average)
    z = draw_latent(500, trial.latent, torch_generator(trial.seed, "shown"))
    reference = world.sums(world.others)
    stages: list[dict[str, Any]] = []

    def note(place: Place, step: int, began: float) -> None:
        load_parameters(average, mean)
        fid = frechet_distance(reference, world.sums(_pictures(average, z, place, trial.size)))
        stages.append({"px": place.size, "steps": step, "fid": fid, "seconds": time.perf_counter() - began})
        told(stages[-1])

    began = time.perf_counter()
    note(Place(len(settings.schedule.steps) - 1), 0, began)
    rounds = math.ceil(settings.schedule.total / PER_ROUND)
    for round in range(rounds):
        step0 = round * PER_ROUND
        rng = torch_generator(trial.seed, "round", round)
        train_pggan_round(state, world.images, np.arange(len(world.images)), settings, rng, trial.precision, step0)
        decay = min(DECAY, round / (round + 5))
        mean = moving_average(mean, parameters_of(state.generator), decay)
        stage = settings.schedule.at(step0).stage
        if settings.schedule.at(step0 + PER_ROUND).stage > stage or round == rounds - 1:
            note(Place(stage), step0 + PER_ROUND, began)
    return average.calibrate().requires_grad_(False), stages


def _sought(trial: Trial, world: World, generator: Generator, search: Search, name: str, limit: int) -> Sampled:
    """Latents for class `name` until `trial.latents` are accepted or `limit` were tried."""
    target = target_row(world.study.classes, {name: True})
    rng = torch_generator(trial.seed, "latents", name)

    def images_of(z: Tensor) -> Tensor:
        return as_pixels(generator(z))

    def scores(images: Tensor) -> Tensor:
        return Tensor(world.steering(prepare(images)))

    return gather_accepted(
        lambda z: search(images_of, scores, z, target, trial.steering),
        lambda count: draw_latent(count, trial.latent, rng),
        count=trial.latents,
        limit=limit,
    )


def _fid(world: World, real: Pixels, images: Pixels) -> float | None:
    """None for fewer images than a covariance needs."""
    return frechet_distance(world.sums(real), world.sums(images)) if len(images) > 1 else None


def label(trial: Trial, world: World, generator: Generator) -> list[dict[str, Any]]:
    """Both methods for every class: yield, cost, what the judge says, FID to B's images of the class.

    `trial.latents` are optimised; rejection may try `REJECTION` times as many to find as many.
    """
    rows: list[dict[str, Any]] = []
    grown = Place(len(generator.blocks))
    for number, name in enumerate(world.study.classes):
        real = world.others[world.others_labels == number]
        found = {
            "optimised": _sought(trial, world, generator, optimise_latents, name, trial.latents),
            "rejection": _sought(trial, world, generator, reject_latents, name, REJECTION * trial.latents),
        }
        kept = {
            method: _pictures(generator, one.latents[one.accepted], grown, trial.size) for method, one in found.items()
        }
        equal = min(len(images) for images in kept.values())
        for method, images in kept.items():
            rows.append(
                {
                    "class": name,
                    "method": method,
                    **found[method].facts(),
                    "judge": world.agreement(images, number) if len(images) else None,
                    "fid": _fid(world, real, images),
                    "fid_floor": _fid(world, real, world.images[world.labels == number][: len(images)]),
                    "fid_at_equal_number": _fid(world, real, images[:equal]),
                    "equal_number": equal,
                }
            )
    return rows


COLUMNS = {
    "looks": "looks_per_accepted",
    "s": "seconds_per_accepted",
    "steps": "mean_steps",
    "judge": "judge",
    "FID": "fid",
    "floor": "fid_floor",
    "equal n": "fid_at_equal_number",
}

app = typer.Typer(add_completion=False)


@app.command(epilog=EXIT_CODES)
def trial(
    size: Annotated[int, typer.Option(help="Side of the images, px: 32, 64, 128 or 256.")] = Trial.size,
    patients: Annotated[int, typer.Option(min=20, help="Phantoms per class, of A and of B.")] = Trial.patients,
    width: Annotated[int, typer.Option(min=1, help="32 is the paper's.")] = Trial.width,
    latent: Annotated[int, typer.Option(min=2, help="Numbers in a latent.")] = Trial.latent,
    steps: Annotated[int, typer.Option(min=40, help="Training steps of the PGGAN over all stages.")] = Trial.steps,
    learning_rate: Annotated[float, typer.Option(min=0, help="Adam's, of G and D.")] = Trial.learning_rate,
    augment: Annotated[str, typer.Option(help="What D sees: none, translation or full.")] = Trial.augment,
    classifier_steps: Annotated[int, typer.Option(min=1, help="Of both classifiers.")] = Trial.classifier_steps,
    latents: Annotated[int, typer.Option(min=2, help="Latents per class.")] = Trial.latents,
    threshold: Annotated[float, typer.Option(help="Probability at which a latent is accepted.")] = Steering.threshold,
    proximity: Annotated[float, typer.Option(min=0, help="Weight of |z - z0|^2.")] = Steering.proximity,
    seed: Annotated[int, typer.Option(help="Of everything.")] = Trial.seed,
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures there as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a PGGAN on phantoms without labels, label it by optimising latents and by rejection, and print what came of it."""
    torch.set_num_threads(1)
    try:
        plan = Trial(
            size=size,
            patients=patients,
            width=width,
            latent=latent,
            steps=steps,
            learning_rate=learning_rate,
            augment=augment,
            classifier_steps=classifier_steps,
            latents=latents,
            steering=Steering(threshold=threshold, proximity=proximity),
            seed=seed,
        )
        _settings(plan)
    except ValueError as error:
        raise ConfigError(f"{error}. See --help for what each option takes.") from error
    around = world(plan)
    whole = range(len(around.study.classes))
    ceiling = [around.agreement(around.images[around.labels == number], number) for number in whole]
    generator, stages = grow(plan, around)
    rows = label(plan, around, generator)
    values = {"trial": asdict(plan), "judge_on_real": ceiling, "stages": stages, "classes": rows}
    if out is not None:
        write_json(out, values)
    grown = Table("px", "steps", "FID", "s", title="Growing (first row: untrained)")
    for stage in stages:
        grown.add_row(str(stage["px"]), str(stage["steps"]), f"{stage['fid']:.2f}", f"{stage['seconds']:.0f}")
    told = Table("class", "method", "yield", *COLUMNS)
    for row in rows:
        shown = ["-" if row[key] is None else f"{row[key]:.2f}" for key in COLUMNS.values()]
        told.add_row(row["class"], row["method"], f"{row['accepted']}/{row['tried']}", *shown)
    print_result(as_json, values, grown, told, f"The judge is right on {np.mean(ceiling):.3f} of real images.")


if __name__ == "__main__":
    run_app(app)
