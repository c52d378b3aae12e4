"""PGGAN training at a site: the loss in closed form, resumed to the bit, in lockstep, and it learns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from typer.testing import CliRunner

from xfed.common.errors import ConfigError, FederationError
from xfed.common.frechet import feature_sums, frechet_distance
from xfed.common.gan import GanState, render
from xfed.common.growing import Place, Schedule
from xfed.common.latent_classes import Steering
from xfed.common.pggan import Generator, draw_latent, faded
from xfed.common.pggan_training import PgganSettings, gradient_penalty, new_pggan_state, train_pggan_round
from xfed.common.randomness import torch_generator
from xfed.common.weights import load_parameters, parameters_of
from xfed.simulations import pggan_trial
from xfed.simulations.phantom import phantom_arrays

CPU = torch.device("cpu")
ROWS = np.arange(40)
FAST = {"learning_rate_g": 3e-3, "learning_rate_d": 3e-3}  # few steps: 1e-3 is for hundreds of thousands


def _settings(steps: tuple[int, ...] = (3, 3, 3, 3), **changes: object) -> PgganSettings:
    values = {"steps_per_round": 2, "batch": 4, "width": 1, "latent": 16, **changes}
    return PgganSettings(schedule=Schedule(32, steps), **values)


def _state(settings: PgganSettings, name: str = "d") -> GanState:
    state = new_pggan_state(settings, CPU, torch_generator(1, name))
    g = Generator(32, settings.width, settings.latent, torch_generator(1, "g"))
    load_parameters(state.generator, parameters_of(g))
    return state


def _images(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, 32, 32), dtype=np.uint8)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16 * 16, generator=torch_generator(1, "w")))

    def forward(self, images: torch.Tensor, place: Place) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def test_the_penalty_of_a_linear_discriminator_is_known_and_so_is_its_slope() -> None:
    """Closed form: D(x) = w.x has the gradient w everywhere, so (|w| - 1)^2 with the slope 2 (|w| - 1) w / |w|."""
    d = _Linear()
    real, fake, mix = torch.rand(5, 1, 16, 16), torch.rand(5, 1, 16, 16), torch.rand(5, 1, 1, 1)
    penalty = gradient_penalty(d, real, fake, mix, Place(2))
    length = d.weight.detach().norm()
    assert penalty.item() == pytest.approx(float((length - 1) ** 2), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(d.weight.grad, 2 * (length - 1) * d.weight.detach() / length)


def test_the_penalty_is_taken_between_real_and_fake_and_teaches_the_generator_nothing() -> None:
    """Of D(x) = |x|^2 / 2 the gradient is x itself: so the penalty tells where it was taken."""

    class Square(nn.Module):
        def forward(self, images: torch.Tensor, place: Place) -> torch.Tensor:
            return images.square().flatten(1).sum(1) / 2

    real, fake = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4).requires_grad_(True)
    mix = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    penalty = gradient_penalty(Square(), real + 1, fake * 3, mix, Place(0))
    expected = ((4 * 1.0 - 1) ** 2 + (4 * 2.0 - 1) ** 2) / 2  # |x| = 4 times the grey value, 16 pixels
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(penalty, fake, allow_unused=True) == (None,)


@pytest.mark.parametrize("step0", [1, 7])
def test_one_step_is_the_wasserstein_loss_with_penalty_and_drift(step0: int) -> None:
    settings = _settings(steps_per_round=1, penalty=2.0, drift=0.5)
    state = _state(settings)
    images = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (40, 32, 1)).repeat(32, axis=2)
    d, g = copy.deepcopy(state.discriminator), copy.deepcopy(state.generator)
    losses = train_pggan_round(state, images, ROWS, settings, torch_generator(3, "r"), step0=step0)

    place, rng = settings.schedule.at(step0), torch_generator(3, "r")
    rows = torch.randint(40, (4,), generator=rng).numpy()
    real = faded(torch.from_numpy(images[rows])[:, None] / 127.5 - 1, place)
    z = draw_latent(4, 16, rng)
    mix = torch.rand(4, 1, 1, 1, generator=rng)
    fake = g(z, place).detach()
    points = (real * (1 - mix) + fake * mix).requires_grad_(True)
    (slope,) = torch.autograd.grad(d(points, place).sum(), points)
    on_real, on_fake = d(real, place), d(fake, place)
    penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
    expected = on_fake.mean() - on_real.mean() + 2 * penalty + 0.5 * (on_real**2).mean()
    assert losses.discriminator == pytest.approx(expected.item(), rel=1e-5)
    after = -state.discriminator(fake, place).mean()  # G's step sees the D that has just moved
    assert losses.generator == pytest.approx(after.item(), rel=1e-4)
    assert after.item() != pytest.approx(-on_fake.mean().item(), rel=1e-4)


def _play(interrupt_before: int | None, precision: str, keep_moments: bool = True) -> dict[str, np.ndarray]:
    """Five rounds of two steps through four stages; the process is lost before one of them."""
    settings, images = _settings(augment="translation"), _images()
    state = _state(settings)
    for round in range(5):
        if round == interrupt_before:
            saved, weights = state.arrays(), parameters_of(state.generator)
            kept = saved if keep_moments else {k: v for k, v in saved.items() if k.startswith("d/")}
            state = new_pggan_state(settings, CPU, torch_generator(1, "something else"))
            state.restore(kept)
            load_parameters(state.generator, weights)
        train_pggan_round(state, images, ROWS, settings, torch_generator(1, round), precision, 2 * round)
    return {**parameters_of(state.generator), **state.arrays()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("interrupt_before", [1, 3])
def test_a_round_resumed_from_saved_state_equals_an_unbroken_one_to_the_bit(
    precision: str, interrupt_before: int
) -> None:
    whole, resumed = _play(None, precision), _play(interrupt_before, precision)
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_the_optimizer_moments_matter_for_the_resumed_round() -> None:
    """The test above can fail: without the moments the weights differ."""
    kept, dropped = _play(3, "float32"), _play(3, "float32", keep_moments=False)
    assert any(not np.array_equal(kept[name], dropped[name]) for name in kept)


def test_the_step_alone_says_how_far_a_site_grows_and_later_layers_are_left_alone() -> None:
    settings = _settings()
    for step0, stage in ((0, 0), (3, 1), (10, 3)):
        before, states = parameters_of(_state(settings).generator), []
        for site in range(2):
            state = _state(settings, f"d{site}")
            train_pggan_round(
                state, _images()[site:], ROWS[: 20 + site], settings, torch_generator(1, site), step0=step0
            )
            states.append(state)
        for state in states:
            moved = {name for name, value in parameters_of(state.generator).items() if (value != before[name]).any()}
            assert any(name.startswith(f"to_grey.{stage}.") for name in moved)
            assert not any(name.startswith(f"to_grey.{later}.") for name in moved for later in range(stage + 1, 4))
            assert not any(name.startswith(f"blocks.{later}.") for name in moved for later in range(stage, 4))
            assert f"adam_g/step/to_grey.{stage}.weight" in state.arrays()


def test_training_on_phantoms_comes_nearer_to_them() -> None:
    """Frechet distance of 8 x 8 averages: under half the untrained generator's, and under one grey picture's."""
    classes = ["Cardiomegaly", "Normal", "Pleural Effusion"]
    images, _, _ = phantom_arrays(
        classes=classes, patients=dict.fromkeys(classes, 40), images_per_patient=1, size=32, seed=1
    )
    settings = _settings((40, 40, 40, 60), steps_per_round=180, batch=8, **FAST)
    state, z = _state(settings), draw_latent(120, 16, torch_generator(9, "z"))

    def distance(pictures: np.ndarray) -> float:
        small = avg_pool2d(torch.from_numpy(pictures)[:, None].double() / 255, 4).flatten(1).numpy()
        real = avg_pool2d(torch.from_numpy(images)[:, None].double() / 255, 4).flatten(1).numpy()
        return frechet_distance(feature_sums(real), feature_sums(small))

    untrained = distance(render(state.generator, z))
    grey = distance(np.full_like(images, round(float(images.mean()))))
    train_pggan_round(state, images, np.arange(len(images)), settings, torch_generator(2, "round"))
    trained = distance(render(state.generator, z))
    print(f"untrained {untrained:.2f}, grey {grey:.2f}, trained {trained:.2f}")
    assert trained < 0.5 * untrained
    assert trained < grey


def test_weights_that_are_no_numbers_are_named() -> None:
    settings = _settings()
    state = _state(settings)
    with torch.no_grad():
        state.generator.project.weight.fill_(np.nan)
    with pytest.raises(FederationError, match="Lower the learning rates"):
        train_pggan_round(state, _images(), ROWS, settings, torch_generator(1, 0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps_per_round": 0},
        {"batch": 1},
        {"width": 0},
        {"latent": 1},
        {"learning_rate_g": 0.0},
        {"learning_rate_d": 2.0},
        {"penalty": -1.0},
        {"drift": float("nan")},
        {"augment": "mirror"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        _settings(**wrong)


def test_the_trial_runs_from_phantoms_to_labels() -> None:
    trial = pggan_trial.Trial(
        patients=12,
        width=1,
        latent=16,
        batch=4,
        steps=40,
        classifier_steps=2,
        latents=3,
        steering=Steering(threshold=0.3, steps=4),
    )
    world = pggan_trial.world(trial)
    generator, stages = pggan_trial.grow(trial, world)
    assert [stage["px"] for stage in stages] == [32, 4, 8, 16, 32]
    assert stages[-1]["steps"] == 40
    assert np.isfinite([stage["fid"] for stage in stages]).all()
    rows = pggan_trial.label(trial, world, generator)
    assert [row["method"] for row in rows] == ["optimised", "rejection"] * 5
    for row in rows:
        assert row["tried"] >= row["accepted"] >= 0
        assert (row["judge"] is None) == (row["accepted"] == 0)
        assert row["fid"] is None or row["fid"] >= 0


def test_the_trial_names_a_wrong_option() -> None:
    result = CliRunner().invoke(pggan_trial.app, ["--threshold", "2"])
    assert isinstance(result.exception, ConfigError)
    assert "threshold must be above 0" in str(result.exception)
