"""Arms: what each is taught from, that only that differs, and studies on an archive that exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tests.conftest import tiny
from xfed.client.open_training import OpenTraining, balanced_rows
from xfed.client.store import open_store
from xfed.common.arms import ARMS, START, recipe
from xfed.common.classifier import draw_rows
from xfed.common.config import load_study
from xfed.common.config_phases import Arm
from xfed.common.errors import ConfigError
from xfed.common.weights import digest_of, load_arrays
from xfed.server.archive_manifest import read_manifest
from xfed.simulations.run import load_run_study, run_study

CONTROLS = [arm for arm in get_args(Arm) if arm not in ("DS1", "DS3")]
FAST: dict[str, Any] = {"vote": False, "attacks": False, "tstr_steps": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study with DS1 and DS3."""
    folder = tmp_path_factory.mktemp("arms") / "base"
    run_study(tiny(archive=FAST, classifier={"pretraining": 3}), folder)
    return folder


@pytest.fixture(scope="module")
def all_arms(finished: Path) -> Path:
    """Every arm on the archive of `finished`."""
    folder, archive = finished.parent / "all", finished / "archive"
    reuse = read_manifest(archive)["root_sha256"]
    study = tiny(archive={**FAST, "reuse": reuse}, classifier={"arms": list(get_args(Arm)), "pretraining": 3})
    run_study(study, folder, archive=archive)
    return folder


def _weights(folder: Path, arm: str) -> str:
    return digest_of(load_arrays(folder / "models" / f"classifier-{arm}.safetensors")[0])


def test_every_name_of_an_arm_has_a_recipe() -> None:
    assert set(get_args(Arm)) == set(ARMS)


def test_what_a_recipe_fixes_is_fixed_whatever_the_study_says() -> None:
    for balance, augment in (("sampling", True), ("none", False)):
        study = tiny(classifier={"balance": balance, "augment": augment}).classifier
        assert recipe("plain").settings(study).balance == "none"
        assert recipe("weighted").settings(study).balance == "loss"
        assert recipe("weighted").settings(study).augment is augment
        assert recipe("duplicated").settings(study).balance == "sampling"
        assert not recipe("duplicated").settings(study).augment
        assert recipe("DS1").settings(study) == study


def test_who_starts_from_the_archive() -> None:
    study = tiny(classifier={"pretraining": 7}).classifier
    none = tiny().classifier
    assert {arm: recipe(arm).pretraining(study) for arm in ("DS1", "DS3", "pretrained")} == {
        "DS1": 0,
        "DS3": 7,
        "pretrained": 7,
    }
    assert (recipe("DS3").pretraining(none), recipe("pretrained").pretraining(none)) == (0, START)


def test_every_arm_takes_the_same_steps_but_the_longer_one() -> None:
    study = tiny(classifier={"pretraining": 90, "rounds": 30, "batch": 16}).classifier
    steps = {arm: recipe(arm).steps(study, 100) for arm in get_args(Arm)}
    assert set(steps.values()) == {6, 9}
    assert steps["longer"] == 9
    assert sum(value == 9 for value in steps.values()) == 1


def test_balanced_rows_are_as_many_of_each_class_as_of_the_rarest() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [3] * 20)
    rows = np.arange(100, 100 + len(labels))
    kept = balanced_rows(rows, labels, np.random.default_rng(1))
    assert np.bincount(labels[kept - 100], minlength=4).tolist() == [3, 3, 0, 3]
    assert set(np.flatnonzero(labels == 1) + 100) <= set(kept)
    assert balanced_rows(rows[:0], labels[:0], np.random.default_rng(1)).tolist() == []


def test_without_real_images_only_synthetic_ones_are_drawn() -> None:
    import torch

    drawn = draw_rows(
        np.zeros(0, np.int64), np.array([0, 1, 1]), 64, torch.Generator().manual_seed(1), balance="sampling"
    )
    assert set(drawn.tolist()) == {0, 1, 2}


def test_a_study_on_an_archive_that_exists_ends_with_the_same_bits(finished: Path, all_arms: Path) -> None:
    assert {arm: _weights(all_arms, arm) for arm in ("DS1", "DS3")} == {
        arm: _weights(finished, arm) for arm in ("DS1", "DS3")
    }
    report = json.loads((all_arms / "report.json").read_text())
    assert report["archive"]["root_sha256"] == read_manifest(finished / "archive")["root_sha256"]
    assert "existed before" in report["archive"]["left_out"]
    assert not list((all_arms / "models").glob("generator-*"))
    assert (all_arms / "report.html").stat().st_size > 10_000


def test_every_arm_is_another_classifier(all_arms: Path) -> None:
    assert len({_weights(all_arms, arm) for arm in get_args(Arm)}) == len(get_args(Arm))


def test_the_report_says_what_each_arm_was_taught_from(all_arms: Path) -> None:
    arms = json.loads((all_arms / "report.json").read_text())["arms"]
    for arm in get_args(Arm):
        counts = arms[arm].get("counts")
        if recipe(arm).real == "balanced":
            assert counts is None
            continue
        assert all((facts["real"] > 0) == (recipe(arm).real == "all") for facts in counts.values())
        assert all((facts["synthetic"] > 0) == recipe(arm).synthetic for facts in counts.values())


def test_a_site_takes_the_rows_of_the_recipe(all_arms: Path) -> None:
    store = open_store(all_arms / "sites" / "site-01" / "store")
    held = store.rows("train")
    training = OpenTraining.__new__(OpenTraining)
    object.__setattr__(training, "store", store)
    object.__setattr__(training, "study", tiny())
    object.__setattr__(training, "name", "site-01")
    assert training._real("all", held).tolist() == held.tolist()
    assert not len(training._real("none", held))
    balanced = training._real("balanced", held)
    assert len(set(np.bincount(store.labels[balanced], minlength=3))) == 1
    assert set(balanced) < set(held)


def test_another_archive_than_the_study_asks_for_is_refused(finished: Path, tmp_path: Path) -> None:
    study = tiny(archive={**FAST, "reuse": "0" * 64})
    with pytest.raises(ConfigError, match="the study asks for 000000000000"):
        run_study(study, tmp_path / "run", archive=finished / "archive")
    with pytest.raises(ConfigError, match="--archive DIR"):
        run_study(study, tmp_path / "bare")


def test_the_command_names_the_archive_by_its_root(finished: Path, tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text("name: again\n")
    study = load_run_study(config, settings=[], data=None, archive=finished / "archive")
    assert study.archive.reuse == read_manifest(finished / "archive")["root_sha256"]


def test_controls_would_spend_budget_and_are_refused_in_a_private_study(tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text("name: p\nprivacy: {epsilon: 3, delta: 1.0e-4}\nclassifier: {balance: loss, arms: [DS1, DS2]}\n")
    with pytest.raises(ConfigError, match="DS2: every arm spends budget"):
        load_study(config)


def test_on_and_off_in_yaml_are_words(tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text("name: p\nfederation: {secure_aggregation: off}\n")
    assert load_study(config).federation.secure_aggregation == "off"
    assert load_study(config, ["federation.secure_aggregation=on"]).federation.secure_aggregation == "on"
