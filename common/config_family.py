"""The sections of a study file about PGGAN, and what a study's generator family demands of its other sections.

::

    gan.family: dcgan   one generator per class: its name is the class                     (Salehinejad et al. 2018)
    gan.family: pggan   one generator of all images, called "all"; labels by steering      (Segal et al. 2021)
    gan {pggan {...}, steering {...}}, archive {findings {...}} --check_family--> a study that can run, or `ValueError`

Nothing here loads torch: command lines read studies before they know whether they need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from xfed.common.config_section import Section

__all__ = ["ALL", "WHY_NOT_PRIVATE", "Pggan", "SteeringPlan", "check_findings", "sample_names", "slug"]

ALL = "all"
"""What the generator of all images is called in messages, files and reports."""

WHY_NOT_PRIVATE = (
    "PGGAN cannot be trained with differential privacy here: its discriminator looks at the deviation over the batch, so each "
    "patient changes the gradients of all others, and its gradient penalty needs second derivatives patient by patient. "
    "Use the DCGAN or dp-merf in a private study."
)


class Pggan(Section):
    """How the networks of a PGGAN grow and learn (Karras et al. 2018; Segal et al. 2021); used by family pggan alone."""

    fade: float = Field(0.5, ge=0, le=1, description="share of each stage's steps in which its new layers fade in")
    growth: float = Field(
        1.0, gt=0, le=10, description="steps of a stage over those of the stage before; 1 = equal, as in the papers"
    )
    learning_rate: float = Field(1e-3, gt=0, le=0.1, description="Adam's, of G and of D (beta 0 and 0.99)")
    penalty: float = Field(10.0, ge=0, le=1000, description="weight of the gradient penalty")
    drift: float = Field(1e-3, ge=0, le=10, description="weight of D's squared score of real images")


class SteeringPlan(Section):
    """How images of a class are found in a generator that knows no classes; used by family pggan alone."""

    method: Literal["lco", "rejection"] = Field(
        "lco", description="latent class optimisation; or looking at each latent once (the baseline)"
    )
    threshold: float = Field(
        0.9, gt=0, lt=1, description="an image is accepted where the steering classifier sees its target so surely"
    )
    steps: int = Field(100, ge=0, le=10_000, description="most moves of one latent")
    proximity: float = Field(0.01, ge=0, le=100, description="weight of the distance from where the latent began")
    learning_rate: float = Field(0.05, gt=0, le=10, description="Adam's, of the latents")
    attempts: int = Field(
        20,
        ge=1,
        le=100_000,
        description="most latents tried for each image that is wanted; then the class stays smaller",
    )
    rounds: int = Field(
        20,
        ge=1,
        le=100_000,
        description="rounds of the steering classifier, which sites train like arm DS1 before phase 2",
    )


def sample_names(classes: Sequence[str], family: str) -> list[str]:
    """What the sample images of a round show: a class each; numbers, where the generator knows of no class."""
    return [f"image {number}" for number in range(1, len(classes) + 1)] if family == "pggan" else list(classes)


def slug(name: str) -> str:
    """A name in file names: lower case, hyphens."""
    return name.strip().lower().replace(" ", "-")


def check_findings(findings: Mapping[str, Sequence[str]], classes: Sequence[str], family: str) -> None:
    """Raise `ValueError` unless each of `archive.findings` is a new name for two or more, not all, of the classes."""
    if findings and family != "pggan":
        raise ValueError(
            "archive.findings needs gan.family pggan: a generator of one class cannot be asked for several findings at once"
        )
    taken = {slug(name) for name in classes}
    for name, wanted in findings.items():
        if slug(name) in taken or name != name.strip() or not name or name.startswith("."):
            raise ValueError(f"archive.findings: {name!r} must be a name of its own, other than the classes'")
        if any(sign in name for sign in '/\\:*?"<>|\0\n\r\t'):
            raise ValueError(f"archive.findings: {name!r} must be usable as a folder name")
        taken.add(slug(name))
        odd = [one for one in wanted if one not in classes]
        if odd or len(set(wanted)) != len(wanted) or not 2 <= len(wanted) < len(classes):
            raise ValueError(
                f"archive.findings.{name}: name two or more different classes, and not all of {', '.join(classes)}"
            )
