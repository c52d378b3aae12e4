"""Latent class optimisation on toys whose answer is known; rejection sampling as the law of probability has it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from xfed.common.errors import DataError
from xfed.common.latent_classes import (
    Sampled,
    Steering,
    as_pixels,
    gather_accepted,
    log_probability,
    optimise_latents,
    project,
    reject_latents,
    target_row,
)
from xfed.common.randomness import torch_generator

SLOPE = 4.0


def _same(z: Tensor) -> Tensor:
    return z


def _first_two(images: Tensor) -> Tensor:
    """A sigmoid head of two findings: each is there where its coordinate is above 0."""
    return SLOPE * images[:, :2]


def _uniform(count: int, name: str = "z") -> Tensor:
    return torch.rand(count, 6, generator=torch_generator(4, name)) * 2 - 1


BOTH = torch.tensor([1.0, 1.0])
ONE = torch.tensor([1.0, math.nan])
BOX = Steering(prior="uniform", head="sigmoid", proximity=0.0, threshold=0.9)


def test_it_reaches_the_known_optimum_between_class_and_proximity() -> None:
    """Where the threshold is out of reach, a * sigmoid(-a z) = 2 * proximity * (z - z0) holds at the end; by bisection."""
    weight, start = 0.5, -0.3
    low, high = start, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        rising = SLOPE / (1 + math.exp(SLOPE * middle)) > 2 * weight * (middle - start)
        low, high = (middle, high) if rising else (low, middle)
    z0 = torch.full((3, 6), start)
    steering = Steering(
        prior="normal", head="sigmoid", proximity=weight, threshold=0.999999, steps=600, rate=0.01, batch=2
    )
    free = torch.full((3, 40), 1.0)  # far from the shell's edges: the projection does nothing
    found = optimise_latents(_same, _first_two, torch.cat([z0, free], dim=1), ONE, steering)
    assert not found.accepted.any()
    torch.testing.assert_close(found.latents[:, 0], torch.full((3,), low), rtol=0, atol=0.01)
    torch.testing.assert_close(found.latents[:, 1:6], z0[:, 1:])  # what the class does not need stays


@pytest.mark.parametrize(("head", "target"), [("sigmoid", BOTH), ("softmax", torch.tensor([1.0, 0.0]))])
def test_everything_reaches_a_class_that_is_within_reach_and_the_prior_is_kept(head: str, target: Tensor) -> None:
    steering = Steering(prior="uniform", head=head, proximity=0.01, threshold=0.9)
    z0 = _uniform(100)
    found = optimise_latents(_same, _first_two, z0, target, steering)
    assert found.accepted.all()
    assert found.share == 1
    assert (found.probability >= 0.9).all()
    assert found.latents.abs().max() <= 1
    at_once = found.steps == 0
    assert 0 < at_once.sum() < 100
    assert torch.equal(found.latents[at_once], z0[at_once])
    torch.testing.assert_close(found.drift, (found.latents - z0).square().mean(dim=1).sqrt())
    seen = log_probability(_first_two(found.latents), target, head).exp()
    torch.testing.assert_close(found.probability, seen)


@pytest.mark.parametrize("prior", ["sphere", "normal"])
def test_on_the_sphere_and_in_the_shell_it_stays(prior: str) -> None:
    z0 = torch.randn(50, 64, generator=torch_generator(1, "z"))
    z0 = z0 / z0.norm(dim=1, keepdim=True) * 8
    steering = Steering(prior=prior, head="sigmoid", proximity=0.0, rate=0.3, threshold=0.9999)
    found = optimise_latents(_same, _first_two, z0, BOTH, steering)
    length = found.latents.norm(dim=1)
    assert found.steps.max() > 5
    assert (length - 8).abs().max() <= (1e-4 if prior == "sphere" else 1.5 + 1e-4)
    assert (found.latents - z0).norm(dim=1).max() > 1


def test_projection_is_the_identity_on_the_prior_and_nearest_outside() -> None:
    z = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    torch.testing.assert_close(project(z, "sphere"), z * 2 / 5)
    torch.testing.assert_close(project(z, "normal"), z * 3.5 / 5)
    torch.testing.assert_close(project(z / 2, "normal"), z / 2)
    torch.testing.assert_close(project(z, "uniform"), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_proximity_keeps_latents_nearer_and_lets_fewer_through() -> None:
    z0 = _uniform(200)
    near, far = (
        optimise_latents(_same, _first_two, z0, BOTH, Steering(prior="uniform", head="sigmoid", proximity=weight))
        for weight in (3.0, 0.01)
    )
    assert near.drift.mean() < far.drift.mean()
    assert near.share < far.share


def test_rejection_has_the_yield_that_probability_says() -> None:
    """z uniform, p = sigmoid(4 z): accepted where z >= log(9) / 4, a share of (1 - log(9) / 4) / 2."""
    count = 4000
    found = reject_latents(_same, _first_two, _uniform(count), ONE, BOX)
    expected = (1 - math.log(9) / SLOPE) / 2
    slack = 4 * math.sqrt(expected * (1 - expected) / count)
    assert found.share == pytest.approx(expected, abs=slack)
    other = reject_latents(_same, _first_two, _uniform(count), ONE, Steering(prior="uniform", head="sigmoid"))
    assert torch.equal(other.accepted, found.accepted)
    looser = Steering(prior="uniform", head="sigmoid", threshold=0.8)
    assert reject_latents(_same, _first_two, _uniform(count), ONE, looser).share > expected + slack  # can fail
    assert found.looks == count
    assert not found.steps.any()
    assert torch.equal(found.latents, _uniform(count))


def test_optimisation_accepts_all_that_rejection_does_and_more() -> None:
    z = _uniform(300)
    moved, picked = (search(_same, _first_two, z, BOTH, BOX) for search in (optimise_latents, reject_latents))
    assert moved.accepted[picked.accepted].all()
    assert moved.share > 2 * picked.share
    assert moved.looks > picked.looks


def test_each_latent_goes_its_own_way_whatever_the_batch() -> None:
    z = _uniform(23)
    whole = optimise_latents(_same, _first_two, z, BOTH, BOX)
    for batch in (1, 7):
        steering = Steering(prior="uniform", head="sigmoid", proximity=0.0, batch=batch)
        parts = optimise_latents(_same, _first_two, z, BOTH, steering)
        torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-6)
        assert torch.equal(parts.steps, whole.steps)
        assert torch.equal(parts.accepted, whole.accepted)


def test_looks_are_counted_and_bounded() -> None:
    seen = 0

    def generator(z: Tensor) -> Tensor:
        nonlocal seen
        seen += len(z)
        return z

    steering = Steering(prior="uniform", head="sigmoid", steps=7, threshold=0.999999)
    found = optimise_latents(generator, _first_two, _uniform(10), BOTH, steering)
    assert found.looks == seen == 10 * 8
    assert found.steps.tolist() == [7] * 10
    assert optimise_latents(_same, _first_two, _uniform(0), BOTH, steering).share == 0


def test_each_latent_may_have_a_target_of_its_own() -> None:
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, 1.0]]).repeat(10, 1)
    found = optimise_latents(_same, _first_two, _uniform(30), target, BOX)
    assert found.accepted.all()
    there = found.latents[:, :2] > 0
    assert torch.equal(there[0::3], torch.tensor([True, False]).expand(10, 2))
    assert torch.equal(there[1::3], torch.tensor([False, True]).expand(10, 2))
    assert there[2::3, 1].all()


def test_a_sigmoid_heads_target_is_the_product_over_what_is_named() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    p = logits.sigmoid()[0]
    target = target_row(["a", "b", "c"], {"a": True, "b": False})
    assert target.isnan().tolist() == [False, False, True]
    assert log_probability(logits, target, "sigmoid").exp().item() == pytest.approx(float(p[0] * (1 - p[1])))


def test_a_softmax_heads_target_is_exact_for_one_class_and_can_reach_one_for_two() -> None:
    logits = torch.randn(5, 4, generator=torch_generator(1, "logits"))
    one = target_row("abcd", {"c": True})
    torch.testing.assert_close(log_probability(logits, one, "softmax"), logits.log_softmax(1)[:, 2])
    named = target_row("abcd", {"a": False, "b": False, "c": True, "d": False})
    torch.testing.assert_close(log_probability(logits, named, "softmax"), logits.log_softmax(1)[:, 2])
    two = target_row("abcd", {"a": True, "b": True})
    e = logits.exp()
    rest = e[:, 2] + e[:, 3]
    torch.testing.assert_close(
        log_probability(logits, two, "softmax").exp(), e[:, 0] / (e[:, 0] + rest) * e[:, 1] / (e[:, 1] + rest)
    )
    both = torch.tensor([[20.0, 20.0, 0.0, 0.0]])
    assert log_probability(both, two, "softmax").exp().item() == pytest.approx(1)


@pytest.mark.parametrize("target", [[0.0, 0.0], [1.0, 1.0], [math.nan, 0.0]])
def test_a_softmax_head_needs_something_for_and_something_against(target: list[float]) -> None:
    with pytest.raises(ValueError, match="softmax"):
        log_probability(torch.zeros(1, 2), torch.tensor(target), "softmax")


def test_pixels_are_those_of_eight_bits_and_gradients_pass() -> None:
    images = torch.tensor([-1.7, -0.3, 0.1234, 2.0], requires_grad=True)
    kept = as_pixels(images)
    grey = (kept.detach() + 1) * 127.5
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-4)
    assert kept.detach().abs().max() <= 1
    kept.sum().backward()
    assert torch.equal(images.grad, torch.ones(4))


def test_gathering_stops_at_the_count_or_at_the_limit() -> None:
    rng = torch_generator(1, "draw")

    def draw(count: int) -> Tensor:
        return torch.rand(count, 6, generator=rng) * 2 - 1

    def sample(z: Tensor) -> Sampled:
        return reject_latents(_same, _first_two, z, ONE, BOX)

    enough = gather_accepted(sample, draw, count=50, limit=10_000, block=40)
    found = int(enough.accepted.sum())
    assert 50 <= found < 90
    assert len(enough.accepted) == len(enough.latents) == enough.looks < 1000
    short = gather_accepted(sample, draw, count=50, limit=70, block=40)
    assert len(short.accepted) == 70
    assert short.accepted.sum() < 50
    with pytest.raises(ValueError, match="limit"):
        gather_accepted(sample, draw, count=1, limit=0)


def test_the_facts_are_plain_and_say_so_when_nothing_was_accepted() -> None:
    found = optimise_latents(_same, _first_two, _uniform(40), BOTH, BOX)
    facts = found.facts()
    assert facts["tried"] == facts["accepted"] == 40
    assert facts["rejected_share"] == 0
    assert facts["looks_per_accepted"] == found.looks / 40
    assert facts["mean_steps"] == pytest.approx(found.steps.float().mean().item())
    assert facts["seconds_per_accepted"] == found.seconds / 40 > 0
    never = Steering(prior="uniform", head="sigmoid", threshold=0.999999, steps=1)
    none = optimise_latents(_same, _first_two, _uniform(5), BOTH, never)
    assert none.facts()["rejected_share"] == 1
    assert none.facts()["seconds_per_accepted"] is None
    assert none.seconds_each == math.inf


def test_a_diverged_network_is_named() -> None:
    with pytest.raises(DataError, match="not a finite number"):
        optimise_latents(_same, lambda x: x[:, :2] * math.nan, _uniform(3), BOTH, BOX)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"steps": -1},
        {"batch": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"proximity": -0.1},
        {"prior": "gauss"},
        {"head": "tanh"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|there is no"):
        Steering(**wrong)


def test_unknown_findings_and_misshapen_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="Fracture"):
        target_row(["Normal"], {"Fracture": True})
    with pytest.raises(ValueError, match="at least one"):
        target_row(["Normal"], {})
    with pytest.raises(ValueError, match="latents must be"):
        optimise_latents(_same, _first_two, torch.zeros(3), BOTH, BOX)
    with pytest.raises(ValueError, match="target"):
        optimise_latents(_same, _first_two, _uniform(3), torch.zeros(2, 2), BOX)
