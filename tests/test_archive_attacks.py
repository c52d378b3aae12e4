"""The attack on a generator itself: one that learned its images by heart is found, one that did not is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from tests.archives import built
from tests.conftest import tiny
from xfed.common.dcgan import Generator, draw_latent
from xfed.common.errors import DataError
from xfed.common.gan import build_generator
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import save_generator
from xfed.common.weights import parameters_of
from xfed.simulations import archive_attacks
from xfed.simulations.archive_attacks import attack_run, figures_of, reconstruction_errors
from xfed.simulations.hospitals import build_hospitals
from xfed.simulations.phantom import phantom_arrays

CPU = torch.device("cpu")
LATENT = 16


def _phantoms(count: int) -> Any:
    return phantom_arrays(
        classes=("Normal", "Cardiomegaly"),
        patients={"Normal": count, "Cardiomegaly": 2},
        size=32,
        seed=4,
        images_per_patient=1.0,
    )[0][:count]


@pytest.fixture(scope="module")
def by_heart() -> tuple[Generator, Any, Any]:
    """A generator fitted to twelve images, one latent each; the images; others."""
    images = _phantoms(24)
    own, others = images[:12], images[12:]
    generator = Generator(32, 8, LATENT, torch_generator(1, "g"))
    z, target = draw_latent(12, LATENT, torch_generator(1, "z")), torch.from_numpy(own).float()[:, None] / 127.5 - 1
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        (generator(z) - target).pow(2).mean().backward()
        optimizer.step()
    return generator.calibrate(), own, others


def _errors(generator: Generator, images: Any, **more: int) -> Any:
    settings = {"steps": 60, "starts": 2, **more}
    return reconstruction_errors(generator, images, LATENT, rng=torch_generator(2, "attack"), device=CPU, **settings)


def test_what_was_learned_by_heart_is_reconstructed_better(by_heart: tuple[Generator, Any, Any]) -> None:
    generator, own, others = by_heart
    figures = figures_of(_errors(generator, own), _errors(generator, others))
    assert figures["auc"] > 0.9
    assert figures["auc_interval"][0] > 0.6


def test_a_generator_that_saw_neither_tells_nothing(by_heart: tuple[Generator, Any, Any]) -> None:
    _, own, others = by_heart
    stranger = Generator(32, 8, LATENT, torch_generator(9, "g")).calibrate()
    low, high = figures_of(_errors(stranger, own, steps=15), _errors(stranger, others, steps=15))["auc_interval"]
    assert low < 0.5 < high


def test_more_steps_and_starts_come_nearer(
    by_heart: tuple[Generator, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, own, _ = by_heart
    once = _errors(generator, own, starts=1)
    assert (_errors(generator, own, starts=3) <= once + 1e-9).all(), "the first start is among the three"
    assert _errors(generator, own, steps=60).mean() < _errors(generator, own, steps=5).mean()
    monkeypatch.setattr(archive_attacks, "BATCH", 5)
    assert len(_errors(generator, own, steps=2)) == 12


def test_figures_are_those_of_an_oracle() -> None:
    rng = numpy_generator(1, "figures")
    members, others = rng.normal(0, 1, 40).round(1), rng.normal(0.5, 1, 25).round(1)
    figures = figures_of(members, others)
    truth = np.repeat([1, 0], [40, 25])
    assert figures["auc"] == pytest.approx(roc_auc_score(truth, -np.concatenate([members, others])))
    found = max((members < t).mean() for t in others if (others < t).mean() <= 0.05)
    assert figures["tpr_at_5_percent_fpr"] == pytest.approx(found)
    assert figures_of(members, others[:19])["tpr_at_5_percent_fpr"] is None
    assert figures_of(members, others[:0])["auc"] is None


def test_a_finished_study_is_attacked_class_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny()
    build_hospitals(study, tmp_path, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(study.resolved()))
    with pytest.raises(DataError, match="finished simulated study"):
        attack_run(tmp_path)
    built(tmp_path)
    for name in study.classes:
        weights = parameters_of(build_generator(study, (name,)))
        save_generator(tmp_path / "models" / f"generator-{name}.safetensors", study, name, weights, {})
    monkeypatch.setattr(
        "sys.argv",
        ["x", str(tmp_path), "--patients", "5", "--steps", "2", "--starts", "1", "--json", str(tmp_path / "f.json")],
    )
    archive_attacks.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert found.keys() == set(study.classes)
    for attacks in found.values():
        assert attacks["archive"]["members"] == attacks["generator"]["held_out"] == 5
        assert 0 <= attacks["generator"]["auc"] <= 1
