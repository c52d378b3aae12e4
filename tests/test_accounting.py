"""Epsilon: two accountants and closed forms agree, published rows are met, calibration stays below its target and near it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from xfed.common.accounting import (
    calibrate,
    claim,
    epsilon,
    epsilon_bound,
    epsilon_curve,
    epsilon_estimate,
    epsilons,
    second_opinion,
    smallest_factor,
)
from xfed.common.dp_events import Event
from xfed.common.errors import ConfigError


def event(q: float, sigma: float, steps: int = 1, clip: float = 1.0) -> Event:
    return Event(sampling="none" if q == 1 else "poisson", q=q, sigma=sigma, steps=steps, clip=clip)


def of(*triples: tuple[float, float, int]) -> list[Event]:
    return [event(*triple) for triple in triples]


# (events, delta, PLD figure): shared measurements made with the same library by another program
MEASURED = [
    (of((0.01, 1, 10_000)), 1e-5, 6.188),
    (of((0.064, 1, 1_500)), 1e-4, 16.68),
    (of((0.01, 0.5, 1_000)), 1e-5, 13.36),
    (of((0.01, 10, 1_000)), 1e-5, 0.0978),
    (of((0.064, 1.2, 3_000), (0.128, 1.5, 400)), 1e-4, 21.97),
]


@pytest.mark.parametrize(("events", "delta", "figure"), MEASURED)
def test_figures_of_the_table(events: list[Event], delta: float, figure: float) -> None:
    assert epsilon(events, delta) == pytest.approx(figure, rel=2e-3)


GRID = [
    (of((0.5, 3, 50)), 1e-5),
    (of((0.02, 0.7, 300)), 1e-5),
    (of((0.064, 1, 1_500)), 1e-4),
    (of((0.01, 0.5, 1_000)), 1e-5),
    (of((0.1, 4, 400)), 1e-6),
    (of((0.9, 12, 60)), 1e-5),
    (of((1, 2, 3)), 1e-5),
    (of((1, 3, 1), (0.05, 1.2, 200)), 1e-5),
    (of((0.064, 1.2, 300), (0.128, 1.5, 100), (1, 20, 2)), 1e-4),
    (of((0.3, 5, 40), (0.01, 0.6, 200), (0.2, 2, 10), (1, 6, 1)), 1e-5),
]


@pytest.mark.parametrize(("events", "delta"), GRID)
def test_two_accountants_agree_within_a_per_cent(events: list[Event], delta: float) -> None:
    figures = claim(events, delta)
    assert figures.accountants == ("dp_accounting PLD", "opacus PRV")
    assert figures.second == second_opinion(events, delta)
    assert figures.first == epsilon(events, delta)
    assert figures.second == pytest.approx(figures.first, rel=0.01)
    assert figures.epsilon == figures.first


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.003, 0.02, 0.15])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("steps", [100, 2_000])
def test_two_accountants_agree_on_a_wider_grid(q: float, sigma: float, steps: int) -> None:
    for events in (of((q, sigma, steps)), of((q, sigma, steps), (q / 2, 2 * sigma, 3 * steps), (1, 10, 1))):
        assert second_opinion(events, 1e-5) == pytest.approx(epsilon(events, 1e-5), rel=0.01)


def test_the_larger_figure_is_claimed_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfed.common import accounting

    events = of((0.05, 1.2, 200))
    first = epsilon(events, 1e-5)
    for second, claimed in ((1.05 * first, 1.05 * first), (0.9 * first, first), (1.005 * first, first)):
        monkeypatch.setattr(accounting, "_second", lambda *_, second=second: (second, "another"))
        assert claim(events, 1e-5).epsilon == claimed


def test_rdp_answers_where_prv_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfed.common import accounting

    monkeypatch.setattr(accounting, "_LARGEST_PRV", 1)
    accounting._second.cache_clear()
    try:
        figures = claim(of((0.01, 10, 1_000)), 1e-5)
    finally:
        accounting._second.cache_clear()
    assert figures.accountants[1] == "opacus RDP"
    # Opacus' own orders end at 63 and give 0.135
    assert figures.second == pytest.approx(0.1097, rel=0.01)
    assert figures.epsilon == figures.second > figures.first


def delta_of_gaussian(sigma: float, value: float) -> float:
    """Balle & Wang 2018, theorem 8, as they write it."""
    return float(norm.cdf(0.5 / sigma - value * sigma) - math.exp(value) * norm.cdf(-0.5 / sigma - value * sigma))


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 4.0, 50.0])
def test_without_sampling_the_closed_form_is_met(sigma: float, delta: float) -> None:
    right = brentq(lambda value: delta_of_gaussian(sigma, value) - delta, 0, 100, xtol=1e-14, rtol=1e-14)
    assert epsilon(of((1, sigma, 1)), delta) == pytest.approx(right, rel=1e-6)
    # many releases are one with less noise
    assert epsilon(of((1, 3 * sigma, 9)), delta) == pytest.approx(right, rel=1e-6)
    assert epsilon(of((1, sigma * math.sqrt(3), 1), (1, sigma * math.sqrt(6), 4)), delta) == pytest.approx(
        right, rel=1e-6
    )


def test_the_grid_of_losses_stays_close_above_the_closed_form() -> None:
    almost = [event(1 - 1e-9, 4.0, 30)]  # on the grid, as everything with sampling
    right = epsilon(of((1, 4.0, 30)), 1e-5)
    assert right <= epsilon(almost, 1e-5) * (1 + 1e-6) <= 1.001 * right


def test_clip_order_and_grouping_cost_nothing() -> None:
    events = of((0.1, 2, 30), (0.2, 3, 20), (1, 5, 1))
    expected = epsilon(events, 1e-5)
    split = [event(0.1, 2, 10, 0.5), event(1, 5, 1, 7.0), event(0.2, 3, 20), event(0.1, 2, 20)]
    assert epsilon(split, 1e-5) == pytest.approx(expected, rel=1e-12)
    assert epsilons([events, split], 1e-5) == pytest.approx([expected, expected], rel=1e-12)


def test_composition_is_of_events_and_not_of_epsilons() -> None:
    first, second = of((0.05, 1, 500)), of((0.1, 2, 300))
    together = epsilon(first + second, 1e-5)
    parts = epsilon(first, 1e-5), epsilon(second, 1e-5)
    assert max(parts) < together < sum(parts)


@settings(max_examples=12, deadline=None)
@given(q=st.floats(0.01, 0.9), sigma=st.floats(0.6, 20), steps=st.integers(1, 500), more=st.floats(1.05, 2))
def test_more_noise_costs_less_and_more_of_all_else_costs_more(q: float, sigma: float, steps: int, more: float) -> None:
    value = epsilon(of((q, sigma, steps)), 1e-5)
    room = 1 + 1e-3
    assert epsilon(of((q, more * sigma, steps)), 1e-5) <= value * room
    assert epsilon(of((q, sigma, 2 * steps)), 1e-5) * room >= value
    assert epsilon(of((min(0.99, more * q), sigma, steps)), 1e-5) * room >= value
    assert epsilon(of((q, sigma, steps), (1, 30, 1)), 1e-5) * room >= value
    assert value <= epsilon(of((1, sigma, steps)), 1e-5) * room


@pytest.mark.parametrize(("events", "delta"), [*GRID, *[row[:2] for row in MEASURED]])
def test_the_bound_is_near(events: list[Event], delta: float) -> None:
    assert 0.999 <= epsilon_bound(events, delta) / epsilon(events, delta) <= 1.01


@pytest.mark.parametrize(("events", "delta"), [*GRID, *[row[:2] for row in MEASURED]])
def test_the_estimate_is_near_enough_to_begin_with(events: list[Event], delta: float) -> None:
    assert 0.6 <= epsilon_estimate(events, delta) / epsilon(events, delta) <= 1.1


def test_hardly_any_noise_is_counted_without_the_help_of_sampling() -> None:
    assert epsilon(of((0.01, 0.1, 5)), 1e-5) == epsilon(of((1, 0.1, 5)), 1e-5) > 300
    assert epsilon(of((0.01, 0.1, 5)), 1e-5) > epsilon(of((0.01, 0.3, 5)), 1e-5)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == second_opinion([], 1e-5) == 0
    assert epsilon(of((1, 1e6, 1)), 1e-5) == 0


@pytest.mark.parametrize("delta", [0, -1e-5, 1, 2, 1e-10, math.nan])
def test_a_delta_that_cannot_be_accounted_for_is_refused(delta: float) -> None:
    for ask in (epsilon, epsilon_bound, second_opinion, claim):
        with pytest.raises(ConfigError, match="delta"):
            ask(of((0.1, 1, 1)), delta)
    with pytest.raises(ConfigError, match="delta"):
        calibrate(lambda factor: of((0.1, factor, 1)), 1.0, delta)


def test_the_curve_falls_with_delta() -> None:
    events, deltas = of((0.05, 1.5, 200)), [1e-7, 1e-6, 1e-5, 1e-4]
    curve = epsilon_curve(events, deltas)
    assert [delta for delta, _ in curve] == deltas
    assert [value for _, value in curve] == sorted((value for _, value in curve), reverse=True)
    assert curve[2][1] == epsilon(events, 1e-5)


@pytest.mark.parametrize("target", [0.1, 1, 8])
@pytest.mark.parametrize(
    "base", [of((0.064, 1, 2_000)), of((1, 1, 1)), of((0.01, 0.7, 3_000), (0.3, 10, 10), (1, 20, 1))]
)
def test_calibration_stays_below_its_target_and_near_it(base: list[Event], target: float) -> None:
    def build(factor: float) -> list[Event]:
        return [event(one.q, one.sigma * factor, one.steps) for one in base]

    found = calibrate(build, target, 1e-5)
    assert 0.995 * target <= epsilon(build(found), 1e-5) <= target
    rough = calibrate(build, target, 1e-5, rough=True)
    assert 0.93 * target <= epsilon(build(rough), 1e-5) <= target


@pytest.mark.parametrize("target", [0, -1, math.inf, math.nan])
def test_a_budget_of_nothing_or_of_everything_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and finite"):
        calibrate(lambda factor: of((0.1, factor, 10)), target, 1e-5)


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match="no amount of noise"):
        calibrate(lambda factor: [*of((1, 1, 1)), *of((0.1, factor, 10))], 1.0, 1e-5)
    with pytest.raises(ConfigError, match="empty"):
        calibrate(lambda factor: [], 1.0, 1e-5)


@given(st.floats(0.3, 4), st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_a_factor_is_found_for_any_power(power: float, scale: float, target: float) -> None:
    if not 1e-5 < (scale / target) ** (1 / power) < 1e5:
        return
    found = smallest_factor(lambda factor: scale * factor**-power, target)
    assert 0.995 * target <= scale * found**-power <= target


def test_where_the_measure_jumps_the_upper_side_is_taken() -> None:
    found = smallest_factor(lambda factor: 2.0 if factor < 1.7 else 0.5, 1.0)
    assert 1.7 <= found <= 1.7 * (1 + 1e-5)
