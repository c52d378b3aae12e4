"""The report: self-contained, equal to its numbers, safe with hostile names, whole with parts missing, honest in its verdict."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from xfed.common.errors import DataError
from xfed.common.metrics import add, score_sums, summary, zero
from xfed.server import figures
from xfed.server.cli import app
from xfed.server.report import difference, render_again, terminal_table, verdict, write_report

CLASSES = ["Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax"]
SITES = ["site-01", "site-02", "site-03"]
NOT_PRIVATE = "No differential privacy: epsilon is infinite."


def _sums(rng: np.random.Generator, n: int, skill: float, classes: int):
    labels = rng.choice(classes, n, p=np.arange(classes, 0, -1) / np.arange(classes, 0, -1).sum())
    p = np.exp(rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels])
    return score_sums(p / p.sum(axis=1, keepdims=True), labels, rng.integers(0, n // 2, n))


def _arm(seed: int, skill: float, classes: list[str], sites: list[str], synthetic: int, n: int = 150) -> dict:
    rng = np.random.default_rng(seed)
    by_site = {site: _sums(rng, n, skill, len(classes)) for site in sites}
    total = zero(len(classes))
    for sums in by_site.values():
        total = add(total, sums)
    rise = np.linspace(0.2, 0.5, 12)
    return {
        **summary(total, classes),
        "sites": {site: summary(sums, classes) for site, sums in by_site.items()},
        "rounds": [
            {
                "round": i + 1,
                "loss": 1.6 - rise[i],
                "validation_balanced_accuracy": float(rise[i] + 0.02 * rng.normal()),
                "validation_accuracy": float(rise[i]),
                "validation_auc": 0.7,
                "validation_loss": 1.7 - rise[i],
            }
            for i in range(12)
        ],
        "best_round": 11,
        "stopped": "early",
        "counts": {name: {"real": 90 * (i + 1), "synthetic": synthetic * (5 - i)} for i, name in enumerate(classes)},
    }


def example(classes: list[str] = CLASSES, sites: list[str] = SITES, skills: tuple[float, float] = (0.9, 1.0)) -> dict:
    """A whole report as `server.conduct` makes it."""
    return {
        "schema": 1,
        "name": "demo",
        "study_digest": "ab" * 32,
        "created": "2018-04-15T09:30:00+00:00",
        "classes": classes,
        "source": "phantom",
        "image_size": 64,
        "sites": {
            site: {"patients": 210, "counts": {c: {"train": 90, "validation": 20, "test": 21} for c in classes}}
            for site in sites
        },
        "arms": {"DS1": _arm(1, skills[0], classes, sites, 0), "DS3": _arm(2, skills[1], classes, sites, 90)},
        "gan": {
            "classes": {
                c: {
                    "sites": sites[: 2 + i % 2],
                    "rounds": [
                        {"round": r, "loss_g": 3 / r + 0.7 + 0.1 * i, "loss_d": 0.69 - 0.3 / r} for r in range(1, 13)
                    ],
                }
                for i, c in enumerate(classes)
            },
            "progress_rounds": [1, 4, 8, 12],
        },
        "archive": {
            "counts": dict.fromkeys(classes, 120),
            "quality": {
                c: {
                    "fid": 31.25,
                    "fid_floor": 4.5,
                    "kid": 0.0625,
                    "kid_floor": -0.001,
                    "precision": 0.71,
                    "recall": 0.42,
                    "density": 0.83,
                    "coverage": None,
                }
                for c in classes
            },
            "features": "dcnn of DS1, projected to 64 dimensions",
            "recognised": {"by": "DS1", "balanced_accuracy": 0.61, "per_class": dict.fromkeys(classes, 0.61)},
            "root_sha256": "cd" * 32,
        },
        "privacy": {
            "sites": {
                site: {
                    "unit": "patient",
                    "epsilon": None,
                    "delta": None,
                    "statement": NOT_PRIVATE,
                    "released": ["generator of Normal", "classifier of DS1", "sums of features"],
                }
                for site in sites
            }
        },
        "traffic": {
            site: {"sent_bytes": 123_456_789, "received_bytes": 4_200, "messages": {"GanUpdate": 60, "Scores": 24}}
            for site in sites
        },
        "timings": {"gan": 312.4, "classifier": 95.0, "quality": 4.2},
        "versions": {"xfed": "0.1.0", "torch": "2.13.0"},
        "digests": {"config.yaml": "ef" * 32, "archive root": "cd" * 32},
        "events": [
            {"time": "2018-04-15T09:12:44+00:00", "kind": "gan", "site": sites[-1], "text": "did not answer in 60 s"}
        ],
    }


def panels(classes: int = 5, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "real": rng.integers(1, 255, (classes, 6, size, size), dtype=np.uint8),
        "synthetic": rng.integers(1, 255, (classes, 6, size, size), dtype=np.uint8),
        "progress": rng.integers(1, 255, (4, classes, size, size), dtype=np.uint8),
    }


class _Page(HTMLParser):
    """Tags with their attributes, the unrounded values, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.values: list[float] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def _page(folder: Path, report: dict, images: dict | None = None) -> _Page:
    return _Page(write_report(folder, report, images).read_text(encoding="utf-8"))


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    html = write_report(tmp_path, example(), panels()).read_text(encoding="utf-8")
    assert "http" not in re.sub(r'content="default|http-equiv', "", html)
    page = _Page(html)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes[key][:60])
        assert not any(key.startswith("on") for key in attributes)
    assert "@import" not in html
    assert "url(" not in html


def test_every_picture_has_an_alternative_and_every_heading_cell_a_scope(tmp_path):
    page = _page(tmp_path, example(), panels())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 + 5 * 6 * 2 + 5 * 4
    assert all(len(attributes["alt"]) > 5 for attributes in images)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert targets <= set(ids)


def test_numbers_on_the_page_equal_those_of_the_json(tmp_path):
    page = _page(tmp_path, example(), panels())
    report = json.loads((tmp_path / "report.json").read_text())
    shown = set(page.values)
    for arm in report["arms"].values():
        for facts in (arm, *arm["sites"].values()):
            assert {facts["balanced_accuracy"], *facts["balanced_accuracy_interval"], facts["accuracy"]} <= shown
        for entry in arm["per_class"].values():
            for score in ("sensitivity", "specificity", "auc"):
                assert {entry[score], *entry[f"{score}_interval"]} <= shown
        for row in arm["confusion"]:
            assert all(str(cell) in page.words for cell in row)
    for entry in report["archive"]["quality"].values():
        assert {value for value in entry.values() if value is not None} <= shown
    assert {123_456_789, 312.4} <= shown
    assert report["arms"]["DS1"]["rounds"][0]["loss"] not in shown, "curves are figures, and this test can fail"


def test_hostile_names_stay_text(tmp_path):
    evil = "<script>alert(1)</script>"
    classes = [evil, '"><img src=x onerror=alert(2)>', "$\\frac{", "{{ 7*7 }}", "Normal & <b>"]
    report = example(classes, ["</table><h1>", "b'\"", "c"])
    report["name"] = evil
    report["events"][0]["text"] = evil
    report["privacy"]["sites"]["c"]["statement"] = evil
    html = write_report(tmp_path, report, panels()).read_text(encoding="utf-8")
    page = _Page(html)
    assert "<script" not in html
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert evil in page.text
    assert "{{ 7*7 }}" in page.text


OPTIONAL = (
    "sites",
    "gan",
    "archive",
    "privacy",
    "traffic",
    "timings",
    "versions",
    "digests",
    "events",
    "created",
    "image_size",
)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are built but not written out: that takes most of a report's second."""
    monkeypatch.setattr(figures, "_svg", lambda figure: "data:image/svg+xml;base64,")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("missing", [*OPTIONAL, "study_digest", "source", "arms"])
def test_a_missing_part_breaks_nothing(tmp_path, missing):
    report = example()
    del report[missing]
    page = _page(tmp_path, report, panels())
    assert "What this cannot tell you" in page.text


def test_the_least_report_is_rendered(tmp_path):
    page = _page(tmp_path, {"schema": 1, "name": "x", "classes": ["a", "b"], "arms": {}})
    assert "No verdict" in page.text
    assert "Take it that there is no differential privacy" in page.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "part", ["sites", "rounds", "counts", "best_round", "stopped", "confusion", "per_class", "loss"]
)
def test_a_missing_part_of_an_arm_breaks_nothing(tmp_path, part):
    report = example()
    for arm in report["arms"].values():
        del arm[part]
    assert "reached" in _page(tmp_path, report, panels()).text


@pytest.mark.usefixtures("undrawn")
def test_classes_without_test_images_show_a_dash_and_are_named(tmp_path):
    report = example()
    empty = summary(zero(5), CLASSES)
    for arm in report["arms"].values():
        arm["per_class"]["Normal"] = empty["per_class"]["Normal"]
        arm["balanced_over"] = [name for name in CLASSES if name != "Normal"]
        arm["confusion"][1] = [0] * 5
    text = _page(tmp_path, report).text
    assert "Without test images, and so left out of balanced accuracy: Normal." in text
    assert "nan" not in text.lower().split()
    report["arms"] = dict.fromkeys(("DS1", "DS3"), empty)
    assert "No verdict: no arm was scored" in _page(tmp_path, report).text


def test_rendering_again_gives_the_same_page_with_its_images(tmp_path):
    path = write_report(tmp_path, example(), panels())
    first = path.read_bytes()
    path.unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == first
    assert str(path.name) in result.output
    write_report(tmp_path, example(), None)
    assert not (tmp_path / "report-panels.npz").exists(), "images of an earlier report must not outlive it"


def test_a_folder_without_a_good_report_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no report\.json"):
        render_again(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        render_again(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DataError, match="mapping"):
        render_again(tmp_path)
    with pytest.raises(DataError, match="schema 2"):
        write_report(tmp_path, example() | {"schema": 2})
    write_report(tmp_path, example())
    (tmp_path / "report-panels.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match="damaged"):
        render_again(tmp_path)


# ---- the verdict


def _two(ds1: tuple[float, float, float], ds3: tuple[float, float, float]) -> dict:
    def arm(value, low, high):
        return {"balanced_accuracy": value, "balanced_accuracy_interval": [low, high], "n": 100, "patients": 80}

    return {"schema": 1, "name": "x", "classes": ["a", "b"], "arms": {"DS1": arm(*ds1), "DS3": arm(*ds3)}}


@pytest.mark.parametrize(
    ("ds1", "ds3", "says"),
    [
        ((0.44, 0.39, 0.49), (0.46, 0.41, 0.52), "no difference shown (+0.02, 95% interval −0.05 to +0.10)"),
        ((0.46, 0.41, 0.52), (0.44, 0.39, 0.49), "no difference shown (−0.02"),
        ((0.44, 0.39, 0.49), (0.61, 0.56, 0.66), "DS3 is better by 0.17 (95% interval +0.10 to +0.24)"),
        ((0.61, 0.56, 0.66), (0.44, 0.39, 0.49), "DS3 is worse by 0.17 (95% interval −0.24 to −0.10)"),
        # the arms' intervals overlap (0.49 > 0.48), the interval of the difference still leaves out 0
        ((0.44, 0.39, 0.49), (0.53, 0.48, 0.58), "DS3 is better by 0.09"),
    ],
)
def test_the_verdict_says_what_the_interval_of_the_difference_says(ds1, ds3, says):
    sentence = verdict(_two(ds1, ds3))
    assert says in sentence
    assert f"{ds3[0]:.2f} [{ds3[1]:.2f}, {ds3[2]:.2f}]" in sentence
    assert sentence.count(".") == sentence.count("0.") + 1, "one sentence"


def test_the_verdict_claims_a_difference_only_when_it_is_shown():
    rng = np.random.default_rng(5)
    for _ in range(300):
        a, b = rng.uniform(0.2, 0.8, 2)
        w, v = rng.uniform(0.01, 0.2, 2)
        report = _two((a, a - w, a + w), (b, b - v, b + v))
        gap = difference(report, "balanced_accuracy")
        claims = "better" in verdict(report) or "worse" in verdict(report)
        assert claims == (abs(b - a) > np.hypot(w, v)) == gap.shown


def test_one_arm_is_not_compared_with_nothing():
    report = _two((0.4, 0.3, 0.5), (0.5, 0.4, 0.6))
    del report["arms"]["DS1"]
    assert "no second arm" in verdict(report)
    assert difference(report, "balanced_accuracy") is None


def test_an_arm_that_may_be_guessing_is_called_so(tmp_path):
    text = _page(tmp_path, _two((0.52, 0.45, 0.6), (0.7, 0.65, 0.75))).text
    assert "DS1: the interval reaches 0.50, what guessing would get." in text
    assert "DS3: the interval reaches" not in text


def test_the_terminal_table_holds_both_arms(capsys):
    report = example()
    report["classes"][0] = "Cardiomegaly"
    console = Console(width=160, record=True, quiet=False)
    console.print(terminal_table(report))
    text = console.export_text()
    for arm in ("DS1", "DS3"):
        assert f"{report['arms'][arm]['balanced_accuracy']:.2f}" in text
        for entry in report["arms"][arm]["per_class"].values():
            assert f"{entry['sensitivity']:.2f} [" in text
    assert "balanced accuracy" in text
    hostile = copy.deepcopy(report)
    hostile["classes"] = ["[red]x[/nope]", *CLASSES[1:]]
    console.print(terminal_table(hostile))
    assert "[red]x[/nope]" in console.export_text()
    console.print(terminal_table({"schema": 1, "name": "x", "classes": ["a"], "arms": {}}))


# ---- four arms or more: a row per arm


def many() -> dict:
    report = example()
    for number, arm in enumerate(("plain", "weighted", "augmented", "<b>odd</b>")):
        report["arms"][arm] = _arm(number + 3, 0.5 + 0.2 * number, CLASSES, SITES, 0)
    return report


@pytest.mark.usefixtures("undrawn")
def test_many_arms_are_rows_and_keep_every_number(tmp_path):
    report = many()
    page = _page(tmp_path, report)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a row per arm" in html
    assert 'colspan="6"' not in html, "no group of columns per arm"
    assert 'colspan="2"' not in html
    assert "<b>odd" not in html
    shown = set(page.values)
    for arm in report["arms"].values():
        for facts in (arm, *arm["sites"].values()):
            assert {facts["balanced_accuracy"], *facts["balanced_accuracy_interval"]} <= shown
        for entry in arm["per_class"].values():
            for score in ("sensitivity", "specificity", "auc"):
                assert {entry[score], *entry[f"{score}_interval"]} <= shown
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    few = _page(tmp_path / "few", example())
    assert "a row per arm" not in few.text
    assert "DS3 − DS1" in few.text
    assert "DS3 − DS1" in page.text


@pytest.mark.parametrize("width", [80, 130])
def test_the_terminal_tables_of_many_arms_have_a_row_per_arm(width):
    report = many()
    console = Console(width=width, record=True, quiet=False)
    console.print(terminal_table(report))
    text = console.export_text()
    rows: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("│"):
            name = line.split("│")[1].strip()
            rows[name] = rows.get(name, "") + line
    assert set(report["arms"]) <= set(rows)
    for arm, facts in report["arms"].items():
        low, high = facts["balanced_accuracy_interval"]
        assert f"{facts['balanced_accuracy']:.2f} [{low:.2f}, {high:.2f}]" in rows[arm]
        for entry in facts["per_class"].values():
            assert f"{entry['sensitivity']:.2f}" in rows[arm]
            low, high = entry["sensitivity_interval"]
            assert f"{low:.2f}–{high:.2f}" in text
    assert "DS3 (real + synthetic) reached" in text


def test_many_arms_are_drawn_a_row_each():
    arms = many()["arms"]
    svg = base64.b64decode(figures.sensitivity_dots(arms, CLASSES, 0.2).split(",")[1]).decode()
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert all(texts.count(name) == 1 for name in (*CLASSES, *(arm for arm in arms if "<" not in arm)))
    assert "&lt;b&gt;odd&lt;/b&gt;" in texts
