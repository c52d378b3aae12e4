"""Training and use of a classifier: draws, weights, schedule, determinism, learning, and agreement with slow versions."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from xfed.common.classifier import draw_rows, predict, prepare, sigmoid_decay, train_round
from xfed.common.config import Classifier
from xfed.common.dcnn import DCNN
from xfed.common.errors import DataError, FederationError

CPU = torch.device("cpu")
REAL = np.repeat(np.array([0, 1, 2]), [600, 60, 6])


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stripes(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images of 32 px with a bright band at the left, the middle or the right: three classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    images = draw.integers(0, 60, (count, 32, 32))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 + 10 * label : 8 + 10 * label] += 120
    return images.astype(np.uint8), labels


def train(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    steps: int,
    rate: float = 1e-3,
    **other: object,
) -> float:
    settings = Classifier.model_validate({"batch": 32, "augment": False, **other})
    return train_round(
        model,
        images,
        labels,
        None,
        None,
        settings=settings,
        learning_rate=rate,
        steps=steps,
        generator=seeded(4),
        precision="float32",
        device=CPU,
    )


def test_the_schedule_is_a_falling_sigmoid() -> None:
    rates = [sigmoid_decay(1e-3, number, 19) for number in range(19)]
    assert rates[0] == pytest.approx(1e-3 / (1 + math.exp(-6)))
    assert rates[12] == pytest.approx(0.5e-3)  # two thirds of the way
    assert rates[18] == pytest.approx(1e-3 / (1 + math.exp(3)))
    assert all(after < before for before, after in pairwise(rates))
    for early, late in zip(rates[6:], reversed(rates[6:]), strict=True):
        assert early + late == pytest.approx(1e-3)  # point symmetry about two thirds
    assert sigmoid_decay(1e-3, 0, 1) == pytest.approx(1e-3, rel=0.01)
    for wrong in (-1, 19):
        with pytest.raises(ValueError, match="round"):
            sigmoid_decay(1e-3, wrong, 19)


def test_balanced_draws_take_every_class_and_every_image_alike() -> None:
    rows = draw_rows(REAL, None, 60_000, seeded(), balance="sampling")
    assert rows.dtype == np.int64
    shares = np.bincount(REAL[rows], minlength=3) / 60_000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.01)
    within = np.bincount(rows, minlength=666)[660:]
    np.testing.assert_allclose(within / within.sum(), 1 / 6, atol=0.015)


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_unbalanced_draws_follow_the_counts(balance: str) -> None:
    rows = draw_rows(REAL, None, 60_000, seeded(), balance=balance)
    np.testing.assert_allclose(np.bincount(REAL[rows], minlength=3) / 60_000, np.array([600, 60, 6]) / 666, atol=0.01)


def test_a_class_that_a_site_lacks_is_never_drawn() -> None:
    labels = np.array([0, 0, 3])
    rows = draw_rows(labels, None, 10_000, seeded(), balance="sampling")
    np.testing.assert_allclose((labels[rows] == 3).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (None, 40 / 46)])
def test_synthetic_share_within_a_class(share: float | None, expected: float) -> None:
    synthetic = np.repeat(np.array([2, 3]), [40, 10])
    rows = draw_rows(REAL, synthetic, 60_000, seeded(), balance="sampling", synthetic_share=share)
    everything = np.concatenate([REAL, synthetic])
    drawn, is_synthetic = everything[rows], rows >= len(REAL)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 60_000, 1 / 4, atol=0.01)
    assert is_synthetic[drawn == 2].mean() == pytest.approx(expected, abs=0.015)
    assert not is_synthetic[drawn == 0].any()  # no synthetic image of class 0
    assert is_synthetic[drawn == 3].all()  # no real image of class 3


def test_no_image_at_all_is_an_error_that_says_what_to_do() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(DataError, match="no training image"):
        draw_rows(nothing, None, 4, seeded(), balance="sampling")


def test_draws_depend_on_the_generator_alone() -> None:
    first, same, other = (draw_rows(REAL, None, 50, seeded(seed), balance="sampling") for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_training_is_bitwise_repeatable_and_leaves_global_randomness_alone() -> None:
    images, labels = stripes(60, 0)
    start = DCNN(32, 3, width=4, generator=seeded())
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    state = torch.get_rng_state()
    losses = [train(model, images, labels, 4, augment=True, dropout=0.5) for model in (first, second)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, start.state_dict()[name])


def test_training_learns_and_predict_generalises() -> None:
    images, labels = stripes(300, 0)
    model = DCNN(32, 3, width=4, dropout=0.1, generator=seeded())
    before = train(model, images, labels, 1)
    train(model, images, labels, 60)
    after = train(model, images, labels, 5)
    assert after < 0.7 * before
    unseen, truth = stripes(200, 1)
    probabilities = predict(model, unseen, device=CPU, precision="float32", batch=64)
    assert (probabilities.argmax(axis=1) == truth).mean() > 0.95


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_one_step_is_adam_with_l2_on_the_drawn_batch(smoothing: float) -> None:
    images, labels = stripes(40, 0)
    model = DCNN(32, 3, width=4, dropout=0.0, generator=seeded())
    slow = copy.deepcopy(model)
    loss = train(model, images, labels, 1, momentum=0.5, weight_decay=1e-2, label_smoothing=smoothing)

    rows = draw_rows(labels, None, 32, seeded(4), balance="sampling")
    optimizer = torch.optim.Adam(slow.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=1e-2)
    pixels = images[rows].astype(np.float64)
    pixels = (pixels - pixels.mean((1, 2), keepdims=True)) / pixels.std((1, 2), keepdims=True)
    log_p = slow(torch.from_numpy(pixels[:, None]).float()).log_softmax(dim=1)
    target = (1 - smoothing) * nn.functional.one_hot(torch.from_numpy(labels[rows]), 3) + smoothing / 3
    expected = -(target * log_p).sum(dim=1).mean()
    expected.backward()
    optimizer.step()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    moved = [(a - b).abs().mean().item() for a, b in zip(model.parameters(), slow.parameters(), strict=True)]
    assert max(moved) < 2e-5  # a step is 1e-3: Adam's sign flips only where a gradient is about 0


def test_weights_in_the_loss_undo_the_imbalance() -> None:
    """With balance "loss" the mean weighted gradient is that of balanced classes: so is the best constant answer."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(images), 3)

    labels = np.repeat(np.array([0, 1, 2]), [60, 30, 10])
    images = np.zeros((100, 8, 8), dtype=np.uint8)
    answers = {}
    for balance in ("sampling", "loss", "none"):
        model = Constant()
        train(model, images, labels, 700, 3e-3, balance=balance, batch=64, weight_decay=0.0)
        answers[balance] = model.logits.detach().softmax(dim=0).numpy()
    np.testing.assert_allclose(answers["sampling"], 1 / 3, atol=0.03)
    np.testing.assert_allclose(answers["loss"], 1 / 3, atol=0.05)
    np.testing.assert_allclose(answers["none"], 0.9 * np.array([0.6, 0.3, 0.1]) + 0.1 / 3, atol=0.04)


@pytest.mark.parametrize("balance", ["sampling", "loss", "none"])
def test_a_site_may_lack_the_last_class(balance: str) -> None:
    images, labels = stripes(30, 0)
    assert math.isfinite(train(DCNN(32, 5, width=4, generator=seeded()), images, labels, 1, balance=balance))


def test_memory_maps_and_synthetic_images_reach_the_model(tmp_path: Path) -> None:
    images, labels = stripes(30, 0)
    np.save(tmp_path / "images.npy", images)
    stored = np.load(tmp_path / "images.npy", mmap_mode="r")
    start = DCNN(32, 3, width=4, generator=seeded())
    from_map, from_memory = copy.deepcopy(start), copy.deepcopy(start)
    assert train(from_map, stored, labels, 2) == train(from_memory, images, labels, 2)

    # all real, or the same images half real and half synthetic drawn in proportion: the same rows, the same weights
    split = copy.deepcopy(start)
    settings = Classifier(batch=32, augment=False, synthetic_share=None, balance="none")
    whole = copy.deepcopy(start)

    def two_steps(model: nn.Module, real: slice, synthetic: slice | None) -> None:
        train_round(
            model,
            images[real],
            labels[real],
            None if synthetic is None else images[synthetic],
            None if synthetic is None else labels[synthetic],
            settings=settings,
            learning_rate=1e-3,
            steps=2,
            generator=seeded(),
            precision="float32",
            device=CPU,
        )

    two_steps(whole, slice(None), None)
    two_steps(split, slice(15), slice(15, None))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, split.state_dict()[name])


def test_a_loss_that_is_no_longer_finite_is_an_error() -> None:
    images, labels = stripes(20, 0)
    model = DCNN(32, 3, width=4, generator=seeded())
    with torch.no_grad():
        model.output.bias.fill_(float("nan"))
    with pytest.raises(FederationError, match=r"classifier\.learning_rate"):
        train(model, images, labels, 1)


def test_predict_gives_probabilities_whatever_the_batch_and_leaves_the_mode() -> None:
    images, _ = stripes(7, 0)
    model = DCNN(32, 5, width=4, generator=seeded()).train()
    whole = predict(model, images, device=CPU, precision="float32")
    assert model.training
    assert whole.shape == (7, 5)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(predict(model, images, device=CPU, precision="float32", batch=2), whole, atol=1e-5)
    np.testing.assert_allclose(predict(model, images, device=CPU, precision="bfloat16"), whole, atol=0.05)
    assert predict(model, images[:0], device=CPU, precision="float32").shape == (0, 5)


def test_exposure_does_not_change_the_answer() -> None:
    images, _ = stripes(5, 0)
    model = DCNN(32, 3, width=4, generator=seeded())
    darker = (images // 2 * 2, images // 2)
    answers = [predict(model, version, device=CPU, precision="float32") for version in darker]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)
    assert prepare(torch.from_numpy(images)).shape == (5, 1, 32, 32)
