"""Phantoms: the findings can be measured and learned, data sets are reproducible, styles do what they say."""

from __future__ import annotations

import csv
import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xfed.common.config import Study
from xfed.common.errors import ConfigError, StorageError
from xfed.common.randomness import numpy_generator
from xfed.simulations.anatomy import Thorax, blur, draw_anatomy, edge, grid, texture, vessels
from xfed.simulations.phantom import (
    FINDINGS,
    NEUTRAL,
    SiteStyle,
    apply_style,
    draw_phantom,
    phantom_arrays,
    site_style,
    write_phantom_folder,
)

CLASSES = Study(name="x").classes
SIZE = 64
PATIENTS = 30


def film(finding: str, patient: int, exposure: int = 0, size: int = SIZE, style: SiteStyle = NEUTRAL) -> np.ndarray:
    return draw_phantom(
        finding, numpy_generator(5, "p", patient), numpy_generator(5, "e", patient, exposure), size, style
    )


@pytest.fixture(scope="module")
def films() -> dict[str, np.ndarray]:
    """The same patients and exposures with each finding, float [PATIENTS, SIZE, SIZE]."""
    return {name: np.stack([film(name, k) for k in range(PATIENTS)]).astype(float) for name in CLASSES}


def box(images: np.ndarray, x: tuple[float, float], y: tuple[float, float]) -> np.ndarray:
    """Mean grey level per image over a box in film coordinates -1..1."""
    (left, right), (top, bottom) = (tuple(int((v + 1) / 2 * SIZE) for v in pair) for pair in (x, y))
    return np.asarray(images[:, top:bottom, left:right].mean(axis=(1, 2)))


def sides(images: np.ndarray, inner: float, outer: float, y: tuple[float, float]) -> np.ndarray:
    """Mean grey level on image left and right, [n, 2]."""
    return np.stack([box(images, (-outer, -inner), y), box(images, (inner, outer), y)], axis=1)


def test_findings_are_the_default_classes() -> None:
    assert (*CLASSES, "Consolidation") == tuple(FINDINGS)
    with pytest.raises(ConfigError, match=r"no phantom of 'Nodule'.*Cardiomegaly"):
        film("Nodule", 0)
    with pytest.raises(ConfigError, match="16"):
        film("Normal", 0, size=8)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_any_size(size: int) -> None:
    image = film("Pneumothorax", 1, size=size)
    assert image.dtype == np.uint8
    assert image.shape == (size, size)
    assert image.std() > 40


def test_sizes_show_the_same_patient() -> None:
    small, large = film("Normal", 3, size=64).astype(float), film("Normal", 3, size=128).astype(float)
    pooled = large.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.98
    assert np.corrcoef(small.ravel(), film("Normal", 4).ravel())[0, 1] < 0.98  # another patient would not pass


def test_a_film_is_a_chest(films: dict[str, np.ndarray]) -> None:
    normal = films["Normal"]
    lungs = sides(normal, 0.3, 0.5, (-0.5, 0.0))
    middle = box(normal, (-0.08, 0.08), (-0.1, 0.2))
    assert (lungs.max(axis=1) < middle - 40).all()
    assert (lungs.max(axis=1) < box(normal, (-0.4, 0.4), (0.75, 0.95)) - 40).all()  # the abdomen is white
    heart = sides(normal, 0.2, 0.35, (0.1, 0.3))
    assert (heart[:, 1] > heart[:, 0]).mean() > 0.9  # the heart's apex is on the patient's left
    assert (normal.max(axis=(1, 2)) > 200).all()
    assert (normal.min(axis=(1, 2)) < 60).all()


@pytest.mark.parametrize("ratio", [0.40, 0.48, 0.60, 0.70])
def test_cardiothoracic_ratio_is_the_one_asked_for(ratio: float) -> None:
    for patient in range(5):
        anatomy = draw_anatomy(np.random.default_rng(patient))
        heart = Thorax(anatomy, *grid(400), ratio, 0.0).heart_inside > 0
        width = np.flatnonzero(heart.any(axis=0))
        measured = (np.ptp(width) + 1) * (2 / 400) / (2 * anatomy.chest)
        assert measured == pytest.approx(ratio, abs=0.02)


def test_only_cardiomegaly_has_a_heart_over_half_the_chest() -> None:
    ratios = [draw_anatomy(np.random.default_rng(k)).heart_ratio for k in range(300)]
    assert min(ratios) >= 0.38
    assert max(ratios) + 0.02 <= 0.5


def test_cardiomegaly_is_measurable(films: dict[str, np.ndarray]) -> None:
    change = box(films["Cardiomegaly"], (0.25, 0.5), (0.0, 0.3)) - box(films["Normal"], (0.25, 0.5), (0.0, 0.3))
    assert (change > 10).all()
    apex = sides(films["Cardiomegaly"], 0.3, 0.5, (-0.6, -0.4)) - sides(films["Normal"], 0.3, 0.5, (-0.6, -0.4))
    assert np.abs(apex).max() < 6  # and nothing else changes


def test_effusion_whitens_a_lower_zone_and_spares_the_apex(films: dict[str, np.ndarray]) -> None:
    zone = (0.45, 0.70, (0.20, 0.60))
    low = sides(films["Pleural Effusion"], *zone) - sides(films["Normal"], *zone)
    high = sides(films["Pleural Effusion"], 0.3, 0.5, (-0.6, -0.4)) - sides(films["Normal"], 0.3, 0.5, (-0.6, -0.4))
    assert (low.max(axis=1) > 12).all()
    assert np.abs(high).max() < 8
    both = (low > 12).all(axis=1).mean()
    assert 0.1 < both < 0.7  # some on both sides, some on one
    assert np.std(low.max(axis=1)) > 8  # the level varies


def test_edema_is_a_haze_around_the_hila(films: dict[str, np.ndarray]) -> None:
    change = films["Pulmonary Edema"] - films["Normal"]
    centre = sides(change, 0.22, 0.38, (-0.2, 0.15))
    rim = sides(change, 0.55, 0.65, (-0.2, 0.15))
    assert (centre.min(axis=1) > 8).all()
    assert (centre.mean(axis=1) > rim.mean(axis=1) + 8).all()


def test_pneumothorax_is_darker_beyond_an_edge_on_one_side(films: dict[str, np.ndarray]) -> None:
    change = films["Pneumothorax"] - films["Normal"]
    outer = np.stack([change[:, 10:36, 6:22].min(axis=(1, 2)), change[:, 10:36, 42:58].min(axis=(1, 2))], axis=1)
    assert (outer.min(axis=1) < -15).all()
    mean = sides(change, 0.4, 0.65, (-0.6, 0.0))
    assert (np.abs(mean).min(axis=1) < 3).all()  # the other side is as it was
    left = (mean[:, 0] < mean[:, 1]).mean()
    assert 0.2 < left < 0.8


def test_a_simple_classifier_learns_the_findings_of_unseen_patients() -> None:
    images, labels, patients = phantom_arrays(
        classes=CLASSES, patients=dict.fromkeys(CLASSES, 130), images_per_patient=1.3, size=32, seed=11
    )
    pixels, test = images.reshape(len(images), -1) / 255.0, patients % 3 == 0
    model = make_pipeline(StandardScaler(), PCA(60, random_state=0), LogisticRegression(C=0.1, max_iter=1000)).fit(
        pixels[~test], labels[~test]
    )
    assert balanced_accuracy_score(labels[test], model.predict(pixels[test])) >= 0.8
    brightness = images.mean(axis=(1, 2))[:, None]  # yet the mean brightness does not give the class away
    naive = LogisticRegression(max_iter=1000).fit(brightness[~test], labels[~test])
    assert balanced_accuracy_score(labels[test], naive.predict(brightness[test])) < 0.5


def test_images_of_a_patient_share_the_anatomy() -> None:
    first, second = film("Normal", 0, 0).astype(float), film("Normal", 0, 1).astype(float)
    assert not np.array_equal(first, second)
    anatomies = [draw_anatomy(numpy_generator(5, "p", 0)), draw_anatomy(numpy_generator(5, "p", 0))]
    assert anatomies[0] == anatomies[1] != draw_anatomy(numpy_generator(5, "p", 1))


def test_edge_is_a_step_from_zero_to_one() -> None:
    at = np.array([-1.0, -0.1, 0.0, 0.1, 1.0], dtype=np.float32)
    assert np.allclose(edge(at, 0.1), [0, 0, 0.5, 1, 1], atol=1e-6)
    assert edge(at, 0.1).dtype == np.float32


@pytest.mark.parametrize("sigma", [0.5, 1.3, 3.0])
def test_blur_is_a_gaussian(sigma: float) -> None:
    noise = np.random.default_rng(0).random((2, 31, 31), dtype=np.float32)
    ours = blur(noise, sigma)
    for plane, source in zip(ours, noise, strict=True):
        oracle = gaussian_filter(source, sigma, mode="nearest", radius=math.ceil(2.5 * sigma))
        assert np.allclose(plane, oracle, atol=1e-5)
    assert blur(noise, 0.1) is noise


def test_texture_is_smooth_and_bounded() -> None:
    plane = texture(np.random.default_rng(0), 128, 8)
    assert np.abs(plane).max() <= 1
    assert np.abs(np.diff(plane, axis=1)).max() < 0.25
    assert plane.std() > 0.2


def test_vessels_do_not_depend_on_the_resolution_and_grow_upwards_in_congestion() -> None:
    anatomy = draw_anatomy(np.random.default_rng(2))
    coarse, fine = (vessels(anatomy, (0.0, 0.0), 1.0, 0.0, size, 0.7) for size in (128, 512))
    assert coarse.mean() == pytest.approx(fine.mean(), rel=0.05)
    full = vessels(anatomy, (0.0, 0.0), 1.0, 0.0, 128, 1.2)
    assert full[:50].sum() > 1.5 * coarse[:50].sum()
    assert full[70:].sum() == pytest.approx(coarse[70:].sum(), rel=0.1)


FEW: dict[str, Any] = {
    "classes": CLASSES,
    "patients": {"Cardiomegaly": 6, "Normal": 9, "Pleural Effusion": 3, "Pulmonary Edema": 0, "Pneumothorax": 4},
    "images_per_patient": 1.8,
    "size": 32,
    "seed": 4,
}


def test_folder_holds_the_arrays(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    count = write_phantom_folder(tmp_path / "a", **FEW, progress=lambda *at: told.append(at))
    images, labels, patients = phantom_arrays(**FEW)
    assert count == len(images) == len(labels) == len(patients)
    assert told == [(k + 1, count) for k in range(count)]
    with (tmp_path / "a" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Image Index", "Patient ID", "label", "Finding Labels", "View Position"]
    assert {p.name for p in (tmp_path / "a" / "images").iterdir()} == {row["Image Index"] for row in rows}
    for row, image, label, patient in zip(rows, images, labels, patients, strict=True):
        with Image.open(tmp_path / "a" / "images" / row["Image Index"]) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), image)
        assert row["label"] == CLASSES[label]
        assert row["Finding Labels"] == FINDINGS[CLASSES[label]]
        assert int(row["Patient ID"]) == patient
    write_phantom_folder(tmp_path / "b", **FEW)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_interrupted_folder_is_finished_by_the_same_call(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom_folder(tmp_path, **FEW, progress=stop)
    assert not (tmp_path / "labels.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(before) == 5
    told: list[int] = []
    count = write_phantom_folder(tmp_path, **FEW, progress=lambda done, _: told.append(done))
    assert told == list(range(6, count + 1))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(list((tmp_path / "images").iterdir())) == count


def test_full_disk_is_a_storage_error_and_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match="No space left"):
            write_phantom_folder(tmp_path, **FEW)
    assert not (tmp_path / "labels.csv").exists()
    assert write_phantom_folder(tmp_path, **FEW) == len(phantom_arrays(**FEW)[0])


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000001_000.png").write_bytes(b"a real film")
    with pytest.raises(ConfigError, match="holds other images"):
        write_phantom_folder(tmp_path, **FEW)
    assert (tmp_path / "images" / "00000001_000.png").read_bytes() == b"a real film"
    write_phantom_folder(tmp_path / "new", **FEW)
    with pytest.raises(ConfigError, match="made otherwise"):
        write_phantom_folder(tmp_path / "new", **{**FEW, "seed": 5})


def test_numbers_of_patients_and_images() -> None:
    _, labels, patients = phantom_arrays(**{**FEW, "size": 16, "images_per_patient": 1.0})
    assert np.bincount(labels, minlength=5).tolist() == [6, 9, 3, 0, 4]
    assert sorted(patients.tolist()) == list(range(1, 23))
    many = {"Normal": 300, "Pneumothorax": 300}
    _, labels, patients = phantom_arrays(classes=tuple(many), patients=many, images_per_patient=1.5, size=16, seed=0)
    numbers = np.bincount(patients)[1:]
    assert len(numbers) == 600
    # 600 x Poisson(0.5): mean 1.5 with standard error 0.029
    assert numbers.mean() == pytest.approx(1.5, abs=0.1)
    both = np.mean([len(set(labels[patients == k].tolist())) > 1 for k in range(1, 601)])
    assert 0.02 < both < 0.08
    _, labels, _ = phantom_arrays(classes=("Normal",), patients={}, images_per_patient=1.0, size=16, seed=0)
    assert labels.tolist() == [0] * 100  # a class left out


def test_a_patient_does_not_change_when_the_others_do() -> None:
    alone, *_ = phantom_arrays(**{**FEW, "classes": ("Normal",), "patients": {"Normal": 2}, "images_per_patient": 1})
    among, labels, _ = phantom_arrays(**{**FEW, "images_per_patient": 1})
    assert np.array_equal(alone, among[labels == 1][:2])
    other, *_ = phantom_arrays(**{**FEW, "seed": 5, "images_per_patient": 1})
    assert not np.array_equal(other, among)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("Normal", "Nodule")},
        {"patients": {"Nodule": 3}},
        {"patients": {"Normal": -1}},
        {"images_per_patient": 0.5},
    ],
)
def test_impossible_data_sets_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.phantom"):
        phantom_arrays(**{**FEW, **change})


@pytest.fixture(scope="module")
def some() -> np.ndarray:
    return np.stack([film("Normal", k, size=32) for k in range(70)])


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_site_styles() -> None:
    assert site_style(1, 0, 0.0) == NEUTRAL
    styles = [site_style(1, k, 1.0) for k in range(5)]
    assert len({s.gain for s in styles}) == 5
    assert styles[2] == site_style(1, 2, 1.0) != site_style(2, 2, 1.0)
    half = site_style(1, 2, 0.5)
    assert half.gain**2 == pytest.approx(styles[2].gain)  # the logarithm is linear in the strength
    assert half.rotation * 2 == pytest.approx(styles[2].rotation)
    assert all(s.noise >= 0 and s.blur >= 0 and 0.7 < s.gain < 1.3 for s in styles)
    with pytest.raises(ConfigError, match="style_shift"):
        site_style(1, 0, 1.5)


def test_neutral_style_is_the_identity(some: np.ndarray) -> None:
    same = apply_style(some, NEUTRAL, rng())
    assert np.array_equal(same, some)
    assert same is not some
    assert apply_style(some[:0], site_style(0, 0, 1.0), rng()).shape == (0, 32, 32)


def test_gain_and_gamma_are_closed_forms(some: np.ndarray) -> None:
    styled = apply_style(some, SiteStyle(gain=1.1, gamma=1.4), rng())
    expected = np.floor(np.clip(1.1 * (some / 255.0) ** 1.4, 0, 1) * 255 + 0.5)
    assert np.abs(styled - expected).max() <= 1
    assert (styled == expected).mean() > 0.999
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert (np.diff(apply_style(grey, SiteStyle(gain=0.8, gamma=0.7), rng()).ravel().astype(int)) >= 0).all()


def test_shift_of_whole_pixels_moves_the_image(some: np.ndarray) -> None:
    moved = apply_style(some, SiteStyle(shift=(2 * 3 / 32, -2 * 2 / 32)), rng())
    assert np.abs(moved[:, :-2, 3:].astype(int) - some[:, 2:, :-3]).max() <= 1


def test_quarter_turn_is_clockwise(some: np.ndarray) -> None:
    turned = apply_style(some, SiteStyle(rotation=math.pi / 2), rng())
    assert np.abs(turned.astype(int) - np.rot90(some, k=-1, axes=(1, 2))).max() <= 1


def test_zoom_magnifies_the_middle(some: np.ndarray) -> None:
    big = apply_style(some, SiteStyle(zoom=2.0), rng()).astype(float)
    pooled = big.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.corrcoef(pooled.ravel(), some[:, 8:24, 8:24].ravel())[0, 1] > 0.98


def test_noise_has_the_stated_deviation() -> None:
    grey = np.full((50, 32, 32), 128, dtype=np.uint8)
    noisy = apply_style(grey, SiteStyle(noise=0.02), rng())
    expected = math.hypot(0.02 * 255, 12**-0.5)  # grain and rounding
    assert noisy.std() == pytest.approx(expected, rel=0.02)
    assert noisy.std() != pytest.approx(1.1 * expected, rel=0.02)


def test_vignette_darkens_the_corners_only() -> None:
    styled = apply_style(np.full((1, 64, 64), 200, dtype=np.uint8), SiteStyle(vignette=0.3), rng())[0]
    assert styled[32, 32] == 200
    assert styled[0, 0] == pytest.approx(200 * 0.7, abs=3)


def test_style_depends_on_the_generator_and_not_on_the_number_of_images(some: np.ndarray) -> None:
    style = site_style(0, 1, 1.0)
    whole = apply_style(some, style, rng())
    assert np.array_equal(whole[:3], apply_style(some[:3], style, rng()))
    assert not np.array_equal(whole, apply_style(some, style, np.random.default_rng(4)))
    assert whole.mean() != pytest.approx(some.mean(), abs=1)


def test_drawing_in_a_style_changes_the_film_and_not_the_finding() -> None:
    bright = SiteStyle(gain=1.2)
    plain, styled = film("Normal", 0), film("Normal", 0, style=bright)
    assert np.abs(styled - np.clip(1.2 * plain.astype(float), 0, 255)).max() <= 2
    style = site_style(0, 1, 1.0)
    sick, well = (film(name, 0, style=style).astype(float) for name in ("Cardiomegaly", "Normal"))
    assert (sick - well)[28:44, 36:48].mean() > 8


def test_consolidation_is_one_lobe_without_air_with_bronchi_dark_in_it(films: dict[str, np.ndarray]) -> None:
    """Against the same patients' normal films: brighter in one lobe of one lung, and nowhere else."""
    solid = np.stack([film("Consolidation", k) for k in range(PATIENTS)]).astype(float)
    brighter = solid - films["Normal"]
    lobes = np.stack([sides(brighter, 0.25, 0.55, rows) for rows in ((-0.60, -0.30), (0.05, 0.25))], axis=2)
    flat = lobes.reshape(PATIENTS, 4)
    ordered = np.sort(flat, axis=1)
    assert (ordered[:, -1] > 15).all(), "the lobe is opaque"
    assert (np.abs(ordered[:, :2]) < 6).all(), "the other lung is as it was"
    assert {int(flat[k].argmax()) for k in range(PATIENTS)} == {0, 1, 2, 3}, "every lobe happens"
    # inside the lobe the branches are darker than around them: the same branches are brighter in the air of a normal lung
    large = film("Consolidation", 3, size=256).astype(float) - film("Normal", 3, size=256).astype(float)
    assert large.max() > 25
