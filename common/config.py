"""The study file as frozen values: parsed once, at the edge, unknown keys refused.

::

    study.yaml --(load: YAML, --set overrides)--> Study --digest--> every message, checkpoint and report carries it

`Study` holds what changes results (and so is in the digest). Left out of it: `Study.runtime`, which changes only speed, and
`Study.experiment`, which says what to repeat. Bitwise-equal weights are promised for the same machine,
thread count and precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from xfed.common.config_data import Data, Experiment, Phantom, Sites, Splits
from xfed.common.config_family import ALL, WHY_NOT_PRIVATE, check_findings, slug
from xfed.common.config_phases import Archive, Classifier, Gan
from xfed.common.config_privacy import Merf, Privacy, Shares
from xfed.common.config_section import Section
from xfed.common.errors import ConfigError

__all__ = [
    "NOT_IN_DIGEST",
    "Archive",
    "Classifier",
    "Data",
    "Experiment",
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

NOT_IN_DIGEST = frozenset({"runtime", "experiment"})
ImageSize = Literal[32, 64, 128, 256]


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

    @field_validator("secure_aggregation", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: object) -> object:
        """YAML reads on and off as true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


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
    experiment: Experiment = Experiment()
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
        check_findings(self.archive.findings, self.classes, self.gan.family)
        if (self.unlabelled or self.gan.shared_rounds) and ALL in map(slug, self.classes):
            raise ValueError(f"classes: with gan.family pggan no class may be called {ALL!r}: its generator is")
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
        if self.unlabelled:
            raise ValueError(f"gan.family pggan: {WHY_NOT_PRIVATE}")
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
        if controls := [arm for arm in self.classifier.arms if arm not in ("DS1", "DS3")]:
            raise ValueError(
                f"classifier.arms: {', '.join(controls)}: every arm spends budget, so a private study offers DS1 and DS3 alone"
            )
        if self.gan.shared_rounds:
            raise ValueError("gan.shared_rounds: no budget is planned for a generator of all classes; set it to 0")
        if self.archive.reuse is not None:
            raise ValueError("archive.reuse: a private study plans its budget over its own generators; leave it out")
        if self.data.splits.folds:
            raise ValueError("data.splits.folds: a private study splits patients by their own images; set it to 0")
        if self.report.share_real_examples:
            raise ValueError("report.share_real_examples shows patients; a private study cannot")

    @property
    def private(self) -> bool:
        """Whether the study is differentially private (`privacy.epsilon` is given)."""
        return self.privacy.epsilon is not None

    @property
    def unlabelled(self) -> bool:
        """Whether one generator learns from all images without labels (`gan.family: pggan`)."""
        return self.gan.family == "pggan"

    @property
    def generators(self) -> tuple[str, ...]:
        """Names of the study's generators: the classes, or "all"."""
        return (ALL,) if self.unlabelled else self.classes

    @property
    def labels(self) -> tuple[str, ...]:
        """What an image of the archive may be labelled: the classes, then the combinations of `archive.findings`."""
        return (*self.classes, *self.archive.findings)

    @property
    def data_seed(self) -> int:
        """What decides who is where and in which split (`data.seed`)."""
        return self.seed if self.data.seed is None else self.data.seed

    def resolved(self) -> dict[str, Any]:
        """The whole study as plain values, runtime included, defaults filled in."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that changes results (all but `runtime` and `experiment`)."""
        values = self.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))
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
