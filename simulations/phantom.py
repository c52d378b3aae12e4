"""Procedural chest films with six findings: labelled data for demos and tests, of nobody.

::

    seed --patient generator--> Anatomy --+
    seed --exposure generator--> framing -+--> attenuation at 2x size --film, 2x2 mean, grain--> one image
    finding (one of FINDINGS) ------------+                   SiteStyle ---^                        |
                                                                                                    v
    phantom_arrays: images, labels, patients  <-- the same pixels -->  write_phantom_folder: PNG + labels.csv

Images of one patient share the anatomy and the side and extent of a finding, and differ in framing, breath
and exposure. The same arguments give the same bytes with the same NumPy and Pillow on the same kind of
processor. Nothing here is clinical: the findings are textbook signs, drawn so that they can be seen at 32
pixels.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.common.durable import translate_os_errors, write_bytes, write_json, write_text
from xfed.common.errors import ConfigError
from xfed.common.randomness import numpy_generator
from xfed.simulations.anatomy import Anatomy, Thorax, blur, draw_anatomy, edge, grid, texture, vessels

__all__ = [
    "FINDINGS",
    "NEUTRAL",
    "SiteStyle",
    "apply_style",
    "draw_phantom",
    "phantom_arrays",
    "site_style",
    "write_phantom_folder",
]

Plane = npt.NDArray[np.floating[Any]]
Images = npt.NDArray[np.uint8]

FINDINGS = {  # class -> what the NIH label file calls it
    "Cardiomegaly": "Cardiomegaly",
    "Normal": "No Finding",
    "Pleural Effusion": "Effusion",
    "Pulmonary Edema": "Edema",
    "Pneumothorax": "Pneumothorax",
    "Consolidation": "Consolidation",
}
DEFAULT_PATIENTS = 100
TWO_CLASSES = 0.05  # share of patients with images in two classes


@dataclass(frozen=True, kw_only=True)
class SiteStyle:
    """How one hospital's films differ: exposure, noise, sharpness and framing. Polarity is never changed."""

    gain: float = 1.0  # factor on brightness
    gamma: float = 1.0  # exponent on brightness in 0..1
    noise: float = 0.0  # standard deviation of added grain, in units of full white
    blur: float = 0.0  # standard deviation of a Gaussian, as a share of the image's side
    shift: tuple[float, float] = (0.0, 0.0)  # right and down, as a share of half the side
    zoom: float = 1.0  # above 1 magnifies
    rotation: float = 0.0  # radians, clockwise
    vignette: float = 0.0  # share of brightness lost in the corners


NEUTRAL = SiteStyle()


def site_style(seed: int, site_index: int, strength: float) -> SiteStyle:
    """The style of site `site_index`; `strength` runs from 0 (`NEUTRAL`) to 1 (plainly another hospital)."""
    if not 0 <= strength <= 1:
        raise ConfigError(f"style_shift is {strength}: it must lie between 0 and 1")
    if strength == 0:
        return NEUTRAL
    draw = numpy_generator(seed, "site-style", site_index).uniform(-1, 1, 9) * strength
    gain, gamma, noise, soft, dx, dy, zoom, turn, dark = (float(v) for v in draw)
    return SiteStyle(
        gain=math.exp(0.25 * gain),
        gamma=math.exp(0.35 * gamma),
        noise=0.02 * (strength + noise),
        blur=0.006 * (strength + soft),
        shift=(0.07 * dx, 0.07 * dy),
        zoom=math.exp(0.10 * zoom),
        rotation=0.06 * turn,
        vignette=0.15 * (strength + dark),
    )


def _develop(planes: Plane, style: SiteStyle, generator: np.random.Generator) -> Images:
    """Brightness in 0..1 [..., s, s] to grey levels by the style's sharpness, curve, vignette and grain."""
    size = planes.shape[-1]
    planes = blur(planes, style.blur * size)
    if style.gamma != 1:
        planes = np.clip(planes, 0, 1) ** np.float32(style.gamma)
    if style.gain != 1:
        planes = planes * np.float32(style.gain)
    if style.vignette:
        x, y = grid(size)
        planes = planes * (1 - np.float32(0.5 * style.vignette) * (x * x + y * y))
    if style.noise:
        planes = planes + np.float32(style.noise) * generator.standard_normal(planes.shape, dtype=np.float32)
    return (np.clip(planes, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def _frame(x: Plane, y: Plane, style: SiteStyle) -> tuple[Plane, Plane]:
    """Where in the scene each point of the film looks."""
    x, y = (x - style.shift[0]) / style.zoom, (y - style.shift[1]) / style.zoom
    cos, sin = math.cos(style.rotation), math.sin(style.rotation)
    return cos * x + sin * y, cos * y - sin * x


def apply_style(images: Images, style: SiteStyle, generator: np.random.Generator) -> Images:
    """Give images uint8 [n, s, s], real ones too, a site's style; returns a new uint8 [n, s, s].

    `generator` draws the grain. What framing brings in from outside repeats the border.
    """
    n, size = len(images), images.shape[-1]
    if style == NEUTRAL or n == 0:
        return images.copy()
    x, y = _frame(*grid(size), style)
    columns = np.clip((x + 1) * np.float32(size / 2) - np.float32(0.5), 0, size - 1)
    rows = np.clip((y + 1) * np.float32(size / 2) - np.float32(0.5), 0, size - 1)
    c0, r0 = np.minimum(columns.astype(np.intp), size - 2), np.minimum(rows.astype(np.intp), size - 2)
    fc, fr = columns - c0, rows - r0
    styled = np.empty_like(images)
    for first in range(0, n, 64):
        part = images[first : first + 64]
        top = part[:, r0, c0] * (1 - fc) + part[:, r0, c0 + 1] * fc
        bottom = part[:, r0 + 1, c0] * (1 - fc) + part[:, r0 + 1, c0 + 1] * fc
        planes = ((top * (1 - fr) + bottom * fr) / 255).astype(np.float32)
        styled[first : first + 64] = _develop(planes, style, generator)
    return styled


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What is wrong, drawn once per patient, its extent a little different on each film; 0..1 per side."""

    heart_ratio: float
    fluid: tuple[float, float] = (0.0, 0.0)
    haze: float = 0.0
    collapse: tuple[float, float] = (0.0, 0.0)
    solid: tuple[float, float] = (0.0, 0.0)  # how dense a lobe is
    upper: bool = False  # which lobe


def _draw_finding(
    finding: str, anatomy: Anatomy, patient: np.random.Generator, exposure: np.random.Generator
) -> _Finding:
    extent, side, both, other = (float(v) for v in patient.random(4))
    extent = min(max(extent + float(exposure.uniform(-0.08, 0.08)), 0.0), 1.0)
    ratio = anatomy.heart_ratio
    one = (1.0, 0.0) if side < 0.5 else (0.0, 1.0)
    if finding == "Cardiomegaly":
        return _Finding(heart_ratio=0.55 + 0.15 * extent)
    if finding == "Pleural Effusion":
        rest = 0.25 + 0.75 * other if both < 0.4 else 0.0
        level = 0.27 + 0.73 * extent
        return _Finding(
            heart_ratio=ratio, fluid=(max(one[0] * level, one[1] * rest), max(one[1] * level, one[0] * rest))
        )
    if finding == "Pulmonary Edema":
        return _Finding(heart_ratio=ratio + 0.02, haze=0.45 + 0.55 * extent)
    if finding == "Pneumothorax":
        size = 0.26 + 0.54 * extent
        return _Finding(heart_ratio=ratio, collapse=(one[0] * size, one[1] * size))
    if finding == "Consolidation":
        density = 0.55 + 0.45 * extent
        return _Finding(heart_ratio=ratio, solid=(one[0] * density, one[1] * density), upper=other < 0.5)
    return _Finding(heart_ratio=ratio)


def _attenuation(
    anatomy: Anatomy, found: _Finding, view: SiteStyle, lift: float, fine: int, exposure: np.random.Generator
) -> Plane:
    """The chest with its finding, as attenuation float32 [fine, fine]."""
    x, y = _frame(*grid(fine), view)
    chest = Thorax(anatomy, x, y, found.heart_ratio, lift)
    tissue, air, lungs = chest.body(), chest.air, chest.lung
    tree = vessels(anatomy, view.shift, view.zoom, view.rotation, fine, 0.7 + 0.5 * found.haze)
    line: Plane | None = None

    def per_side(values: tuple[float, float]) -> Plane:
        return np.where(chest.right, np.float32(values[1]), np.float32(values[0]))

    if max(found.collapse):  # air outside the lung: darker, no vessels, bounded by the line of the pleura
        amount = per_side(found.collapse)
        height = np.clip((y - anatomy.apex) * np.float32(1 / (0.55 - anatomy.apex)), 0, 1)
        off = chest.cage - chest.across - amount * (0.50 - 0.34 * height) * np.float32(anatomy.chest)
        off = np.minimum(off, y - anatomy.apex - np.float32(0.25) * amount)  # above 0 in what is left of the lung
        left = np.where(amount > 0, edge(off, 0.018), np.float32(1))
        tree = tree * left
        air = air * (left * (1 - 0.22 * amount) + (1 - left) * np.float32(1.36))
        line = np.where(amount > 0, edge(0.013 - np.abs(off), 0.012), np.float32(0)) * lungs
    if found.haze:  # bat wings: water around the lung roots that spares the periphery
        far = np.hypot((chest.across - 0.24) * np.float32(1 / 0.33), (y - 0.02) * np.float32(1 / 0.46))
        fluff = 0.85 + 0.3 * texture(exposure, fine, 14) + 0.2 * texture(exposure, fine, 30)
        air = air * (1 - found.haze * np.clip(0.72 * np.exp(-(far**3)) * fluff + 0.10, 0, 0.9))
        tree = tree * np.float32(1.15)
    if max(found.solid):  # a lobe without air, sharp at its fissure; the bronchi still hold air: dark branches in it
        depth = (y - anatomy.apex) / (per_side(chest.domes) - anatomy.apex)
        fissure = 0.46 + 0.10 * (chest.outward - 0.5)
        lobe = edge(fissure - depth, 0.03) if found.upper else edge(depth - fissure, 0.03) * edge(1.02 - depth, 0.10)
        lobe = lobe * per_side(found.solid) * (0.9 + 0.1 * texture(exposure, fine, 12))
        tissue = tissue + 0.16 * lobe * lungs
        air = air * (1 - 0.88 * lobe)
        tree = tree * (1 - 2.4 * lobe)
    if max(found.fluid):  # fluid up to a meniscus that climbs the chest wall
        level = per_side(found.fluid)
        surface = per_side(chest.domes) + np.float32(0.6 * anatomy.sulcus + 0.05) - level * np.float32(0.62)
        climb = np.clip((chest.outward - 0.35) * np.float32(1 / 0.65), 0, 1.2) ** np.float32(2.5)
        wet = np.where(level > 0, edge(y - surface + (0.10 + 0.12 * level) * climb, 0.045), np.float32(0))
        tissue = tissue + 0.20 * wet * lungs
        air = air * (1 - 0.93 * wet)
        lungs = lungs * (1 - wet)
    layer: Plane = tissue - (0.56 - 0.05 * anatomy.habitus) * air + chest.centre() + tree * lungs
    layer += 0.03 * texture(exposure, fine, 24) * lungs
    layer += chest.bones() * (1 - 0.6 * chest.core)
    if line is not None:
        layer += 0.10 * line
    return layer


def draw_phantom(
    finding: str,
    patient: np.random.Generator,
    exposure: np.random.Generator,
    size: int,
    style: SiteStyle = NEUTRAL,
) -> Images:
    """One frontal chest film, uint8 [size, size], white where little light passes.

    `patient` decides anatomy, side and extent; `exposure` framing, breath, film and grain. Two films of one
    patient are drawn with two equal `patient` generators. `size` is at least 16. Raises `ConfigError` for a
    finding outside `FINDINGS`.
    """
    if finding not in FINDINGS:
        raise ConfigError(f"there is no phantom of {finding!r}; {_offer()}")
    if size < 16:
        raise ConfigError(f"phantoms of {size} pixels cannot show a finding; the smallest size is 16")
    anatomy = draw_anatomy(patient)
    found = _draw_finding(finding, anatomy, patient, exposure)
    dx, dy, zoom, turn, lift, dose, curve, grain, tilt = (float(v) for v in exposure.uniform(-1, 1, 9))
    view = SiteStyle(
        shift=(0.03 * dx + style.shift[0], 0.035 * dy + style.shift[1]),
        zoom=math.exp(0.05 * zoom - 0.03) * style.zoom,
        rotation=0.035 * turn + style.rotation,
    )
    layer = _attenuation(anatomy, found, view, 0.03 * lift, 2 * size, exposure)
    x, y = grid(2 * size)
    layer *= (0.97 + 0.13 * dose) * (1 + 0.05 * tilt * x + 0.04 * y)
    film = 1.04 * (1 - np.exp(-1.75 * np.maximum(layer, 0.01) ** np.float32(1.25 + 0.12 * curve)))
    if exposure.random() < 0.5:  # the technician's side marker: an L, opaque, in the corner on the patient's left
        left, top, unit = int((1.66 + 0.08 * dx) * size), int((0.14 + 0.06 * dy) * size), max(1, size // 24)
        film[top : top + 4 * unit, left : left + unit] = 1.0
        film[top + 3 * unit : top + 4 * unit, left : left + 3 * unit] = 1.0
    film = film.reshape(size, 2, size, 2).mean(axis=(1, 3), dtype=np.float32)
    film = blur(film, 0.004 * size * (1 + 0.8 * found.haze))
    film += (0.012 + 0.005 * grain) * exposure.standard_normal((size, size), dtype=np.float32)
    return _develop(film, style, exposure)


@dataclass(frozen=True)
class _Planned:
    """One image of a phantom data set, before it is drawn."""

    label: int
    patient: int  # unique over all classes, from 1
    image: int  # number among the patient's images, from 0
    stream: tuple[str, int]  # class and position that the patient was drawn for: names its generators


def _plan(classes: Sequence[str], patients: Mapping[str, int], images_per_patient: float, seed: int) -> list[_Planned]:
    for name in [*classes, *patients]:
        if name not in FINDINGS or name not in classes:
            raise ConfigError(f"data.phantom: {name!r} is not among the classes, or has no phantom; {_offer()}")
    counts = [patients.get(name, DEFAULT_PATIENTS) for name in classes]
    if min(counts, default=0) < 0 or not 1 <= images_per_patient < math.inf:
        raise ConfigError("data.phantom: patients must be 0 or more and images_per_patient 1 or more")
    more = images_per_patient - 1
    several = -math.expm1(-more)  # share of patients with two images or more
    mixed = min(1.0, TWO_CLASSES / several) if several else 0.0
    drawn = [label for label, count in enumerate(counts) if count]
    planned: list[_Planned] = []
    number = 0
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        others = [other for other in drawn if other != label]
        for index in range(count):
            number += 1
            rng = numpy_generator(seed, "phantom", name, index, "images")
            images = 1 + int(rng.poisson(more))
            change, which = rng.random(2)
            labels = [label] * images
            if images > 1 and others and change < mixed:
                labels[-1] = others[int(which * len(others))]
            planned += [_Planned(each, number, k, (name, index)) for k, each in enumerate(labels)]
    return planned


def _offer() -> str:
    names = ", ".join(FINDINGS)
    return f"phantoms are drawn of {names}. For other classes give a folder of images (data.source: folder)."


def _draw_all(plan: Sequence[_Planned], classes: Sequence[str], size: int, seed: int) -> Iterator[Images]:
    for one in plan:
        patient = numpy_generator(seed, "phantom", *one.stream, "anatomy")
        exposure = numpy_generator(seed, "phantom", *one.stream, "exposure", one.image)
        yield draw_phantom(classes[one.label], patient, exposure, size)


def phantom_arrays(
    *, classes: Sequence[str], patients: Mapping[str, int], images_per_patient: float, size: int, seed: int
) -> tuple[Images, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A whole data set: images uint8 [n, size, size], labels int64 [n] (position in `classes`), patients
    int64 [n] (from 1).

    `patients` is the number drawn for each class; a class left out gets 100. A patient has 1 +
    Poisson(images_per_patient - 1) images, and about 5 % of the patients, always ones with two images or
    more, have their last image in another class. A patient stays the same when other classes or numbers
    change. Raises `ConfigError` for a class without a phantom.
    """
    plan = _plan(classes, patients, images_per_patient, seed)
    images = np.empty((len(plan), size, size), dtype=np.uint8)
    for row, image in enumerate(_draw_all(plan, classes, size, seed)):
        images[row] = image
    labels = np.array([one.label for one in plan], dtype=np.int64)
    return images, labels, np.array([one.patient for one in plan], dtype=np.int64)


def write_phantom_folder(
    out: Path,
    *,
    classes: Sequence[str],
    patients: Mapping[str, int],
    images_per_patient: float,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the data set of `phantom_arrays` as `out`/images/*.png and `out`/labels.csv; returns the number
    of images.

    The table's columns are those of NIH ChestX-ray14, plus `label` (the class). It is written last: a folder
    without it is unfinished, and the same call goes on where it stopped. `progress` is told (done, total).
    Raises `ConfigError` for a class without a phantom or when `out` holds something else, and `StorageError`
    when the disk is full or read-only.
    """
    plan = _plan(classes, patients, images_per_patient, seed)
    wanted = {name: patients.get(name, DEFAULT_PATIENTS) for name in classes}
    made_with = {"patients": wanted, "images_per_patient": images_per_patient, "size": size, "seed": seed}
    folder, table, marker = out / "images", out / "labels.csv", out / "phantom.json"
    if folder.exists() or table.exists() or marker.exists():
        try:
            same = json.loads(marker.read_text(encoding="utf-8")) == made_with
        except (OSError, ValueError):
            same = False
        if not same:
            raise ConfigError(
                f"{out} holds other images, or phantoms made otherwise. Choose another --out, or delete it."
            )
    write_json(marker, made_with)
    with translate_os_errors(out):
        unfinished = not table.exists()
        table.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        kept = {path.name for path in folder.glob("*.png")} if unfinished else set()
    names = [f"{one.patient:08d}_{one.image:03d}.png" for one in plan]
    missing = [(name, one) for name, one in zip(names, plan, strict=True) if name not in kept]
    done = len(plan) - len(missing)
    for (name, _), image in zip(missing, _draw_all([one for _, one in missing], classes, size, seed), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_bytes(folder / name, buffer.getvalue())
        done += 1
        if progress is not None:
            progress(done, len(plan))
    lines = ["Image Index,Patient ID,label,Finding Labels,View Position"]
    for name, one in zip(names, plan, strict=True):
        finding = classes[one.label]
        lines.append(f"{name},{one.patient:08d},{finding},{FINDINGS[finding]},PA")
    write_text(table, "\n".join(lines) + "\n")
    return len(plan)
