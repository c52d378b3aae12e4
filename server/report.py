"""The facts of a study as files that open anywhere: report.json for machines, report.html for people.

::

    report (plain values) --> report.json --------------------------------------+
    panels (uint8 images) --> report-panels.npz --(render_again reads both)-----+--> report.html (one file, offline, no script)

The report holds (parts marked ? may be absent; a score may be None, "nothing to measure on"):

    schema 1, name, study_digest, created, classes [..], source "phantom" | "folder", image_size?
    sites?    {site: {patients, counts {class: {train, validation, test}}}}         both None in a secure study
    totals?   {patients, counts {class: {train, validation, test}}}                 secure_aggregation? bool
    arms      {"DS1" | "DS3": `xfed.common.metrics.summary` on all test patients, and
                 sites? {site: summary}, rounds? [{round, loss, validation_balanced_accuracy, validation_loss,
                 ..}], best_round?, stopped? "early" | "rounds", counts? {class: {real, synthetic}}}
    gan?      {classes {class: {sites, holders?, rounds [{round, loss_g, loss_d}]}}, progress_rounds? [..]}
    archive?  {counts {class: n}, quality? {class: {fid, fid_floor, kid, kid_floor, precision, recall, density,
               coverage, ms_ssim?, ms_ssim_real?, images_compared?, images_real?, images_floor?, equal_numbers?,
               kid_pooled?}}, left_out?, tstr? (a summary as of an arm, or {left_out}),
               recognised? {balanced_accuracy, per_class {class: share}}, features?, root_sha256, privacy_tests?,
               steering? {.., targets {label: {tried, accepted, judge, ..}}}}
    sibling?  another study beside this one: `xfed.server.siblings`
    privacy?  {sites {site: {unit, epsilon, delta, statement, released [..]}}}      epsilon None: infinite
    traffic?  {site: {sent_bytes, received_bytes, messages {name: n}}}              seen from the site
    timings? {phase: seconds}, versions? {..}, digests? {..}, events? [{time, kind, site, text}]

    panels: "real"? uint8 [C, k, S, S], "synthetic"? uint8 [C, k, S, S], "progress"? uint8 [rounds, C, S, S], and the
            heat maps of `xfed.server.heat_panels`
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table
from rich.text import Text

from xfed.common.arms import ARMS
from xfed.common.durable import write_bytes, write_json, write_text
from xfed.common.errors import DataError
from xfed.common.intervals import difference_interval
from xfed.server import figures
from xfed.server.pictures import pictures
from xfed.server.templates import render_page, signed

__all__ = [
    "ARM_NAMES",
    "SCHEMA",
    "Difference",
    "Panels",
    "difference",
    "guessing_rate",
    "read_panels",
    "render_again",
    "terminal_table",
    "verdict",
    "write_report",
]

SCHEMA = 1
ARM_NAMES: Mapping[str, str] = {name: recipe.title for name, recipe in ARMS.items()}
PANELS = "report-panels.npz"
MOST_EVENTS = 200
CARRIES = {
    "PlanStatus": "whether the plan is approved, software version",
    "Description": "counts per class and split, number of patients, software version",
    "SessionKeys": "public keys for one secure sum, and the site's signature of them",
    "SessionShares": "sealed shares that only another hospital can open",
    "Masked": "an answer under masks that cancel in the sum over all hospitals, and only there",
    "UnmaskShares": "shares that take the masks off one sum",
    "GanUpdate": "a generator's weights, number of images, two mean losses",
    "ArchiveWanted": "which parts of the archive are missing",
    "ArchiveKept": "the digest of an archive part",
    "ClassifierUpdate": "a classifier's weights, number of images, a mean loss",
    "Scores": "confusion counts, score histograms, patient-level moments",
    "ArchiveMeasured": "sums of features, a few scores per class",
    "ArchiveVote": "a 0 or 1 for each synthetic image: is it too near to a training image?",
    "ArchiveAttacked": "patients counted per bin of their distance to the archive",
    "Examples": "example images: phantoms, or with the site's consent",
    "Refusal": "the reason why a request was refused",
}

Panels = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Difference:
    """A score of DS3 minus that of DS1, with its interval; see `xfed.common.intervals.difference_interval`."""

    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(report: Mapping[str, Any], score: str, class_name: str | None = None) -> Difference | None:
    """DS3 - DS1 of `score` (of one class, if named), or None when an arm or its interval is missing."""
    sides = []
    for arm in ("DS3", "DS1"):
        facts = report.get("arms", {}).get(arm, {})
        if class_name is not None:
            facts = facts.get("per_class", {}).get(class_name, {})
        value, interval = facts.get(score), facts.get(f"{score}_interval")
        if value is None or interval is None:
            return None
        sides.append((value, interval))
    (a, a_span), (b, b_span) = sides
    return Difference(a - b, *difference_interval(a, a_span, b, b_span))


def _number(value: Any, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _span(facts: Mapping[str, Any], score: str) -> str:
    interval = facts.get(f"{score}_interval")
    return f"{_number(facts.get(score))} [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""


def _percent(report: Mapping[str, Any]) -> str:
    levels = {facts.get("confidence", 0.95) for facts in report.get("arms", {}).values()} or {0.95}
    return f"{100 * min(levels):g}%"


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence, from the numbers and never more than they say: DS3 against DS1 in balanced accuracy.

    A difference is called shown only when the interval of the difference leaves out 0. Overlap of the two
    arms' intervals is not used: it is no test.
    """
    arms: Mapping[str, Any] = report.get("arms") or {}
    scored = [arm for arm in arms if arms[arm].get("balanced_accuracy_interval")]
    if not scored:
        return "No verdict: no arm was scored on test images."
    if "DS1" not in scored or "DS3" not in scored:
        arm = scored[0]
        return (
            f"{arm} ({ARM_NAMES.get(arm, arm)}) reached {_span(arms[arm], 'balanced_accuracy')} balanced accuracy; "
            "there is no second arm with scores to compare it with."
        )
    gap = difference(report, "balanced_accuracy")
    if gap is None:  # pragma: no cover - both arms have intervals here
        return "No verdict: the arms cannot be compared."
    ds1, ds3 = arms["DS1"], arms["DS3"]
    opening = (
        f"DS3 (real + synthetic) reached {_span(ds3, 'balanced_accuracy')} balanced accuracy against "
        f"{_span(ds1, 'balanced_accuracy')} for DS1 (real only): "
    )
    interval = f"{_percent(report)} interval {signed(gap.low)} to {signed(gap.high)}"
    if not gap.shown:
        return opening + f"no difference shown ({signed(gap.value)}, {interval})."
    word = "better" if gap.value > 0 else "worse"
    return opening + f"DS3 is {word} by {_number(abs(gap.value))} ({interval})."


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the verdict must know with it."""
    arms: Mapping[str, Any] = report.get("arms") or {}
    notes = []
    scored = {arm: facts for arm, facts in arms.items() if facts.get("balanced_accuracy_interval")}
    if scored:
        n, patients = (next(iter(scored.values())).get(key) for key in ("n", "patients"))
        if n is not None and patients is not None:
            notes.append(f"Scored on {n:,} test images of {patients:,} patients that no arm was trained on.")
        facts = next(iter(scored.values()))
        absent = [name for name in report["classes"] if name not in facts.get("balanced_over", report["classes"])]
        if absent:
            notes.append(f"Without test images, and so left out of balanced accuracy: {', '.join(absent)}.")
        guessing = guessing_rate(report)
        unsure = [arm for arm, facts in scored.items() if facts["balanced_accuracy_interval"][0] <= guessing]
        if unsure:
            notes.append(
                f"{' and '.join(unsure)}: the interval reaches {guessing:.2f}, what guessing would get. "
                "Nothing is shown to have been learned."
            )
    gap = difference(report, "balanced_accuracy")
    if gap is not None and not gap.shown:
        notes.append("“No difference shown” does not mean “equal”: more test patients could show one.")
    if report.get("source") == "phantom":
        notes.append("The images are drawn phantoms, not patients: the figures say nothing about patients.")
    return notes


def guessing_rate(report: Mapping[str, Any]) -> float:
    """What guessing would reach in balanced accuracy: 1 over the classes that were scored."""
    for facts in (report.get("arms") or {}).values():
        if facts.get("balanced_over"):
            return 1 / len(facts["balanced_over"])
    return 1 / max(1, len(report["classes"]))


def _drawn(report: Mapping[str, Any]) -> dict[str, str]:
    """Every figure that the report has numbers for, as data URIs by name."""
    arms: Mapping[str, Any] = report.get("arms") or {}
    guessing, result = guessing_rate(report), {}
    if any(facts.get("per_class") for facts in arms.values()):
        result["sensitivity"] = figures.sensitivity_dots(arms, report["classes"], guessing)
    # a private study scores no round
    if any(entry.get("validation_loss") is not None for facts in arms.values() for entry in facts.get("rounds") or []):
        result["curves"] = figures.training_curves(arms, guessing)
    gan = (report.get("gan") or {}).get("classes") or {}
    if any(facts.get("rounds") for facts in gan.values()):
        result["gan"] = figures.gan_losses(gan)
    counted = [facts["counts"] for facts in arms.values() if facts.get("counts")]
    if counted:
        result["counts"] = figures.counts_bars(
            arms["DS3"]["counts"] if arms.get("DS3", {}).get("counts") else counted[0]
        )
    return result


def _site_names(report: Mapping[str, Any]) -> list[str]:
    arms = (report.get("arms") or {}).values()
    return sorted({*(report.get("sites") or {}), *(site for facts in arms for site in facts.get("sites") or {})})


def _statements(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Privacy statement -> the sites that make it, so that a common one is printed once."""
    result: dict[str, list[str]] = {}
    for site, entry in ((report.get("privacy") or {}).get("sites") or {}).items():
        if entry.get("statement"):
            result.setdefault(entry["statement"], []).append(site)
    return result


def _html(report: Mapping[str, Any], panels: Panels) -> str:
    classes = report["classes"]
    gaps = {name: difference(report, "sensitivity", name) for name in classes}
    return render_page(
        "report.html.j2",
        report=report,
        arms=report.get("arms") or {},
        arm_names=ARM_NAMES,
        classes=classes,
        colours=figures.ARM_COLOURS,
        verdict=verdict(report),
        notes=_notes(report),
        percent=_percent(report),
        guessing=guessing_rate(report),
        gap=difference(report, "balanced_accuracy"),
        accuracy_gap=difference(report, "accuracy"),
        gaps=gaps,
        drawn=_drawn(report),
        pictures=pictures(report, panels),
        carries=CARRIES,
        seen=sorted({name for entry in (report.get("traffic") or {}).values() for name in entry.get("messages") or {}}),
        heat_scale=figures.heat_scale(),
        site_names=_site_names(report),
        statements=_statements(report),
        most_events=MOST_EVENTS,
        many_arms=figures.MANY_ARMS,
    )


def write_report(folder: Path, report: Mapping[str, Any], panels: Panels | None = None) -> Path:
    """Write report.json, report-panels.npz (when there are images) and report.html; the path of the last is returned.

    Each file is whole or absent. Raises `StorageError`, and `DataError` for a report of another schema.
    """
    if report.get("schema") != SCHEMA or not report.get("classes"):
        raise DataError(
            f"{folder}: a report of schema {report.get('schema')!r}; this xfed writes schema {SCHEMA} with classes. "
            "Use the xfed version that made it."
        )
    write_json(folder / "report.json", report)
    if panels:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(array, np.uint8) for name, array in panels.items()}
        np.savez_compressed(buffer, **arrays)
        write_bytes(folder / PANELS, buffer.getvalue())
    else:
        (folder / PANELS).unlink(missing_ok=True)
    path = folder / "report.html"
    write_text(path, _html(report, panels or {}))
    return path


def read_panels(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The images kept beside a report; {} where there are none. Raises `DataError`."""
    path = folder / PANELS
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it to render without images.") from error


def render_again(folder: Path) -> Path:
    """Write report.html anew from report.json (and the images kept beside it). Raises `DataError`."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no report.json: give the folder of a finished run (--out of the run)."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Run the study again: it continues at the report.") from error
    if not isinstance(report, dict):
        raise DataError(f"{path} is not a report: it must be a mapping with schema {SCHEMA}")
    return write_report(folder, report, read_panels(folder))


def terminal_table(report: Mapping[str, Any]) -> Table | Group:
    """DS1 beside DS3, per class and overall, for the end of a run; many arms: a row per arm, classes in a table of their own."""
    arms: Mapping[str, Any] = report.get("arms") or {}
    caption = Text(re.sub(r"\s+", " ", verdict(report)), style="default")
    if len(arms) >= figures.MANY_ARMS:
        return Group(*_arm_rows(report["classes"], arms), caption)
    table = Table(caption=caption, caption_justify="left", header_style="bold", expand=False)
    table.add_column("class")
    table.add_column("n", justify="right")
    for arm in arms:
        table.add_column(f"{arm} sensitivity", justify="right")
        table.add_column("AUC", justify="right")
    for name in report["classes"]:
        entries = [facts.get("per_class", {}).get(name, {}) for facts in arms.values()]
        n = next((str(entry["n"]) for entry in entries if entry.get("n") is not None), "–")
        cells = [text for entry in entries for text in (_span(entry, "sensitivity") or "–", _number(entry.get("auc")))]
        table.add_row(Text(name), n, *cells)
    table.add_section()
    for score, label in (("balanced_accuracy", "balanced accuracy"), ("accuracy", "accuracy")):
        cells = [text for facts in arms.values() for text in (_span(facts, score) or "–", _overall_auc(facts, score))]
        n = next((str(facts["n"]) for facts in arms.values() if facts.get("n") is not None), "–")
        table.add_row(label, n, *cells)
    return table


def _arm_rows(classes: Sequence[str], arms: Mapping[str, Any]) -> tuple[Table, Table]:
    overall, per_class = (Table("arm", header_style="bold", title_justify="left") for _ in range(2))
    per_class.title = "sensitivity per class"
    for heading in ("balanced accuracy", "accuracy", "AUC"):
        overall.add_column(heading, justify="right")
    for name in classes:
        per_class.add_column(Text(name), justify="right", overflow="fold", min_width=9)
    for arm, facts in arms.items():
        spans = [_span(facts, score) or _number(facts.get(score)) for score in ("balanced_accuracy", "accuracy")]
        overall.add_row(Text(arm), *spans, _number(facts.get("auc")))
        entries = (facts.get("per_class", {}).get(name, {}) for name in classes)
        per_class.add_row(Text(arm), *(_stacked(entry, "sensitivity") for entry in entries))
    return overall, per_class


def _stacked(facts: Mapping[str, Any], score: str) -> str:
    return (_span(facts, score) or _number(facts.get(score))).replace(" [", "\n").replace("]", "").replace(", ", "–")


def _overall_auc(facts: Mapping[str, Any], score: str) -> str:
    return _number(facts.get("auc")) if score == "balanced_accuracy" else ""
