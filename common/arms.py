"""The arms of a study: what each classifier is taught from, and how. All other settings are the same in every arm.

::

    classifier.arms: [DS1, DS3, ...] --ARMS[name]--> Recipe --at the site--> rows of real images, synthetic or not, settings
                                                            --at the coordinator--> start from the archive or not

    DS1, DS2, DS3   Salehinejad et al. 2018, section 3.3: real, real balanced, real + synthetic; balancing of draws and
                    augmentation as the study says, alike in all three
    controls        what synthetic images have to beat. Every arm takes the same number of steps of the same batch

An arm's name is part of its random streams, so two arms with one recipe are two runs of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xfed.common.config import Study
from xfed.common.config_phases import Arm, Classifier

__all__ = ["ARMS", "START", "STEERING", "Recipe", "recipe", "settings_of_arm"]


START = 400
STEERING = "steering"
"""The classifier that labels the images of a generator of all images: no arm of the study, taught like DS1 before phase 2."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One arm. `real`: all training images, as many of each class as of the rarest one at the site, or none.

    `synthetic`: the archive is among the images. `start`: the classifier is first taught by the archive alone, at the
    coordinator: always, as `classifier.pretraining` says, or never. `changes`: settings of `Classifier` that the arm fixes.
    """

    title: str
    real: Literal["all", "balanced", "none"] = "all"
    synthetic: bool = False
    start: Literal["always", "setting", "never"] = "never"
    longer: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, study: Classifier) -> Classifier:
        """The study's settings with the arm's changes."""
        return study.model_copy(update=dict(self.changes))

    def pretraining(self, study: Classifier) -> int:
        """Steps on the archive alone before the first round; `START` where the arm needs them and the study gives none."""
        return {"never": 0, "setting": study.pretraining, "always": study.pretraining or START}[self.start]

    def steps(self, study: Classifier, images: int) -> int:
        """Steps of one round at a site that holds `images` training images: alike in every arm but a `longer` one."""
        usual = study.steps_per_round or max(1, round(images / study.batch))
        return usual + (round(study.pretraining / study.rounds) if self.longer else 0)


_PLAIN = {"balance": "none", "augment": False}

ARMS: Mapping[Arm, Recipe] = {
    "DS1": Recipe(title="real only"),
    "DS2": Recipe(title="real, balanced by leaving images out", real="balanced"),
    "DS3": Recipe(title="real + synthetic", synthetic=True, start="setting"),
    "plain": Recipe(title="real only, nothing balanced or augmented (DS1 of the paper)", changes=_PLAIN),
    "filled": Recipe(
        title="real, filled up with synthetic, nothing augmented (DS3 of the paper)",
        synthetic=True,
        changes={**_PLAIN, "synthetic_share": None},
    ),
    "duplicated": Recipe(
        title="real, rare classes repeated until balanced, nothing augmented",
        changes={"balance": "sampling", "augment": False},
    ),
    "longer": Recipe(title="real only, as many steps more as DS3 takes on the archive", longer=True),
    "weighted": Recipe(title="real, class-weighted loss", changes={"balance": "loss"}),
    "augmented": Recipe(
        title="real, balanced sampling and classic augmentation", changes={"balance": "sampling", "augment": True}
    ),
    "synthetic": Recipe(
        title="synthetic only", real="none", synthetic=True, changes={"balance": "sampling", "synthetic_share": None}
    ),
    "pretrained": Recipe(title="synthetic first, then real only", start="always"),
}

_STEERING = Recipe(title="real only, to steer a generator by")


def recipe(name: str) -> Recipe:
    """The recipe of an arm. Raises `KeyError` for a name that is none; a study file with such a name is refused before."""
    if name == STEERING:
        return _STEERING
    return {str(arm): found for arm, found in ARMS.items()}[name]


def settings_of_arm(study: Study, name: str) -> Classifier:
    """The settings that a site trains arm `name` with, its number of rounds included."""
    settings = recipe(name).settings(study.classifier)
    return settings.model_copy(update={"rounds": study.gan.steering.rounds}) if name == STEERING else settings
