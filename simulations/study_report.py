"""What a study of many arms says, as one page that opens anywhere, tables for a program and figures for a paper.

::

    values (OUT/study.json) --figures--> OUT/figures/*.svg, *.png --+
                            --tables---> OUT/tables/*.csv           +--> OUT/study.html (one file, offline, no script)

The values hold (parts marked ? may be absent; None: not measured):

    schema 1, name, created, classes [..], image_size, source "phantom" | "folder", guessing, software?
    grid      {folds, seeds [..], cells, confidence, replicates}
    arms      {arm: {title}}
    groups    [{id, sites, skew, model, images, patients, verdict, planned, comparisons [..],
                arms {arm: {runs, seeds, folds, balanced_accuracy SCORE, accuracy SCORE, auc SCORE, seconds, failed? [text],
                            per_class {class: {sensitivity SCORE, auc SCORE, n}}, counts {class: {real, synthetic}},
                            curve {round [..], mean [..], sd [..], runs}}}}]      seconds: of one run, in the mean
    SCORE     {value, low, high: of the pooled folds, the patient as the unit; mean, sd: over folds and seeds}
    comparison {a, b, score, value, low, high, low_single, high_single, p, p_holm, shown, seeds, sentence, t {mean, low, high}}
    confounder? {view, table {class: {view: n}}, view_only {balanced_accuracy}, arms {group: {arm: {view: {balanced_accuracy,
                n, classes}}}}, note}
    generators? {group: {class: {fid, fid_floor, kid, precision, recall, ..}}}
    failed?   {task: text}
    privacy?  [{epsilon | None, delta, arm, generators, balanced_accuracy {value, low, high}, exact?, recognised?}]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xfed.common.durable import write_bytes, write_text
from xfed.common.errors import DataError
from xfed.server.figures import arm_colour
from xfed.server.templates import render_page
from xfed.simulations import study_figures as figures
from xfed.simulations.study_figures import Drawing
from xfed.simulations.study_paper import WHY_NOT_COMPARABLE, published
from xfed.simulations.study_tables import csv_tables, group_label, p_value, terminal_tables, view_score

__all__ = ["SCHEMA", "terminal_tables", "write_study_report"]

SCHEMA = 1
Values = Mapping[str, Any]


def write_study_report(folder: Path, values: Values) -> Path:
    """Write study.html, tables/ and figures/ under `folder`; the page's path is returned. Equal values give equal bytes.

    Tables and figures of an earlier report are deleted. Raises `StorageError`, and `DataError` for values of another schema.
    """
    if values.get("schema") != SCHEMA or not values.get("classes"):
        raise DataError(
            f"{folder}: a study of schema {values.get('schema')!r}; this xfed reads schema {SCHEMA} with classes. "
            "Use the xfed version that made it."
        )
    drawn = {group: _drawn(values, facts) for group, facts in groups_by_name(values).items()}
    common = {"privacy": figures.utility(values.get("privacy") or [], _guessing(values))}
    for kind, endings in (("tables", ("csv",)), ("figures", ("svg", "png"))):
        for ending in endings:
            for old in (folder / kind).glob(f"*.{ending}"):
                old.unlink()
    for name, text in csv_tables(values).items():
        write_text(folder / "tables" / f"{name}.csv", text)
    for group, parts in {"": common, **drawn}.items():
        for kind, drawing in parts.items():
            if drawing is not None:
                place = folder / "figures" / "-".join(part for part in (group, kind) if part)
                write_text(place.with_name(place.name + ".svg"), drawing.svg)
                write_bytes(place.with_name(place.name + ".png"), drawing.png)
    path = folder / "study.html"
    write_text(path, _page(values, drawn, common))
    return path


def groups_by_name(values: Values) -> dict[str, Mapping[str, Any]]:
    """The groups by names that are safe in a file's name and in a link, and different."""
    result: dict[str, Mapping[str, Any]] = {}
    for group in values.get("groups") or []:
        raw = str(group.get("id") or "group")
        model = str(group.get("model") or "")
        stem = (
            re.sub(r"[^A-Za-z0-9]+", "-", raw if model in raw else f"{raw}-{model}").strip("-").lower()[:60] or "group"
        )
        name = stem
        while name in result:
            name = f"{stem}-{len(result) + 1}"
        result[name] = group
    return result


def _guessing(values: Values) -> float:
    given = values.get("guessing")
    return float(given) if given is not None else 1 / len(values["classes"])


def _drawn(values: Values, group: Mapping[str, Any]) -> dict[str, Drawing | None]:
    arms = group.get("arms") or {}
    rows = [row for row in group.get("comparisons") or [] if row.get("value") is not None]
    guide = (
        f"difference; line: {_percent(values)} interval for all {group.get('planned') or len(rows)} comparisons together, "
        "bar: for this one alone"
    )
    return {
        "differences": figures.forest(rows, guide) if rows else None,
        "counts": figures.counts(arms, values["classes"]),
        "curves": figures.curves(arms),
        "classes": figures.classes(arms, values["classes"], _guessing(values)),
    }


def _percent(values: Values) -> str:
    return f"{100 * ((values.get('grid') or {}).get('confidence') or 0.95):g}%"


def _notes(values: Values) -> list[str]:
    """What a reader of the verdicts must know with them."""
    groups: Sequence[Mapping[str, Any]] = values.get("groups") or []
    comparisons = [row for group in groups for row in group.get("comparisons") or []]
    notes = []
    if comparisons:
        notes.append(
            f"An interval here is {_percent(values)}, its unit is the patient. The intervals of differences are wider than "
            "usual on purpose: they hold for all planned comparisons of their setting together."
        )
    if any(not row.get("shown") for row in comparisons):
        notes.append("“No gain shown” does not mean “equal”: more patients, folds or seeds could show one.")
    if any(row.get("seeds") == 1 for row in comparisons):
        notes.append(
            "One training run of each fold: how much scores move when training is repeated is not in the intervals."
        )
    failed = [f"{arm} ({group_label(group)})" for group in groups for arm, facts in _arms(group) if facts.get("failed")]
    failed += list(values.get("failed") or {})
    if failed:
        notes.append(f"Not all runs succeeded; the scores are without these: {', '.join(failed)}.")
    guessing = _guessing(values)
    unsure = [
        f"{arm} ({group_label(group)})" if len(groups) > 1 else arm
        for group in groups
        for arm, facts in _arms(group)
        if (low := (facts.get("balanced_accuracy") or {}).get("low")) is not None and low <= guessing
    ]
    if unsure:
        notes.append(
            f"The interval reaches {guessing:.2f}, what guessing would get: {', '.join(unsure)}. "
            "Nothing is shown to have been learned there."
        )
    return notes


def _arms(group: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list((group.get("arms") or {}).items())


def _axis(group: Mapping[str, Any], guessing: float) -> tuple[float, float]:
    """From where to where the bars of balanced accuracy are drawn: tenths around all intervals and around guessing."""
    scores = [facts.get("balanced_accuracy") or {} for _, facts in _arms(group)]
    ends = [guessing, *(score[key] for score in scores for key in ("low", "high") if score.get(key) is not None)]
    return math.floor(10 * min(ends) - 0.01) / 10, math.ceil(10 * max(ends) + 0.01) / 10


def _views(values: Values) -> dict[str, Any] | None:
    """The confounder's table in a form to be printed: views, counts per class, and the share of the first view."""
    confounder = values.get("confounder") or {}
    table: Mapping[str, Mapping[str, int]] = confounder.get("table") or {}
    views = list(dict.fromkeys(view for row in table.values() for view in row))
    if not views:
        return None
    shares = {
        name: row.get(views[0], 0) / total if (total := sum(row.values())) else None for name, row in table.items()
    }
    known = {name: share for name, share in shares.items() if share is not None}
    alone = (confounder.get("view_only") or {}).get("balanced_accuracy") or {}
    return {
        "names": views,
        "shares": shares,
        "least": min(known, key=known.__getitem__) if known else None,
        "most": max(known, key=known.__getitem__) if known else None,
        "alone": alone,
        "tells": alone.get("low") is not None and alone["low"] > _guessing(values),
    }


def _page(
    values: Values, drawn: Mapping[str, Mapping[str, Drawing | None]], common: Mapping[str, Drawing | None]
) -> str:
    groups = groups_by_name(values)
    arms = [facts for group in groups.values() for _, facts in _arms(group)]
    titles = {arm: facts.get("title") for arm, facts in (values.get("arms") or {}).items()}
    label_of = {str(group.get("id")): group_label(group) for group in groups.values()}
    for group in groups.values():
        label_of.setdefault(
            str(group.get("id")).removesuffix(f"-{group.get('model')}"), group_label({**group, "model": None})
        )
    return render_page(
        "study.html.j2",
        package="xfed.simulations",
        study=values,
        classes=values["classes"],
        grid=values.get("grid") or {},
        groups=groups,
        labels={name: group_label(group) for name, group in groups.items()},
        label_of=label_of,
        titles=titles,
        colours={arm: arm_colour(arm) for group in groups.values() for arm, _ in _arms(group)},
        notes=_notes(values),
        percent=_percent(values),
        guessing=_guessing(values),
        views=_views(values),
        published={name: published(str(group.get("model")), values["classes"]) for name, group in groups.items()},
        why_not=WHY_NOT_COMPARABLE,
        axes={name: _axis(group, _guessing(values)) for name, group in groups.items()},
        p_value=p_value,
        view_score=view_score,
        drawn={
            group: {kind: part.uri for kind, part in parts.items() if part}
            for group, parts in (*drawn.items(), ("", common))
        },
        runs=sum(facts.get("runs") or 0 for facts in arms),
        seconds=sum((facts.get("seconds") or 0) * (facts.get("runs") or 0) for facts in arms),
    )
