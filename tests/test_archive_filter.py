"""The automatic filter: planted faults go, honest images stay, numbers are refilled in order, and nothing depends on chance."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from tests.archives import FakeRun, built, weights_of
from xfed.common.errors import DataError
from xfed.common.gan import ready_generator
from xfed.server.archive import build_archive, read_archive, render_block
from xfed.server.archive_filter import LIMITS, Sieve, Sifted
from xfed.server.archive_signature import verify_archive
from xfed.server.run import Run
from xfed.simulations.phantom import phantom_arrays

Pixels = npt.NDArray[np.uint8]
SIZE = 32


def _honest(count: int, seed: int = 1) -> Pixels:
    """Smooth pictures of one kind, all different."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    base = np.sin(2 * np.pi * x) + np.cos(2 * np.pi * y)
    bases = np.stack([np.cos(np.pi * i * x) * np.cos(np.pi * j * y) for i in range(4) for j in range(4)])
    extra = np.tensordot(rng.normal(0, 0.15, (count, len(bases))), bases, 1)
    return np.clip(128 + 45 * (base + extra), 5, 250).astype(np.uint8)


def _draw(images: Pixels) -> Any:
    return lambda block: images[32 * block : 32 * (block + 1)]


def _sift(images: Pixels, wanted: int, *, on: bool = True) -> tuple[list[Sifted], dict[str, Any]]:
    sieve = Sieve(on=on)
    found = list(sieve.sift("Normal", wanted, _draw(images)))
    return found, sieve.facts()


def test_honest_images_all_stay() -> None:
    found, facts = _sift(_honest(512), 256)
    assert [one.number for one in found] == list(range(256))
    assert not any(one.reason for one in found)
    assert facts["rejected"] == {"Normal": {}}
    assert facts["short"] == {}


@pytest.mark.parametrize("size", [32, 64])
def test_phantoms_all_stay(size: int) -> None:
    """No real picture of a class is rejected for being what it is: 192 phantoms, the filter's false rejects are none."""
    images, _, _ = phantom_arrays(
        classes=["Pneumothorax"], patients={"Pneumothorax": 200}, images_per_patient=1, size=size, seed=5
    )
    found, _ = _sift(images[:192], 96)
    assert [one.reason for one in found] == [""] * 96


def _planted() -> tuple[Pixels, dict[int, str]]:
    images = _honest(160)
    rng = np.random.default_rng(2)
    images[3] = 127
    images[4] = 127 + rng.integers(0, 5, (SIZE, SIZE))  # still nothing to see
    images[11] = 255
    images[20] = np.where(rng.random((SIZE, SIZE)) < 0.8, 0, images[20])
    images[31] = images[7]
    images[32] = np.clip(images[8].astype(int) + rng.integers(-1, 2, (SIZE, SIZE)), 0, 255)
    images[40] = rng.integers(2, 253, (SIZE, SIZE))
    images[41] = 255 - images[41]
    reasons = {3: "blank", 4: "blank", 11: "blank", 20: "saturated", 31: "duplicate", 32: "duplicate"}
    return images, {**reasons, 40: "off-manifold", 41: "off-manifold"}


def test_planted_faults_are_found_and_their_places_filled() -> None:
    images, reasons = _planted()
    found, facts = _sift(images, 64)
    assert {one.number: one.reason for one in found if one.reason} == reasons
    kept = [one for one in found if not one.reason]
    assert len(kept) == 64
    assert [one.number for one in found] == list(range(64 + len(reasons)))
    assert all(np.array_equal(one.pixels, images[one.number]) for one in found)
    assert facts["drawn"] == {"Normal": 72}
    assert facts["rejected"]["Normal"] == {"blank": 3, "saturated": 1, "duplicate": 2, "off-manifold": 2}
    scores = {one.number: one.scores for one in found}
    assert float(scores[31]["nearest"]) == 0
    assert float(scores[40]["oddity"]) > LIMITS["off-manifold"]


def test_switched_off_it_keeps_everything_and_says_so() -> None:
    images, _ = _planted()
    found, facts = _sift(images, 64, on=False)
    assert [one.number for one in found if not one.reason] == list(range(64))
    assert facts["on"] is False


def test_scores_equal_a_slow_computation() -> None:
    images = _honest(64)
    found, _ = _sift(images, 32)
    for one in found[::7]:
        whole = one.pixels.astype(float)
        assert float(one.scores["contrast"]) == pytest.approx(whole.std(), abs=6e-4)
        steps = (np.abs(np.diff(whole, axis=0)).mean() + np.abs(np.diff(whole, axis=1)).mean()) / 2
        assert float(one.scores["sharpness"]) == pytest.approx(steps, abs=6e-4)
        small = [i.astype(float).reshape(16, 2, 16, 2).mean((1, 3)) for i in images[: one.number + 1]]
        distances = [np.sqrt(((small[-1] - other) ** 2).mean()) for other in small[:-1]]
        assert float(one.scores["nearest"]) == pytest.approx(min(distances, default=255), abs=6e-4)


def test_at_most_twice_as_many_are_drawn() -> None:
    images = np.repeat(_honest(10), 20, axis=0)  # collapsed: ten pictures, over and over
    found, facts = _sift(images, 40)
    assert len(found) == 80
    assert sum(not one.reason for one in found) == 4
    assert facts["short"] == {"Normal": 36}


def test_duplicates_are_found_across_classes() -> None:
    images = _honest(64)
    sieve = Sieve()
    assert all(not one.reason for one in sieve.sift("Normal", 32, _draw(images)))
    second = list(sieve.sift("Cardiomegaly", 32, _draw(images)))
    assert {one.reason for one in second[:32]} == {"duplicate"}


def test_too_few_images_to_say_what_is_usual() -> None:
    """A wild image cannot be told from a usual one among thirty-one."""
    images = np.full((32, SIZE, SIZE), 9, np.uint8)
    images[:20] = _honest(20)
    images[5] = np.random.default_rng(1).integers(2, 253, (SIZE, SIZE))
    found, _ = _sift(images, 16)
    assert not any(one.reason == "off-manifold" for one in found)


def test_an_archive_lacks_what_was_rejected_and_every_image_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = render_block

    def spoilt(study: Any, name: str, generator: Any, block: int) -> Pixels:
        images = real(study, name, generator, block)
        if name == "Normal" and block == 0:
            images[4], images[6] = 0, images[1]
        return images

    monkeypatch.setattr("xfed.server.archive.render_block", spoilt)
    folder = built(tmp_path, per_class=20)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == manifest["planned"] == dict.fromkeys(manifest["classes"], 20)
    assert manifest["filter"]["rejected"]["Normal"] == {"blank": 1, "duplicate": 1}
    assert manifest["filter"]["drawn"]["Normal"] == 22
    with (folder / "metadata.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "Normal"]
    numbers = [int(row["file_name"][-10:-4]) for row in rows]
    assert numbers == [0, 1, 2, 3, 5, *range(7, 22)]
    assert verify_archive(folder, unsigned=True) == []
    run = FakeRun(tmp_path / "again")
    images, labels = read_archive(folder, run.study.classes)
    block = real(run.study, "Normal", ready_generator(run.study, weights_of(run)["Normal"]), 0)
    assert np.array_equal(images[labels == 1], block[numbers])


def test_a_class_that_cannot_be_filled_is_smaller_and_the_journal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = render_block

    def collapsed(study: Any, name: str, generator: Any, block: int) -> Pixels:
        images = real(study, name, generator, block)
        return np.zeros_like(images) if name == "Normal" else images

    monkeypatch.setattr("xfed.server.archive.render_block", collapsed)
    folder = built(tmp_path, per_class=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["Normal"] == 0
    assert manifest["filter"]["short"] == {"Normal": 5}
    assert manifest["filter"]["rejected"]["Normal"] == {"blank": 10}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["kind"] == "problem"]
    assert told["text"] == "Normal: 5 images fewer than planned: of 10 drawn, rejected: 10 blank"
    assert set(read_archive(folder, tuple(manifest["classes"]))[1]) == {0, 2}


def test_nothing_left_at_all_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfed.server.archive.render_block", lambda *_: np.zeros((32, SIZE, SIZE), np.uint8))
    run = FakeRun(tmp_path)
    with pytest.raises(DataError, match=r"collapsed.*archive\.filter"):
        build_archive(cast(Run, run), weights_of(run))
    assert not (tmp_path / "archive").exists()


def test_it_is_a_choice_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = render_block

    def dull(*arguments: Any) -> Pixels:
        images = real(*arguments)
        images[0] = 0
        return images

    monkeypatch.setattr("xfed.server.archive.render_block", dull)
    settings = {"balance": "fixed", "per_class": 3, "filter": False}
    folder = built(tmp_path, archive=settings)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["filter"]["on"] is False
    assert manifest["filter"]["drawn"] == manifest["counts"]
