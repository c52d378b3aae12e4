"""What events cost: epsilon at delta, by two independent implementations, and the noise that a budget asks for.

::

    events --merged by (sampling, q, sigma)--+--only Gaussians without sampling--> closed form (Balle & Wang 2018)
                                             +--else--> dp_accounting: PLD per mechanism (kept) --composed by steps--> epsilon
                                             +--------> Opacus: PRV, or RDP where PRV cannot  --> second opinion
    build(factor) -> events --calibrate--> the smallest factor whose epsilon is within the budget

Nothing is on disk, nothing is random. dp_accounting, Opacus and SciPy take seconds to load and are loaded by the first question.

Formal guarantees
    Epsilon is for adding or removing one patient (both directions), Poisson sampling, and the composition of all events
    given: the privacy loss distributions are composed, never epsilons.
    Every figure is an upper bound up to floating-point rounding: grids are pessimistic (connect the dots, Doroshenko et al.
    2022); so is each figure of `epsilon_bound`, on its coarser grid.
    `calibrate` returns a factor whose epsilon is at most the target.
Not covered
    Delta below 1e-9: float64 rounding in the Fourier transforms would count. Such a delta is refused.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from xfed.common.dp_events import Event
from xfed.common.errors import ConfigError

__all__ = [
    "TIGHTNESS",
    "Claim",
    "calibrate",
    "claim",
    "epsilon",
    "epsilon_bound",
    "epsilon_curve",
    "epsilon_estimate",
    "epsilons",
    "second_opinion",
    "smallest_factor",
]

TIGHTNESS = 0.001
"""How far, relatively, two figures of `epsilon` may lie from what they would be on one common grid."""
_FINE, _COARSE = 4e-4, 1e-2  # relative excess of the variance of the privacy loss that a grid may add
_LARGEST_GRID = 1 << 18
_LARGEST_PRV = 1 << 24
_SMALLEST_SIGMA = 0.2
_SMALLEST_DELTA = 1e-9

Mechanisms = tuple[tuple[float, float, int], ...]
"""Distinct (q, sigma, steps), sorted; at most one of them has q = 1, and then steps = 1."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Both accountants' figures for the same events; `epsilon` is the one to claim."""

    epsilon: float
    first: float
    second: float
    accountants: tuple[str, str]


def _mechanisms(events: Iterable[Event]) -> Mechanisms:
    """Events by (q, sigma): order and clip cost nothing, and Gaussians without sampling compose to one (exactly)."""
    steps: dict[tuple[float, float], int] = {}
    precision = 0.0
    for event in events:
        # sampling only ever lowers the loss; with so little noise its distribution would not fit on a grid
        if event.sampling == "none" or event.sigma < _SMALLEST_SIGMA:
            precision += event.steps / event.sigma**2
        else:
            steps[event.q, event.sigma] = steps.get((event.q, event.sigma), 0) + event.steps
    if precision:
        steps[1.0, 1 / math.sqrt(precision)] = 1
    return tuple((q, sigma, count) for (q, sigma), count in sorted(steps.items()))


def _check(delta: float) -> None:
    if not _SMALLEST_DELTA <= delta < 1:
        raise ConfigError(
            f"delta {delta!r} cannot be accounted for: it must be at least {_SMALLEST_DELTA:g} and below 1; "
            "choose 1 / (10 x patients) or less"
        )


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon >= 0 (may be inf) of all events together at `delta`; 0 without events. Raises `ConfigError` on a wrong delta.

    PLD accountant (dp_accounting); a composition of Gaussians without sampling by Balle & Wang 2018, theorem 8.
    """
    return _epsilon(_mechanisms(events), delta, _FINE)


def epsilon_bound(events: Iterable[Event], delta: float) -> float:
    """The same from above, some ten times faster, on a coarser grid (about 1% higher, rarely more)."""
    return _epsilon(_mechanisms(events), delta, _COARSE)


def epsilon_estimate(events: Iterable[Event], delta: float) -> float:
    """About the same at once, by the central limit theorem (Dong, Roth & Su 2022, section 5): no bound, never to be claimed."""
    _check(delta)
    square = 0.0
    for q, sigma, steps in _mechanisms(events):
        sampled = q**2 * math.expm1(min(1 / sigma**2, 50.0)) if q < 1 else math.inf
        square += steps * min(sampled, 1 / sigma**2)
    return _gaussian_epsilon(1 / math.sqrt(square), delta) if square else 0.0


def epsilon_curve(events: Iterable[Event], deltas: Sequence[float]) -> list[tuple[float, float]]:
    """(delta, epsilon) for each delta, from one composition."""
    mechanisms = _mechanisms(events)
    return [(delta, _epsilon(mechanisms, delta, _FINE)) for delta in deltas]


def epsilons(groups: Iterable[Iterable[Event]], delta: float) -> list[float]:
    """`epsilon` of each group; equal groups are computed once."""
    return [epsilon(group, delta) for group in groups]


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: Mechanisms, delta: float, excess: float) -> float:
    _check(delta)
    if not mechanisms:
        return 0.0
    if len(mechanisms) == 1 and mechanisms[0][0] == 1:
        return _gaussian_epsilon(mechanisms[0][1], delta)
    with _quiet():
        return float(_composed(mechanisms, _grid(mechanisms, excess)).get_epsilon_for_delta(delta))


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    """The epsilon of one Gaussian mechanism, exact to 1e-12 and not below."""
    log_ndtr: Any = importlib.import_module("scipy.special").log_ndtr

    def excess(value: float) -> float:
        left = math.exp(log_ndtr(0.5 / sigma - value * sigma))
        return left - math.exp(min(value + log_ndtr(-0.5 / sigma - value * sigma), 0.0)) - delta

    low, high = 0.0, 1.0
    if excess(low) <= 0:
        return 0.0
    while excess(high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _grid(mechanisms: Mechanisms, excess: float) -> float:
    """The step of the grid of losses, a power of two.

    Rounding a step's loss to the grid adds at most h^2 / 6 or so to its variance; h is chosen so that this is, over all
    steps, `excess` of the whole variance. A power of two lets calls share what is kept.
    """
    count, variance, widest = 0, 0.0, 0.0
    for q, sigma, steps in mechanisms:
        scale = 1 / sigma**2 if q == 1 else min(q**2 * math.expm1(min(1 / sigma**2, 6.0)), 1 / sigma**2)
        count, variance = count + steps, variance + steps * scale
        widest = max(widest, 20 / sigma + 0.5 / sigma**2)
    step = max(math.sqrt(6 * excess * variance / count), widest / _LARGEST_GRID)
    return float(2.0 ** math.floor(math.log2(step)))


@lru_cache(maxsize=32)
def _composed(mechanisms: Mechanisms, grid: float) -> Any:
    *others, (q, sigma, steps) = mechanisms
    last = _self_composed(q, sigma, steps, grid)
    return last.compose(_composed(tuple(others), grid)) if others else last


@lru_cache(maxsize=64)
def _self_composed(q: float, sigma: float, steps: int, grid: float) -> Any:
    one = _distribution(q, sigma, grid)
    return one.self_compose(steps) if steps > 1 else one


@lru_cache(maxsize=64)
def _distribution(q: float, sigma: float, grid: float) -> Any:
    library = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    return library.from_gaussian_mechanism(
        sigma,
        pessimistic_estimate=True,
        value_discretization_interval=grid,
        sampling_prob=q,
        use_connect_dots=True,
        neighboring_relation=library.NeighborRel.ADD_OR_REMOVE_ONE,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the accountants' warnings about steps of the numerics; their figures stay bounds."""
    numpy = importlib.import_module("numpy")
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def second_opinion(events: Iterable[Event], delta: float) -> float:
    """Epsilon of the same events by Opacus: PRV (Gopi et al. 2021), or RDP with orders up to 4,096 where PRV cannot."""
    return _second(_mechanisms(events), delta)[0]


def claim(events: Iterable[Event], delta: float) -> Claim:
    """Both figures, and the one to claim: the first, unless the second is more than 1% away from it and larger."""
    mechanisms = _mechanisms(events)
    first = _epsilon(mechanisms, delta, _FINE)
    second, name = _second(mechanisms, delta)
    apart = abs(first - second) > 0.01 * min(first, second)
    return Claim(
        epsilon=max(first, second) if apart else first,
        first=first,
        second=second,
        accountants=("dp_accounting PLD", name),
    )


@lru_cache(maxsize=256)
def _second(mechanisms: Mechanisms, delta: float) -> tuple[float, str]:
    _check(delta)
    if not mechanisms:
        return 0.0, "opacus RDP"
    with _quiet():
        bound = _rdp(mechanisms, delta)
        figure = _prv(mechanisms, delta, bound, bound)
        if figure is not None and figure < 0.7 * bound:  # the error allowed was a share of a bound that is far above
            figure = _prv(mechanisms, delta, bound, figure) or figure
    return (bound, "opacus RDP") if figure is None or not figure <= bound else (figure, "opacus PRV")


def _rdp(mechanisms: Mechanisms, delta: float) -> float:
    analysis = importlib.import_module("opacus.accountants.analysis.rdp")
    # its own orders stop at 63: too few where there is much noise
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [2**k for k in range(6, 13)]
    orders += [3 * 2**k for k in range(5, 11)]
    orders.sort()
    total: Any = 0.0
    for q, sigma, steps in mechanisms:
        total = total + analysis.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    return float(analysis.get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])


def _prv(mechanisms: Mechanisms, delta: float, bound: float, about: float) -> float | None:
    """Opacus' PRV accountant, to a share of `about`; None where its grid would be too large or it fails."""
    if not 0 < bound < math.inf:
        return None
    count = sum(steps for _, _, steps in mechanisms)
    for share in (0.003, 0.006):
        error = share * about
        mesh = error / math.sqrt(count * math.log(12_000 / delta) / 2)
        if 2 * (1.6 * bound + 4) / mesh < _LARGEST_PRV:
            break
    else:
        return None
    accountant = importlib.import_module("opacus.accountants.prv").PRVAccountant()
    accountant.history = [(sigma, q, steps) for q, sigma, steps in mechanisms]
    try:
        figure = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))
    except (ValueError, RuntimeError, FloatingPointError, ArithmeticError, MemoryError):
        return None
    return figure if math.isfinite(figure) and figure > 0 else None


def calibrate(build: Callable[[float], Sequence[Event]], epsilon: float, delta: float, *, rough: bool = False) -> float:
    """The smallest factor, to half a per cent of epsilon, such that ``epsilon(build(factor)) <= epsilon``.

    `build` gives the events for noise multiplied by `factor` (> 0): more noise must not cost more. `rough` is quicker and
    leaves some five per cent of the budget. Raises `ConfigError` where no factor between 1e-6 and 1e6 meets the budget.
    """
    _check(delta)

    def estimate(factor: float) -> float:
        return epsilon_estimate(build(factor), delta)

    def bound(factor: float) -> float:
        return epsilon_bound(build(factor), delta)

    first = smallest_factor(bound, epsilon, start=smallest_factor(estimate, epsilon), tolerance=0.05 if rough else 0.02)
    if rough:
        return first
    return smallest_factor(lambda factor: _epsilon(_mechanisms(build(factor)), delta, _FINE), epsilon, start=first)


def smallest_factor(
    measure: Callable[[float], float], target: float, *, start: float = 1.0, tolerance: float = 0.005
) -> float:
    """A factor with ``(1 - tolerance) * target <= measure(factor) <= target``, for a decreasing `measure`.

    Where `measure` jumps over that interval, the smallest factor that meets the target, to 1e-6. Raises `ConfigError`.
    """
    if not 0 < target < math.inf:
        raise ConfigError(f"a budget of epsilon {target!r} cannot be planned for: it must be above 0 and finite")
    low: tuple[float, float] | None = None  # log factor, log excess: too little noise
    high: tuple[float, float] | None = None  # enough noise
    before: tuple[float, float] | None = None
    was_above: bool | None = None
    aim = math.log1p(-tolerance / 2)
    x = math.log(start)
    for _ in range(200):
        value = measure(math.exp(x))
        if (1 - tolerance) * target <= value <= target:
            return math.exp(x)
        y = math.log(value / target) - aim if 0 < value < math.inf else math.copysign(50.0, value - target)
        above = value > target
        # the end that stays a second time weighs half (Illinois), or it would hold the other back
        if above == was_above and low is not None and high is not None:
            low, high = (low, (high[0], high[1] / 2)) if above else ((low[0], low[1] / 2), high)
        low, high = ((x, y), high) if above else (low, (x, y))
        was_above = above
        if low is not None and high is not None:
            if high[0] - low[0] < 1e-6:
                return math.exp(high[0])
            x, before = _between(low, high), (x, y)
        else:
            # epsilon falls like a power of the factor: 1 where it is small, 2 and more where it is large
            slope = 1.4 if before is None or before[1] == y else (before[1] - y) / (x - before[0])
            x, before = x + max(min(y / max(slope, 0.3), 2.5), -2.5), (x, y)
        if abs(x) > math.log(1e6):
            break
    if high is None:
        raise ConfigError(
            f"no amount of noise brings these events within epsilon {target:g}: a part of them has noise that is fixed. "
            "Raise privacy.epsilon or do less"
        )
    if low is None:
        raise ConfigError(f"these events stay below epsilon {target:g} with hardly any noise: is the plan empty?")
    return math.exp(high[0])


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Where the line through both points meets 0, kept away from the ends so that the interval shrinks."""
    (a, above), (b, below) = low, high
    share = above / (above - below) if above > below else 0.5
    return a + (b - a) * min(max(share, 0.02), 0.98)
