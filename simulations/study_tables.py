"""A study's numbers as tables: CSV for a program or a spreadsheet, and a short form for the terminal.

::

    values (see `xfed.simulations.study_report`) --csv_tables------> {name: text}: scores, differences, counts, curves, table1,
                                                                     views, scores-by-view, generators, privacy
                                                 --terminal_tables-> arms and differences per group, verdicts first

CSV is RFC 4180 with a heading; numbers are unrounded, an unknown one is empty. A text that a spreadsheet would take for a formula
gets an apostrophe before it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from xfed.server.templates import signed
from xfed.simulations.study_paper import published

__all__ = ["csv_tables", "group_label", "terminal_tables"]

Facts = Mapping[str, Any]
SCORES = ("balanced_accuracy", "accuracy", "auc")
MODELS = {"dcnn": "DCNN", "googlenet": "GoogLeNet"}


def group_label(group: Facts) -> str:
    """A group's setting in words: "DCNN, 3 hospitals, even"."""
    sites, skew, model = group.get("sites"), str(group.get("skew") or ""), str(group.get("model") or "")
    parts = [MODELS.get(model, model)]
    if sites is not None:
        parts.append(f"{sites} hospital{'' if sites == 1 else 's'}")
    if skew:
        parts.append(f"skewed ({skew.replace('dirichlet', 'Dirichlet')})" if skew.startswith("dirichlet") else skew)
    return ", ".join(part for part in parts if part) or str(group.get("id") or "")


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _csv(heading: str, rows: Iterable[Iterable[Any]]) -> str | None:
    listed = [[_cell(value) for value in row] for row in rows]
    if not listed:
        return None
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(heading.split())
    writer.writerows(listed)
    return buffer.getvalue()


def csv_tables(values: Facts) -> dict[str, str]:
    """Every table that has rows, by its file's name without ending."""
    groups = list(values.get("groups") or [])
    confounder = values.get("confounder") or {}
    tables = {
        "scores": _csv(
            "group sites skew model arm score class value low high mean sd n runs seeds folds",
            (row for group in groups for row in _scores(group)),
        ),
        "differences": _csv(
            "group model a b score value low high low_single high_single p p_holm shown seeds t_mean t_low t_high planned",
            (row for group in groups for row in _differences(group)),
        ),
        "counts": _csv(
            "group model arm class real synthetic",
            (
                [*_name(group), arm, name, entry.get("real"), entry.get("synthetic")]
                for group, arm, facts in _arms(groups)
                for name, entry in (facts.get("counts") or {}).items()
            ),
        ),
        "curves": _csv("group model arm round mean sd runs", (row for one in _arms(groups) for row in _curve(*one))),
        "table1": _csv("group model source arm class mean_percent sd_percent", _table1(values, groups)),
        "views": _csv(
            "class view images",
            ([name, view, n] for name, row in (confounder.get("table") or {}).items() for view, n in row.items()),
        ),
        "scores-by-view": _csv(
            "group arm view balanced_accuracy n classes",
            (
                [group, arm, view, view_score(entry), entry.get("n"), "; ".join(entry.get("classes") or [])]
                for group, arms in (confounder.get("arms") or {}).items()
                for arm, by_view in arms.items()
                for view, entry in by_view.items()
            ),
        ),
        "generators": _csv(
            "group class score value",
            (
                [group, name, score, value]
                for group, table in (values.get("generators") or {}).items()
                for name, entry in table.items()
                for score, value in entry.items()
            ),
        ),
        "privacy": _csv("epsilon delta arm generators value low high exact recognised", _privacy(values)),
    }
    return {name: text for name, text in tables.items() if text is not None}


def view_score(entry: Facts) -> Any:
    """Balanced accuracy within one view: a plain number, or that of a score with an interval."""
    score = entry.get("balanced_accuracy")
    return score.get("value") if isinstance(score, Mapping) else score


def _name(group: Facts) -> list[Any]:
    return [group.get("id"), group.get("model")]


def _arms(groups: Iterable[Facts]) -> Iterator[tuple[Facts, str, Facts]]:
    for group in groups:
        for arm, facts in (group.get("arms") or {}).items():
            yield group, arm, facts


def _scores(group: Facts) -> Iterator[list[Any]]:
    for _, arm, facts in _arms([group]):
        found = [(score, "", facts.get(score), None) for score in SCORES]
        for name, entry in (facts.get("per_class") or {}).items():
            found += [(score, name, entry.get(score), entry.get("n")) for score in ("sensitivity", "auc")]
        for score, name, numbers, n in found:
            if numbers:
                head = [group.get("id"), group.get("sites"), group.get("skew"), group.get("model"), arm, score, name]
                cells = [numbers.get(key) for key in ("value", "low", "high", "mean", "sd")]
                yield [*head, *cells, n, *(facts.get(key) for key in ("runs", "seeds", "folds"))]


def _differences(group: Facts) -> Iterator[list[Any]]:
    keys = ["a", "b", "score", "value", "low", "high", "low_single", "high_single", "p", "p_holm", "shown", "seeds"]
    for row in group.get("comparisons") or []:
        t = row.get("t") or {}
        yield [*_name(group), *map(row.get, keys), *map(t.get, ("mean", "low", "high")), group.get("planned")]


def _curve(group: Facts, arm: str, facts: Facts) -> Iterator[list[Any]]:
    curve = facts.get("curve") or {}
    rounds = curve.get("round") or []
    for number, mean, sd in zip(rounds, curve.get("mean") or [], curve.get("sd") or [None] * len(rounds), strict=True):
        yield [*_name(group), arm, number, mean, sd, curve.get("runs")]


def _table1(values: Facts, groups: Iterable[Facts]) -> Iterator[list[Any]]:
    for group, arm, facts in _arms(groups):
        entries = [(name, (entry.get("sensitivity") or {})) for name, entry in (facts.get("per_class") or {}).items()]
        for name, score in [*entries, ("total", facts.get("balanced_accuracy") or {})]:
            mean, sd = (None if score.get(key) is None else 100 * score[key] for key in ("mean", "sd"))
            yield [*_name(group), "this study", arm, name, mean, sd]
    for model in dict.fromkeys(str(group.get("model")) for group in groups):
        table = published(model, values["classes"]) or {"rows": []}
        for row in table["rows"]:
            pairs = [*zip(values["classes"], row["cells"], strict=True), ("total", row["total"])]
            yield from (["", model, table["source"], row["arm"], name, *cell] for name, cell in pairs if cell)


def _privacy(values: Facts) -> Iterator[list[Any]]:
    for row in values.get("privacy") or []:
        score = row.get("balanced_accuracy") or {}
        epsilon = "infinite" if row.get("epsilon") is None else row["epsilon"]
        cells = [score.get(key) for key in ("value", "low", "high")]
        yield [
            epsilon,
            row.get("delta"),
            row.get("arm"),
            row.get("generators"),
            *cells,
            row.get("exact"),
            row.get("recognised"),
        ]


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}"


def _span(score: Facts | None) -> str:
    score = score or {}
    if score.get("low") is None or score.get("high") is None:
        return _number(score.get("value"))
    return f"{_number(score.get('value'))} [{_number(score['low'])}, {_number(score['high'])}]"


def terminal_tables(values: Facts) -> Group:
    """For the end of a study: each group's verdict, its arms and their paired differences, for `rich.print`."""
    parts: list[Any] = []
    for group in values.get("groups") or []:
        parts += [
            Text(group_label(group), style="bold"),
            Text(str(group.get("verdict") or "No verdict.")),
            _arms_table(group),
        ]
        parts += [_differences_table(group)] if group.get("comparisons") else []
        parts.append(Text())
    if values.get("failed"):
        parts.append(Text(f"Failed, and missing from the scores: {', '.join(values['failed'])}", style="yellow"))
    if values.get("source") == "phantom":
        parts.append(Text("The images are drawn phantoms, not patients: the figures say nothing about patients."))
    return Group(*(parts or [Text("Nothing was run.")]))


def _arms_table(group: Facts) -> Table:
    table = Table(header_style="bold")
    table.add_column("arm", overflow="fold")
    for heading in ("balanced accuracy", "mean ± sd", "accuracy", "AUC", "runs"):
        table.add_column(heading, justify="right")
    for _, arm, facts in _arms([group]):
        score = facts.get("balanced_accuracy") or {}
        spread = "–" if score.get("mean") is None else f"{_number(score['mean'])} ± {_number(score.get('sd'))}"
        accuracy, auc = ((facts.get(key) or {}).get("value") for key in ("accuracy", "auc"))
        failed = len(facts.get("failed") or [])
        runs = f"{_whole(facts.get('runs'))} ({failed} failed)" if failed else _whole(facts.get("runs"))
        table.add_row(Text(arm), _span(score), spread, _number(accuracy), _number(auc), runs)
    return table


def _differences_table(group: Facts) -> Table:
    table = Table(
        header_style="bold", caption="intervals hold for all planned comparisons together", caption_justify="left"
    )
    table.add_column("difference", overflow="fold")
    for heading in ("score", "value", "interval", "p (Holm)"):
        table.add_column(heading, justify="right")
    for row in group["comparisons"]:
        known = row.get("value") is not None
        span = f"{signed(row['low'], 3)} to {signed(row['high'], 3)}" if known else "–"
        cells: list[Text | str] = [
            Text(str(row.get("score")).replace("_", " ")),
            signed(row["value"], 3) if known else "–",
            span,
            p_value(row.get("p_holm")),
        ]
        table.add_row(Text(f"{row.get('a')} − {row.get('b')}"), *cells, style="bold" if row.get("shown") else "")
    return table


def p_value(value: Any) -> str:
    """A p-value as it is printed: never 0."""
    if not isinstance(value, int | float):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _whole(value: Any) -> str:
    return "–" if value is None else f"{value:,}"
