"""Does the distance see what is wrong with an image? Known damage of growing strength, and the distance that each gives.

::

    phantoms A --classifier taught on them--> features (as a study does: the judge is the classifier of real images)
    phantoms B, half 0: the reference; half 1 damaged at levels 0 (floor) .. 5 --> FID(half 0, damaged half 1) per class
    python -m xfed.simulations.fid_validation --out docs/images --> fid-validation.png; the table on stdout

A figure that is to judge an archive must rise with every one of five disturbances: noise, blur, swirl, implanted rectangles,
and images of another class (Heusel et al. 2017, appendix A1; for chest X-rays Segal et al. 2021). Damage is nested: what a
level adds, the levels above it have too. Each class is compared with itself; the figure shown is the mean over classes.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample

from xfed.common.config import Study, parse_study
from xfed.common.durable import write_bytes
from xfed.common.features import KERNEL_DIMENSIONS, project_features
from xfed.common.frechet import feature_sums, frechet_distance
from xfed.common.kernel_sums import kernel_distance, kernel_sums
from xfed.common.randomness import numpy_generator
from xfed.common.registry import build_classifier
from xfed.common.synthetic_training import train_on_synthetic
from xfed.common.weights import load_parameters
from xfed.simulations.anatomy import blur
from xfed.simulations.phantom import phantom_arrays

__all__ = ["DISTURBANCES", "LEVELS", "Disturbed", "disturb", "validate"]

LEVELS = (0, 1, 2, 3, 4, 5)
NOISE = (0, 6, 12, 24, 40, 64)  # standard deviation in grey levels
BLUR = (0, 0.02, 0.035, 0.05, 0.075, 0.11)  # standard deviation as a share of the side
SWIRL = (0, 0.1, 0.2, 0.35, 0.55, 0.8)  # turn of the centre in radians
RECTANGLES = (0, 1, 2, 3, 5, 8)  # number, each up to a quarter of the side
CONTAMINATION = (0, 0.1, 0.2, 0.4, 0.6, 0.9)  # share of images of another class

Pixels = npt.NDArray[np.uint8]


def _noise(images: Pixels, level: int, others: Pixels) -> Pixels:
    grain = numpy_generator(0, "damage", "noise").normal(size=images.shape)
    return _pixels(images + NOISE[level] * grain)


def _blur(images: Pixels, level: int, others: Pixels) -> Pixels:
    return _pixels(blur(images.astype(np.float32), BLUR[level] * images.shape[-1]))


def _swirl(images: Pixels, level: int, others: Pixels) -> Pixels:
    """Turned about the centre by an angle that falls to a third at half the side's distance."""
    if not level:
        return images
    size = images.shape[-1]
    grid = affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], align_corners=False)[0]
    angle = SWIRL[level] * torch.exp(-grid.norm(dim=-1))
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], dim=-1)
    bent = (turn.view(size, size, 2, 2) @ grid[..., None])[..., 0]
    planes = torch.from_numpy(images.astype(np.float32))[:, None]
    found = grid_sample(planes, bent.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False)
    return _pixels(found[:, 0].numpy())


def _rectangles(images: Pixels, level: int, others: Pixels) -> Pixels:
    rng, size = numpy_generator(0, "damage", "rectangles"), images.shape[-1]
    sides = rng.integers(max(2, size // 10), size // 4 + 1, (len(images), RECTANGLES[-1], 2))
    corners = rng.integers(0, size, (len(images), RECTANGLES[-1], 2))
    greys = rng.integers(0, 256, (len(images), RECTANGLES[-1]))
    result = images.copy()
    for image, side, corner, grey in zip(result, sides, corners, greys, strict=True):
        for number in range(RECTANGLES[level]):
            (row, column), (height, width) = corner[number], side[number]
            image[row : row + height, column : column + width] = grey[number]
    return result


def _contamination(images: Pixels, level: int, others: Pixels) -> Pixels:
    order = numpy_generator(0, "damage", "contamination").permutation(len(images))
    swapped = order[: round(CONTAMINATION[level] * len(images))]
    result = images.copy()
    result[swapped] = others[swapped % len(others)]
    return result


def _pixels(values: npt.NDArray[np.floating]) -> Pixels:
    result: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return result


DISTURBANCES: Mapping[str, Callable[[Pixels, int, Pixels], Pixels]] = {
    "noise": _noise,
    "blur": _blur,
    "swirl": _swirl,
    "rectangles": _rectangles,
    "other class": _contamination,
}
UNITS = {
    "noise": ("deviation, grey levels", NOISE),
    "blur": ("deviation, share of the side", BLUR),
    "swirl": ("turn of the centre, radians", SWIRL),
    "rectangles": ("rectangles per image", RECTANGLES),
    "other class": ("share of images", CONTAMINATION),
}


def disturb(name: str, images: Pixels, level: int, others: Pixels) -> Pixels:
    """`images` uint8 [n, S, S] with damage `name` at `level` 0 (none) .. 5; `others` are images of another class."""
    return DISTURBANCES[name](images, level, others)


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """FID and KID per disturbance, class and level, float64 [D, C, L]; level 0 is the floor. `shown`: images [D, L, S, S]."""

    classes: tuple[str, ...]
    fid: npt.NDArray[np.float64]
    kid: npt.NDArray[np.float64]
    shown: npt.NDArray[np.uint8]

    def table(self) -> str:
        """Means over classes as Markdown: strength and FID, level by level."""
        lines = [
            "| disturbance | floor | " + " | ".join(f"level {level}" for level in LEVELS[1:]) + " |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, fid, kid in zip(DISTURBANCES, self.fid.mean(axis=1), self.kid.mean(axis=1), strict=True):
            unit, strengths = UNITS[name]
            cells = [f"{value:.2f} ({strength:g})" for value, strength in zip(fid[1:], strengths[1:], strict=True)]
            lines.append(f"| {name} ({unit}) | {fid[0]:.2f} | {' | '.join(cells)} |")
            cells = [f"{value:.3f}" for value in kid[1:]]
            lines.append(f"| KID | {kid[0]:.3f} | {' | '.join(cells)} |")
        return "\n".join(lines)


def study_for(size: int, classes: tuple[str, ...], width: int) -> Study:
    """The study whose classifier is the judge."""
    return parse_study(
        {
            "name": "fid-validation",
            "image_size": size,
            "classes": list(classes),
            "classifier": {"width": width, "batch": 64, "arms": ["DS1"]},
        },
        "fid_validation",
    )


def validate(study: Study, *, patients: int, steps: int, device: torch.device) -> Disturbed:
    """Teach the judge on phantoms, then measure all disturbances on others: `patients` per class and half."""
    classes = study.classes

    def drawn(seed: int, each: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
        images, labels, _ = phantom_arrays(
            classes=classes,
            patients=dict.fromkeys(classes, each),
            images_per_patient=1.0,
            size=study.image_size,
            seed=seed,
        )
        return images, labels

    judge = build_classifier(study)
    taught = train_on_synthetic(study, *drawn(1, patients), steps=steps, purpose="fid validation", device=device)
    load_parameters(judge, taught)

    def features(images: Pixels) -> npt.NDArray[np.float64]:
        return project_features(judge, images, device, study.precision)

    images, labels = drawn(2, 2 * patients)
    halves = [(images[labels == c][:patients], images[labels == c][patients:]) for c in range(len(classes))]
    references = [features(first) for first, _ in halves]
    scale = float(np.sqrt((np.concatenate(references)[:, :KERNEL_DIMENSIONS] ** 2).mean()))
    fid = np.zeros((len(DISTURBANCES), len(classes), len(LEVELS)))
    kid, shown = np.zeros_like(fid), []
    for row, name in enumerate(DISTURBANCES):
        for level in LEVELS:
            for c, (_, second) in enumerate(halves):
                other = halves[(c + 1) % len(halves)][1]
                damaged = disturb(name, second, level, other)
                found = features(damaged)
                fid[row, c, level] = frechet_distance(feature_sums(references[c]), feature_sums(found))
                narrow = [kernel_sums(part[:, :KERNEL_DIMENSIONS], scale) for part in (references[c], found)]
                kid[row, c, level] = kernel_distance(*narrow)
                if c == 0:
                    shown.append(_example(second, damaged))
    size = study.image_size
    return Disturbed(
        classes=classes, fid=fid, kid=kid, shown=np.array(shown).reshape(len(DISTURBANCES), len(LEVELS), size, size)
    )


def _example(before: Pixels, after: Pixels) -> Pixels:
    """The first image; where only some images change, the first that did."""
    changed = np.flatnonzero((before != after).any(axis=(1, 2)))
    chosen: Pixels = after[changed[0] if len(changed) else 0]
    return chosen


def picture(result: Disturbed) -> bytes:
    """PNG: per disturbance one image at levels 0, 3 and 5, and below it the distances of the classes and their mean."""
    with mpl.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa5b1"}
    ):
        figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
        grid = figure.subplots(2, len(DISTURBANCES), height_ratios=[1, 2.4], sharex=False)
        for column, name in enumerate(DISTURBANCES):
            films, axes = grid[0][column], grid[1][column]
            films.imshow(np.concatenate(result.shown[column, [0, 3, 5]], axis=1), cmap="gray", vmin=0, vmax=255)
            films.set_axis_off()
            films.set_title(name, fontsize=10, color="#1f2933")
            for line in result.fid[column]:
                axes.plot(LEVELS, line, color="#9aa5b1", linewidth=1)
            mean = result.fid[column].mean(axis=0)
            axes.plot(
                LEVELS, mean, "o-", color="#0b6e6e", linewidth=2, markersize=4, label="mean of the classes (grey)"
            )
            axes.axhline(mean[0], color="#52606d", linewidth=1, linestyle=(0, (3, 3)))
            axes.set(ylim=(0, None), xticks=LEVELS, xlabel="level")
            axes.set_xticklabels([f"{strength:g}" for strength in UNITS[name][1]], fontsize=7.5)
            axes.set_xlabel(UNITS[name][0], fontsize=8, color="#52606d")
            if not column:
                axes.set_ylabel("FID")
                axes.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=1.2)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    small = io.BytesIO()
    with Image.open(buffer) as drawn:
        drawn.convert("RGB").quantize(96).save(small, format="png", optimize=True)
    return small.getvalue()


def main() -> None:
    """Command line: measure, print the table, write fid-validation.png and .json under --out."""
    parser = argparse.ArgumentParser(description="FID under known damage, on phantoms")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--size", type=int, default=64, choices=(32, 64, 128, 256))
    parser.add_argument("--patients", type=int, default=200, help="per class and half")
    parser.add_argument("--steps", type=int, default=300, help="steps of the judge")
    parser.add_argument("--width", type=int, default=16, help="of the judge")
    options = parser.parse_args()
    study = study_for(options.size, Study(name="default").classes, options.width)
    result = validate(study, patients=options.patients, steps=options.steps, device=torch.device("cpu"))
    print(result.table())
    facts = {"classes": result.classes, "fid": result.fid.tolist(), "kid": result.kid.tolist(), "units": UNITS}
    write_bytes(options.out / "fid-validation.json", json.dumps(facts).encode())
    write_bytes(options.out / "fid-validation.png", picture(result))


if __name__ == "__main__":
    main()
