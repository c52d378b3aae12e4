"""How far a growing network has grown: a function of the training step alone, so that all sites grow in lockstep.

::

    round, steps per round --> global step --Schedule.at--> Place(stage, alpha) --> size of the images, share of the new layers
    4 px |--- fade in 8 px ---|--- 8 px ---|--- fade in 16 px ---|--- 16 px ---| ...              (Karras et al. 2018, fig. 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["BASE", "SIZES", "Place", "Schedule", "stages_of"]

BASE = 4
SIZES = (32, 64, 128, 256)


def stages_of(size: int) -> int:
    """How many stages lead to `size` px: 4 at 32 px, 7 at 256 px. Raises `ValueError` for a size that is not offered."""
    if size not in SIZES:
        raise ValueError(f"image size must be 32, 64, 128 or 256, not {size}")
    return int(math.log2(size // BASE)) + 1


@dataclass(frozen=True)
class Place:
    """How far a network has grown: `stage` 0 is 4 px, each next one doubles; `alpha` in 0..1 is how far it has faded in."""

    stage: int
    alpha: float = 1.0

    @property
    def size(self) -> int:
        """Side of the images, px."""
        return int(BASE * 2**self.stage)


@dataclass(frozen=True)
class Schedule:
    """When the networks grow: ``steps[k]`` training steps at stage k, of which the share `fade` fades the stage in.

    The first stage has nothing to fade in from. First stages of 0 steps are left out: training begins at a larger size. Raises
    `ValueError` where a value is outside its range.

    Guarantees: `at` depends on the step alone; it never shrinks; from `total` on it is the grown network.
    """

    size: int
    steps: tuple[int, ...]
    fade: float = 0.5

    def __post_init__(self) -> None:
        if len(self.steps) != stages_of(self.size):
            raise ValueError(
                f"{self.size} px take {stages_of(self.size)} stages (4, 8, ... {self.size} px), not {len(self.steps)}"
            )
        trained = [steps for begun, steps in zip(accumulate(self.steps), self.steps, strict=True) if begun]
        if not trained or min(trained) < 1 or min(self.steps) < 0 or not 0 <= self.fade <= 1:
            raise ValueError(
                "steps must be 1 or more from the first trained stage to the last, 0 before it, and fade in 0..1, "
                f"not {self.steps} and {self.fade}"
            )

    @classmethod
    def spread(cls, size: int, total: int, fade: float = 0.5, growth: float = 1.0) -> Schedule:
        """`total` steps over the stages, each stage `growth` times the steps of the one before (1: equal, as in the paper)."""
        if not 0 < growth < math.inf:
            raise ValueError(f"growth must be a finite number above 0, not {growth}")
        reached = list(accumulate(growth**stage for stage in range(stages_of(size))))
        ends = [0, *(round(total * share / reached[-1]) for share in reached)]
        return cls(size, tuple(end - begin for begin, end in pairwise(ends)), fade)

    @property
    def total(self) -> int:
        """Steps until the last stage is done."""
        return sum(self.steps)

    def at(self, step: int) -> Place:
        """The place at global `step` 0, 1, ...; alpha rises linearly from 0 at the first step of a stage."""
        if step < 0:
            raise ValueError(f"there is no step {step}: they count from 0")
        begin = 0
        for stage, steps in enumerate(self.steps):
            if step < begin + steps:
                fading = self.fade * steps if begin else 0.0
                return Place(stage, min(1.0, (step - begin) / fading) if fading else 1.0)
            begin += steps
        return Place(len(self.steps) - 1)
