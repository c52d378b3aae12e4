"""A hospital scores a released classifier on its own folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from tests.conftest import ROOT, tiny
from xfed.client.evaluate import evaluate_folder
from xfed.common.classifier import predict, train_round
from xfed.common.config import Data
from xfed.common.errors import CheckpointError, DataError
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier, load_classifier, save_classifier
from xfed.common.weights import parameters_of, save_arrays
from xfed.simulations.phantom import phantom_arrays, write_phantom_folder

STUDY = tiny(classifier={"width": 8})
PATIENTS = dict.fromkeys(STUDY.classes, 60)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained a little, as a file."""
    images, labels, _ = phantom_arrays(
        classes=STUDY.classes, patients=PATIENTS, images_per_patient=1.3, size=32, seed=1
    )
    model = build_classifier(STUDY, torch_generator(1, "m"))
    train_round(
        model,
        images,
        labels,
        None,
        None,
        settings=STUDY.classifier,
        learning_rate=1e-3,
        steps=80,
        generator=torch_generator(1, "t"),
        precision="float32",
        device=torch.device("cpu"),
    )
    path = tmp_path_factory.mktemp("model") / "classifier-DS1.safetensors"
    save_classifier(path, STUDY, parameters_of(model), {"arm": "DS1"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of other patients, in NIH layout."""
    path = tmp_path_factory.mktemp("data") / "phantoms"
    few = dict.fromkeys(STUDY.classes, 25)
    write_phantom_folder(path, classes=STUDY.classes, patients=few, images_per_patient=1.4, size=32, seed=2)
    return path


def test_scores_equal_an_independent_computation(released: Path, folder: Path) -> None:
    scores = evaluate_folder(released, folder, data=Data())
    few = dict.fromkeys(STUDY.classes, 25)
    images, labels, patients = phantom_arrays(
        classes=STUDY.classes, patients=few, images_per_patient=1.4, size=32, seed=2
    )
    model = load_classifier(released).model
    predicted = predict(model, images, device=torch.device("cpu"), precision="float32").argmax(1)
    assert scores["n"] == len(labels)
    assert scores["patients"] == len(np.unique(patients))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores["balanced_accuracy"] > 0.5  # it has learnt something: three classes
    assert scores["unreadable"] == {}


def test_the_command_prints_one_arms_object(released: Path, folder: Path) -> None:
    code = "from xfed.client.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", str(released), "--images", str(folder)]
    command += ["--labels", str(folder / "labels.csv")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert set(scores["per_class"]) == set(STUDY.classes)
    assert {"accuracy", "sensitivity", "specificity", "auc", "n"} <= set(scores["per_class"]["Normal"])
    table = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert f"{scores['balanced_accuracy']:.3f}" in table.stdout


def test_unreadable_and_unlabelled_images_are_counted_not_skipped_silently(
    released: Path, folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows = (copy / "labels.csv").read_text().splitlines()
    victim = rows[1].split(",")[0]
    next(copy.rglob(victim)).write_bytes(b"not a picture")
    rows[2] = rows[2].replace("Cardiomegaly", "Hernia")
    (copy / "labels.csv").write_text("\n".join(rows) + "\n")
    scores = evaluate_folder(released, copy, data=Data())
    assert sum(scores["unreadable"].values()) == 1
    assert sum(scores["left_out"].values()) == 1
    assert scores["n"] == len(rows) - 3


def test_mistakes_are_named(released: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        evaluate_folder(tmp_path / "none.safetensors", folder, data=Data())
    save_arrays(tmp_path / "other.safetensors", {"w": np.zeros(2, np.float32)}, {"kind": "generator"})
    with pytest.raises(CheckpointError, match="not a classifier"):
        evaluate_folder(tmp_path / "other.safetensors", folder, data=Data())
    (tmp_path / "labels.csv").write_text("file,who\na.png,1\n")
    code = "from xfed.client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", str(released), "--images", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr
