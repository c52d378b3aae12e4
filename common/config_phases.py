"""The sections of a study file about the three phases: generators, archive, classifiers.

::

    study.yaml: gan {...}, archive {...}, classifier {...} --> Gan, Archive, Classifier --> Study

What one section decides is checked here, what several decide in `Study`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from xfed.common.config_family import Pggan, SteeringPlan
from xfed.common.config_privacy import Merf
from xfed.common.config_section import Section

__all__ = ["Archive", "Arm", "Classifier", "Gan"]

# what each is: `xfed.common.arms`
Arm = Literal[
    "DS1", "DS2", "DS3", "plain", "filled", "duplicated", "longer", "weighted", "augmented", "synthetic", "pretrained"
]


class Gan(Section):
    """Phase 1: one generator per class, or one of all images. Defaults follow Salehinejad et al. 2018, section 3.2."""

    family: Literal["dcgan", "pggan"] = Field(
        "dcgan",
        description="a DCGAN per class; or one PGGAN of all images without labels, whose images are labelled by steering",
    )
    method: Literal["dcgan", "dp-merf", "dp-merf+dcgan"] = Field(
        "dcgan", description="adversarial; one noisy embedding per class; or the second as a warm start of the first"
    )
    merf: Merf = Merf()
    pggan: Pggan = Pggan()
    steering: SteeringPlan = SteeringPlan()
    width: int = Field(
        32, ge=1, le=256, description="channels before the last up-convolution (dcgan, 4 or more) or at 256 px (pggan)"
    )
    latent: int = Field(128, ge=2, le=1024)
    shared_rounds: int = Field(
        0,
        ge=0,
        le=100_000,
        description="rounds before the others in which one DCGAN learns from all classes, drawn alike; each class's networks "
        "start from it. 0 = each class for itself",
    )
    rounds: int = Field(20, ge=1, le=100_000)
    steps_per_round: int = Field(50, ge=1, le=100_000)
    batch: int = Field(64, ge=2, le=4096)
    learning_rate_g: float = Field(2e-4, gt=0, le=0.1, description="of a DCGAN; for the other see gan.pggan")
    learning_rate_d: float = Field(5e-4, gt=0, le=0.1, description="likewise")
    momentum: float = Field(0.5, ge=0, lt=1, description="Adam's beta1, of a DCGAN")
    ema: float = Field(
        0.9, ge=0, lt=1, description="decay per round of the moving average that the archive is drawn from"
    )
    augment: Literal["translation", "full", "none"] = Field(
        "translation", description="differentiable augmentation of what D sees (Zhao et al. 2020)"
    )
    r1: float = Field(
        0.0, ge=0, le=1000, description="weight of the R1 gradient penalty on reals, every 16 steps; 0 = off"
    )
    minimum_images: int = Field(
        8, ge=1, description="a site with fewer training images of a class (pggan: of all) leaves that generator out"
    )

    @model_validator(mode="after")
    def _fits_the_family(self) -> Gan:
        if self.family == "dcgan" and self.width < 4:
            raise ValueError("width must be 4 or more with family dcgan")
        if self.family == "pggan" and self.method != "dcgan":
            raise ValueError(f"method {self.method} is of family dcgan; leave it out with family pggan")
        if self.family == "pggan" and self.shared_rounds:
            raise ValueError("shared_rounds is of family dcgan; a PGGAN learns from all classes anyway")
        if "dcgan" not in self.method and self.shared_rounds:
            raise ValueError(f"shared_rounds trains networks; method {self.method} has no rounds of training")
        if self.family == "pggan" and self.r1 > 0:
            raise ValueError("r1 is of family dcgan; a PGGAN has a penalty of its own (gan.pggan.penalty)")
        return self


class Archive(Section):
    """Phase 2: synthetic images per class."""

    balance: Literal["match", "fixed"] = Field(
        "match", description="match: fill every class up to `target` times the largest class; fixed: `per_class` each"
    )
    target: float = Field(1.0, gt=0, le=10)
    per_class: int = Field(500, ge=1, le=1_000_000)
    minimum: int = Field(64, ge=1, description="images per class at the least, so that every class can be looked at")
    findings: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="family pggan: name -> classes that shall be seen together, {Wet heart: [Cardiomegaly, Pleural Effusion]}; "
        "`minimum` images each (balance fixed: `per_class`), in the archive, in no arm",
    )
    filter: bool = Field(
        True, description="leave out synthetic images that are blank, saturated, far from their class, or duplicates"
    )
    reuse: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="root digest of an archive that exists: phases 1 and 2 are left out, classifiers are taught from that one",
    )
    tstr_steps: int = Field(
        400,
        ge=0,
        le=100_000,
        description="steps of a classifier on the archive alone, at the coordinator, scored once on real test patients (TSTR); "
        "0 = not done; never done in a private study",
    )
    vote: bool = Field(
        True,
        description="before the release every site vetoes the images that are too near to its training images; never in a "
        "private study",
    )
    attacks: bool = Field(
        True,
        description="every site attacks the archive with its own patients (membership, re-identification) and sends counts; "
        "never in a private study",
    )


class Classifier(Section):
    """Phase 3. Defaults follow Salehinejad et al. 2018, sections 2.2 and 3.2."""

    model: Literal["dcnn", "googlenet"] = "dcnn"
    width: int = Field(32, ge=4, le=256)
    arms: tuple[Arm, ...] = Field(
        ("DS1", "DS3"), description="what classifiers are taught from; the controls are in docs/experiments.md"
    )
    rounds: int = Field(30, ge=1, le=100_000)
    steps_per_round: int = Field(
        0, ge=0, le=100_000, description="local steps per round; 0 = one pass over the site's images"
    )
    batch: int = Field(128, ge=1, le=4096)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    momentum: float = Field(0.5, ge=0, lt=1, description="Adam's beta1")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="L2 regularisation")
    dropout: float = Field(0.5, ge=0, lt=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    balance: Literal["sampling", "loss", "none"] = "sampling"
    augment: bool = Field(True, description="small affine and exposure changes of training images, in both arms alike")
    synthetic_share: float | None = Field(
        0.25,
        ge=0,
        le=1,
        description="share of each class's draws that are synthetic in DS3; null = in proportion to counts",
    )
    pretraining: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="steps on the archive alone, at the coordinator, before DS3's first round; they cost no privacy",
    )
    average: float = Field(
        0.0, ge=0, lt=1, description="decay per round of a moving average of the global model; 0 = off"
    )
    patience: int = Field(20, ge=1, description="rounds without a better validation score before stopping")
