"""What the hospital allows at the most: policy.yaml, read once, compared with every study and every request.

::

    site/policy.yaml --load_policy (unknown or doubled fields refused)--> Policy
    Policy, Study of a plan --violations--> [] or what is outside, in words      (before the hospital approves a plan)
    Policy, request         --bounds.check_request--> the same again, per request (a policy may be tightened after the approval)
    policy.yaml is the hospital's own file: xfed writes it once, as a template, and never again; nothing here writes to disk

A policy can only tighten: a request must be inside the approved study and inside the policy. No field adds anything to a study,
and no value of a field makes a study pass that a looser value would have refused.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xfed.common.config import Study
from xfed.common.errors import ConfigError

__all__ = ["METRICS", "PHASES", "Policy", "default_policy_text", "load_policy", "parse_policy", "violations"]

Phase = Literal["generators", "archive", "classifier"]
Metric = Literal["counts", "scores", "archive_scores", "losses"]
PHASES: tuple[Phase, ...] = ("generators", "archive", "classifier")
METRICS: tuple[Metric, ...] = ("counts", "scores", "archive_scores", "losses")

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Policy(BaseModel):
    """The bounds of one hospital. Every default is the tighter choice where privacy is concerned."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    classes: Names | None = Field(None, description="classes that may be studied, [A, B, ...]; null = all")
    phases: Annotated[tuple[Phase, ...], Field(strict=False)] = Field(
        PHASES, description="phases that this site takes part in"
    )
    generator_models: Names = Field(
        ("dcgan", "pggan"),
        description="generator models that may be trained here: dcgan, one per class; pggan, one of all images, labels unused",
    )
    classifier_models: Names = Field(("dcnn", "googlenet"), description="classifier models that may be trained here")
    max_image_size: int = Field(256, ge=1, description="largest side of the images, in pixels")
    max_generator_rounds: int = Field(200, ge=1, description="most rounds of generator training, per class")
    max_classifier_rounds: int = Field(
        200, ge=1, description="most rounds of classifier training, per arm; also of the classifier that steers a PGGAN"
    )
    max_steps_per_round: int = Field(
        500,
        ge=1,
        description="most training steps in one round; a study that asks for one pass over the site's own images "
        "(classifier.steps_per_round: 0) is inside every bound",
    )
    max_batch: int = Field(256, ge=1, description="most images in one training step")
    max_archive_images: int = Field(
        100_000, ge=1, description="most synthetic images that are taken in: they fill this site's disk"
    )
    minimum_images: int = Field(
        8,
        ge=1,
        description="a study may train a generator on no fewer images (pggan: of all classes) than this (its gan.minimum_images)",
    )
    allow_non_private: bool = Field(
        False,
        description="true: studies WITHOUT differential privacy may train here. Their privacy loss (epsilon) is infinite: what "
        "leaves the hospital, and synthetic images made from it, can reveal something about single patients, and nothing "
        "bounds how much. Studies that state privacy.epsilon need no such permission",
    )
    epsilon_max: float | None = Field(
        None,
        gt=0,
        description="largest epsilon of a study with differential privacy; null = none. A study without it has an infinite "
        "epsilon and is refused whenever this is set",
    )
    delta_max: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest delta of a study with differential privacy; null = none. A study without it states no delta and is "
        "refused whenever this is set",
    )
    epsilon_total_max: float | None = Field(
        None,
        gt=0,
        description="largest epsilon of all private studies together, as this site's ledger adds them up; null = none",
    )
    declared_patients: dict[str, Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="patients per class that this site declares to everybody in a study with differential privacy, "
        "{Class: number, ...}: they fix how often a patient is drawn. null = the number of training patients, rounded to ten",
    )
    require_secure_aggregation: bool = Field(
        False, description="true: only studies whose coordinator sees sums over sites, never one site's update"
    )
    minimum_summed_sites: int = Field(
        2,
        ge=2,
        description="a sum that hides this site's update is taken over at least so many sites, this one included",
    )
    share_examples: bool = Field(False, description="true: REAL IMAGES of patients may be shown in the study's report")
    archive_votes: bool = Field(
        True,
        description="false: studies whose sites vote on the synthetic images (archive.vote) are refused. A vote says, for each "
        "synthetic image, whether it is too near to a training image of this site: so that it can be left out before the "
        "archive is released. Without secure aggregation the coordinator sees whose vote it was",
    )
    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = Field(
        METRICS,
        description="figures that may leave. counts: images per class and split; losses: mean training losses, in every "
        "update (without these two nothing can be trained in this version); scores: sums of classification scores; "
        "archive_scores: sums of features, how like real images the synthetic ones are, and how many patients each attack on "
        "the archive finds",
    )
    smallest_count: int = Field(
        5,
        ge=0,
        description="fewest patients of a class in a split (train, validation, test) that may show in a count; 0 = off. A "
        "class with fewer takes no part in that split: it is not counted, not trained on and not scored",
    )
    max_request_mb: int = Field(2048, ge=1, description="largest request, in MiB of arrays")

    @classmethod
    def permissive(cls) -> Policy:
        """No bound tighter than what a study file can say: for simulations, whose hospitals belong to whoever runs them."""
        return cls(
            max_generator_rounds=100_000,
            max_classifier_rounds=100_000,
            max_steps_per_round=100_000,
            max_batch=4096,
            max_archive_images=2**40,
            minimum_images=1,
            allow_non_private=True,
            share_examples=True,
            smallest_count=0,
            max_request_mb=2**20,
        )


_MOST = (
    ("", "image_size", "max_image_size"),
    ("generators", "gan.rounds", "max_generator_rounds"),
    ("generators", "gan.steps_per_round", "max_steps_per_round"),
    ("generators", "gan.batch", "max_batch"),
    ("classifier", "classifier.rounds", "max_classifier_rounds"),
    ("classifier", "classifier.steps_per_round", "max_steps_per_round"),
    ("classifier", "classifier.batch", "max_batch"),
)
_SHARED = (("generators", "gan.shared_rounds", "max_generator_rounds"),)
_STEERED = (("classifier", "gan.steering.rounds", "max_classifier_rounds"),)
_ONE_OF = (
    ("generators", "gan.family", "generator_models"),
    ("classifier", "classifier.model", "classifier_models"),
)
_NOT_PRIVATE = (
    "privacy: the study trains without differential privacy: its epsilon is infinite, and what leaves can reveal something about "
    "single patients, with no bound on how much. This site's policy allows no such study ({field} is {value}). "
    "If the hospital accepts that, set in policy.yaml: {remedy}"
)


def violations(policy: Policy, study: Study, parts: Collection[str] | None = None) -> list[str]:
    """Everything that `study` would ask for and `policy` forbids, in words; empty when all is inside.

    `parts` narrows this to what holds for all requests and to these parts: the names of `PHASES`, of
    `METRICS` and "examples". Each text names the study's field, both values and the policy's field.
    """
    return [text for part, text in _outside(policy, study) if not part or parts is None or part in parts]


def _outside(policy: Policy, study: Study) -> Iterator[tuple[str, str]]:
    """Pairs of the part of a study that is concerned ("" = all of it) and the violation in words."""
    if policy.classes is not None and (unknown := [name for name in study.classes if name not in policy.classes]):
        yield "", _words("classes", ", ".join(unknown), f"only {', '.join(policy.classes)}", "classes")
    for phase in PHASES:
        if phase not in policy.phases:
            yield phase, _words("phases", phase, f"only {_listed(policy.phases)}", "phases")
    for part, where, field in (
        *_MOST,
        *(_STEERED if study.unlabelled else ()),
        *(_SHARED if study.gan.shared_rounds else ()),
    ):
        wanted, most = attrgetter(where)(study), getattr(policy, field)
        if wanted > most:
            yield part, _words(where, wanted, f"at most {most}", field)
    for part, where, field in _ONE_OF:
        wanted, known = attrgetter(where)(study), getattr(policy, field)
        if wanted not in known:
            yield part, _words(where, wanted, f"only {_listed(known)}", field)
    images = study.archive.per_class if study.archive.balance == "fixed" else study.archive.minimum
    if (images := images * len(study.labels)) > policy.max_archive_images:
        yield (
            "archive",
            _words("archive", f"{images} images", f"at most {policy.max_archive_images}", "max_archive_images"),
        )
    if study.gan.minimum_images < policy.minimum_images:
        yield (
            "generators",
            _words(
                "gan.minimum_images", study.gan.minimum_images, f"at least {policy.minimum_images}", "minimum_images"
            ),
        )
    yield from (("", text) for text in _privacy(policy, study))
    if policy.require_secure_aggregation and not study.secure:
        wish = f"{study.federation.secure_aggregation} with {study.sites.count} sites, which is off"
        yield "", _words("federation.secure_aggregation", wish, "only on", "require_secure_aggregation")
    if study.secure and study.sites.count < policy.minimum_summed_sites:
        least = f"at least {policy.minimum_summed_sites} in a sum"
        yield "", _words("sites.count", study.sites.count, least, "minimum_summed_sites")
    if study.report.share_real_examples and not policy.share_examples:
        yield "examples", _words("report.share_real_examples", True, "only False", "share_examples")
    if study.archive.vote and not study.private and not policy.archive_votes:
        yield "archive_votes", _words("archive.vote", True, "only False", "archive_votes")
    for metric in METRICS:
        if metric not in policy.metrics:
            # no training without an update's losses, no request at all without counts: so these concern more than one part
            yield (
                "" if metric == "counts" else metric,
                _words("metrics", metric, f"only {_listed(policy.metrics)}", "metrics"),
            )


def _privacy(policy: Policy, study: Study) -> Iterator[str]:
    """Bounds of the budget; a study without differential privacy has an infinite epsilon."""
    if not study.private:
        if not policy.allow_non_private:
            yield _NOT_PRIVATE.format(field="allow_non_private", value="false", remedy="allow_non_private: true")
        for field in ("epsilon_max", "delta_max"):
            bound = getattr(policy, field)
            if bound is not None:
                yield _NOT_PRIVATE.format(field=field, value=f"{bound:g}", remedy=f"{field}: null")
        return
    for name, field in (("epsilon", "epsilon_max"), ("delta", "delta_max")):
        wanted, bound = getattr(study.privacy, name), getattr(policy, field)
        if bound is not None and wanted > bound:
            yield _words(f"privacy.{name}", f"{wanted:g}", f"at most {bound:g}", field)


def _words(where: str, wanted: object, allowed: str, field: str) -> str:
    return f"{where}: the study wants {wanted}, this site's policy allows {allowed} ({field})"


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def parse_policy(values: Any, source: str) -> Policy:
    """Validate plain values. Raises `ConfigError` naming `source`, every wrong field, its value and what is allowed."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} is not a policy: it must be a mapping of fields, such as `max_batch: 64`")
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            message = f"{item['msg']} (it is {item['input']!r:.80})"
            if item["type"] == "extra_forbidden":
                message = f"there is no such field; the fields are {', '.join(Policy.model_fields)}"
            lines.append(f"  {'.'.join(str(part) for part in item['loc'])}: {message}")
        raise ConfigError(f"{source} is not a valid policy:\n" + "\n".join(lines)) from error


def load_policy(path: Path) -> Policy:
    """Read a policy file. Raises `ConfigError`, also when there is none: defaults might be wider than what was lost."""
    try:
        text = path.read_text(encoding="utf-8")
        tree, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no policy. Put the hospital's policy.yaml back, or begin with a new one from the template."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the policy cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: the policy is not YAML: {error}") from error
    if isinstance(tree, yaml.MappingNode):
        names = [str(key.value) for key, _ in tree.value]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:  # YAML would silently take the last one
            raise ConfigError(f"{path}: {', '.join(doubled)} is there more than once. Keep the line that is meant.")
    return parse_policy(values, str(path))


def default_policy_text() -> str:
    """A commented policy.yaml that says what `Policy()` says: the template that a new site begins with."""
    lines = [
        "# What this hospital allows. A request outside of it is refused before any data is read, and the refusal says why.",
        "# A policy can only tighten: nothing here adds to a study, and a study still needs this hospital's approval.",
        "# A field that is left out has the value that stands here.",
    ]
    for name, field in Policy.model_fields.items():
        lines.append("")
        lines += textwrap.wrap(str(field.description), 118, initial_indent="# ", subsequent_indent="# ")
        value = field.default
        text = f"[{', '.join(value)}]" if isinstance(value, tuple) else json.dumps(value)
        lines.append(f"{name}: {text}")
    return "\n".join(lines) + "\n"
