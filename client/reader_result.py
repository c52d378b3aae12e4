"""What a reader study says in words, and the aggregate that may leave the hospital.

::

    figures (xfed.common.reader_statistics) --in_words--> sentences, for the page and the terminal
    ReaderStudy --may it leave? policy, private studies, small counts--> aggregate --> a file that a person sends

The aggregate holds counts per class and pseudonymous reader, and figures made of them: no image, no id of one, no single
answer, no time. It is exact: no noise is added, so nothing bounds what it says about a patient. Therefore it is refused where
the archive's study is private, where patients of this site are under a privacy ledger, and where the policy allows no study
without differential privacy. A class with fewer real images (each is one patient) than `smallest_count` takes no part in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xfed.client.policy import load_policy
from xfed.client.reader_study import ReaderStudy
from xfed.common.config import Study, parse_study
from xfed.common.errors import ConfigError, RefusedError
from xfed.common.reader_statistics import Reading, summarise

__all__ = ["aggregate", "in_words"]


def in_words(facts: Mapping[str, Any]) -> list[str]:
    """The figures of one reader, or of all pooled, as sentences."""
    low, high = facts["accuracy_interval"]
    kinds = {kind: facts[kind] for kind in ("synthetic", "real")}
    called_real = {kind: one["n"] - one["called_synthetic"] for kind, one in kinds.items()}
    if low <= 0.5 <= high:
        meaning = "Chance can explain this: the answers do not show that synthetic images can be told from real ones"
    elif facts["accuracy"] > 0.5:
        meaning = "Chance does not explain this: synthetic images were told from real ones"
    else:
        meaning = "Chance does not explain this: synthetic images were taken for real, and real ones for synthetic"
    return [
        f"{facts['correct']} of {facts['n']} answers were right.",
        f"That is {facts['accuracy']:.0%}, with a 95% interval from {low:.0%} to {high:.0%}; guessing gives 50%.",
        f"{meaning} ({_p(facts['p_value'])}).",
        f"Synthetic images were called real in {called_real['synthetic']} of {kinds['synthetic']['n']} answers, real ones in "
        f"{called_real['real']} of {kinds['real']['n']}.",
    ]


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def aggregate(study: ReaderStudy, site: Path) -> dict[str, Any]:
    """What may leave of a study of the site in folder `site`. Raises `RefusedError` with the reason, or `DataError`."""
    policy = load_policy(site / "policy.yaml")
    design = study.design
    if any(known.private and known.digest == design.study for known in _known_studies(site)):
        raise RefusedError(
            f"the archive is of study {design.study[:12]}, which is private: the readers' counts are a release without "
            "noise, and the promise to its patients would no longer hold. The result stays here (reader-study.json)."
        )
    if (site / "ledger.jsonl").is_file():
        raise RefusedError(
            "patients of this site took part in private studies (ledger.jsonl): the readers' counts are a release without "
            "noise that the ledger cannot account for. The result stays here (reader-study.json)."
        )
    if not policy.allow_non_private:
        raise RefusedError(
            "policy.yaml allows nothing without differential privacy (allow_non_private is false), and the readers' counts carry "
            "no noise. If the hospital accepts that, set in policy.yaml: allow_non_private: true"
        )
    if "archive_scores" not in policy.metrics:
        raise RefusedError(
            "policy.yaml lets no figures leave that say how like real images the synthetic ones are (metrics has no "
            "archive_scores)"
        )
    study.figures()  # has anybody finished?
    real = np.bincount(design.labels[~design.truth], minlength=len(design.classes))
    kept = [label for label in range(len(design.classes)) if real[label] and real[label] >= policy.smallest_count]
    if not kept:
        raise RefusedError(
            f"no class has {policy.smallest_count} real images (smallest_count in policy.yaml), each of which is one "
            "patient: such counts do not leave"
        )
    rows = np.flatnonzero(np.isin(design.labels, kept))
    names = sorted(
        study.readings().items(), key=lambda item: hashlib.sha256(f"{design.seed}/{item[0]}".encode()).digest()
    )
    readings = {
        f"reader-{number}": Reading(called=each.called[rows], confidence=each.confidence[rows])
        for number, (_, each) in enumerate(names, start=1)
    }
    labels = np.searchsorted(kept, design.labels[rows])
    classes = [design.classes[label] for label in kept]
    return {
        "schema": 1,
        "kind": "reader study, aggregate",
        "study": design.study,
        "archive_root": design.archive_root,
        "image_size": design.image_size,
        "images": len(rows),
        "only_held_out_patients": design.held_out["train"] == 0,
        "classes": classes,
        "classes_left_out": [name for name in design.classes if name not in classes],
        **summarise(design.truth[rows], labels, classes, readings),
    }


def _known_studies(site: Path) -> Iterator[Study]:
    """The studies that this site has been part of, or was asked to be. Raises `ConfigError` where one cannot be read."""
    for path in [site / "study.json", *sorted(site.glob("studies/*/study.json")), *sorted(site.glob("plans/*.json"))]:
        if not path.is_file() or path.name.endswith(".approved.json"):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if path.parent.name == "plans":
                values = json.loads(values["plan"])["study"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): whether that study is private is not known") from error
        yield parse_study(values, str(path))
