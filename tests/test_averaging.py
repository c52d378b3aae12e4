"""Averaging generators works: three hospitals with styles of their own, G averaged over rounds, D kept at home.

The averaged generator must be nearer to all hospitals' images together than any hospital's own generator is (those it was
averaged from, and those trained alone for as long). The same measure must turn it down when D is made anew in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.conftest import tiny
from xfed.common.classifier import train_round
from xfed.common.features import project_features
from xfed.common.frechet import FeatureSums, feature_sums, frechet_distance
from xfed.common.gan import GanState, build_generator, new_gan_state, ready_generator, render, train_gan_round
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import load_parameters, parameters_of
from xfed.server.aggregate import RunningMean
from xfed.simulations.phantom import apply_style, phantom_arrays, site_style

CPU = torch.device("cpu")
SITES, ROUNDS = 3, 100
STUDY = tiny(
    gan={"width": 8, "steps_per_round": 4, "batch": 32, "latent": 32, "learning_rate_g": 4e-4, "learning_rate_d": 2e-4},
    classifier={"width": 8},
)
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class World:
    """Three hospitals' images, and the eyes (a classifier's features) in which generators are judged."""

    sites: list[np.ndarray]
    judge: torch.nn.Module
    real: FeatureSums

    def distance(self, weights: Weights) -> float:
        """Frechet distance of 450 images to all hospitals' real images."""
        z = torch.rand(450, 32, generator=torch_generator(9, "z")) * 2 - 1
        images = render(ready_generator(STUDY, weights), z)
        return frechet_distance(self.real, feature_sums(project_features(self.judge, images, CPU, "float32")))


@pytest.fixture(scope="module")
def world() -> World:
    patients = dict.fromkeys(STUDY.classes, 400)
    images, labels, numbers = phantom_arrays(
        classes=STUDY.classes, patients=patients, images_per_patient=1, size=32, seed=3
    )
    judge = build_classifier(STUDY, torch_generator(1, "judge"))
    train_round(
        judge,
        images,
        labels,
        None,
        None,
        settings=STUDY.classifier,
        learning_rate=1e-3,
        steps=150,
        generator=torch_generator(2, "judge"),
        precision="float32",
        device=CPU,
    )
    sites = [
        apply_style(images[numbers % SITES == site], site_style(5, site, 1.0), numpy_generator(1, site))
        for site in range(SITES)
    ]
    real = feature_sums(project_features(judge, np.concatenate(sites), CPU, "float32"))
    return World(sites, judge, real)


def _anew(old: GanState, *names: str | int) -> GanState:
    """A new D with its optimizer; G's optimizer stays."""
    state = new_gan_state(STUDY, CPU, *names)
    kept = {key: value for key, value in old.arrays().items() if key.startswith("adam_g")}
    state.restore({**state.arrays(), **kept})
    return state


def _train(world: World, *, average: bool, reset: bool = False) -> tuple[Weights, list[Weights]]:
    """The average after the last round, and the generators it was made from."""
    states = [new_gan_state(STUDY, CPU, "d", site) for site in range(SITES)]
    weights = [parameters_of(build_generator(STUDY, ("g",)))] * SITES
    for round in range(ROUNDS):
        if reset and round:
            states = [_anew(state, "d", site, round) for site, state in enumerate(states)]
        own, mean = [], RunningMean()
        for site, state in enumerate(states):
            load_parameters(state.generator, weights[site])
            rows = np.arange(len(world.sites[site]))
            train_gan_round(state, world.sites[site], rows, STUDY.gan, torch_generator(4, site, round), "bfloat16")
            own.append(parameters_of(state.generator))
            mean.add(own[-1], len(rows))
        weights = [mean.mean()] * SITES if average else own
    return mean.mean(), own


@pytest.mark.timeout(400)
def test_the_averaged_generator_beats_every_sites_own_and_would_not_without_its_discriminators(world: World) -> None:
    kept, own = _train(world, average=True)
    _, alone = _train(world, average=False)
    reset, _ = _train(world, average=True, reset=True)
    averaged = world.distance(kept)
    sites_own = min(world.distance(weights) for weights in [*own, *alone])
    print(f"averaged {averaged:.2f}, best own {sites_own:.2f}, averaged with D reset {world.distance(reset):.2f}")
    assert averaged < sites_own
    assert not world.distance(reset) < sites_own
