"""The speed benchmark measures what it says: both sides train, turns alternate, and the arithmetic of ratios holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from xfed.simulations.benchmarks import speed
from xfed.simulations.benchmarks.speed import Comparison, Workload, compare


def _work(**changes: object) -> Workload:
    facts = {
        "model": "dcgan",
        "size": 32,
        "width": 4,
        "batch": 4,
        "repeats": 2,
        "seconds": 0.0,
        "device": "cpu",
        "precision": "float32",
    }
    return Workload(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["dcgan", "dcnn"])
def test_both_sides_run_and_are_paired(model: str) -> None:
    found = compare(_work(model=model, seconds=0.01))
    assert len(found.xfed) == len(found.reference) == len(found.ratios) == 2
    assert min(*found.xfed, *found.reference) > 0


def test_ratios_are_of_neighbours() -> None:
    found = Comparison(workload=_work(), xfed=(10.0, 30.0, 8.0), reference=(5.0, 10.0, 8.0))
    assert found.ratios == (2.0, 3.0, 1.0)
    assert speed._spread(found.ratios, 2) == "2.00 [1.00, 3.00]"


def test_a_turn_counts_images_over_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 2.5])  # began, a look after each turn, end: two turns of 5 images in 2.5 s
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed._speed(lambda: 5, 2.0, speed.torch.device("cpu"), "wall") == pytest.approx(4.0)


def test_the_first_place_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(speed, "_xfed_gan", lambda *_: lambda: order.append("xfed") or 1)
    monkeypatch.setattr(speed, "_plain_gan", lambda *_: lambda: order.append("plain") or 1)
    monkeypatch.setattr(speed, "_speed", lambda turn, *_: float(turn()))
    compare(_work(repeats=3))
    assert order == ["xfed", "plain", "xfed", "plain", "plain", "xfed", "xfed", "plain"]


def test_both_sides_start_from_the_same_weights_and_train(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    from xfed.common.weights import digest_of, parameters_of

    study, made = speed._study(_work()), []
    monkeypatch.setattr(speed, "build_generator", _recording(speed.build_generator, made))
    images = np.random.default_rng(1).integers(0, 255, (8, 32, 32), dtype=np.uint8)
    turn = speed._xfed_gan(study, images, torch.device("cpu"))
    before = digest_of(parameters_of(made[-1]))
    data = [(torch.zeros(1, 32, 32), 0)] * 8
    plain = speed._plain_gan(study, data, torch.device("cpu"))  # type: ignore[arg-type]
    generator = made[-1]
    assert digest_of(parameters_of(generator)) == before
    assert turn() == plain() == 4
    assert digest_of(parameters_of(generator)) != before


def _recording(function, made):
    def call(*arguments):
        made.append(function(*arguments))
        return made[-1]

    return call


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="dcgan and dcnn"):
        compare(_work(model="vgg"))


def test_the_command_prints_json_with_the_machine() -> None:
    options = [
        "--size=32",
        "--width=4",
        "--batch=4",
        "--repeats=1",
        "--seconds=0",
        "--threads=1",
        "--device=cpu",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "xfed.simulations.benchmarks.speed", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert [one["workload"]["model"] for one in found["results"]] == ["dcgan", "dcnn"]
    assert found["machine"]["threads"] == 1
    assert {"processor", "bfloat16", "torch", "cores"} <= set(found["machine"])
