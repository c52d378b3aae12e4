"""Phase 1: one generator per class, averaged over the hospitals that hold the class; discriminators stay at home.

::

    gan.method with dp-merf: generators are fitted to noisy embeddings first (xfed.server.embeddings); alone, that is all
    round r:  G_c --TrainGan--> every site with class c --GanUpdate--> running mean = G_c(r), folded into EMA_c
              all classes in one exchange, so that no core waits      --> checkpoints/gan-<r> (G, EMA, history, sample images)

The average over images of G alone, with D and the optimizers kept at the sites, was measured better than
averaging both, and the moving average over rounds better still (docs/benchmarks.md). The archive is drawn
from the moving average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.config import Study
from xfed.common.dcgan import draw_latent
from xfed.common.errors import FederationError
from xfed.common.gan import build_generator, ready_generator, render
from xfed.common.messages import GanUpdate, Reply, Request, TrainGan
from xfed.common.randomness import torch_generator
from xfed.common.registry import save_generator
from xfed.common.weights import Weights, parameters_of, rounded, under
from xfed.server.aggregate import RunningMean, check_update, moving_average
from xfed.server.embeddings import fit_from_embeddings
from xfed.server.run import ALL_SITES, Run

__all__ = ["Generators", "holders", "sample_images", "train_generators"]

PHASE = "gan"
SHOWN_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Generators:
    """The trained generators: moving-average weights per class, loss history, and samples as they sharpened."""

    weights: dict[str, Weights]
    history: dict[str, list[dict[str, Any]]]
    holders: dict[str, tuple[str, ...]]
    progress: dict[int, npt.NDArray[np.uint8]]


def holders(run: Run) -> dict[str, tuple[str, ...]]:
    """Sites that are asked to train each class: those with at least `gan.minimum_images`, or all in a secure study.

    Raises `FederationError` where no site holds a class.
    """
    result = {}
    least, census = run.study.gan.minimum_images, run.census
    for label, class_name in enumerate(run.study.classes):
        sites = tuple(site for site in run.exchange.sites if run.study.secure or census.sites[site][0, label] >= least)
        if not census.holders[label]:
            if run.study.private:
                raise FederationError(
                    f"no site declares {run.study.gan.minimum_images} patients of {class_name} (gan.minimum_images). Leave the "
                    "class out of `classes`, or let sites declare more (declared_patients of their policy)."
                )
            raise FederationError(
                f"no site holds {run.study.gan.minimum_images} training images of {class_name} (gan.minimum_images). "
                "Lower it, add images, or leave the class out of `classes`."
            )
        result[class_name] = sites
    return result


def _shown_rounds(rounds: int) -> set[int]:
    return {max(1, round(rounds * (step + 1) ** 2 / SHOWN_ROUNDS**2)) for step in range(SHOWN_ROUNDS)}


def _pack(prefix: str, weights: dict[str, Weights]) -> dict[str, npt.NDArray[Any]]:
    return {f"{prefix}/{name}/{key}": value for name, arrays in weights.items() for key, value in arrays.items()}


def train_generators(run: Run) -> Generators:
    """Run all rounds of phase 1 that are not done yet, and write models/generator-<class>.safetensors."""
    study = run.study
    sites = holders(run)
    current: dict[str, Weights] = {
        name: parameters_of(build_generator(study, ("generator", name))) for name in study.classes
    }
    history: dict[str, list[dict[str, Any]]] = {name: [] for name in study.classes}
    progress: dict[int, npt.NDArray[np.uint8]] = {}
    rounds = study.gan.rounds if "dcgan" in study.gan.method else 0
    done = 0
    checkpoint = run.checkpoints.latest(PHASE)
    if checkpoint is None and "dp-merf" in study.gan.method:
        current = fit_from_embeddings(run, current, sites)
        progress[0] = sample_images(study, current)
    average = current
    if checkpoint is not None:
        done, history = checkpoint.round, checkpoint.facts["history"]
        current = {name: under(checkpoint.arrays, f"g/{name}/") for name in study.classes}
        average = {name: under(checkpoint.arrays, f"ema/{name}/") for name in study.classes}
        progress = {int(number): images for number, images in under(checkpoint.arrays, "shown/").items()}
    run.journal.write("phase", phase=PHASE, round=done, rounds=rounds)
    for round in range(done + 1, rounds + 1):
        new, losses = _one_round(run, round, current, sites)
        # the first rounds are far from anything worth remembering: the decay warms up
        decay = min(study.gan.ema, (round - 1) / (round + 4))
        average = {name: moving_average(average[name], new[name], decay) for name in study.classes}
        current = new
        for name in study.classes:
            history[name].append({"round": round, **losses[name]})
        if round in _shown_rounds(rounds):
            progress[round] = sample_images(study, average)
        run.checkpoints.save(
            PHASE,
            round,
            {
                **_pack("g", current),
                **_pack("ema", average),
                **{f"shown/{number}": images for number, images in progress.items()},
            },
            {"history": history},
        )
        run.journal.write("round", phase=PHASE, round=round, rounds=rounds, losses=losses)
    for name in study.classes:
        path = run.folder / "models" / f"generator-{name}.safetensors"
        save_generator(path, study, name, average[name], {"rounds": rounds, "sites": list(sites[name])})
    return Generators(weights=average, history=history, holders=sites, progress=progress)


def _one_round(
    run: Run, round: int, current: dict[str, Weights], sites: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Weights], dict[str, dict[str, float]]]:
    means = {name: RunningMean() for name in sites}
    sums = {name: {"loss_g": 0.0, "loss_d": 0.0} for name in sites}
    requests = [
        TrainGan(
            study=run.study.digest,
            class_name=name,
            round=round,
            payload=run.study.federation.payload,
            weights=rounded(current[name], run.study.federation.payload),
            total=int(run.census.drawn[label]) if run.study.secure else 0,
        )
        for label, name in enumerate(sites)
    ]

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, GanUpdate) or not isinstance(request, TrainGan):
            raise FederationError(f"{site} answered {type(reply).__name__} to TrainGan")
        check_update(reply.weights, current[request.class_name], site)
        label = run.study.classes.index(request.class_name)
        held = reply.images if site == ALL_SITES else int(run.census.sites[site][0, label])
        means[request.class_name].add(reply.weights, held)
        sums[request.class_name]["loss_g"] += held * reply.loss_g
        sums[request.class_name]["loss_d"] += held * reply.loss_d

    run.sum(PHASE, round, requests, list(sites.values()), fold)
    losses = {
        name: {key: value / max(1, means[name].total) for key, value in sums[name].items()}
        | {"sites": means[name].count}
        for name in sites
    }
    return {name: mean.mean() for name, mean in means.items()}, losses


def sample_images(study: Study, weights: Mapping[str, Weights]) -> npt.NDArray[np.uint8]:
    """One image per class from fixed latents, uint8 [C, S, S]: the same ones each round, so that they can be seen to sharpen."""
    images = []
    for name in study.classes:
        generator = ready_generator(study, weights[name])
        z = draw_latent(1, study.gan.latent, torch_generator(study.seed, "shown", name))
        images.append(render(generator, z)[0])
    return np.stack(images)
