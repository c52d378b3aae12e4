"""Phase 1: one generator per class, or one of all images, averaged over the hospitals that hold any; discriminators stay at home.

::

    gan.shared_rounds: one generator "all" of all classes, rounds 1..s (checkpoints/shared-<r>); every G_c, D_c starts from it
    gan.method with dp-merf: generators are fitted to noisy embeddings first (xfed.server.embeddings); alone, that is all
    round r:  G_c --TrainGan--> every site with class c --GanUpdate--> running mean = G_c(r), folded into EMA_c
              all classes in one exchange, so that no core waits      --> checkpoints/gan-<r> (G, EMA, history, sample images)

The average over images of G alone, with D and the optimizers kept at the sites, was measured better than
averaging both, and the moving average over rounds better still (docs/benchmarks.md). The archive is drawn
from the moving average. A generator's name is its class, or "all" for the one of all images (`Study.generators`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.config import Study
from xfed.common.config_family import ALL
from xfed.common.errors import FederationError
from xfed.common.gan import build_generator
from xfed.common.generator_family import shown
from xfed.common.messages import GanUpdate, Reply, Request, TrainGan
from xfed.common.registry import save_generator
from xfed.common.weights import Weights, parameters_of, rounded, under
from xfed.server.aggregate import RunningMean, check_update, moving_average
from xfed.server.embeddings import fit_from_embeddings
from xfed.server.run import ALL_SITES, Run

__all__ = ["Generators", "holders", "sample_images", "train_generators"]

PHASE, SHARED = "gan", "shared"
SHOWN_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Generators:
    """The trained generators by name: moving-average weights, loss history, and samples as they sharpened."""

    weights: dict[str, Weights]
    history: dict[str, list[dict[str, Any]]]
    holders: dict[str, tuple[str, ...]]
    progress: dict[int, npt.NDArray[np.uint8]]


def holders(run: Run) -> dict[str, tuple[str, ...]]:
    """Sites that are asked to train each generator: those with at least `gan.minimum_images`, or all in a secure study.

    Raises `FederationError` where no site holds enough.
    """
    result = {}
    least = run.study.gan.minimum_images
    for number, name in enumerate(run.study.generators):
        if not run.census.holders[number]:
            raise FederationError(_nobody_holds(run.study, name))
        result[name] = tuple(site for site in run.exchange.sites if run.study.secure or _held(run, name, site) >= least)
    return result


def _nobody_holds(study: Study, name: str) -> str:
    least = study.gan.minimum_images
    if study.private:
        return (
            f"no site declares {least} patients of {name} (gan.minimum_images). Leave the "
            "class out of `classes`, or let sites declare more (declared_patients of their policy)."
        )
    if name == ALL:
        return f"no site holds {least} training images (gan.minimum_images). Lower it, or add images."
    return (
        f"no site holds {least} training images of {name} (gan.minimum_images). "
        "Lower it, add images, or leave the class out of `classes`."
    )


def _held(run: Run, name: str, site: str) -> int:
    """Training images of a site that count for generator `name`."""
    training = run.census.sites[site][0]
    if run.study.unlabelled:
        return int(training.sum())
    if name == ALL:
        return int(training[training >= run.study.gan.minimum_images].sum())
    return int(training[run.study.classes.index(name)])


def _drawn(run: Run, name: str) -> int:
    """Training images of all sites that train generator `name`."""
    drawn = run.census.drawn
    return int(drawn.sum() if name == ALL else drawn[run.study.classes.index(name)])


def _shown_rounds(rounds: int) -> set[int]:
    return {max(1, round(rounds * (step + 1) ** 2 / SHOWN_ROUNDS**2)) for step in range(SHOWN_ROUNDS)}


def _pack(prefix: str, weights: dict[str, Weights]) -> dict[str, npt.NDArray[Any]]:
    return {f"{prefix}/{name}/{key}": value for name, arrays in weights.items() for key, value in arrays.items()}


def train_generators(run: Run) -> Generators:
    """Run all rounds of phase 1 that are not done yet, and write models/generator-<name>.safetensors."""
    study, names = run.study, run.study.generators
    sites = holders(run)
    current: dict[str, Weights] = {name: parameters_of(build_generator(study, ("generator", name))) for name in names}
    history: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    progress: dict[int, npt.NDArray[np.uint8]] = {}
    rounds = study.gan.rounds if "dcgan" in study.gan.method else 0
    done = 0
    checkpoint = run.checkpoints.latest(PHASE)
    if checkpoint is None and "dp-merf" in study.gan.method:
        current = fit_from_embeddings(run, current, sites)
        progress[0] = sample_images(study, current, 0)
    average, first = current, study.gan.shared_rounds
    if checkpoint is None and first:
        current = average = dict.fromkeys(names, _shared_start(run))
        done = first
    if checkpoint is not None:
        done, history = checkpoint.round, checkpoint.facts["history"]
        current = {name: under(checkpoint.arrays, f"g/{name}/") for name in names}
        average = {name: under(checkpoint.arrays, f"ema/{name}/") for name in names}
        progress = {int(number): images for number, images in under(checkpoint.arrays, "shown/").items()}
    run.journal.write("phase", phase=PHASE, round=done - first, rounds=rounds)
    for round in range(done + 1, first + rounds + 1):
        new, losses = _one_round(run, round, current, sites)
        # the first rounds are far from anything worth remembering: the decay warms up
        decay = min(study.gan.ema, (round - first - 1) / (round - first + 4))
        average = {name: moving_average(average[name], new[name], decay) for name in names}
        current = new
        for name in names:
            history[name].append({"round": round, **losses[name]})
        if round - first in _shown_rounds(rounds):
            progress[round] = sample_images(study, average, round)
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
        run.journal.write("round", phase=PHASE, round=round - first, rounds=rounds, losses=losses)
    for name in names:
        path = run.folder / "models" / f"generator-{name}.safetensors"
        save_generator(path, study, name, average[name], {"rounds": rounds, "sites": list(sites[name])})
    return Generators(weights=average, history=history, holders=sites, progress=progress)


def _shared_start(run: Run) -> Weights:
    """Weights after `gan.shared_rounds` rounds of one generator from all classes; what is done is not done again."""
    study = run.study
    rounds, held = study.gan.shared_rounds, run.exchange.sites
    sites = {ALL: tuple(site for site in held if study.secure or _held(run, ALL, site))}
    current: dict[str, Weights] = {ALL: parameters_of(build_generator(study, ("generator", ALL)))}
    checkpoint, done = run.checkpoints.latest(SHARED), 0
    if checkpoint is not None:
        done, current = checkpoint.round, {ALL: checkpoint.arrays}
    run.journal.write("phase", phase=SHARED, round=done, rounds=rounds)
    for round in range(done + 1, rounds + 1):
        current, losses = _one_round(run, round, current, sites, SHARED)
        run.checkpoints.save(SHARED, round, dict(current[ALL]), {})
        run.journal.write("round", phase=SHARED, round=round, rounds=rounds, losses=losses)
    return current[ALL]


def _one_round(
    run: Run, round: int, current: dict[str, Weights], sites: dict[str, tuple[str, ...]], phase: str = PHASE
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
            total=_drawn(run, name) if run.study.secure else 0,
        )
        for name in sites
    ]

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, GanUpdate) or not isinstance(request, TrainGan):
            raise FederationError(f"{site} answered {type(reply).__name__} to TrainGan")
        check_update(reply.weights, current[request.class_name], site)
        held = reply.images if site == ALL_SITES else _held(run, request.class_name, site)
        means[request.class_name].add(reply.weights, held)
        sums[request.class_name]["loss_g"] += held * reply.loss_g
        sums[request.class_name]["loss_d"] += held * reply.loss_d

    run.sum(phase, round, requests, list(sites.values()), fold)
    losses = {
        name: {key: value / max(1, means[name].total) for key, value in sums[name].items()}
        | {"sites": means[name].count}
        for name in sites
    }
    return {name: mean.mean() for name, mean in means.items()}, losses


def sample_images(study: Study, weights: Mapping[str, Weights], round: int | None = None) -> npt.NDArray[np.uint8]:
    """Images after `round` (None: when done) from fixed latents, uint8 [C, S, S], so that they can be seen to sharpen.

    One per class; of a generator of all images as many as there are classes, of none in particular.
    """
    if study.unlabelled:
        return shown(study, weights[ALL], round, ALL, len(study.classes))
    return np.concatenate([shown(study, weights[name], round, name) for name in study.classes])
