"""The page of a study of arms: safe with hostile names, whole with parts missing, equal to its numbers, honest."""

from __future__ import annotations

import copy
import csv
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.test_report import _Page
from xfed.common.errors import DataError
from xfed.server.figures import arm_colour
from xfed.simulations import study_figures, study_report
from xfed.simulations.study_grid import arm_titles
from xfed.simulations.study_paper import LECTURE_GOOGLENET, PAPER, published
from xfed.simulations.study_report import terminal_tables, write_study_report
from xfed.simulations.study_tables import csv_tables, group_label

CLASSES = ["Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax"]
ARMS = [
    "DS1",
    "DS2",
    "DS3",
    "plain",
    "filled",
    "duplicated",
    "weighted",
    "augmented",
    "synthetic",
    "pretrained",
    "alone",
    "pooled",
]
EVIL = "<script>alert(1)</script>"
NO_GAIN = "DS3 against DS1: no gain shown, nor a loss: balanced accuracy +0.01 [−0.03, +0.05]."


def _score(rng: np.random.Generator, value: float) -> dict[str, float]:
    low, high = value - rng.uniform(0.02, 0.05), value + rng.uniform(0.02, 0.05)
    return {"value": value, "low": low, "high": high, "mean": value + 0.001, "sd": rng.uniform(0.01, 0.03)}


def _arm(rng: np.random.Generator, classes: list[str], synthetic: int) -> dict[str, Any]:
    value = rng.uniform(0.3, 0.5)
    return {
        "runs": 10,
        "seeds": 2,
        "folds": 5,
        "balanced_accuracy": _score(rng, value),
        "accuracy": _score(rng, value + 0.1),
        "auc": _score(rng, value + 0.3),
        "per_class": {
            name: {"sensitivity": _score(rng, rng.uniform(0.2, 0.7)), "auc": _score(rng, 0.7), "n": 40 + i}
            for i, name in enumerate(classes)
        },
        "counts": {name: {"real": 100 * (i + 1), "synthetic": synthetic} for i, name in enumerate(classes)},
        "curve": {"round": [1, 2, 3], "mean": [0.2, 0.3, value], "sd": [0.01, 0.02, 0.03], "runs": 10},
        "seconds": 61.5,
    }


def _difference(a: str, b: str, value: float, half: float) -> dict[str, Any]:
    low, high = value - half, value + half
    return {
        "a": a,
        "b": b,
        "score": "balanced_accuracy",
        "value": value,
        "low": low,
        "high": high,
        "low_single": value - 0.6 * half,
        "high_single": value + 0.6 * half,
        "p": 0.2,
        "p_holm": 0.4,
        "shown": low > 0 or high < 0,
        "seeds": 2,
        "sentence": "-",
        "t": {"mean": value, "low": low, "high": high},
    }


def example(
    arms: list[str] = ARMS, classes: list[str] = CLASSES, models: tuple[str, ...] = ("dcnn",)
) -> dict[str, Any]:
    """A whole study's values as `xfed-sim study` makes them."""
    rng = np.random.default_rng(3)
    groups = [
        {
            "id": f"3-sites-even-{model}",
            "sites": 3,
            "skew": "even",
            "model": model,
            "images": 3250,
            "patients": 1421,
            "arms": {arm: _arm(rng, classes, 50 if arm in ("DS3", "filled") else 0) for arm in arms},
            "comparisons": [_difference("DS3", "DS1", 0.0123, 0.04), _difference("DS3", "plain", 0.0987, 0.05)],
            "planned": 11,
            "verdict": NO_GAIN,
        }
        for model in models
    ]
    return {
        "schema": 1,
        "name": "arms of nih",
        "created": "2018-04-15T09:30:00+00:00",
        "classes": classes,
        "image_size": 64,
        "source": "folder",
        "guessing": 1 / len(classes),
        "software": "xfed 0.2.0",
        "grid": {"folds": 5, "seeds": [1, 2], "cells": 10, "confidence": 0.95, "replicates": 4000},
        "arms": {arm: {"title": f"title of {arm}"} for arm in arms},
        "groups": groups,
        "confounder": {
            "view": "View Position",
            "table": {name: {"AP": 90 - 20 * i, "PA": 10 + 20 * i} for i, name in enumerate(classes)},
            "view_only": {"balanced_accuracy": {"value": 0.341, "low": 0.31, "high": 0.36}},
            "arms": {
                groups[0]["id"]: {
                    "DS1": {"AP": {"balanced_accuracy": 0.2951, "n": 321, "classes": classes[:4]}, "PA": {}}
                }
            },
            "note": "first seed",
        },
        "generators": {"3-sites-even": {name: {"fid": 0.31, "fid_floor": 0.04, "recall": None} for name in classes}},
        "privacy": [
            {
                "epsilon": epsilon,
                "delta": epsilon and 1e-4,
                "arm": "DS3",
                "generators": "dp-merf",
                "balanced_accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1},
                "exact": value + 0.01,
                "recognised": 0.7,
            }
            for epsilon, value in ((None, 0.9), (9.96, 0.7), (10.0, 0.71), (1.0, 0.4))
        ],
    }


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without drawing, which takes most of the time."""
    blank = study_figures.Drawing("<svg/>", b"png")
    kinds = ("differences", "counts", "curves", "classes")
    monkeypatch.setattr(study_report, "_drawn", lambda values, group: dict.fromkeys(kinds, blank))
    monkeypatch.setattr(study_figures, "utility", lambda rows, guessing: blank if rows else None)


def _page(folder: Path, values: dict[str, Any]) -> _Page:
    return _Page(write_study_report(folder, values).read_text(encoding="utf-8"))


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_page_its_tables_and_its_figures_are_whole(tmp_path):
    path = write_study_report(tmp_path, example(ARMS[:5]))
    html = path.read_text(encoding="utf-8")
    page = _Page(html)
    assert "http" not in re.sub(r'content="default|http-equiv', "", html)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    assert all(one["src"].startswith("data:image/svg") and len(one["alt"]) > 5 for one in images)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)
    stem = "3-sites-even-dcnn"
    figures = {f"{stem}-{kind}" for kind in ("differences", "counts", "curves", "classes")} | {"privacy"}
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == figures
    for file in (tmp_path / "figures").glob("*.svg"):
        ET.parse(file)
        assert file.stem in figures
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "figures").glob("*.png"))
    first = path.read_bytes(), (tmp_path / "figures" / f"{stem}-curves.png").read_bytes()
    write_study_report(tmp_path, example(ARMS[:5]))
    assert first == (path.read_bytes(), (tmp_path / "figures" / f"{stem}-curves.png").read_bytes())


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_comes_first_and_numbers_equal_the_values(tmp_path):
    values = example()
    page = _page(tmp_path, values)
    group = values["groups"][0]
    assert page.text.index(NO_GAIN) < page.text.index("Training runs")
    assert "does not mean “equal”" in page.text
    shown = set(page.values)
    for arm in group["arms"].values():
        for score in ("balanced_accuracy", "accuracy", "auc"):
            assert {arm[score][key] for key in ("value", "low", "high")} <= shown
        for entry in arm["per_class"].values():
            assert {100 * entry["sensitivity"]["mean"], 100 * entry["sensitivity"]["sd"]} <= shown
        assert arm["seconds"] in shown
    for row in group["comparisons"]:
        assert row["value"] in shown
    assert "+0.012 −0.028 to +0.052" in re.sub(r"(?<=\d)(?=−0.028)", " ", page.text)
    assert {0.341, 0.31, 0.36, 0.2951, 321.0, 0.04, 9.96, 120.0} <= shown
    assert group["arms"]["DS1"]["curve"]["sd"][2] not in shown, "curves are figures, and this test can fail"
    rows = _rows((tmp_path / "tables" / "scores.csv").read_text())
    found = next(row for row in rows if (row["arm"], row["score"], row["class"]) == ("filled", "sensitivity", "Normal"))
    assert float(found["low"]) == group["arms"]["filled"]["per_class"]["Normal"]["sensitivity"]["low"]
    curves = _rows((tmp_path / "tables" / "curves.csv").read_text())
    assert len(curves) == 3 * len(ARMS)
    assert curves[-1]["sd"] == "0.03"


@pytest.mark.usefixtures("undrawn")
def test_only_what_is_shown_is_bold(tmp_path):
    html = write_study_report(tmp_path, example()).read_text(encoding="utf-8")
    bold = re.findall(r'<tr class="shown-row"><th scope="row">([^<]+)</th>', html)
    assert bold == ["DS3 − plain"]


@pytest.mark.usefixtures("undrawn")
def test_phantoms_are_called_so_before_any_figure(tmp_path):
    assert "say nothing about patients" not in _page(tmp_path / "a", example()).text
    text = _page(tmp_path / "b", example() | {"source": "phantom"}).text
    assert text.index("say nothing about patients") < text.index("Training runs")


def test_hostile_names_stay_text(tmp_path):
    classes = [EVIL, '"><img src=x onerror=alert(2)>', "$\\frac{", "{{ 7*7 }}", "=HYPERLINK(1)"]
    arms = ["DS1", "</table><h1>", EVIL]
    values = example(arms, classes)
    values["name"] = values["software"] = EVIL
    values["groups"][0] |= {"id": f"../../{EVIL}", "verdict": EVIL, "model": EVIL, "skew": EVIL}
    values["groups"][0]["arms"]["DS1"]["failed"] = [EVIL]
    values["confounder"]["note"] = values["confounder"]["view"] = EVIL
    values["failed"] = {EVIL: EVIL}
    values["privacy"][0]["arm"] = values["privacy"][1]["generators"] = EVIL
    html = write_study_report(tmp_path, values).read_text(encoding="utf-8")
    page = _Page(html)
    assert "<script" not in html
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert "{{ 7*7 }}" in page.text
    inside = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert inside == {"study.html", "tables", "figures"}
    for file in (tmp_path / "figures").glob("*.svg"):
        assert "<script" not in file.read_text()
        ET.parse(file)
    assert "'=HYPERLINK(1)" in (tmp_path / "tables" / "counts.csv").read_text()
    console = Console(width=120, record=True, quiet=False)
    console.print(terminal_tables(values))
    assert EVIL in console.export_text()


MISSING = [
    "created",
    "image_size",
    "guessing",
    "software",
    "grid",
    "arms",
    "groups",
    "confounder",
    "generators",
    "privacy",
]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", MISSING)
@pytest.mark.parametrize("how", ["absent", "none"])
def test_a_missing_part_breaks_nothing(tmp_path, part, how):
    values = example(ARMS[:4])
    if how == "absent":
        del values[part]
    else:
        values[part] = None
    text = _page(tmp_path, values).text
    assert "What this cannot tell you" in text
    assert "None" not in text
    assert "nan" not in text.lower().split()
    Console(quiet=True).print(terminal_tables(values))


def test_what_was_not_measured_is_a_dash(tmp_path, monkeypatch):
    monkeypatch.setattr(study_figures, "_drawing", lambda figure: study_figures.Drawing("<svg/>", b"png"))
    values = example(ARMS[:4])
    for arm in ("DS1", "DS2"):
        facts = values["groups"][0]["arms"][arm]
        for key in list(facts):
            facts[key] = None
    values["groups"][0]["arms"]["DS3"] = {"failed": ["killed"]}
    values["groups"][0]["comparisons"][0] |= dict.fromkeys(("value", "low", "high", "p", "p_holm", "t"), None)
    for key in ("images", "patients", "verdict", "planned", "skew"):
        values["groups"][0][key] = None
    text = _page(tmp_path, values).text
    assert "No verdict" in text
    assert "None" not in text
    assert "1 failed" in text
    assert "the scores are without these: DS3" in text
    Console(quiet=True).print(terminal_tables(values))


@pytest.mark.usefixtures("undrawn")
def test_an_older_or_later_schema_is_refused(tmp_path):
    with pytest.raises(DataError, match="schema 2"):
        write_study_report(tmp_path, example() | {"schema": 2})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_files_of_an_earlier_report_do_not_outlive_it(tmp_path):
    write_study_report(tmp_path, example(models=("dcnn", "googlenet")))
    assert (tmp_path / "figures" / "3-sites-even-googlenet-counts.svg").is_file()
    values = example()
    values["privacy"] = None
    write_study_report(tmp_path, values)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert not any("googlenet" in name or name.startswith("privacy") for name in names)
    assert not (tmp_path / "tables" / "privacy.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_equal_ids_get_names_of_their_own(tmp_path):
    values = example(ARMS[:2], models=("dcnn", "dcnn"))
    assert len(study_report.groups_by_name(values)) == 2
    page = _page(tmp_path, values)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


# ---- the confounder


@pytest.mark.usefixtures("undrawn")
def test_the_view_is_named_a_confounder_only_as_far_as_it_tells(tmp_path):
    values = example(ARMS[:2])
    text = _page(tmp_path / "a", values).text
    assert "AP/PA is confounded with the class" in text
    assert "Cardiomegaly is AP in 90% of its images, Pneumothorax in 10%" in text
    assert "may be owed to the view" in text
    values["confounder"]["view_only"]["balanced_accuracy"]["low"] = 0.15
    text = _page(tmp_path / "b", values).text
    assert "may be owed to the view" not in text
    assert "not shown to tell the class" in text


# ---- beside the paper


def test_the_paper_s_totals_are_the_means_of_its_classes():
    means = {
        arm: np.mean([value for name, (value, _) in row.items() if name != "total"])
        for arm, row in PAPER["arms"].items()
    }
    for arm in ("DS1", "DS2"):
        assert means[arm] == pytest.approx(PAPER["arms"][arm]["total"][0], abs=0.011)
    assert f"{means['DS3']:.2f}" in PAPER["remark"]
    assert (PAPER["arms"]["DS1"]["total"], PAPER["arms"]["DS3"]["total"]) == ((70.87, 0.47), (92.10, 0.41))
    assert PAPER["arms"]["DS3"]["Pneumothorax"] == (88.84, None)


def test_the_slide_s_slip_is_said():
    for row in LECTURE_GOOGLENET["arms"].values():
        mean = np.mean([value for name, (value, _) in row.items() if name != "total"])
        assert abs(mean - row["total"][0]) > 1
        assert f"{mean:.2f}" in LECTURE_GOOGLENET["remark"]
        assert row["Normal"] == row["Pneumothorax"]


@pytest.mark.usefixtures("undrawn")
def test_published_figures_stand_beside_ours_with_the_reasons_once(tmp_path):
    page = _page(tmp_path, example(ARMS[:4], models=("dcnn", "googlenet")))
    assert {79.15, 92.10, 0.41, 93.35, 0.84} <= set(page.values)
    assert page.text.count("Other data: 56,420 films") == 1
    assert "not comparable" in page.text
    table = _rows(csv_tables(example(ARMS[:4]))["table1"])
    assert [row["mean_percent"] for row in table if row["arm"] == "DS2" and row["class"] == "total"][1] == "58.9"


def test_other_classes_or_models_have_no_published_row():
    assert published("dcnn", ["laptop", "bottle"]) is None
    assert published("resnet", CLASSES) is None
    found = published("dcnn", ["Pneumothorax", "Consolidation"])
    assert found["rows"][0]["cells"] == [(57.99, None), None]


# ---- figures


def test_twelve_arms_are_told_apart_by_more_than_colour():
    looks = {(arm_colour(arm), str(study_figures.LINES.get(arm, "-"))) for arm in ARMS}
    assert len(looks) == len(ARMS)
    assert len({arm_colour(arm) for arm in ARMS}) == len(ARMS)
    svg = study_figures.curves(example()["groups"][0]["arms"]).svg
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert all(texts.count(arm) == 2 for arm in ARMS), "at the end of its line, and above its own panel"


def test_names_at_the_lines_ends_do_not_hide_each_other():
    arms = {arm: {"curve": {"round": [1, 2], "mean": [0.2, 0.4 + 1e-4 * i]}} for i, arm in enumerate(ARMS)}
    svg = study_figures.curves(arms).svg
    main = svg[: svg.index('id="axes_2"')]
    heights = sorted(
        float(y) for y, name in re.findall(r'x="[\d.]+" y="([\d.]+)"[^>]*>([^<]+)</text>', main) if name in ARMS
    )
    if not heights:
        heights = sorted(
            float(y)
            for y, name in re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>([^<]+)</text>", main)
            if name in ARMS
        )
    assert len(heights) == len(ARMS)
    assert min(np.diff(heights)) > 9


def test_equal_counts_share_a_panel():
    arms = example()["groups"][0]["arms"]
    sets = study_figures.same_counts(arms)
    assert [names for names, _ in sets] == [[a for a in ARMS if a not in ("DS3", "filled")], ["DS3", "filled"]]
    changed = copy.deepcopy(arms)
    changed["pooled"]["counts"]["Normal"]["real"] += 1
    assert len(study_figures.same_counts(changed)) == 3


def test_the_forest_says_every_interval_and_fills_only_what_is_shown():
    rows = example()["groups"][0]["comparisons"]
    svg = study_figures.forest(rows, "guide").svg
    assert "+0.012  [−0.028, +0.052]" in svg
    assert "+0.099  [+0.049, +0.149]" in svg
    none = study_figures.forest(rows[:1], "guide").svg
    assert study_figures.SHOWN in svg
    assert study_figures.SHOWN not in none
    hollow = "fill: #ffffff; stroke: #7b8794"
    assert svg.count(hollow) == none.count(hollow) > 0


def test_a_setting_in_words():
    assert group_label({"sites": 1, "skew": "even", "model": "dcnn"}) == "DCNN, 1 hospital, even"
    told = group_label({"sites": 10, "skew": "dirichlet 0.5", "model": "googlenet"})
    assert told == "GoogLeNet, 10 hospitals, skewed (Dirichlet 0.5)"
    assert set(arm_titles(ARMS)) == set(ARMS)


def test_the_terminal_holds_verdicts_arms_and_differences():
    console = Console(width=100, record=True, quiet=False)
    console.print(terminal_tables(example() | {"source": "phantom"}))
    text = " ".join(console.export_text().split())
    assert NO_GAIN in text
    for arm, facts in example()["groups"][0]["arms"].items():
        assert f"{arm} │ {facts['balanced_accuracy']['value']:.2f} [" in text
    assert "−0.028 to +0.052" in text
    assert "say nothing about patients" in text
