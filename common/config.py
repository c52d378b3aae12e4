"""The study file as frozen values: parsed once, at the edge, unknown keys refused.

::

    study.yaml --(load: YAML, --set overrides)--> Study --digest--> every message, checkpoint and report carries it

`Study` holds what changes results (and so is in the digest). `Study.runtime` holds what changes only speed and is left out of
the digest. Bitwise-equal weights are promised for the same machine, thread count and precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from xfed.common.config_privacy import Merf, Privacy, Shares
from xfed.common.config_section import Section
from xfed.common.errors import ConfigError

__all__ = [
    "Archive",
    "Classifier",
    "Data",
    "Federation",
    "Gan",
    "Merf",
    "Phantom",
    "Privacy",
    "Report",
    "Runtime",
    "Shares",
    "Sites",
    "Splits",
    "Study",
    "load_study",
    "parse_study",
]

ImageSize = Literal[32, 64, 128, 256]


class Splits(Section):
    """Shares of patients, per class, that go to each split; they add up to 1."""

    train: float = Field(0.7, gt=0, lt=1)
    validation: float = Field(0.15, gt=0, lt=1)
    test: float = Field(0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _adds_up(self) -> Splits:
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError("train + validation + test must add up to 1")
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


class Gan(Section):
    """Phase 1: one generator per class. Defaults follow Salehinejad et al. 2018, section 3.2."""

    model: Literal["dcgan"] = "dcgan"
    method: Literal["dcgan", "dp-merf", "dp-merf+dcgan"] = Field(
        "dcgan", description="adversarial; one noisy embedding per class; or the second as a warm start of the first"
    )
    merf: Merf = Merf()
    width: int = Field(32, ge=4, le=256, description="channels before the last up-convolution")
    latent: int = Field(128, ge=2, le=1024)
    rounds: int = Field(20, ge=1, le=100_000)
    steps_per_round: int = Field(50, ge=1, le=100_000)
    batch: int = Field(64, ge=2, le=4096)
    learning_rate_g: float = Field(2e-4, gt=0, le=0.1)
    learning_rate_d: float = Field(5e-4, gt=0, le=0.1)
    momentum: float = Field(0.5, ge=0, lt=1, description="Adam's beta1")
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
        8, ge=1, description="a site with fewer training images of a class leaves that class out"
    )


class Archive(Section):
    """Phase 2: synthetic images per class."""

    balance: Literal["match", "fixed"] = Field(
        "match", description="match: fill every class up to `target` times the largest class; fixed: `per_class` each"
    )
    target: float = Field(1.0, gt=0, le=10)
    per_class: int = Field(500, ge=1, le=1_000_000)
    minimum: int = Field(64, ge=1, description="images per class at the least, so that every class can be looked at")
    filter: bool = Field(
        True, description="leave out synthetic images that are blank, saturated, far from their class, or duplicates"
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
    arms: tuple[Literal["DS1", "DS3"], ...] = ("DS1", "DS3")
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


class Federation(Section):
    """Who must answer, and for how long the coordinator waits."""

    quorum: float = Field(1.0, gt=0, le=1, description="share of the asked sites that must answer a round")
    time_limit_s: float = Field(3600, gt=0, description="seconds to wait for the replies of one round")
    retries: int = Field(1, ge=0, le=20, description="times a round without quorum is tried again")
    join_limit_s: float = Field(120, gt=0, description="seconds to wait for the sites to come online")
    absence_limit_s: float = Field(
        120, gt=0, description="seconds a round waits for a site that went offline before going on without it"
    )
    payload: Literal["float32", "bfloat16"] = Field(
        "float32", description="how generators travel; bfloat16 halves the bytes and rounds each weight to 8 bits"
    )
    secure_aggregation: Literal["auto", "on", "off"] = Field(
        "auto", description="the coordinator sees only sums over sites; auto: on for three or more sites"
    )


class Report(Section):
    """What the report may show."""

    share_real_examples: bool = Field(
        False,
        description="real images beside synthetic ones; phantoms are always shown, patients only when this is true",
    )


class Runtime(Section):
    """Speed only: not part of the study's digest."""

    backend: Literal["local", "ray"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = Field(0, ge=0, le=256, description="sites trained at once by the local backend; 0 = one per core")
    threads: int = Field(1, ge=1, le=256, description="torch threads of each worker")


class Study(Section):
    """A whole study: what is built, from what, by whom, and how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(2018, ge=0, lt=2**31)
    classes: tuple[str, ...] = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")
    image_size: ImageSize = 64
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="arithmetic of convolutions and products; weights stay float32"
    )
    data: Data = Data()
    sites: Sites = Sites()
    gan: Gan = Gan()
    archive: Archive = Archive()
    classifier: Classifier = Classifier()
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    report: Report = Report()
    runtime: Runtime = Runtime()

    @field_validator("classes")
    @classmethod
    def _classes_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 2:
            raise ValueError("at least two classes are needed")
        slugs = [name.strip().lower().replace(" ", "-") for name in value]
        if len(set(slugs)) != len(slugs):
            raise ValueError("class names must differ (case and spaces do not count)")
        for name in value:
            if name != name.strip() or not name or any(c in name for c in '/\\:*?"<>|\0\n\r\t') or name.startswith("."):
                raise ValueError(f"class name {name!r} must be usable as a folder name")
        return value

    @model_validator(mode="after")
    def _names_agree(self) -> Study:
        def known(where: str, names: Sequence[str]) -> None:
            for name in names:
                if name not in self.classes:
                    raise ValueError(f"{where}: unknown class {name!r}; the classes are {', '.join(self.classes)}")

        known("data.phantom.patients", list(self.data.phantom.patients))
        known("data.label_map", list(self.data.label_map.values()))
        for site, missing in self.sites.missing.items():
            if not 1 <= site <= self.sites.count:
                raise ValueError(f"sites.missing: there is no site {site} among 1..{self.sites.count}")
            known(f"sites.missing.{site}", missing)
        if self.federation.secure_aggregation == "on" and self.sites.count < 2:
            raise ValueError(
                "federation.secure_aggregation: a sum over one site hides nothing; it needs two sites or more"
            )
        self._privacy_is_possible()
        if not self.classifier.arms or len(set(self.classifier.arms)) != len(self.classifier.arms):
            raise ValueError("classifier.arms: name each arm once, at least one")
        return self

    def _privacy_is_possible(self) -> None:
        """Refuse what would void the claim, with the reason."""
        if not self.private:
            if self.gan.method != "dcgan":
                raise ValueError(
                    f"gan.method {self.gan.method} releases noisy embeddings: it needs privacy.epsilon and delta"
                )
            return
        if self.classifier.balance == "sampling":
            raise ValueError(
                "classifier.balance: sampling draws patients of rare classes more often, so the sampling rate q of the claim "
                "would not be theirs. In a private study use loss (public class sizes) or none"
            )
        if self.precision != "float32":
            raise ValueError(
                "precision: bfloat16 lets clipped gradients exceed the clip; a private study needs float32"
            )
        if self.gan.r1 > 0:
            raise ValueError("gan.r1 reads real images a second time, outside of the clipped gradient; set it to 0")
        if self.report.share_real_examples:
            raise ValueError("report.share_real_examples shows patients; a private study cannot")

    @property
    def private(self) -> bool:
        """Whether the study is differentially private (`privacy.epsilon` is given)."""
        return self.privacy.epsilon is not None

    def resolved(self) -> dict[str, Any]:
        """The whole study as plain values, runtime included, defaults filled in."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that changes results (all but `runtime`)."""
        values = self.model_dump(mode="json", exclude={"runtime"})
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def secure(self) -> bool:
        """Whether sums over sites are all that the coordinator may see (`federation.secure_aggregation`)."""
        wish = self.federation.secure_aggregation
        return wish == "on" or (wish == "auto" and self.sites.count >= 3)

    def site_names(self) -> tuple[str, ...]:
        """Names of the simulated hospitals: site-01, site-02, ... (sorted by name and by number alike)."""
        digits = max(2, len(str(self.sites.count)))
        return tuple(f"site-{number:0{digits}d}" for number in range(1, self.sites.count + 1))


def _override(values: dict[str, Any], setting: str) -> None:
    """Apply one ``a.b=c`` of --set in place; c is read as YAML."""
    path, separator, text = setting.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {setting!r}: write it as section.field=value, for instance --set gan.rounds=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not YAML ({error})") from error
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {key} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(study)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such field; see docs/configuration.md for the fields of each section"
        elif item["type"] != "missing":
            message += f" (it is {item['input']!r:.80})"
        lines.append(f"  {where}: {message}")
    return f"{source} is not a valid study:\n" + "\n".join(lines)


def parse_study(values: Any, source: str) -> Study:
    """Validate plain values. Raises `ConfigError` naming `source`, every wrong field, its value and what is allowed."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} is not a study: it must be a mapping of fields, like configs/demo.yaml")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, source)) from error


def load_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """Read a study file and apply ``a.b=c`` settings. Raises `ConfigError`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such study file. The shipped ones are in configs/.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the study file cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: the study file is not YAML: {error}") from error
    if isinstance(values, dict):
        for setting in settings:
            _override(values, setting)
    return parse_study(values, str(path))
