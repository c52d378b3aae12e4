"""What every site's privacy budget says, as the coordinator works it out again from public figures.

::

    Description (declared patients per class) --plan_budget--> Budget per site --> noise of the scores, privacy in the report
"""

from __future__ import annotations

from collections.abc import Mapping

from xfed.common.budget import Budget, plan_budget
from xfed.server.run import Run

__all__ = ["budgets_of", "noise_of_scores"]

_PLANS: dict[tuple[str, tuple[int, ...]], Budget] = {}
"""Plans by study and sizes: a plan takes seconds, and is a function of these."""


def budgets_of(run: Run) -> dict[str, Budget]:
    """The plan of each site of a private study. Raises `ConfigError` where a site's declared sizes allow none."""
    names = run.study.classes
    budgets = {}
    for site, description in sorted(run.descriptions.items()):
        sizes = tuple(int(count) for count in description.counts["counts"][0])
        key = (run.study.digest, sizes)
        if key not in _PLANS:
            _PLANS[key] = plan_budget(run.study, dict(zip(names, sizes, strict=True)))
        budgets[site] = _PLANS[key]
    return budgets


def noise_of_scores(budgets: Mapping[str, Budget], sites: list[str]) -> float:
    """Standard deviation of the noise in each cell of the scores, summed over `sites`."""
    variance = 0.0
    for site in sites:
        event = budgets[site].part("scores").per_round
        variance += (event.sigma * event.clip) ** 2
    return float(variance**0.5)
