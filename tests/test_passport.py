"""The passport: says what the numbers say and no more, loads nothing, omits nothing silently; and what a private study omits."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny
from tests.test_report import CLASSES, _arm, _Page, example, panels
from xfed.common.errors import CheckpointError
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import digest_of, load_arrays, parameters_of
from xfed.server import synthetic_arm
from xfed.server.passport import passport_of, write_passport
from xfed.server.quality import archive_quality
from xfed.server.report import difference, render_again, write_report
from xfed.server.synthetic_arm import LEFT_OUT_PRIVATE, score_synthetic_arm

STATEMENT = "Synthetic images: no picture shows a patient. epsilon is infinite."
MORE = {
    "ms_ssim": 0.61,
    "ms_ssim_real": 0.58,
    "images_compared": 71,
    "images_real": 77,
    "images_floor": 71,
    "equal_numbers": True,
    "kid_pooled": True,
}
TESTS = {
    "vote": {
        "statement": "3 hospitals compared every image with their training images.",
        "sites": 3,
        "images": 606,
        "vetoed": 6,
        "vetoed_per_class": {"Normal": 6, "Pneumothorax": 0},
    },
    "membership": {
        "statement": "Training patients could not be told from held-out ones.",
        "by_pixels": {
            "Normal": {"members": 200, "held_out": 90, "auc": 0.5123, "auc_interval": [0.441, 0.583], "tpr": None},
            "Pneumothorax": {"members": 0, "held_out": 0, "auc": None, "auc_interval": None, "tpr": None},
        },
    },
    "reidentification": {
        "statement": "Linked no better.",
        "training": {"patients": 41, "auc": 0.6251, "auc_interval": [0.55, 0.7], "first_by_chance": 0.025},
        "held_out": {"patients": 20, "auc": 0.6, "auc_interval": [0.5, 0.7], "first_by_chance": 0.05},
        "excess": {"auc": 0.0251, "interval": [-0.1, 0.15]},
    },
}


def _report(skills: tuple[float, float] = (0.9, 1.0), synthetic_skill: float = 0.6) -> dict[str, Any]:
    report = example(skills=skills)
    archive = report["archive"]
    for facts in archive["quality"].values():
        facts |= MORE
    archive["left_out"] = None
    archive["tstr"] = {**_arm(3, synthetic_skill, CLASSES, ["a"], 0), "steps": 400, "images": 600}
    archive["privacy_tests"] = copy.deepcopy(TESTS)
    return report


def _manifest(**changes: Any) -> dict[str, Any]:
    return {
        "classes": CLASSES,
        "counts": dict.fromkeys(CLASSES, 120),
        "root_sha256": "ee" * 32,
        "generators": dict.fromkeys(CLASSES, "fa" * 32),
        "privacy": STATEMENT,
        "curation": {"summary": "none: no person has looked at these images yet"},
        "filter": {"on": True, "rejected": {"Normal": {"blank": 2, "duplicate": 1}, "Pneumothorax": {"blank": 0}}},
        "vetoes": {"sites": 3, "images": 606, "vetoed": 6, "vetoed_per_class": {"Normal": 6}},
        **changes,
    }


def _written(
    folder: Path, report: dict[str, Any], manifest: dict[str, Any], images: Any = None
) -> tuple[dict[str, Any], str]:
    (folder / "archive").mkdir(parents=True, exist_ok=True)
    (folder / "archive" / "manifest.json").write_text(json.dumps(manifest))
    write_report(folder, report, images)
    write_passport(folder, report)
    passport = json.loads((folder / "archive" / "passport.json").read_text())
    return passport, (folder / "archive" / "passport.html").read_text(encoding="utf-8")


def _heat() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = panels()
    for kind in ("real", "synthetic"):
        found[f"cam_{kind}"] = rng.integers(0, 255, (5, 3, 16, 16), dtype=np.uint8)
        found[f"first_{kind}"] = rng.integers(0, 255, (5, 4, 16, 16), dtype=np.uint8)
    return found


def test_the_page_loads_nothing_names_everything_and_shows_every_number(tmp_path: Path) -> None:
    passport, html = _written(tmp_path, _report(), _manifest(), _heat())
    assert "http" not in re.sub(r'content="default|http-equiv', "", html)
    page = _Page(html)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes[key][:60])
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 + 5 * 6 * 2 + 5 * 3 * 2 + 1 + 5 * 2
    assert all(attributes.get("alt") for attributes in images)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)
    shown = set(page.values)
    for facts in passport["quality"].values():
        for key in (
            "fid",
            "fid_floor",
            "kid",
            "kid_floor",
            "precision",
            "recall",
            "density",
            "ms_ssim",
            "ms_ssim_real",
        ):
            assert facts[key] in shown
    assert {passport["tstr"]["balanced_accuracy"], *passport["tstr"]["balanced_accuracy_interval"]} <= shown
    assert passport["real"]["DS1"]["balanced_accuracy"] in shown
    for text in (
        *passport["verdict"]["may"],
        *passport["verdict"]["may_not"],
        passport["verdict"]["summary"],
        STATEMENT,
    ):
        assert text in page.text
    for digest in passport["digests"].values():
        assert digest in page.text
    assert "6 of 606 images were too near" in page.text
    assert "3 images were rejected and drawn anew (Normal 3)" in page.text
    assert passport["root_sha256"] == "ee" * 32
    assert "images were taken out since" in page.text, "the figures are of the archive as delivered"


def test_the_report_shows_the_heat_maps_and_tstr_too_also_when_it_is_rendered_again(tmp_path: Path) -> None:
    html = write_report(tmp_path, _report(), _heat()).read_text(encoding="utf-8")
    page = _Page(html)
    assert "Where the classifier looks" in page.text
    images = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert sum(alt.startswith("Heat map of") for alt in images) == 5 * 3 * 2
    assert sum(alt.startswith("First-layer activations") for alt in images) == 5 * 2
    assert f"{_report()['archive']['tstr']['balanced_accuracy']:.2f}" in page.text.partition("(TSTR): ")[2][:90]
    assert render_again(tmp_path).read_text(encoding="utf-8") == html
    synthetic = {name: array for name, array in _heat().items() if "real" not in name}
    alone = _Page(write_report(tmp_path, _report(), synthetic).read_text(encoding="utf-8"))
    shown = [attributes["alt"] for tag, attributes in alone.tags if tag == "img"]
    assert not any(re.match(r"Real |Heat map of real|First-layer activations of a real", alt) for alt in shown)
    assert sum(alt.startswith("Heat map of synthetic") for alt in shown) == 5 * 3


def test_the_privacy_tests_stand_on_the_page_with_their_figures(tmp_path: Path) -> None:
    passport, html = _written(tmp_path, _report(), _manifest())
    assert passport["privacy_tests"] == TESTS
    text = _Page(html).text
    for facts in TESTS.values():
        assert facts["statement"] in text
    for piece in (
        "0.512 [0.441, 0.583]",
        "0.625 [0.55, 0.7]",
        "0.0251 [-0.1, 0.15]",
        "vetoed: 6",
        "Normal 6",
        "By pixels",
    ):
        assert piece in text, piece
    report = _report()
    report["archive"]["privacy_tests"] = {"vote": {"left_out": "left out: this study is private"}}
    assert "left out: this study is private" in _Page(_written(tmp_path, report, _manifest())[1]).text
    del report["archive"]["privacy_tests"]
    assert "No test of the archive against patients’ images" in _Page(_written(tmp_path, report, _manifest())[1]).text


def test_what_is_not_shown_is_not_a_use() -> None:
    undecided = passport_of(_report((0.9, 0.95)), _manifest())["verdict"]
    assert not difference(_report((0.9, 0.95)), "balanced_accuracy").shown  # type: ignore[union-attr]
    assert "not shown to help training" in undecided["summary"]
    assert any("none was shown" in text for text in undecided["may_not"])
    assert not any("Training beside" in text for text in undecided["may"])
    better = passport_of(_report((0.2, 2.0)), _manifest())["verdict"]
    assert any(text.startswith("Training beside real images of the same classes") for text in better["may"])
    assert "shown to help training" in better["summary"]
    worse = passport_of(_report((2.0, 0.2)), _manifest())["verdict"]
    assert any("made the classifier worse" in text for text in worse["may_not"])
    assert not any("Training beside" in text for text in worse["may"])
    report = _report()
    del report["arms"]["DS3"]
    assert any("was not measured" in text for text in passport_of(report, _manifest())["verdict"]["may_not"])


def test_the_archive_alone_is_recommended_only_above_guessing() -> None:
    taught = passport_of(_report(synthetic_skill=1.2), _manifest())
    assert any(text.startswith("First experiments") for text in taught["verdict"]["may"])
    assert "teaches more than guessing" in taught["verdict"]["summary"]
    guessed = passport_of(_report(synthetic_skill=0.0), _manifest())
    assert guessed["tstr"]["balanced_accuracy_interval"][0] <= guessed["guessing"]
    assert not any(text.startswith("First experiments") for text in guessed["verdict"]["may"])
    assert "alone not shown to teach more than guessing" in guessed["verdict"]["summary"]


def test_weak_classes_are_named_with_their_figures() -> None:
    report = _report()
    report["archive"]["recognised"]["per_class"]["Pneumothorax"] = 0.31
    report["archive"]["quality"]["Normal"]["coverage"] = 0.2
    report["archive"]["quality"]["Pleural Effusion"]["ms_ssim"] = 0.9
    warned = " ".join(passport_of(report, _manifest())["verdict"]["may_not"])
    assert "Pneumothorax (31%)" in warned
    assert "Normal (20%)" in warned
    assert "more alike than real ones: Pleural Effusion" in warned
    assert "fewer than half" not in " ".join(passport_of(_report(), _manifest())["verdict"]["may_not"])


def test_privacy_curation_and_phantoms_change_the_verdict() -> None:
    open_study = passport_of(_report(), _manifest())
    assert open_study["privacy"]["epsilon"] is None
    assert any("Taking it for anonymous" in text for text in open_study["verdict"]["may_not"])
    assert any("phantoms" in text for text in open_study["verdict"]["may_not"])
    assert any("no person has looked" in text for text in open_study["verdict"]["may_not"])
    report = _report()
    report["source"] = "folder"
    for number, entry in enumerate(report["privacy"]["sites"].values()):
        entry |= {"epsilon": 2.5 + number, "delta": 1e-4}
    curated = _manifest(curation={"summary": "2 people looked at 600 images, 20 were rejected"})
    private = passport_of(report, curated)
    assert private["privacy"]["epsilon"] == 4.5, "the maximum over hospitals, never a mean"
    assert any("epsilon 4.5 at most" in text for text in private["verdict"]["may_not"])
    assert not any(word in " ".join(private["verdict"]["may_not"]) for word in ("phantoms", "no person"))
    assert "looked at by people" in private["verdict"]["summary"]


def test_what_a_private_study_leaves_out_is_said_in_words_and_is_never_zero(tmp_path: Path) -> None:
    report = _report()
    nothing = dict.fromkeys(("fid", "fid_floor", "kid", "kid_floor", "precision", "recall", "density", "coverage"))
    for facts in report["archive"]["quality"].values():
        facts |= nothing | {"ms_ssim_real": None, "images_compared": 0, "kid_pooled": False}
    report["archive"] |= {"left_out": "left out: this study is private", "tstr": {"left_out": LEFT_OUT_PRIVATE}}
    passport, html = _written(tmp_path, report, _manifest())
    page = _Page(html)
    assert LEFT_OUT_PRIVATE in page.text
    assert "left out: this study is private" in page.text
    assert "A dash below is “not measured”, not zero" in page.text
    assert 0.0 not in page.values
    assert any(LEFT_OUT_PRIVATE in text for text in passport["verdict"]["may_not"])
    assert "distance of the synthetic images" not in html


def test_unequal_numbers_and_a_kid_of_the_sites_are_marked(tmp_path: Path) -> None:
    assert "unequal" not in _written(tmp_path, _report(), _manifest())[1]
    report = _report()
    report["archive"]["quality"]["Normal"] |= {"equal_numbers": False, "kid_pooled": False}
    text = _Page(_written(tmp_path, report, _manifest())[1]).text
    assert "unequal, read with care" in text
    assert "mean of the hospitals’ own figures" in text


@pytest.mark.parametrize("part", ["arms", "sites", "privacy", "totals", "versions", "gan"])
def test_a_missing_part_of_the_report_breaks_nothing(tmp_path: Path, part: str) -> None:
    report = _report()
    report.pop(part, None)
    assert "passport" in _written(tmp_path, report, _manifest())[1]


def test_the_least_archive_of_an_older_version_has_a_passport(tmp_path: Path) -> None:
    report = {"schema": 1, "name": "x", "classes": ["A", "B"], "archive": {"counts": {"A": 1, "B": 1}}}
    passport, html = _written(tmp_path, report, {"counts": {"A": 1, "B": 1}, "curation": "none: nobody"})
    assert "2 synthetic images of 2 classes" in passport["verdict"]["summary"]
    assert "No privacy statement came with this archive" in html
    with pytest.raises(CheckpointError, match="no readable manifest"):
        write_passport(tmp_path / "elsewhere", report)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    classes = [evil, '"><img src=x onerror=alert(2)>']
    report = example(classes, ["</table>"])
    report["archive"]["privacy_tests"] = {evil: {"statement": evil, "rows": {evil: [evil]}}}
    _, html = _written(
        tmp_path, report, _manifest(classes=classes, counts=dict.fromkeys(classes, 3), curation={"summary": evil})
    )
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert evil in page.text


def test_written_again_with_the_same_facts_no_byte_changes_and_other_facts_have_their_own_time(tmp_path: Path) -> None:
    report = _report()
    first, html = _written(tmp_path, report, _manifest(), panels())
    later = {**report, "created": "2018-05-01T00:00:00+00:00"}
    again, same = _written(tmp_path, later, _manifest(), panels())
    assert again == first
    assert same == html
    other, _ = _written(tmp_path, later, _manifest(root_sha256="dd" * 32), panels())
    assert other["created"] == later["created"]


class _Journal:
    def write(self, kind: str, **facts: Any) -> None:
        """Kept nowhere."""


PRIVATE_STUDY = tiny(
    privacy={"epsilon": 3.0, "delta": 1e-4},
    classifier={"balance": "loss"},
    gan={"method": "dp-merf", "merf": {"features": 8}},
)


def _asks_nothing(*arguments: Any) -> None:
    raise AssertionError("a site was asked")


def test_a_private_study_asks_no_site_about_the_archive() -> None:
    run: Any = SimpleNamespace(study=PRIVATE_STUDY, journal=_Journal(), sum=_asks_nothing, ask=_asks_nothing)
    weights = parameters_of(build_classifier(PRIVATE_STUDY, torch_generator(1, "c")))
    images = np.random.default_rng(0).integers(0, 255, (30, 32, 32), dtype=np.uint8)
    labels = np.arange(30) % 3
    found = archive_quality(run, "DS1", weights, images, labels)
    for facts in found["quality"].values():
        assert facts["fid"] is None
        assert facts["coverage"] is None
        assert facts["ms_ssim_real"] is None
        assert facts["images_real"] is None, "not 0"
        assert 0 < facts["ms_ssim"] < 1, "synthetic pairs need no patient"
    assert "private" in found["left_out"]
    assert score_synthetic_arm(run, images, labels) == {"left_out": LEFT_OUT_PRIVATE}


def test_the_archives_own_classifier_is_taught_once_and_scored_on_real_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny(archive={"tstr_steps": 3})
    run: Any = SimpleNamespace(study=study, folder=tmp_path, journal=_Journal(), sum=_asks_nothing)
    images = np.random.default_rng(0).integers(0, 255, (30, 32, 32), dtype=np.uint8)
    labels = np.arange(30) % 3
    asked: list[str] = []

    def scored(run: Any, weights: Any) -> dict[str, Any]:
        asked.append(digest_of(weights["TSTR"]))
        return {"TSTR": ({"balanced_accuracy": 0.5}, {"site-01": {}})}

    monkeypatch.setattr(synthetic_arm, "score_on_test_patients", scored)
    first = score_synthetic_arm(run, images, labels)
    path = tmp_path / "models" / "classifier-TSTR.safetensors"
    weights, facts = load_arrays(path)
    assert facts["arm"] == "TSTR"
    assert first["weights_sha256"] == digest_of(weights) == asked[0]
    assert (first["steps"], first["images"], first["balanced_accuracy"]) == (3, 30, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic_arm, "train_on_synthetic", _asks_nothing)
        assert score_synthetic_arm(run, images, labels) == first, "a killed run scores the same weights"
    assert score_synthetic_arm(run, 255 - images, labels)["weights_sha256"] != first["weights_sha256"]
    without: Any = SimpleNamespace(**{**vars(run), "study": tiny(archive={"tstr_steps": 0})})
    assert "tstr_steps is 0" in score_synthetic_arm(without, images, labels)["left_out"]
