"""Averaging: the identity for one site, order-free, equal to the textbook, and closed to nonsense."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xfed.common.errors import FederationError
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.weights import parameters_of
from xfed.server.aggregate import RunningMean, check_update, moving_average

FLOATS = hnp.arrays(np.float32, (3, 2), elements=st.floats(-1e6, 1e6, width=32))


@given(FLOATS, st.integers(1, 2**28))
def test_the_mean_of_one_site_is_that_site_exactly(weights: np.ndarray, count: int) -> None:
    mean = RunningMean()
    mean.add({"w": weights}, count)
    assert np.array_equal(mean.mean()["w"], weights)


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    rng = numpy_generator(1, "order")
    sites = [
        (rng.normal(0, 10.0 ** rng.integers(-6, 3), 4000).astype(np.float32), int(rng.integers(1, 5000)))
        for _ in range(5)
    ]
    results = set()
    for order in permutations(range(5)):
        mean = RunningMean()
        for site in order:
            mean.add({"w": sites[site][0]}, sites[site][1])
        results.add(mean.mean()["w"].tobytes())
    assert len(results) == 1


def test_equals_the_weighted_mean_of_numpy() -> None:
    rng = numpy_generator(2, "oracle")
    values = rng.normal(size=(4, 7, 3)).astype(np.float32)
    counts = [3, 1, 10, 7]
    mean = RunningMean()
    for value, count in zip(values, counts, strict=True):
        mean.add({"w": value}, count)
    np.testing.assert_allclose(mean.mean()["w"], np.average(values, axis=0, weights=counts), rtol=1e-6)


def test_one_full_batch_fedsgd_round_equals_one_centralised_step() -> None:
    """McMahan et al. 2017, section 2: the count-weighted mean of full-batch steps is the step on the union."""
    rng = torch_generator(3, "fedsgd")
    x, y = torch.rand(60, 10, generator=rng), torch.randint(4, (60,), generator=rng)

    def step(rows: torch.Tensor) -> dict[str, np.ndarray]:
        torch.manual_seed(0)  # the same starting weights everywhere
        model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        torch.optim.SGD(model.parameters(), 0.5).step()
        return parameters_of(model)

    parts = torch.tensor_split(torch.arange(60), [7, 20, 45])
    mean = RunningMean()
    for part in parts:
        mean.add(step(part), len(part))
    federated, centralised = mean.mean(), step(torch.arange(60))
    for name, value in centralised.items():
        np.testing.assert_allclose(federated[name], value, atol=1e-5)
    unweighted = RunningMean()
    for part in parts:
        unweighted.add(step(part), 1)
    assert any(np.abs(unweighted.mean()[n] - v).max() > 1e-5 for n, v in centralised.items())


def test_zero_weight_other_names_and_empty_means_are_refused() -> None:
    mean = RunningMean()
    with pytest.raises(ValueError, match="nothing"):
        mean.mean()
    with pytest.raises(ValueError, match="at least 1"):
        mean.add({"w": np.zeros(2, np.float32)}, 0)
    mean.add({"w": np.zeros(2, np.float32)}, 1)
    with pytest.raises(ValueError, match="names"):
        mean.add({"v": np.zeros(2, np.float32)}, 1)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"w": np.array([1, np.nan], np.float32)}, "NaN"),
        ({"w": np.array([1, np.inf], np.float32)}, "infinity"),
        ({"w": np.zeros(3, np.float32)}, "expected"),
        ({"w": np.zeros(2, np.float64)}, "float64"),
        ({"v": np.zeros(2, np.float32)}, "other parameters"),
        ({}, "other parameters"),
    ],
)
def test_malformed_updates_are_refused_and_the_site_is_named(update: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(FederationError, match=words) as caught:
        check_update(update, {"w": np.zeros(2, np.float32)}, "site-07")
    assert "site-07" in str(caught.value)


def test_moving_average_closed_form() -> None:
    average = {"w": np.zeros(1, np.float32)}
    for _ in range(10):
        average = moving_average(average, {"w": np.ones(1, np.float32)}, 0.8)
    assert average["w"][0] == pytest.approx(1 - 0.8**10, rel=1e-5)
    assert np.array_equal(
        moving_average(average, {"w": np.full(1, 3, np.float32)}, 0.0)["w"], np.full(1, 3, np.float32)
    )
