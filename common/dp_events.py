"""What was done to patients' data, in the words of differential privacy: the events that everything is counted from.

::

    study + declared sizes --xfed.common.budget--> Event per part of the study --> mechanism runs --> ledger lines
                                                                                               --> accountants: epsilon

An event is one mechanism run a number of times. Composition is over events, never over epsilons: the order does not matter, so
equal events are added up by their steps. Terms as in dp_accounting: Poisson sampling of patients, Gaussian mechanism,
neighbours differ by one patient (add or remove).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

__all__ = ["Event", "exposures", "merged"]

_KEYS = ("mechanism", "unit", "sampling", "q", "sigma", "steps", "clip")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A Gaussian mechanism, run `steps` times. Raises `ValueError` where a value is outside its range.

    Each time every patient is taken with probability `q` (in (0, 1]; 1 without sampling), the sum over those taken changes by at
    most `clip` (L2) when a patient is added or removed, and noise of standard deviation ``sigma * clip`` is added to it.
    """

    sampling: Literal["poisson", "none"]
    q: float
    sigma: float
    steps: int
    clip: float
    mechanism: str = "gaussian"
    unit: str = "patient"

    def __post_init__(self) -> None:
        for name in ("q", "sigma", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, not {value!r}")
        if self.q > 1 or (self.sampling == "none") != (self.q == 1):
            raise ValueError(f"q is {self.q!r} with sampling {self.sampling!r}: below 1 with poisson, 1 with none")
        if self.sampling not in ("poisson", "none"):
            raise ValueError(f"sampling must be poisson or none, not {self.sampling!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be a whole number, 1 or more, not {self.steps!r}")
        if self.mechanism != "gaussian" or self.unit != "patient":
            raise ValueError(
                f"only the gaussian mechanism for a patient is known, not {self.mechanism!r}, {self.unit!r}"
            )

    def times(self, steps: int) -> Event:
        """The same mechanism run `steps` times."""
        return replace(self, steps=steps)

    def as_json(self) -> dict[str, Any]:
        """Plain values, in the order of the ledger's contract."""
        values = asdict(self)
        return {key: values[key] for key in _KEYS}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Event:
        """The inverse of `as_json`. Raises `ValueError` on other keys or values."""
        if values.keys() != set(_KEYS):
            raise ValueError(f"an event holds {', '.join(_KEYS)}, not {', '.join(map(str, values))}")
        return cls(**dict(values))


def merged(events: Iterable[Event]) -> list[Event]:
    """Equal mechanisms added up by their steps, in the order of their first appearance."""
    steps: dict[Event, int] = {}
    for event in events:
        key = event.times(1)
        steps[key] = steps.get(key, 0) + event.steps
    return [event.times(count) for event, count in steps.items()]


def exposures(spent: Sequence[tuple[str | None, Event]], *, overlap: int) -> dict[str | None, list[Event]]:
    """What patients of each class were exposed to: events of their class and those of every class. None: the latter alone."""
    names = [None, *dict.fromkeys(name for name, _ in spent if name is not None)]
    return {
        name: merged(event.times(event.steps * overlap) for of, event in spent if of in (None, name)) for name in names
    }
