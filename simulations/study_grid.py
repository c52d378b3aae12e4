"""What `xfed-sim study` has to run: cells, and in each cell a base run and one run per arm.

::

    experiment: sites x skews x seeds x folds --> Cell --> base: all three phases, arm DS1 (phases 1 and 2 are shared by the arms)
                                 x models --> Task(arm): phase 3 alone on the base's sites and archive
                                              Task(alone): one run per site; Task(pooled): one site that has everybody's images

    OUT/cells/<cell>/base/                  a run folder; OUT/cells/<cell>/<arm>[-<model>]/<part>/: the others
    OUT/cells/<cell>/<task>/task.json       what was asked, with its digest; outcomes.npz: there only when it is finished

Patients keep their place and number in all folds and seeds (`data.seed`), so outcomes can be paired. A task is named by what it
is, and its digest by everything that changes its figures: a finished task of the same digest is not run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from xfed.common.arms import ARMS
from xfed.common.config import Study, parse_study
from xfed.common.errors import ConfigError
from xfed.common.randomness import seed_for
from xfed.common.version import SOFTWARE

__all__ = ["ALONE", "POOLED", "Cell", "Task", "arm_titles", "cells_of", "check_arms", "tasks_of"]

ALONE, POOLED = "alone", "pooled"
SIMULATED = {ALONE: "each site alone (mean over sites)", POOLED: "all images at one site"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of the grid: its `study` is that of the base run. `seed`: one of the experiment's; each fold has one of its
    own from it, so that folds differ in the noise of training, too.
    """

    study: Study
    seed: int
    fold: int

    @property
    def group(self) -> str:
        """Sites and skew in a name: the cells whose outcomes are put together."""
        sites = self.study.sites
        skew = "even" if sites.partition == "even" else f"dirichlet-{sites.alpha:g}"
        return f"{sites.count}-sites-{skew}"

    @property
    def name(self) -> str:
        """Unique in the grid; a folder's name."""
        return f"{self.group}-seed-{self.seed}-fold-{self.fold}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of work: the base of a cell, or one arm of it with one classifier model."""

    cell: Cell
    arm: str
    model: str
    base: bool = False

    @property
    def study(self) -> Study:
        """The study to run; for an arm of `alone` or `pooled`, that of one site (its archive is set when the base is done)."""
        values = self.cell.study.resolved()
        if not self.base:
            values["classifier"] |= {"arms": ["DS1" if self.arm in SIMULATED else self.arm], "model": self.model}
            if self.arm in SIMULATED:
                values["sites"] = {"count": 1}
        return parse_study(values, f"arm {self.arm}")

    @property
    def name(self) -> str:
        """A folder's name within the cell."""
        return "base" if self.base else f"{self.arm}-{self.model}"

    def folder(self, out: Path) -> Path:
        """The task's folder under the study's."""
        return out / "cells" / self.cell.name / self.name

    def base_folder(self, out: Path) -> Path:
        """The folder of the cell's base."""
        return out / "cells" / self.cell.name / "base"

    def digest(self, source: str) -> str:
        """Hex SHA-256 of everything that the task's figures hang on; `source` names the images."""
        facts = [self.cell.study.digest, self.study.digest, self.name, source, SOFTWARE]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def arm_titles(arms: Sequence[str]) -> dict[str, str]:
    """Each arm in words."""
    known = {str(name): recipe.title for name, recipe in ARMS.items()} | SIMULATED
    return {arm: known[arm] for arm in arms}


def check_arms(study: Study) -> None:
    """Raises `ConfigError` where the experiment names an arm that there is not, or cannot be made of this study."""
    known = [*map(str, ARMS), *SIMULATED]
    for arm in study.experiment.arms:
        if arm not in known:
            raise ConfigError(f"experiment.arms: there is no arm {arm!r}; the arms are {', '.join(known)}")
    if study.experiment.baseline not in study.experiment.arms:
        raise ConfigError(f"experiment.baseline: {study.experiment.baseline!r} is not among experiment.arms")
    if study.private:
        raise ConfigError(
            "a private study cannot be repeated over folds and arms: each run would spend the budget anew. Utility beside "
            "epsilon: python -m xfed.simulations.privacy_utility"
        )


def cells_of(study: Study) -> list[Cell]:
    """All cells of the grid, in the order in which they should be run: whole folds of the first seed and setting first."""
    experiment = study.experiment
    settings = product(
        experiment.sites or (study.sites.count,),
        experiment.skews or (study.sites.partition,),
        experiment.seeds or (study.seed,),
        range(experiment.folds),
    )
    return [
        Cell(study=_base(study, sites, skew, seed, fold), seed=seed, fold=fold) for sites, skew, seed, fold in settings
    ]


def _base(study: Study, sites: int, skew: str, seed: int, fold: int) -> Study:
    values = study.resolved()
    values["seed"] = seed_for(seed, "fold", fold) % 2**31
    values["data"] |= {"seed": study.data_seed}
    values["data"]["splits"] |= {"folds": study.experiment.folds, "fold": fold}
    values["sites"] |= {"count": sites, "partition": skew}
    values["sites"]["missing"] = {k: v for k, v in values["sites"]["missing"].items() if int(k) <= sites}
    # what tests an archive before its release, and scores it alone, is the affair of `xfed-sim run`
    values["archive"] |= {"vote": False, "attacks": False, "tstr_steps": 0}
    values["classifier"] |= {"arms": ["DS1"]}
    values["runtime"] |= {"backend": "local", "workers": 1, "threads": 1}
    return parse_study(values, "a cell of the study")


def tasks_of(cell: Cell) -> Iterator[Task]:
    """The base first, then each arm with each classifier; DS1 with the study's own classifier comes with the base."""
    study = cell.study
    own = study.classifier.model
    yield Task(cell=cell, arm="DS1", model=own, base=True)
    for model, arm in product(study.experiment.models or (own,), study.experiment.arms):
        if (arm, model) != ("DS1", own) and not (arm in SIMULATED and study.sites.count == 1):
            yield Task(cell=cell, arm=arm, model=model)
