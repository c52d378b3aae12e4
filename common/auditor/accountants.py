"""What events cost, by two accountants that share no code: the auditor's own use of them.

::

    events --added up by (q, sigma)--> dp_accounting PLD (connect the dots, pessimistic) --> first    --+
                                  +--> Opacus PRV, or RDP where PRV cannot               --> second   --+--> Claim

Pure; both libraries take seconds to load and are loaded by the first question. Adding or removing one patient, Poisson sampling.

Formal guarantees
    Events are composed, never epsilons. The larger figure is claimed where the two differ by more than 1% of the smaller.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from xfed.common.auditor.lines import Event
from xfed.common.errors import ConfigError

__all__ = ["Claim", "Mechanisms", "claim", "curve", "largest", "mechanisms"]

Mechanisms = tuple[tuple[float, float, int], ...]
"""(q, sigma, steps), each (q, sigma) once, sorted."""

_SMALLEST_DELTA = 1e-12
_LARGEST_MESH = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Epsilon to claim, both figures, and who computed them (name and version). `agree`: they differ by at most 1%."""

    epsilon: float
    first: float
    second: float
    names: tuple[str, str]

    @property
    def agree(self) -> bool:
        """Whether the two figures are within 1% of the smaller."""
        return abs(self.first - self.second) <= 0.01 * min(self.first, self.second)


def mechanisms(events: Iterable[Event], times: int = 1) -> Mechanisms:
    """The events, each `times` times, added up: neither their order nor their clip costs anything."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        steps[event.q, event.sigma] = steps.get((event.q, event.sigma), 0) + event.steps * times
    return tuple((q, sigma, count) for (q, sigma), count in sorted(steps.items()))


@lru_cache(maxsize=256)
def claim(of: Mechanisms, delta: float) -> Claim:
    """Both figures at `delta`. Raises `ConfigError` on a delta outside [1e-12, 1)."""
    if not _SMALLEST_DELTA <= delta < 1:
        raise ConfigError(f"delta {delta!r} cannot be accounted for: give one from {_SMALLEST_DELTA:g} to below 1")
    names = (f"dp_accounting {version('dp-accounting')} PLD", f"opacus {version('opacus')} PRV")
    if not of:
        return Claim(epsilon=0.0, first=0.0, second=0.0, names=names)
    first = float(_pld(of).get_epsilon(delta))
    with _quiet():
        bound = _rdp(of, delta)
        second = _prv(of, delta, bound)
    if second is None:
        second, names = bound, (names[0], names[1].replace("PRV", "RDP"))
    result = Claim(epsilon=first, first=first, second=second, names=names)
    return result if result.agree else Claim(epsilon=max(first, second), first=first, second=second, names=names)


def largest(groups: Iterable[Mechanisms], delta: float) -> float:
    """The largest epsilon to claim among groups; the second accountant, who is slow, is asked about the largest alone."""
    return claim(max(groups, key=lambda of: curve(of, [delta])[0][1]), delta).epsilon


def curve(of: Mechanisms, deltas: Sequence[float]) -> list[tuple[float, float]]:
    """(delta, epsilon) by the first accountant."""
    return [(delta, float(_pld(of).get_epsilon(delta)) if of else 0.0) for delta in deltas]


@lru_cache(maxsize=64)
def _pld(of: Mechanisms) -> Any:
    dp: Any = importlib.import_module("dp_accounting")
    pld: Any = importlib.import_module("dp_accounting.pld")
    with _quiet():
        accountant = pld.PLDAccountant(
            dp.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_grid(of)
        )
        for q, sigma, steps in of:
            event = dp.GaussianDpEvent(sigma)
            accountant.compose(event if q == 1 else dp.PoissonSampledDpEvent(q, event), steps)
    return accountant


def _grid(of: Mechanisms) -> float:
    """Step of the grid of losses: fine enough that rounding adds some 1e-4 of the variance, and 1e-4 at the coarsest asked for.

    Connecting the dots adds about h^2 / 6 of variance per step; the bound is on the sum over all steps.
    """
    count, variance, widest = 0, 0.0, 0.0
    for q, sigma, steps in of:
        one = 1 / sigma**2 if q == 1 else min(q**2 * math.expm1(min(1 / sigma**2, 6.0)), 1 / sigma**2)
        count, variance = count + (1 if q == 1 else steps), variance + steps * one
        widest = max(widest, 20 / sigma + 0.5 / sigma**2)
    step = math.sqrt(6 * 2e-4 * variance / count)
    return max(min(step, 2e-3), widest / (1 << 20))


def _rdp(of: Mechanisms, delta: float) -> float:
    analysis: Any = importlib.import_module("opacus.accountants.analysis.rdp")
    # orders that are no whole numbers take longest, and only matter for large epsilons
    orders = [1 + x / 10 for x in range(1, 21)] + list(range(4, 64)) + [round(64 * 1.5**k) for k in range(12)]
    total = sum(analysis.compute_rdp(q=q, noise_multiplier=s, steps=n, orders=orders) for q, s, n in of)
    return float(analysis.get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])


def _prv(of: Mechanisms, delta: float, bound: float) -> float | None:
    """The PRV accountant's upper bound; None where its grid would not fit, or it says nothing sensible."""
    if not 0 < bound < math.inf:
        return None
    steps = sum(n for _, _, n in of)
    for share in (0.002, 0.005):
        error = share * bound
        if 2 * (1.6 * bound + 4) / (error / math.sqrt(steps * math.log(12_000 / delta) / 2)) < _LARGEST_MESH:
            break
    else:
        return None
    accountant: Any = importlib.import_module("opacus.accountants.prv").PRVAccountant()
    accountant.history = [(sigma, q, n) for q, sigma, n in of]
    try:
        figure = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError):
        return None
    return figure if 0 < figure <= bound else None


@contextmanager
def _quiet() -> Iterator[None]:
    numpy: Any = importlib.import_module("numpy")
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
