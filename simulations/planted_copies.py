"""Does the vote find copies, and spare honest images? Copies of training images are planted in an archive of fresh phantoms.

    python -m xfed.simulations.planted_copies [--size 32] [--patients 60] [--seeds 3]

::

    phantoms --split by patient--> three hospitals --> each: its training images --plant--> copies of 13 kinds
    fresh phantoms of other patients, styled as each hospital --> honest images
    both --xfed.client.vote of every hospital--> share of copies vetoed (by the hospital whose they are), of honest ones (by any)

Kinds 1 to 7 are what the vote promises to find; the others show where it ends.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from xfed.client.splits import split_patients
from xfed.client.store import Store, write_store
from xfed.client.vote import vote
from xfed.common.config import Study, parse_study
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.simulations.judge import taught_classifier
from xfed.simulations.phantom import apply_style, phantom_arrays, site_style

__all__ = ["PROMISED", "hospital", "plant", "taught", "toy_study"]

Images = npt.NDArray[np.uint8]

PROMISED = (
    "exact",
    "shifted by 1",
    "shifted by 2",
    "grain 5/255",
    "mirrored",
    "exposure",
    "mirrored, shifted by 2, grain 5/255",
)
SITES = 3


def plant(images: Images, rng: np.random.Generator) -> dict[str, Images]:
    """Copies of `images` uint8 [n, S, S], by kind: the `PROMISED` ones first."""
    mirrored = images[:, :, ::-1]
    return {
        "exact": images,
        "shifted by 1": _shifted(images, 1, rng),
        "shifted by 2": _shifted(images, 2, rng),
        "grain 5/255": _grainy(images, 5, rng),
        "mirrored": mirrored,
        "exposure": _exposed(images, 0.8, 20, 1.0),
        "mirrored, shifted by 2, grain 5/255": _grainy(_shifted(mirrored, 2, rng), 5, rng),
        "smoothed": _smoothed(images),
        "grain 10/255": _grainy(images, 10, rng),
        "gamma 1.4": _exposed(images, 1.0, 0, 1.4),
        "turned by 4 degrees": _moved(images, 4, 1.0),
        "magnified by 8%": _moved(images, 0, 1.08),
        "half of two copies": (images // 2 + np.roll(images, 1, axis=0) // 2).astype(np.uint8),
    }


def _shifted(images: Images, by: int, rng: np.random.Generator) -> Images:
    """Each by `by` pixels along one axis or both, at random; edges are repeated."""
    padded = np.pad(images, ((0, 0), (by, by), (by, by)), mode="edge")
    steps = [(y, x) for y in (-by, 0, by) for x in (-by, 0, by) if y or x]
    side = images.shape[-1]
    chosen = rng.integers(len(steps), size=len(images))
    return np.stack(
        [
            padded[i, by + steps[k][0] : by + steps[k][0] + side, by + steps[k][1] : by + steps[k][1] + side]
            for i, k in enumerate(chosen)
        ]
    )


def _grainy(images: Images, sigma: float, rng: np.random.Generator) -> Images:
    return np.clip(np.rint(images + rng.normal(0, sigma, images.shape)), 0, 255).astype(np.uint8)


def _exposed(images: Images, gain: float, offset: float, gamma: float) -> Images:
    return np.clip(gain * 255 * (images / 255) ** gamma + offset, 0, 255).astype(np.uint8)


def _smoothed(images: Images) -> Images:
    """A mean over 3 x 3 pixels of a picture 64 px wide, over as much of the body at other sizes (at least 3 x 3)."""
    width = max(3, 2 * (images.shape[-1] * 3 // 64 // 2) + 1)
    pixels = torch.nn.functional.pad(torch.from_numpy(images.copy())[:, None].float(), (width // 2,) * 4, "replicate")
    smooth: Images = torch.nn.functional.avg_pool2d(pixels, width, 1)[:, 0].round().byte().numpy()
    return smooth


def _moved(images: Images, degrees: float, zoom: float) -> Images:
    middle, keep = images.shape[-1] / 2, 1 / zoom
    matrix = (keep, 0, middle * (1 - keep), 0, keep, middle * (1 - keep))
    return np.stack(
        [
            np.asarray(
                Image.fromarray(image)
                .transform(image.shape, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
                .rotate(degrees, Image.Resampling.BILINEAR)
            )
            for image in images
        ]
    )


def toy_study(size: int, seed: int) -> Study:
    """A study of phantoms of the five classes at three hospitals, with a small classifier."""
    return parse_study(
        {
            "name": "planted",
            "seed": seed,
            "image_size": size,
            "sites": {"count": SITES, "style_shift": 0.2},
            "classifier": {"width": 8, "batch": 64},
        },
        "planted copies",
    )


def hospital(study: Study, folder: Path, patients: int, index: int = 0, images_per_patient: float = 1.3) -> Store:
    """The store of hospital `index`: `patients` phantoms per class, split by patient, in its style."""
    images, labels, people = phantom_arrays(
        classes=study.classes,
        patients=dict.fromkeys(study.classes, patients),
        images_per_patient=images_per_patient,
        size=study.image_size,
        seed=study.seed * 100 + index,
    )
    style = site_style(study.seed, index, study.sites.style_shift)
    splits = split_patients(
        labels=labels,
        patients=people,
        splits=study.data.splits,
        seed=study.seed + index,
        n_classes=len(study.classes),
    )
    return write_store(
        folder,
        classes=study.classes,
        images=apply_style(images, style, numpy_generator(study.seed, "style", index)),
        labels=labels,
        patients=people,
        splits=splits,
    )


def taught(study: Study, stores: list[Store], steps: int = 150) -> torch.nn.Module:
    """The study's classifier after a little training on the hospitals' training images: its features are the vote's."""
    images = np.concatenate([store.images[store.rows("train")] for store in stores])
    labels = np.concatenate([store.labels[store.rows("train")] for store in stores])
    start, draws = torch_generator(study.seed, "taught"), torch_generator(study.seed, "taught", "draws")
    return taught_classifier(study, images, labels, steps=steps, start=start, draws=draws)


def _trial(study: Study, patients: int, folder: Path) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    stores = [hospital(study, folder / str(index), patients, index) for index in range(SITES)]
    model, device = taught(study, stores), torch.device("cpu")
    rng = numpy_generator(study.seed, "plants")
    for store in stores:
        chosen = store.rows("train")
        planted = plant(np.asarray(store.images[chosen[: min(100, len(chosen))]]), rng)
        whole = np.concatenate(list(planted.values()))
        cast = vote(store, whole, model, device, "float32", sites=SITES).vetoed
        yield from zip(planted, np.split(cast, len(planted)), strict=True)
    fresh, _, _ = phantom_arrays(
        classes=study.classes,
        patients=dict.fromkeys(study.classes, 60),
        images_per_patient=1.0,
        size=study.image_size,
        seed=study.seed * 100 + 99,
    )
    for index in range(SITES):
        honest = apply_style(fresh, site_style(study.seed, index, study.sites.style_shift), rng)
        votes = [vote(store, honest, model, device, "float32", sites=SITES).vetoed for store in stores]
        yield "honest", np.logical_or.reduce(votes)


def _shares(size: int, patients: int, seeds: int) -> Mapping[str, tuple[int, int]]:
    """Per kind (and "honest") how many were vetoed, of how many."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for seed in range(1, seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            for kind, vetoed in _trial(toy_study(size, seed), patients, Path(folder)):
                found[kind][0] += int(vetoed.sum())
                found[kind][1] += len(vetoed)
    return {kind: (k, n) for kind, (k, n) in found.items()}


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--patients", type=int, default=60, help="per class and hospital")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table = Table("images", "vetoed", "of", "share")
    for kind, (vetoed, count) in _shares(options.size, options.patients, options.seeds).items():
        table.add_row(kind, f"{vetoed:,}", f"{count:,}", f"{vetoed / count:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
