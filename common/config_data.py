"""The sections of a study file about images: where they come from, how patients are split, and which hospital gets whom.

::

    study.yaml: data {source, layout, splits, phantom, ...}, sites {count, partition, ...} --> Data, Sites --> Study
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from xfed.common.config_section import Section

__all__ = ["Data", "Experiment", "Phantom", "Sites", "Splits"]


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


class Experiment(Section):
    """What `xfed-sim study` repeats the study over. Not part of the study's digest: each run of it has one of its own."""

    arms: tuple[str, ...] = Field(
        (
            "DS1",
            "DS2",
            "DS3",
            "plain",
            "filled",
            "duplicated",
            "weighted",
            "synthetic",
            "pretrained",
            "alone",
            "pooled",
        ),
        min_length=1,
        description="arms to compare; alone (each site by itself) and pooled (all images at one site) exist only in a simulation",
    )
    baseline: str = Field("DS3", description="the arm that every other arm is compared with")
    folds: int = Field(5, ge=2, le=20, description="folds of cross-validation by patient")
    seeds: tuple[int, ...] = Field((), description="training seeds; none given: the study's")
    sites: tuple[int, ...] = Field((), description="numbers of sites; none given: the study's")
    skews: tuple[Literal["even", "dirichlet"], ...] = Field((), description="partitions; none given: the study's")
    models: tuple[Literal["dcnn", "googlenet"], ...] = Field((), description="classifiers; none given: the study's")
    view_column: str = Field("View Position", description="column of the label file that confounds; absent: left out")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    replicates: int = Field(4000, ge=200, le=100_000, description="bootstrap replicates of each interval")
