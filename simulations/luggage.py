"""Procedural X-rays of luggage: a data set of another domain, to show that classes and images are configuration.

::

    seed --bag generator--> size, straps, clutter, what is in it --+
    seed --view generator--> shift, turn, dose -------------------+--> attenuation at 2x size --2x2 mean, grain--> one image
    write_luggage_folder: images/*.png + labels.csv (image, patient = the bag, label) --> a study with data.source: folder

One thing to find per bag: `OBJECTS`, or nothing ("Empty"). Air is bright, metal black. Nothing here is security advice: the
objects are outlines that can be told apart at 32 pixels. The same arguments give the same bytes with the same NumPy and Pillow
on the same kind of processor.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.common.durable import translate_os_errors, write_bytes, write_json, write_text
from xfed.common.errors import ConfigError
from xfed.common.randomness import numpy_generator
from xfed.simulations.anatomy import edge, grid, texture

__all__ = ["OBJECTS", "draw_luggage", "luggage_arrays", "write_kind", "write_luggage_folder"]

Plane = npt.NDArray[np.floating[Any]]
Images = npt.NDArray[np.uint8]


def _box(x: Plane, y: Plane, half_x: float, half_y: float, corner: float = 0.02) -> Plane:
    """About the distance to the border of a rectangle with round corners, above 0 inside."""
    dx, dy = np.abs(x) - (half_x - corner), np.abs(y) - (half_y - corner)
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return np.asarray(corner - outside - np.minimum(np.maximum(dx, dy), 0), dtype=np.float32)


def _bottle(x: Plane, y: Plane, soft: float) -> Plane:
    body, neck = _box(x, y - 0.10, 0.15, 0.36, 0.07), _box(x, y + 0.36, 0.06, 0.16, 0.02)
    glass = edge(np.maximum(body, neck), soft)
    wall = glass - edge(np.maximum(body, neck) - 0.03, soft)
    liquid = edge(body - 0.03, soft) * edge(y + 0.12, 0.02)
    cap = edge(_box(x, y + 0.52, 0.075, 0.05), soft)
    layer: Plane = 0.35 * wall + 0.75 * liquid + 0.9 * cap
    return layer


def _knife(x: Plane, y: Plane, soft: float) -> Plane:
    taper = np.clip((y + 0.60) * np.float32(1 / 0.65), 0, 1)
    blade = edge(np.minimum(0.085 * taper**0.6 - np.abs(x - 0.02), np.minimum(y + 0.60, 0.05 - y)), soft)
    guard = edge(_box(x, y - 0.07, 0.13, 0.03), soft)
    handle = edge(_box(x, y - 0.32, 0.065, 0.24, 0.04), soft)
    rivets = sum(edge(0.03 - np.hypot(x, y - at), soft) for at in (0.20, 0.32, 0.44))
    layer: Plane = 1.6 * blade + 1.6 * guard + 0.55 * handle + 0.8 * rivets
    return layer


def _laptop(x: Plane, y: Plane, soft: float) -> Plane:
    shell = _box(x, y, 0.56, 0.40, 0.05)
    frame = edge(shell, soft) - edge(shell - 0.045, soft)
    keys = edge(_box(x, y + 0.12, 0.44, 0.15), soft) * (0.6 + 0.4 * np.cos(42 * x) * np.cos(42 * (y + 0.12)))
    cells = sum(edge(_box(x - at, y - 0.25, 0.115, 0.085), soft) for at in (-0.32, 0.0, 0.32))
    layer: Plane = 0.45 * edge(shell, soft) + 0.8 * frame + 0.35 * keys + 0.9 * cells
    return layer


def _handgun(x: Plane, y: Plane, soft: float) -> Plane:
    slide = edge(_box(x + 0.04, y + 0.16, 0.46, 0.10, 0.02), soft)
    bore = edge(_box(x + 0.20, y + 0.16, 0.30, 0.025), soft)
    lean = x - 0.25 - 0.22 * (y - 0.15)
    grip = edge(_box(lean, y - 0.18, 0.13, 0.28, 0.04), soft)
    ring = np.hypot(x - 0.02, (y - 0.05) * 1.1)
    guard = edge(0.035 - np.abs(ring - 0.12), soft)
    layer: Plane = 1.7 * slide - 0.5 * bore + 1.3 * grip + 1.3 * guard
    return layer


OBJECTS: Mapping[str, Callable[[Plane, Plane, float], Plane] | None] = {
    "Bottle": _bottle,
    "Empty": None,
    "Handgun": _handgun,
    "Knife": _knife,
    "Laptop": _laptop,
}


def draw_luggage(thing: str, bag: np.random.Generator, view: np.random.Generator, size: int) -> Images:
    """One X-ray of a bag, uint8 [size, size]. `bag` decides the bag and what lies in it, `view` pose, dose and grain.

    Raises `ConfigError` for a `thing` outside `OBJECTS`.
    """
    if thing not in OBJECTS:
        raise ConfigError(f"there is no luggage with {thing!r}; there is {', '.join(OBJECTS)}")
    fine, soft = 2 * size, 3 / size
    x, y = grid(fine)
    dx, dy, turn, dose, grain = (float(value) for value in view.uniform(-1, 1, 5))
    cos, sin = np.float32(np.cos(0.12 * turn)), np.float32(np.sin(0.12 * turn))
    x, y = cos * (x - 0.04 * dx) + sin * (y - 0.04 * dy), cos * (y - 0.04 * dy) - sin * (x - 0.04 * dx)
    half_x, half_y, corner = (
        float(bag.uniform(0.78, 0.92)),
        float(bag.uniform(0.70, 0.84)),
        float(bag.uniform(0.06, 0.2)),
    )
    hull = _box(x, y, half_x, half_y, corner)
    inside = edge(hull, soft)
    layer = 0.10 * inside + 0.45 * (inside - edge(hull - 0.035, soft))
    layer = layer + inside * (0.14 + 0.12 * texture(bag, fine, 5) + 0.05 * texture(bag, fine, 13))  # clothes
    if bag.random() < 0.7:  # the rods of a trolley's handle
        apart = float(bag.uniform(0.12, 0.30))
        layer = layer + 0.35 * edge(0.02 - np.abs(np.abs(x) - apart), soft) * inside
    for _ in range(int(bag.integers(2, 6))):  # buckles, coins, a charger
        at_x, at_y = float(bag.uniform(-0.65, 0.65)), float(bag.uniform(-0.6, 0.6))
        wide, high = float(bag.uniform(0.03, 0.10)), float(bag.uniform(0.03, 0.08))
        layer = layer + float(bag.uniform(0.2, 0.6)) * edge(_box(x - at_x, y - at_y, wide, high, 0.02), soft) * inside
    angle, at = float(bag.uniform(-np.pi, np.pi)), bag.uniform(-0.20, 0.20, 2)
    scale, flip = float(bag.uniform(0.85, 1.1)), 1.0 if bag.random() < 0.5 else -1.0
    if (shape := OBJECTS[thing]) is not None:
        angle = 0.25 * angle if thing == "Laptop" else angle
        c, s = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
        own_x, own_y = c * (x - at[0]) + s * (y - at[1]), c * (y - at[1]) - s * (x - at[0])
        layer = layer + shape(flip * own_x, own_y, soft) * inside
    film = 0.97 * np.exp(-(1.25 + 0.15 * dose) * np.maximum(layer, 0))
    film = film.reshape(size, 2, size, 2).mean(axis=(1, 3), dtype=np.float32)
    film = film + (0.012 + 0.004 * grain) * view.standard_normal((size, size), dtype=np.float32)
    pixels: Images = (np.clip(film, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return pixels


def _plan(bags: Mapping[str, int], images_per_bag: float, seed: int) -> list[tuple[str, int, int]]:
    """Label, number of the bag within its label, and number of the image, for every image."""
    for name, count in bags.items():
        if name not in OBJECTS or count < 0:
            raise ConfigError(
                f"{count} bags with {name!r}: there is luggage with {', '.join(OBJECTS)}, 0 or more of each"
            )
    if not 1 <= images_per_bag <= 5:
        raise ConfigError(f"images_per_bag is {images_per_bag}: it must be 1 to 5")
    return [
        (name, bag, image)
        for name, count in bags.items()
        for bag in range(count)
        for image in range(1 + int(numpy_generator(seed, "luggage", name, bag, "images").poisson(images_per_bag - 1)))
    ]


def _drawn(plan: list[tuple[str, int, int]], size: int, seed: int) -> Iterator[Images]:
    for name, bag, image in plan:
        inside = numpy_generator(seed, "luggage", name, bag, "bag")
        yield draw_luggage(name, inside, numpy_generator(seed, "luggage", name, bag, "view", image), size)


def luggage_arrays(
    *, bags: Mapping[str, int], images_per_bag: float, size: int, seed: int
) -> tuple[Images, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images uint8 [n, size, size], labels int64 [n] (position in `bags`), bags int64 [n] (from 1). Raises `ConfigError`."""
    plan = _plan(bags, images_per_bag, seed)
    images = np.stack(list(_drawn(plan, size, seed))) if plan else np.zeros((0, size, size), np.uint8)
    names, numbers = list(bags), {one: number for number, one in enumerate(dict.fromkeys(row[:2] for row in plan), 1)}
    labels = np.array([names.index(name) for name, _, _ in plan], dtype=np.int64)
    return images, labels, np.array([numbers[row[:2]] for row in plan], dtype=np.int64)


def write_luggage_folder(
    out: Path,
    *,
    bags: Mapping[str, int],
    images_per_bag: float,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the data set as `out`/images/*.png and `out`/labels.csv (last); returns the number of images.

    The same call goes on where it stopped. Raises `ConfigError` when `out` holds something else, `StorageError`.
    """
    plan = _plan(bags, images_per_bag, seed)
    made_with = {"luggage": dict(bags), "images_per_bag": images_per_bag, "size": size, "seed": seed}
    folder, table, marker = out / "images", out / "labels.csv", out / "luggage.json"
    if folder.exists() or table.exists() or marker.exists():
        try:
            same = json.loads(marker.read_text(encoding="utf-8")) == made_with
        except (OSError, ValueError):
            same = False
        if not same:
            raise ConfigError(f"{out} holds other images. Choose another --out, or delete it.")
    write_json(marker, made_with)
    with translate_os_errors(out):
        folder.mkdir(exist_ok=True)
    lines, numbers = (
        ["image,patient,label"],
        {one: n for n, one in enumerate(dict.fromkeys(row[:2] for row in plan), 1)},
    )
    for done, (row, image) in enumerate(zip(plan, _drawn(plan, size, seed), strict=True), 1):
        name = f"{numbers[row[:2]]:06d}_{row[2]:02d}.png"
        if not (folder / name).is_file():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            write_bytes(folder / name, buffer.getvalue())
        lines.append(f"{name},{numbers[row[:2]]:06d},{row[0]}")
        if progress is not None:
            progress(done, len(plan))
    write_text(table, "\n".join(lines) + "\n")
    return len(plan)


def write_kind(
    kind: str,
    out: Path,
    bags: int,
    images_per_bag: float,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """What `xfed-sim phantom --kind` asks for: `bags` of each of `OBJECTS`. Raises `ConfigError` for another kind."""
    if kind != "luggage":
        raise ConfigError(f"--kind {kind!r}: there are chest and luggage")
    wanted = dict.fromkeys(OBJECTS, bags)
    return write_luggage_folder(
        out, bags=wanted, images_per_bag=images_per_bag, size=size, seed=seed, progress=progress
    )
