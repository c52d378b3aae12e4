"""What a planted privacy bug is, and how it is planted: attributes of imported modules are exchanged, in one process.

::

    planted_noise     sampling and noise         |
    planted_steps     clipping, steps of training| @planted(tests that must fail)
    planted_leaks     what leaves, who takes part|   --> BUGS: name -> Bug
    planted_claims    budgets, ledgers, reports  |
    xfed.simulations.privacy_bugs --fork--> child: Bug.plant(), then pytest on Bug.tests

Nothing is written, no source is edited: what is planted lives and dies with the process that planted it. A bug's name is that of
its function, its description the function's docstring. Each is what somebody did once, or what a hurried change could do.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BUGS", "PARTS", "Bug", "all_bugs", "altered", "exchange", "module", "planted"]

PARTS = ("planted_noise", "planted_steps", "planted_leaks", "planted_claims")
"""Modules that fill `BUGS` when they are imported."""


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One planted bug: `plant` puts it into this process; each of `tests` (pytest ids) must then fail."""

    name: str
    description: str
    plant: Callable[[], None]
    tests: tuple[str, ...]


BUGS: dict[str, Bug] = {}
"""Bugs by name, of the parts that were imported."""


def all_bugs() -> dict[str, Bug]:
    """Every bug by name, in the order in which they are planted."""
    for part in PARTS:
        importlib.import_module(f"xfed.simulations.{part}")
    return BUGS


def module(name: str) -> Any:
    """The module of xfed of that name: what is planted may touch what it does not export."""
    return importlib.import_module(f"xfed.{name}")


def planted(*tests: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Put the function into `BUGS`; `tests` are pytest ids below tests/. Raises `ValueError` for a second bug of a name."""

    def keep(plant: Callable[[], None]) -> Callable[[], None]:
        name = plant.__name__.replace("_", "-")
        if name in BUGS or not plant.__doc__ or not tests:
            raise ValueError(f"the bug {name} is there already, or has no description, or no test")
        ids = tuple(f"tests/{test}" for test in tests)
        BUGS[name] = Bug(name=name, description=plant.__doc__.strip().removesuffix("."), plant=plant, tests=ids)
        return plant

    return keep


def exchange(old: Any, new: Any) -> None:
    """Put `new` wherever an imported module of xfed holds `old` under a name. Raises `LookupError` where none does."""
    found = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("xfed.") and module is not None:
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
                    found += 1
    if not found:
        raise LookupError(f"no module holds {old!r}: the bug was not planted")


def altered(real: Callable[..., Any], **changes: Callable[[dict[str, Any]], Any]) -> None:
    """Call `real` everywhere with some arguments exchanged: name to a function of all arguments by name."""
    signature = inspect.signature(real)

    def changed(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        made = {name: change(bound.arguments) for name, change in changes.items()}
        bound.arguments.update(made)
        return real(*bound.args, **bound.kwargs)

    exchange(real, changed)
