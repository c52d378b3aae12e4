"""Luggage, and a sixth class: other classes and another domain are configuration alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.conftest import ROOT
from xfed.common.errors import ConfigError
from xfed.common.nearest import distance_matrix
from xfed.common.randomness import numpy_generator
from xfed.simulations.cli import app
from xfed.simulations.luggage import OBJECTS, draw_luggage, luggage_arrays, write_luggage_folder
from xfed.simulations.run import load_run_study, run_study

FEW = {"bags": {"Knife": 3, "Empty": 2}, "images_per_bag": 1.8, "size": 32, "seed": 4}
SHORT = [
    "gan.rounds=2",
    "gan.steps_per_round=2",
    "gan.batch=4",
    "classifier.width=4",
    "classifier.rounds=2",
    "classifier.steps_per_round=3",
    "classifier.batch=16",
    "archive.balance=fixed",
    "archive.per_class=8",
    "archive.tstr_steps=5",
    "sites.count=2",
]


def _view(thing: str, bag: int, view: int = 0, size: int = 64) -> np.ndarray:
    return draw_luggage(thing, numpy_generator(1, "b", bag), numpy_generator(1, "v", bag, view), size)


@pytest.mark.parametrize("thing", [name for name in OBJECTS if name != "Empty"])
def test_an_object_is_added_to_the_same_bag_and_is_darker_than_it(thing: str) -> None:
    for bag in range(6):
        empty, full = (_view(name, bag).astype(float) for name in ("Empty", thing))
        darker = (empty - full) > 20
        assert 0.01 < darker.mean() < 0.5, "an object hides part of the bag"
        # beside it nothing changes; inside it a bore or a bottle's neck lets as much through
        assert np.abs(empty - full)[~darker].max() < 45
        assert np.abs(empty - full)[~darker].mean() < 2


def test_metal_lets_less_through_than_a_bottle() -> None:
    darkest = {name: np.mean([np.sort(_view(name, bag).ravel())[:40].mean() for bag in range(10)]) for name in OBJECTS}
    assert max(darkest["Knife"], darkest["Handgun"]) < darkest["Bottle"] < darkest["Empty"]


def test_a_bag_is_the_same_bag_in_another_view_and_the_same_arguments_give_the_same_bytes() -> None:
    assert np.array_equal(_view("Bottle", 1), _view("Bottle", 1))
    images = np.stack([_view("Laptop", bag, view) for bag in range(6) for view in (0, 1)])
    distance = distance_matrix(images, images, device=__import__("torch").device("cpu"))
    np.fill_diagonal(distance, np.inf)
    same = [distance[2 * bag, 2 * bag + 1] < np.median(distance[2 * bag]) for bag in range(6)]
    assert sum(same) >= 5


def test_arrays_and_folder_hold_the_same_and_a_stopped_write_goes_on(tmp_path: Path) -> None:
    images, labels, bags = luggage_arrays(**FEW)  # type: ignore[arg-type]
    assert images.shape[1:] == (32, 32)
    assert labels.tolist() == sorted(labels)
    assert len(set(bags.tolist())) == 5 <= len(images)

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_luggage_folder(tmp_path / "a", **FEW, progress=stop)  # type: ignore[arg-type]
    assert not (tmp_path / "a" / "labels.csv").exists()
    assert write_luggage_folder(tmp_path / "a", **FEW) == len(images)  # type: ignore[arg-type]
    with (tmp_path / "a" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [["Knife", "Empty"][label] for label in labels]
    assert [int(row["patient"]) for row in rows] == bags.tolist()
    assert len(list((tmp_path / "a" / "images").glob("*.png"))) == len(rows)
    with pytest.raises(ConfigError, match="other images"):
        write_luggage_folder(tmp_path / "a", **{**FEW, "seed": 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"bags": {"Sword": 2}}, {"bags": {"Knife": -1}}, {"images_per_bag": 9.0}])
def test_what_there_is_not_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"luggage|images_per_bag"):
        luggage_arrays(**{**FEW, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Sword"):
        draw_luggage("Sword", np.random.default_rng(0), np.random.default_rng(0), 32)


def test_the_command_draws_luggage_and_knows_its_kinds(tmp_path: Path) -> None:
    asked = ["phantom", "--kind", "luggage", "--out", str(tmp_path / "l"), "--size", "32", "--patients", "2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "labels.csv" in done.output
    wrong = CliRunner().invoke(app, ["phantom", "--kind", "ships", "--out", str(tmp_path / "s")])
    assert isinstance(wrong.exception, ConfigError)
    assert "luggage" in str(wrong.exception)


def test_a_study_of_luggage_is_a_study_file_and_a_folder(tmp_path: Path) -> None:
    bags = dict.fromkeys(OBJECTS, 12)
    write_luggage_folder(tmp_path / "bags", bags=bags, images_per_bag=1.2, size=32, seed=1)
    changes = ["gan.width=1", "gan.latent=16", "gan.steering.rounds=2", "gan.steering.threshold=0.21"]
    study = load_run_study(
        ROOT / "configs" / "luggage.yaml", settings=[*SHORT, *changes, "gan.steering.steps=10"], data=tmp_path / "bags"
    )
    run_study(study, tmp_path / "out", tmp_path / "bags")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["classes"] == ["Bottle", "Empty", "Handgun", "Knife", "Laptop"]
    assert report["gan"]["family"] == "pggan"
    assert sum(report["archive"]["counts"].values()) > 0
    assert (tmp_path / "out" / "archive" / "passport.html").is_file()


@pytest.mark.slow
def test_a_sixth_class_is_a_line_of_the_study_file(tmp_path: Path) -> None:
    names = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax", "Consolidation")
    few = f"data.phantom.patients={json.dumps(dict.fromkeys(names, 20))}"
    study = load_run_study(ROOT / "configs" / "six-classes.yaml", settings=[*SHORT, "gan.width=4", few], data=None)
    run_study(study, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["classes"][-1] == "Consolidation"
    assert report["archive"]["counts"]["Consolidation"] == 8
    assert (tmp_path / "out" / "models" / "generator-Consolidation.safetensors").is_file()
    assert len(report["arms"]["DS1"]["confusion"]) == 6
