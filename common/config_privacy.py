"""The sections of a study file that differential privacy brought: the budget, how it is spread, and DP-MERF.

::

    study.yaml: privacy {epsilon, delta, clip, shares, ...}, gan.merf {features, ...} --> Privacy, Merf --> Study

What a value would do to the claim is checked here where one section decides it, and in `Study` where several do.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from xfed.common.config_section import Section

__all__ = ["Merf", "Privacy", "Shares"]


class Shares(Section):
    """How the noise is spread: relative epsilons that each part would have alone. The whole is composed, and meets `epsilon`."""

    generators: float = Field(0.6, ge=0, le=1, description="training of the generators")
    embeddings: float = Field(0.6, ge=0, le=1, description="DP-MERF's release; with a warm start, before the training")
    classifier: float = Field(0.35, ge=0, le=1, description="training of the classifiers, all arms together")
    scores: float = Field(0.05, ge=0, le=1, description="counts of the final test")


class Privacy(Section):
    """Differential privacy for every patient of every site (add or remove one); without `epsilon` the study is not private."""

    epsilon: float | None = Field(
        None, description="budget of each site for the whole study; null = NOT private, epsilon is infinite"
    )
    delta: float | None = Field(
        None, description="must be below 1 / patients of every site; needed wherever epsilon is given"
    )
    unit: str = Field("patient", description="what is added or removed: always a patient, with all their images")
    clip: float = Field(1.0, gt=0, le=1000, description="L2 bound of one patient's gradient")
    shares: Shares = Shares()
    engine: Literal["fast", "opacus"] = Field("fast", description="how gradients are clipped patient by patient")
    d_steps: Literal["adaptive"] | Annotated[int, Field(ge=1, le=50)] = Field(
        "adaptive", description="private discriminator steps per generator step"
    )
    overlap: int = Field(1, ge=1, le=100, description="sites that one patient may attend; their losses are composed")

    @field_validator("unit")
    @classmethod
    def _only_patients(cls, value: str) -> str:
        if value != "patient":
            raise ValueError(
                "only 'patient' is offered: a patient with four images loses far more than a claim per image says "
                "(epsilon 4.9 per image can be 26.7 for the patient)"
            )
        return value

    @field_validator("epsilon", "delta")
    @classmethod
    def _is_a_budget(cls, value: float | None) -> float | None:
        if value is not None and not (0 < value < math.inf):
            raise ValueError(
                "must be above 0 and finite: a budget of 0 allows nothing, an infinite one protects nobody. "
                "For a study without differential privacy leave out privacy.epsilon"
            )
        return value

    @model_validator(mode="after")
    def _epsilon_with_delta(self) -> Privacy:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta are given together, or neither is")
        if self.delta is not None and self.delta >= 0.01:
            raise ValueError(
                f"delta {self.delta:g} is no privacy: it must be far below 1 / number of patients, and at most 0.01"
            )
        return self


class Merf(Section):
    """DP-MERF: the generator is fitted to one noisy mean of random features per class (Harder et al. 2021)."""

    features: int = Field(4000, ge=2, le=100_000, multiple_of=2, description="random Fourier features of the pixels")
    length_scale: float = Field(
        1.0, gt=0, description="times the scale that was measured on phantoms; never chosen on patients"
    )
    steps: int = Field(300, ge=1, le=1_000_000, description="steps of the generator at the coordinator")
    batch: int = Field(100, ge=2, le=4096)
    learning_rate: float = Field(1e-3, gt=0, le=0.1)
