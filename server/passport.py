"""The archive's passport: what it is worth and what it costs in privacy, as passport.json and passport.html.

::

    report (plain values) + archive/manifest.json --> passport.json: verdict, figures per class, TSTR, TRTS, privacy, curation
    the same + report-panels.npz (pictures) ----------> passport.html: one file, offline, no script, prints on A4

Both lie in archive/ and travel with it; the release signs them (xfed.server.archive_release). The passport holds no number
that is not in the report or the manifest; what was not measured is said in words and never 0.

passport.json: schema 1, kind, name, study_digest, created, classes, image_size?, source, counts, root_sha256, verdict {summary,
may [..], may_not [..]}, features, left_out?, quality {class: {..}}, recognised, steering?, tstr, real {arm: {balanced_accuracy,
..}}, privacy {statement, epsilon?, delta?}, privacy_tests?, curation, filter?, vetoes?, digests, versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xfed.common.durable import write_json, write_text
from xfed.common.errors import CheckpointError
from xfed.server import figures
from xfed.server.passport_verdict import curation_of, judgement
from xfed.server.pictures import pictures
from xfed.server.report import ARM_NAMES, Panels, guessing_rate, read_panels
from xfed.server.templates import render_page

__all__ = ["passport_of", "write_passport"]

SCHEMA = 1
_SCORES = ("accuracy", "balanced_accuracy", "auc", "n", "patients")


def write_passport(folder: Path, report: Mapping[str, Any]) -> None:
    """Write archive/passport.json and .html of a run folder. Raises `CheckpointError` without an archive, `StorageError`."""
    place = folder / "archive"
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{place} holds no readable manifest ({error}), so there is nothing to write a passport of. Run the study again."
        ) from error
    passport = passport_of(report, manifest)
    passport["created"] = _first_made(place / "passport.json", passport)
    write_json(place / "passport.json", passport)
    write_text(place / "passport.html", _html(passport, report, read_panels(folder)))


def _first_made(path: Path, passport: Mapping[str, Any]) -> Any:
    """When a passport that says all this was first written: writing it again changes no byte."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return passport["created"]
    same = isinstance(before, dict) and before | {"created": None} == json.loads(
        json.dumps({**passport, "created": None})
    )
    return before["created"] if same else passport["created"]


def passport_of(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of passport.json."""
    archive = report["archive"]
    arms = dict(report.get("arms") or {})
    sites = (report.get("privacy") or {}).get("sites") or {}
    epsilons = [entry.get("epsilon") for entry in sites.values()]
    return {
        "schema": SCHEMA,
        "kind": "passport of a synthetic archive",
        "name": report["name"],
        "study_digest": report.get("study_digest"),
        "created": report.get("created"),
        "classes": list(report["classes"]),
        "image_size": report.get("image_size"),
        "source": report.get("source"),
        "counts": manifest.get("counts") or archive.get("counts"),
        "root_sha256": manifest.get("root_sha256"),
        "measured_on": archive.get("root_sha256"),
        "verdict": judgement(report, manifest),
        "features": archive.get("features"),
        "left_out": archive.get("left_out"),
        "quality": archive.get("quality"),
        "recognised": archive.get("recognised"),
        "steering": archive.get("steering"),
        "tstr": archive.get("tstr"),
        "real": {name: _scores(facts) for name, facts in arms.items()},
        "guessing": guessing_rate(report),
        "privacy": {
            "statement": manifest.get("privacy"),
            "epsilon": None if not epsilons or None in epsilons else max(epsilons),
            "delta": next((entry.get("delta") for entry in sites.values()), None),
        },
        "privacy_tests": archive.get("privacy_tests"),
        "curation": manifest.get("curation"),
        "filter": manifest.get("filter"),
        "vetoes": manifest.get("vetoes"),
        "digests": {
            "archive root": manifest.get("root_sha256"),
            "study": report.get("study_digest"),
            **{f"generator {name}": digest for name, digest in (manifest.get("generators") or {}).items()},
        },
        "versions": report.get("versions"),
    }


def _scores(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: facts.get(key) for score in _SCORES for key in (score, f"{score}_interval") if facts.get(key) is not None
    }


def _html(passport: Mapping[str, Any], report: Mapping[str, Any], panels: Panels) -> str:
    return render_page(
        "passport.html.j2",
        passport=passport,
        classes=passport["classes"],
        arm_names=ARM_NAMES,
        curation=curation_of(passport),
        tests=_tests(passport["privacy_tests"] or {}),
        making=_making(passport),
        drawn=_drawn(passport, report),
        pictures=pictures(report, panels),
        heat_scale=figures.heat_scale(),
    )


def _drawn(passport: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    """The charts that the passport has numbers for."""
    quality, classes = passport["quality"] or {}, passport["classes"]
    drawn = {}
    pairs = {
        name: (facts["fid_floor"], facts["fid"]) if facts.get("fid") is not None else None
        for name, facts in ((name, quality.get(name) or {}) for name in classes)
    }
    if any(pairs.values()):
        drawn["fid"] = figures.distances(pairs, "Frechet distance (logarithmic)")
    arms = {name: facts for name, facts in (report.get("arms") or {}).items() if name == "DS1"}
    arms["TSTR"] = passport["tstr"] or {}
    if arms["TSTR"].get("per_class"):
        drawn["tstr"] = figures.sensitivity_dots(arms, classes, passport["guessing"])
    return drawn


def _making(passport: Mapping[str, Any]) -> dict[str, str]:
    """In words: what the automatic filter and the hospitals' vote took out."""
    sieve, vetoes = passport["filter"] or {}, passport["vetoes"] or {}
    lost = {name: sum(reasons.values()) for name, reasons in (sieve.get("rejected") or {}).items()}
    told = {"filter": "none" if not sieve.get("on") else f"{sum(lost.values()):,} images were rejected and drawn anew"}
    if sum(lost.values()):
        told["filter"] += f" ({_words({name: count for name, count in lost.items() if count})})"
    if vetoes:
        told["vetoes"] = (
            f"{vetoes['vetoed']:,} of {vetoes['images']:,} images were too near to a patient of one of {vetoes['sites']} "
            "hospitals and are left out"
        )
    return told


def _tests(tests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each privacy test as its name, its statement (`statement`, or why it was `left_out`), rows and tables of figures."""
    result = []
    for name, facts in tests.items():
        nested = {key: value for key, value in facts.items() if _is_table(value)}
        plain = {key: value for key, value in facts.items() if key not in ("statement", "left_out", *nested)}
        # one row per class is a table; mappings of different keys stand in one table together
        apart = {key: value for key, value in nested.items() if _is_table(next(iter(value.values())))}
        together = {key: value for key, value in nested.items() if key not in apart}
        tables = [_table(key, value) for key, value in apart.items()]
        if together:
            tables.insert(0, _table("", together))
        result.append(
            {
                "name": _label(name, first=True),
                "text": facts.get("statement") or facts.get("left_out") or "",
                "rows": [(_label(key), _words(value)) for key, value in plain.items()],
                "tables": tables,
            }
        )
    return result


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and any(isinstance(inner, Mapping | list) for inner in value.values())
    )


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of equal figures; "x_interval" stands with "x"."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if not key.endswith("interval")))
    cells = {
        _label(name): [
            _words(row.get(column)) + _span(row.get(f"{column}_interval", row.get("interval"))) if column in row else ""
            for column in columns
        ]
        for name, row in rows.items()
    }
    return {"title": _label(title, first=True), "columns": [_label(column) for column in columns], "rows": cells}


def _label(key: str, first: bool = False) -> str:
    """A key of the report in words; `first`: at the beginning of a line."""
    text = " ".join(word.upper() if word in ("auc", "tpr", "fpr") else word for word in key.split("_"))
    return text[:1].upper() + text[1:] if first else text


def _span(interval: Any) -> str:
    return f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""


def _words(value: Any) -> str:
    """A plain value in words: numbers to three digits, lists and mappings with commas, None as "–"."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case int():
            return f"{value:,}"
        case Mapping():
            return ", ".join(f"{str(key).replace('_', ' ')} {_words(inner)}" for key, inner in value.items())
        case list() | tuple():
            return ", ".join(map(_words, value))
    return str(value)
