"""Two studies side by side: what each family of generators made of the same training images, and what it cost.

::

    journal, manifest --generator_cost--> report.json {gan {cost}}: seconds, bytes and steps of phases 1 and 2
    report A, report B --side_by_side--> {names, rows [{title, unit, values [A, B]}, ..], notes}
                                         --> comparison.json, comparison.html, "sibling" of both reports

Figures are taken from the reports as they are. Distances compare only in the same eyes: where the two classifiers DS1 are
not the same to the last bit (other images, splits, seed or settings), a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xfed.common.durable import write_json, write_text
from xfed.common.errors import DataError
from xfed.common.gan import build_generator
from xfed.server.report import read_panels, write_report
from xfed.server.report_signature import sign_report
from xfed.server.run import Run
from xfed.server.templates import render_page

__all__ = ["add_sibling", "generator_cost", "side_by_side", "write_comparison"]

PHASES = ("embeddings", "shared", "gan", "steering")
_MEANS = (
    ("fid", "FID, mean over classes", "lower is better"),
    ("fid_floor", "FID floor (real against real)", ""),
    ("kid", "KID, mean over classes", "lower is better"),
    ("precision", "Precision", "share"),
    ("recall", "Recall", "share"),
    ("density", "Density", "about 1 is ideal"),
    ("coverage", "Coverage", "share"),
    ("ms_ssim", "Pairs alike (MS-SSIM), synthetic", "near the next line is best"),
    ("ms_ssim_real", "Pairs alike (MS-SSIM), real", ""),
)


def generator_cost(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the generators, and the classifier that steers them, took: from events.jsonl, so a resumed study counts everything.

    "seconds" and "bytes" (to and from all sites together) per phase; "steps", "images_shown" (to the discriminators of one site
    that holds every class) and "parameters" of all generators; "search_seconds": of steering, None where there was none.
    """
    study, gan = run.study, run.study.gan
    seconds, travelled = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)
    for event in run.journal.read():
        if event["kind"] == "exchange" and event["phase"] in PHASES:
            seconds[event["phase"]] += event["seconds"]
            travelled[event["phase"]] += sum(each["sent"] + each["received"] for each in event["traffic"].values())
    rounds = gan.rounds if "dcgan" in gan.method else 0
    steps = (rounds * len(study.generators) + gan.shared_rounds) * gan.steps_per_round
    parameters = sum(parameter.numel() for parameter in build_generator(study).parameters())
    searched = (manifest.get("steering") or {}).get("targets")
    return {
        "seconds": {phase: value for phase, value in seconds.items() if value},
        "bytes": {phase: value for phase, value in travelled.items() if value},
        "steps": steps,
        "images_shown": steps * gan.batch,
        "parameters": parameters * len(study.generators),
        "search_seconds": sum(facts["seconds"] for facts in searched.values()) if searched is not None else None,
    }


def side_by_side(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of two reports (`xfed.server.report`) with generators. Raises `DataError` where they cannot be compared."""
    for report in reports:
        if not (report.get("gan") or {}).get("cost") or not (report.get("archive") or {}).get("quality"):
            raise DataError(
                f"{report.get('name')}: its report knows no generators' cost or quality. Run the study again."
            )
    classes = list(reports[0]["classes"])
    if any(report["classes"] != classes for report in reports):
        raise DataError("the two studies have other classes: their archives cannot stand side by side")
    rows: list[dict[str, Any]] = []

    def add(title: str, unit: str, *values: Any, digits: int = 2) -> None:
        rows.append({"title": title, "unit": unit, "values": list(values), "digits": digits})

    add("Family", "", *(report["gan"].get("family", "dcgan") for report in reports))
    add("Real training images", "images", *(_training(report) for report in reports))
    add(
        "Images shown to the discriminators",
        "of a site",
        *(report["gan"]["cost"]["images_shown"] for report in reports),
    )
    add("Synthetic images", "images", *(sum(report["archive"]["counts"][c] for c in classes) for report in reports))
    for key, title, unit in _MEANS:
        add(title, unit, *(_mean(report, classes, key) for report in reports), digits=3)
    for name in classes:
        add(f"FID, {name}", "", *(report["archive"]["quality"][name].get("fid") for report in reports), digits=3)
    add("TSTR, balanced accuracy", "share", *(_tstr(report) for report in reports))
    add("DS1, balanced accuracy", "share", *(_arm(report, "DS1") for report in reports))
    add("DS3, balanced accuracy", "share", *(_arm(report, "DS3") for report in reports))
    for name in classes:
        add(f"Judge agrees, {name}", "share", *(_judge(report, name) for report in reports))
    for title, key in (("Training the generators", "gan"), ("Training the steering classifier", "steering")):
        add(title, "seconds", *(report["gan"]["cost"]["seconds"].get(key) for report in reports), digits=0)
    add("Searching latents", "seconds", *(report["gan"]["cost"]["search_seconds"] for report in reports), digits=0)
    add("Bytes of phases 1 and 2, all sites", "MB", *(_megabytes(report) for report in reports), digits=0)
    add("Parameters of all generators", "", *(report["gan"]["cost"]["parameters"] for report in reports))
    return {
        "names": [str(report["name"]) for report in reports],
        "studies": [report.get("study_digest") for report in reports],
        "rows": rows,
        "notes": _notes(reports),
    }


def _notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        "One run and one seed of each: small differences are noise. Seconds are of this machine, with whatever else ran."
    ]
    eyes = {(report.get("digests") or {}).get("classifier-DS1 weights") for report in reports}
    if len(eyes) > 1 or None in eyes:
        notes.append(
            "The judges (DS1) are not the same classifier: distances and agreement are in different eyes. "
            "Give both studies the same seed, data, sites and classifier."
        )
    if len({_training(report) for report in reports}) > 1:
        notes.append("The studies have different numbers of training images.")
    return notes


def _training(report: Mapping[str, Any]) -> int:
    return sum(counts["train"] for counts in report["totals"]["counts"].values())


def _mean(report: Mapping[str, Any], classes: Sequence[str], key: str) -> float | None:
    found = [report["archive"]["quality"][name].get(key) for name in classes]
    return None if not found or None in found else float(np.mean(found))


def _tstr(report: Mapping[str, Any]) -> float | None:
    found: float | None = (report["archive"].get("tstr") or {}).get("balanced_accuracy")
    return found


def _arm(report: Mapping[str, Any], arm: str) -> float | None:
    found: float | None = (report.get("arms") or {}).get(arm, {}).get("balanced_accuracy")
    return found


def _judge(report: Mapping[str, Any], name: str) -> float | None:
    found: float | None = (report["archive"].get("recognised") or {}).get("per_class", {}).get(name)
    return found


def _megabytes(report: Mapping[str, Any]) -> float:
    return float(sum(report["gan"]["cost"]["bytes"].values()) / 1e6)


def write_comparison(folder: Path, table: Mapping[str, Any]) -> Path:
    """Write comparison.json and comparison.html; returns the path of the page. Raises `StorageError`."""
    write_json(folder / "comparison.json", table)
    path = folder / "comparison.html"
    write_text(path, render_page("comparison.html.j2", sibling=table))
    return path


def add_sibling(run_folder: Path, report: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """Put the table into the report of a finished run, render it anew and sign it. Raises `DataError`, `StorageError`."""
    write_report(run_folder, {**report, "sibling": table}, read_panels(run_folder))
    sign_report(run_folder)
