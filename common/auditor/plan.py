"""What a study would cost a site, before anything is trained: from the study file and public numbers of patients alone.

::

    STUDY.yaml + "Class=number,..." --xfed.common.budget.plan_budget--> noise per part --> per class: feasible? epsilon? warnings

This is the one place where the auditor uses the planner that sites and coordinator use: a plan is no claim, the ledger is.
Nothing is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xfed.common.errors import ConfigError

__all__ = ["parse_patients", "plan_facts"]


def parse_patients(text: str) -> dict[str, int]:
    """``"Class=number,..."`` as a mapping. Raises `ConfigError`."""
    found: dict[str, int] = {}
    for item in text.split(","):
        name, separator, number = item.rpartition("=")
        name, number = name.strip(), number.strip()
        if not separator or not name or not (number.isascii() and number.isdecimal()) or len(number) > 9:
            raise ConfigError(
                f"--patients {item.strip()!r:.80}: write it as Class=number, several with commas between, for instance "
                '--patients "Normal=6000,Pneumothorax=1900"'
            )
        if name in found:
            raise ConfigError(f"--patients names {name} twice")
        found[name] = int(number)
    return found


def plan_facts(path: Path, patients: dict[str, int], settings: list[str]) -> dict[str, Any]:
    """The plan as JSON. Raises `ConfigError` where the study is wrong, not private, or no plan is possible."""
    from xfed.common.accounting import epsilon
    from xfed.common.budget import LARGE_SIGMA, plan_budget
    from xfed.common.config import load_study

    study = load_study(path, settings)
    least = study.gan.minimum_images
    # a site declares none where it has too few, so such a class takes no part and costs nothing
    declared = {name: 0 if size < least else size for name, size in patients.items()}
    budget = plan_budget(study, declared)
    classes: dict[str, Any] = {}
    for name in study.classes:
        size = patients.get(name, 0)
        parts = [part for part in budget.parts if part.class_name in (None, name)] if declared.get(name) else []
        loud = [
            part for part in parts if part.name in ("generators", "classifier") and part.per_round.sigma > LARGE_SIGMA
        ]
        reasons = [f"no patients are declared: {name} is not trained at this site"] if not size else []
        if 0 < size < least:
            reasons.append(f"{size} patients are fewer than gan.minimum_images ({least}): the site would declare none")
        reasons += [
            f"{part.name}: noise multiplier {part.per_round.sigma:g} is above {LARGE_SIGMA:g}; hardly anything is learned"
            for part in loud
        ]
        classes[name] = {
            "patients": size,
            "feasible": not reasons,
            "reasons": reasons,
            "epsilon": budget.epsilons.get(name),
            "parts": [
                {
                    "part": part.name,
                    "class": part.class_name,
                    "sampling": part.whole.sampling,
                    "q": part.whole.q,
                    "sigma": part.whole.sigma,
                    "clip": part.whole.clip,
                    "steps": part.whole.steps,
                    "requests": part.requests,
                    "expected_batch": part.expected,
                    "epsilon_alone": epsilon([part.whole], budget.delta),
                }
                for part in parts
            ],
        }
    return {
        "study": study.digest,
        "name": study.name,
        "budget": budget.target,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "overlap": budget.overlap,
        "patients": sum(patients.values()),
        "feasible": all(entry["feasible"] for entry in classes.values() if entry["patients"]),
        "classes": classes,
        "warnings": list(budget.warnings),
    }
