"""The sections of a study file about images: where they come from, how patients are split, and which hospital gets whom.

::

    study.yaml: data {source, layout, splits, phantom, ...}, sites {count, partition, ...} --> Data, Sites --> Study
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from xfed.common.config_section import Section

__all__ = ["Data", "Phantom", "Sites", "Splits"]


class Splits(Section):
    """Shares of patients, per class, that go to each split; they add up to 1. With `folds`, the test patients are one fold."""

    train: float = Field(0.7, gt=0, lt=1)
    validation: float = Field(0.15, gt=0, lt=1)
    test: float = Field(0.15, gt=0, lt=1)
    folds: int = Field(
        0, ge=0, le=20, description="folds of cross-validation: each tests 1 / folds of the patients; 0 = shares alone"
    )
    fold: int = Field(
        0, ge=0, description="the fold that is tested, 0..folds-1; over all folds each patient is tested once"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Splits:
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError("train + validation + test must add up to 1")
        if self.folds == 1 or self.fold >= max(1, self.folds):
            raise ValueError(f"fold {self.fold} of {self.folds}: folds must be 0 or at least 2, and fold below it")
        return self


class Phantom(Section):
    """How many procedural patients to draw, per class, and how many images each has."""

    patients: dict[str, int] = Field(default_factory=dict, description="class -> patients; a class left out gets 100")
    images_per_patient: float = Field(1.3, ge=1, le=5, description="mean number of images of one patient")


class Data(Section):
    """Where images come from: procedural phantoms, or a folder given with --data."""

    source: Literal["phantom", "folder"] = "phantom"
    layout: Literal["auto", "nih", "folders", "csv"] = "auto"
    labels: str | None = Field(None, description="label file, relative to the data folder; default: found by name")
    image_column: str | None = None
    patient_column: str | None = None
    label_column: str | None = None
    label_map: dict[str, str] = Field(default_factory=dict, description="label as written in the file -> class")
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="who is where and in which split, and phantoms; null = the study's seed"
    )
    phantom: Phantom = Phantom()
    splits: Splits = Splits()


class Sites(Section):
    """How one data set becomes several hospitals (simulation only)."""

    count: int = Field(3, ge=1, le=1000)
    partition: Literal["even", "dirichlet"] = "even"
    alpha: float = Field(0.5, gt=0, le=1000, description="Dirichlet concentration; small = skewed")
    missing: dict[int, tuple[str, ...]] = Field(
        default_factory=dict, description="site number (1..count) -> classes it lacks"
    )
    style_shift: float = Field(
        0.0, ge=0, le=1, description="strength of per-site exposure, noise and framing differences"
    )
