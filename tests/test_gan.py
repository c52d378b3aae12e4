"""GAN training at a site: resumes to the bit, learns, and sends nothing but the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import tiny
from xfed.common.gan import build_generator, new_gan_state, ready_generator, render, train_gan_round
from xfed.common.randomness import torch_generator
from xfed.common.weights import load_parameters, parameters_of

CPU = torch.device("cpu")


def _images(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_round_resumed_from_saved_state_equals_an_unbroken_one_to_the_bit(precision: str) -> None:
    study, rows, images = tiny(), np.arange(40), _images()

    def play(interrupt: bool) -> dict[str, np.ndarray]:
        state = new_gan_state(study, CPU, "d")
        load_parameters(state.generator, parameters_of(build_generator(study, ("g",))))
        for round in range(3):
            if interrupt and round == 2:
                saved, weights = state.arrays(), parameters_of(state.generator)
                state = new_gan_state(study, CPU, "something else")
                state.restore(saved)
                load_parameters(state.generator, weights)
            train_gan_round(state, images, rows, study.gan, torch_generator(1, round), precision)
        return {**parameters_of(state.generator), **state.arrays()}

    whole, resumed = play(False), play(True)
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_the_optimizer_moments_matter_for_the_resumed_round() -> None:
    """The test above can fail: without the moments the weights differ."""
    study, rows, images = tiny(), np.arange(40), _images()

    def play(keep: bool) -> dict[str, np.ndarray]:
        state = new_gan_state(study, CPU, "d")
        load_parameters(state.generator, parameters_of(build_generator(study, ("g",))))
        train_gan_round(state, images, rows, study.gan, torch_generator(1, 0))
        if not keep:
            saved = {k: v for k, v in state.arrays().items() if k.startswith("d/")}
            weights = parameters_of(state.generator)
            state = new_gan_state(study, CPU, "d")
            state.restore(saved)
            load_parameters(state.generator, weights)
        train_gan_round(state, images, rows, study.gan, torch_generator(1, 1))
        return parameters_of(state.generator)

    kept, dropped = play(True), play(False)
    assert any(not np.array_equal(kept[name], dropped[name]) for name in kept)


def test_the_generator_learns_the_brightness_of_its_class() -> None:
    study = tiny(
        gan={"steps_per_round": 60, "width": 8, "augment": "none", "learning_rate_g": 1e-3, "learning_rate_d": 1e-3}
    )
    rng = np.random.default_rng(1)
    bright = (200 + rng.normal(0, 8, (64, 32, 32))).clip(0, 255).astype(np.uint8)
    state = new_gan_state(study, CPU, "d")
    load_parameters(state.generator, parameters_of(build_generator(study, ("g",))))
    z = torch.rand(64, 128, generator=torch_generator(9, "z")) * 2 - 1
    before = abs(render(state.generator.calibrate(), z).mean() - 200)
    train_gan_round(state, bright, np.arange(64), study.gan, torch_generator(2, "round"))
    after = abs(render(state.generator.calibrate(), z).mean() - 200)
    assert after < 0.3 * before


def test_r1_penalty_is_the_squared_gradient_norm() -> None:
    """Closed form: of a linear D(x) = w.x it is |w|^2."""
    from xfed.common.gan import _r1

    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
    weight = linear[1].weight.detach()
    penalty = _r1(linear, torch.rand(5, 1, 4, 4))
    assert penalty.item() == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_r1_and_bfloat16_train_without_nan() -> None:
    study = tiny(gan={"r1": 10.0})
    state = new_gan_state(study, CPU, "d")
    load_parameters(state.generator, parameters_of(build_generator(study, ("g",))))
    losses = train_gan_round(state, _images(), np.arange(40), study.gan, torch_generator(1, 0), "bfloat16")
    assert np.isfinite([losses.discriminator, losses.generator]).all()


def test_rendering_is_uint8_over_the_whole_range() -> None:
    study = tiny()
    images = render(ready_generator(study, parameters_of(build_generator(study, ("g",)))), torch.zeros(2, 128))
    assert images.dtype == np.uint8
    assert images.shape == (2, 32, 32)
