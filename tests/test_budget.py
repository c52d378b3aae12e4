"""The plan of a site's budget: it meets its target from below, follows public figures alone, and refuses what cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny
from xfed.common.accounting import epsilon
from xfed.common.budget import Budget, _rounded_up, plan_budget
from xfed.common.config import Study
from xfed.common.errors import ConfigError

A, B, C = "Cardiomegaly", "Normal", "Pleural Effusion"


def private(**changes: Any) -> Study:
    privacy = {"epsilon": 3.0, "delta": 1e-5, **changes.pop("privacy", {})}
    gan = {"rounds": 4, "steps_per_round": 25, "batch": 32, **changes.pop("gan", {})}
    classifier = {"balance": "none", "rounds": 5, "batch": 64, **changes.pop("classifier", {})}
    return tiny(privacy=privacy, gan=gan, classifier=classifier, **changes)


SIZES = {A: 300, B: 1500, C: 700}


def spelt_out(budget: Budget, class_name: str) -> float:
    """Epsilon of a class from the parts, written out anew."""
    events = [
        part.per_round for part in budget.parts if part.class_name in (None, class_name) for _ in range(part.requests)
    ]
    return epsilon([event for event in events for _ in range(budget.overlap)], budget.delta)


@pytest.mark.parametrize("method", ["dcgan", "dp-merf", "dp-merf+dcgan"])
@pytest.mark.parametrize("target", [0.5, 3, 10])
@pytest.mark.parametrize("overlap", [1, 3])
def test_the_plan_meets_its_target_from_below(method: str, target: float, overlap: int) -> None:
    budget = plan_budget(private(gan={"method": method}, privacy={"epsilon": target, "overlap": overlap}), SIZES)
    assert 0.98 * target <= budget.epsilon <= target
    assert budget.epsilons.keys() == SIZES.keys()
    assert budget.epsilon == max(budget.epsilons.values())
    for name, value in budget.epsilons.items():
        assert value == pytest.approx(spelt_out(budget, name), rel=1e-9)
        assert value == epsilon(budget.of_class(name), budget.delta)


def test_every_use_of_the_patients_is_in_the_plan() -> None:
    budget = plan_budget(private(gan={"method": "dp-merf+dcgan"}, privacy={"clip": 0.5}), SIZES)
    names = [(part.name, part.class_name) for part in budget.parts]
    own = [(name, of) for of in SIZES for name in ("embeddings", "generators")]
    assert names == [*own, ("classifier", None), ("scores", None)]
    generators = budget.part("generators", B)
    assert (generators.per_round.q, generators.per_round.steps, generators.requests) == (32 / 1500, 25, 4)
    assert (generators.whole.steps, generators.expected, generators.per_round.clip) == (100, 32, 0.5)
    classifier = budget.part("classifier")
    assert classifier.per_round.steps == math.ceil(2500 / 64)  # steps_per_round 0: one pass
    assert (classifier.per_round.q, classifier.requests, classifier.expected) == (64 / 2500, 2 * 5, 64)
    scores, embedding = budget.part("scores"), budget.part("embeddings", A)
    assert (scores.per_round.sampling, scores.requests, scores.per_round.clip) == ("none", 2, math.sqrt(2))
    assert (embedding.per_round.sampling, embedding.requests, embedding.per_round.clip) == ("none", 1, 1.0)
    assert [part.phase for part in budget.parts[:2]] == ["generators", "generators"]


def test_the_classifier_has_the_steps_it_is_told() -> None:
    study = private(classifier={"steps_per_round": 7, "arms": ["DS1"]})
    part = plan_budget(study, SIZES).part("classifier")
    assert (part.per_round.steps, part.requests) == (7, 5)


def test_the_shares_are_relative_epsilons_of_each_part_alone() -> None:
    even = plan_budget(private(), SIZES)
    more = plan_budget(private(privacy={"shares": {"generators": 0.6, "classifier": 0.6}}), SIZES)
    ratio = [
        budget.part("classifier").per_round.sigma / budget.part("generators", A).per_round.sigma
        for budget in (even, more)
    ]
    assert ratio[1] < 0.75 * ratio[0]
    alone = [
        epsilon([even.part(*name).whole], 1e-5) for name in (("generators", A), ("generators", C), ("classifier", None))
    ]
    assert alone[0] == pytest.approx(alone[1], rel=0.1)
    assert alone[2] / alone[0] == pytest.approx(0.35 / 0.6, rel=0.15)


def test_a_class_smaller_than_the_batch_is_read_whole() -> None:
    budget = plan_budget(private(), {A: 20, B: 1500, C: 700})
    part = budget.part("generators", A)
    assert (part.per_round.sampling, part.per_round.q, part.expected) == ("none", 1, 20)
    assert 0.98 * 3 <= budget.epsilon <= 3


def test_a_class_without_patients_takes_no_part() -> None:
    without, absent = plan_budget(private(), {A: 0, B: 1500, C: 700}), plan_budget(private(), {B: 1500, C: 700})
    assert without == absent
    assert without.epsilons.keys() == {B, C}
    with pytest.raises(ConfigError, match=f"no part for generators of {A}"):
        without.part("generators", A)


def test_the_plan_is_the_same_for_everybody() -> None:
    assert plan_budget(private(), SIZES) == plan_budget(private(), dict(reversed(SIZES.items())))


def test_overlap_composes_the_sites_of_a_patient() -> None:
    one, three = plan_budget(private(), SIZES), plan_budget(private(privacy={"overlap": 3}), SIZES)
    assert three.part("classifier").per_round.sigma > 1.3 * one.part("classifier").per_round.sigma
    assert sum(event.steps for event in three.of_class(A)) == 3 * sum(event.steps for event in one.of_class(A))


def test_what_is_infeasible_in_practice_is_said() -> None:
    budget = plan_budget(private(privacy={"epsilon": 0.1}), SIZES)
    small, *noisy = budget.warnings
    assert f"{A} (300)" in small
    assert f"{C} (700)" in small
    assert B not in small
    assert any(f"generators of {A}" in line and "noise multiplier" in line for line in noisy)
    assert plan_budget(private(gan={"method": "dp-merf"}, privacy={"epsilon": 10.0}), SIZES).warnings == ()


@pytest.mark.parametrize("delta", [1 / 2500, 1e-3])
def test_delta_must_be_below_one_in_all_patients(delta: float) -> None:
    with pytest.raises(ConfigError, match=r"not below 1 / 2500 patients.*Choose 4e-05 or less"):
        plan_budget(private(privacy={"delta": delta}), SIZES)
    plan_budget(private(privacy={"delta": 0.99 / 2500}), SIZES)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({}, "nothing to protect"),
        ({A: 0}, "nothing to protect"),
        ({"Hernia": 5}, "none of the study's classes"),
        ({A: -1}, "whole number"),
        ({A: 2.5}, "whole number"),
        ({A: True}, "whole number"),
    ],
)
def test_sizes_that_are_none_are_refused(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_budget(private(), declared)


def test_a_study_without_privacy_has_no_plan() -> None:
    with pytest.raises(ConfigError, match="not private"):
        plan_budget(tiny(), SIZES)


@pytest.mark.parametrize("part", ["generators", "classifier", "scores"])
def test_a_part_without_a_share_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=f"shares.{part} is 0"):
        plan_budget(private(privacy={"shares": {part: 0}}), SIZES)
    if part == "generators":
        plan_budget(private(gan={"method": "dp-merf"}, privacy={"shares": {part: 0}}), SIZES)


@settings(max_examples=200)
@given(st.floats(1e-6, 1e6))
def test_noise_is_rounded_up_to_four_digits(value: float) -> None:
    rounded = _rounded_up(value)
    assert value * (1 - 2e-9) <= rounded <= value * 1.0011
    assert float(f"{rounded:.4g}") == rounded == _rounded_up(rounded)


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.tuples(st.integers(20, 5000), st.integers(1000, 5000)),
    target=st.sampled_from([0.3, 1.0, 8.0]),
    batch=st.integers(8, 256),
)
def test_any_sizes_meet_the_target(sizes: tuple[int, int], target: float, batch: int) -> None:
    study = private(gan={"batch": batch}, privacy={"epsilon": target})
    assert 0.98 * target <= plan_budget(study, dict(zip((A, B), sizes, strict=True))).epsilon <= target
