"""The archive's datasheet, after Gebru et al. (2021): filled from the manifest alone, so that it can be made again at any time.

::

    report --about_of--> manifest["about"] --+
    counts, filter, curation, privacy -------+--datasheet--> datasheet.md (Markdown)

What nobody measured or told is written as "not stated" or "not measured", never left out.

Source: T. Gebru et al., "Datasheets for Datasets", Communications of the ACM 64(12), 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

from xfed.server.archive_manifest import labels_of

__all__ = ["about_of", "datasheet"]

MEASURED = ("quality", "features", "recognised", "tstr", "privacy_tests")
FIGURES = {
    "fid": "FID",
    "fid_floor": "FID floor",
    "kid": "KID",
    "kid_floor": "KID floor",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


def about_of(report: Mapping[str, Any], verdict: str, root: str) -> dict[str, Any]:
    """What the documents need of a report (see `xfed.server.report`): for the manifest of the archive with that root."""
    counts = report.get("totals", {}).get("counts", {})
    return {
        "measured_on": report.get("archive", {}).get("root_sha256", root),
        "source": report.get("source"),
        "hospitals": len(report.get("sites") or {}) or None,
        "patients": report.get("totals", {}).get("patients"),
        "real": {name: splits["train"] for name, splits in counts.items()},
        "private": any(site.get("epsilon") is not None for site in report.get("privacy", {}).get("sites", {}).values()),
        "verdict": verdict,
        **{name: report["archive"][name] for name in MEASURED if name in report.get("archive", {})},
    }


def datasheet(manifest: Mapping[str, Any]) -> str:
    """The datasheet of the archive with this manifest, as Markdown."""
    template = resources.files("xfed.server").joinpath("datasheet.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    about: Mapping[str, Any] = _Lenient(manifest.get("about", {}))
    classes = manifest["classes"]
    sieve: Mapping[str, Any] = manifest.get("filter", {})
    rejected = sieve.get("rejected", {})
    return environment.from_string(template).render(
        m=_Lenient(manifest),
        about=about,
        curation=_Lenient(manifest["curation"]),
        hospitals=_plural(about["hospitals"], "hospital"),
        source=_source(about, manifest),
        planned=_Lenient(manifest.get("planned", {}), "not stated"),
        drawn=_Lenient(sieve.get("drawn", {}), "not stated"),
        rejected={
            name: sum(rejected[name].values()) if name in rejected else "not stated" for name in labels_of(manifest)
        },
        short=", ".join(f"{name} lacks {count} images" for name, count in sieve.get("short", {}).items()),
        total=f"{sum(manifest['counts'].values()):,}",
        filter_text=_filter_text(sieve),
        confidential=_confidential(about),
        per_class=_per_class(about["recognised"]),
        vetoes=_vetoes(manifest),
        tests=_tests(about),
        figures=_figures(about["quality"], classes),
        percent=_percent,
    )


class _Lenient(dict[str, Any]):
    """A mapping that says None, or what it is told to, for what it does not hold."""

    def __init__(self, values: Mapping[str, Any], default: Any = None) -> None:
        super().__init__(values)
        self._default = default

    def __missing__(self, key: str) -> Any:
        return self._default


def _plural(count: int | None, noun: str) -> str:
    return f"an unstated number of {noun}s" if count is None else f"{count} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _source(about: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    if about["source"] == "phantom":
        return "Nobody's: the images behind the generators were phantoms, drawn by a procedure (a demonstration)."
    patients = about["patients"]
    people = f"{patients:,} patients" if isinstance(patients, int) and patients else "patients"
    return f"Of {people} of {_plural(about['hospitals'], 'hospital')}, who are not named here."


def _filter_text(sieve: Mapping[str, Any]) -> str:
    if not sieve.get("on"):
        return "No automatic filter was used: blank, saturated and repeated images may be among them."
    limits = sieve["limits"]
    return (
        f"An automatic filter left out images that are blank (contrast below {limits['blank']:g} grey levels), saturated "
        f"({limits['saturated']:.0%} black or white), far from their own class (robust z-score above "
        f"{limits['off-manifold']:g}) or nearer than {limits['duplicate']:g} grey levels (RMS) to another one. It read "
        "synthetic images only, and knows nothing of anatomy."
    )


def _confidential(about: Mapping[str, Any]) -> str:
    if about["source"] == "phantom":
        return "No: no patient's image was used."
    return (
        "The images were made from patients' images. How much of a patient can be in them is what the privacy statement says "
        "and what the attacks in passport.html, if they were run, measured."
    )


def _per_class(recognised: Mapping[str, Any] | None) -> str:
    shares = (recognised or {}).get("per_class") or {}
    told = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share is not None)
    return f": {told}" if told else ""


def _vetoes(manifest: Mapping[str, Any]) -> str:
    """What the hospitals took out (see `xfed.server.votes`); which image, and who, is not said."""
    vetoes = manifest.get("vetoes")
    if not vetoes:
        return "The hospitals did not vote on the images."
    per_class = ", ".join(f"{name} {count}" for name, count in vetoes["vetoed_per_class"].items() if count)
    return (
        f"{_plural(vetoes['sites'], 'hospital')} compared the images with their patients'; {vetoes['vetoed']:,} of "
        f"{vetoes['images']:,} were too near to one and are left out{f' ({per_class})' if per_class else ''}."
    )


def _tests(about: Mapping[str, Any]) -> str:
    """What each test of privacy found, in its own words, or why it was left out."""
    told = []
    for name, facts in (about["privacy_tests"] or {}).items():
        text = facts.get("statement") or facts.get("left_out") if isinstance(facts, Mapping) else None
        told.append(f"- {name}: {text or 'see passport.json'}")
    return "\n".join(told) or "No attack on this archive was measured."


def _figures(quality: Mapping[str, Any] | None, classes: list[str]) -> dict[str, Any] | None:
    """Columns and rows of the table of figures; None where nothing was measured."""
    found = quality or {}
    keys = [key for key in FIGURES if any(found.get(name, {}).get(key) is not None for name in classes)]
    if not keys:
        return None
    rows = []
    for name in classes:
        values = [found.get(name, {}).get(key) for key in keys]
        rows.append([name, *("not measured" if value is None else f"{value:.3g}" for value in values)])
    return {"columns": [FIGURES[key] for key in keys], "rows": rows}
