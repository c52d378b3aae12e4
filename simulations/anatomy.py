"""A thorax that differs from patient to patient, as attenuation maps.

::

    patient generator --draw_anatomy--> Anatomy (numbers) --Thorax(x, y)--> masks and layers of attenuation
                               |
                               +--vessels--> the vessel tree, splatted point by point

Coordinates are a film's: x from -1 (image left, the patient's right side) to +1, y from -1 (neck) to +1
(abdomen). Sides are numbered 0 (image left) and 1 (image right, where the heart's apex is). Attenuation has
no unit: about 1 through the mediastinum, about 0.3 through a lung. Shapes are schematic; they are drawn to
look like frontal films, not measured on any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Anatomy", "Thorax", "blur", "draw_anatomy", "edge", "grid", "texture", "vessels"]

Plane = npt.NDArray[np.floating[Any]]

SPINE = 0.065  # half width of the vertebral column
HILUM = (0.17, -0.10)  # distance from the midline, and height, of a lung root


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One patient's numbers, in film coordinates unless said otherwise."""

    female: bool
    habitus: float  # -1 slender .. +1 stout
    chest: float  # half the greatest inner width of the rib cage
    apex: float  # y of the lung apices
    domes: tuple[float, float]  # y of the tops of the diaphragm, per side
    sulcus: float  # depth of the costophrenic angles below the domes
    heart_ratio: float  # cardiothoracic ratio of a heart that is not enlarged, 0.38..0.48
    heart_tilt: float  # radians from the horizontal
    knob: float  # how far the aortic arch bulges
    rotation: float  # shift of the front of the chest against the spine
    scoliosis: float
    rib_gap: float  # distance between two ribs
    rib_phase: float
    rib_slope: float
    clavicle: float  # y of the inner ends of the clavicles
    clavicle_tilt: float
    shoulder: float  # y of the shoulders
    trunk: float  # half the outer width of the trunk
    arms: float  # gap between trunk and arms; negative when they touch
    bone: float  # contrast of bones, about 1
    stomach: float  # radius of the gas bubble under the dome of side 1; 0 when there is none
    vessel_seed: int


def draw_anatomy(patient: np.random.Generator) -> Anatomy:
    """Draw one patient. Takes the same numbers from `patient` whatever is found in the chest."""

    def uniform(low: float, high: float) -> float:
        return float(patient.uniform(low, high))

    habitus = uniform(-1, 1)
    dome = uniform(0.27, 0.45) - 0.05 * habitus
    chest = uniform(0.66, 0.77) - 0.02 * habitus
    return Anatomy(
        female=bool(patient.random() < 0.48),
        habitus=habitus,
        chest=chest,
        apex=uniform(-0.80, -0.70),
        domes=(dome, dome + uniform(0.01, 0.07)),
        sulcus=uniform(0.20, 0.29),
        heart_ratio=uniform(0.38, 0.48),
        heart_tilt=uniform(0.45, 0.80),
        knob=uniform(0.02, 0.07),
        rotation=uniform(-0.03, 0.03),
        scoliosis=uniform(-0.02, 0.02),
        rib_gap=uniform(0.125, 0.145),
        rib_phase=uniform(-0.5, 0.5),
        rib_slope=uniform(0.12, 0.24),
        clavicle=uniform(-0.66, -0.58),
        clavicle_tilt=uniform(0.05, 0.24),
        shoulder=uniform(-0.86, -0.72),
        trunk=chest + uniform(0.12, 0.17) + 0.07 * max(habitus, -0.5),
        arms=uniform(-0.08, 0.07),
        bone=uniform(0.8, 1.25),
        stomach=uniform(0.05, 0.11) if patient.random() < 0.5 else 0.0,
        vessel_seed=int(patient.integers(2**62)),
    )


def grid(size: int) -> tuple[Plane, Plane]:
    """Film coordinates x and y of the pixel centres, float32 [size, size] each."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return np.broadcast_to(centres, (size, size)), np.broadcast_to(centres[:, None], (size, size))


def blur(planes: Plane, sigma: float) -> Plane:
    """Gaussian of `sigma` pixels over the last two axes, edges repeated; below 0.2 pixels nothing is done."""
    if sigma < 0.2:
        return planes
    radius = math.ceil(2.5 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    for axis in (-2, -1):
        pad = [(0, 0)] * planes.ndim
        pad[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(planes, pad, mode="edge"), axis, 0)
        length = planes.shape[axis]
        total = padded[:length] * weights[0]
        for k in range(1, 2 * radius + 1):
            total += padded[k : k + length] * weights[k]
        planes = np.moveaxis(total, 0, axis)
    return planes


def texture(generator: np.random.Generator, size: int, cells: int) -> Plane:
    """Smooth noise in -1..1, float32 [size, size], `cells` bumps across."""
    coarse = generator.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    at = np.linspace(0, cells - 1e-3, size, dtype=np.float32)
    index = at.astype(np.intp)
    t = at - index
    t = t * t * (3 - 2 * t)
    rows = coarse[index] * (1 - t)[:, None] + coarse[index + 1] * t[:, None]
    noise: Plane = rows[:, index] * (1 - t) + rows[:, index + 1] * t
    return noise


def edge(distance: Plane, softness: float) -> Plane:
    """0 outside, 1 inside, a smooth step of half-width `softness` where `distance` changes sign."""
    t = distance * np.float32(0.5 / softness)
    t += np.float32(0.5)
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    rest = t * np.float32(-2)
    rest += np.float32(3)
    t *= t
    t *= rest
    return t


def _bump(y: Plane, centre: float, width: float) -> Plane:
    z = (y - centre) * np.float32(1 / width)
    return np.exp(-z * z)


class Thorax:
    """Masks and layers of one film: `x`, `y` float32 [h, w] film coordinates.

    `heart_ratio` is the cardiothoracic ratio to draw and `lift` raises the domes (a shallow breath) by that
    much.
    """

    def __init__(self, anatomy: Anatomy, x: Plane, y: Plane, heart_ratio: float, lift: float) -> None:
        self.anatomy = an = anatomy
        self.y = y
        self.x = x - np.float32(an.scoliosis) * np.sin(3 * y)
        self.right = self.x > 0  # the right half of the image, side 1
        self.across = np.abs(self.x)
        self.domes = (an.domes[0] - lift, an.domes[1] - lift)
        self.heart_ratio = heart_ratio
        self._cage()
        self._heart()
        self._lungs()

    def _cage(self) -> None:
        an = self.anatomy
        depth = np.clip((self.y - an.apex) * np.float32(1 / (0.75 - an.apex)), 0, 1)
        top = np.clip(depth * np.float32(1 / 0.58), 0, 1)
        self.cage: Plane = an.chest * (0.92 * (1 - (1 - top) ** 2) ** np.float32(0.45) + 0.08 * depth)
        self.outward: Plane = np.minimum(self.across / (self.cage + np.float32(1e-3)), 2)  # 0 midline, 1 chest wall

    def _heart(self) -> None:
        an = self.anatomy
        half = self.heart_ratio * an.chest
        tilt = an.heart_tilt * (1 - 2.5 * max(self.heart_ratio - 0.48, 0))  # an enlarged heart lies flatter
        cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
        long = half / float(np.hypot(cos, 0.74 * sin))
        short = 0.74 * long
        self.heart_centre = (
            0.30 * half + an.rotation,
            self.domes[1] + 0.02 - 0.68 * float(np.hypot(long * sin, short * cos)),
        )
        dx, dy = self.x - self.heart_centre[0], self.y - self.heart_centre[1]
        u, v = (cos * dx + sin * dy) / long, (cos * dy - sin * dx) / short
        radius = np.sqrt(u * u + v * v)
        self.heart_inside: Plane = (1 - radius) * np.float32(0.5 * (long + short))  # about the distance to its border
        self.heart_depth: Plane = np.sqrt(np.clip(1.02 - radius * radius, 0, 1))

    def _lungs(self) -> None:
        an = self.anatomy
        top = np.exp((an.apex - self.y) * np.float32(1 / 0.09))
        middle = 0.100 + 0.20 * np.minimum(top, 2) + 0.035 * _bump(self.y, -0.12, 0.16)
        middle = middle + np.where(self.right, an.knob * _bump(self.y, -0.36, 0.075) + an.rotation, -an.rotation)
        self.inner: Plane = middle.astype(np.float32)  # where the mediastinum ends
        centre = 0.50 * an.chest
        sideways = (self.across - centre) * np.float32(1 / (an.chest - centre))
        tops = np.where(self.right, np.float32(self.domes[1]), np.float32(self.domes[0]))
        bend = np.where(sideways > 0, an.sulcus * sideways * sideways, 0.35 * an.sulcus * sideways * sideways)
        self.dome: Plane = (tops + bend).astype(np.float32)
        # the heart grows out of the great vessels: a smooth union of the two outlines
        vessels = self.inner - self.across
        blend = np.clip(0.5 + (self.heart_inside - vessels) * np.float32(1 / 0.16), 0, 1)
        outline = vessels + (self.heart_inside - vessels) * blend + np.float32(0.08) * blend * (1 - blend)
        self.core: Plane = edge(outline, 0.024)
        self.heart: Plane = self.core * blend
        self.above: Plane = edge(self.dome - self.y, 0.016)
        self.inside: Plane = edge(self.cage - self.across, 0.030)
        air = self.inside * self.above * (1 - self.core)
        self.lung: Plane = air
        q2 = self.outward * self.outward
        self.air: Plane = air * (1 - 0.30 * np.minimum(q2 * q2, 1)) * (0.86 + 0.14 * edge(self.y + 0.45, 0.35))

    def body(self) -> Plane:
        """Soft tissue without the lungs: trunk, neck, shoulders, arms, breasts, abdomen."""
        an = self.anatomy
        across, y = self.across, self.y
        slope = an.shoulder + 0.12 * np.maximum(across - 0.5, 0) - 0.34 * np.exp(-np.maximum(across - 0.15, 0) * 3.6)
        below = edge(y - slope, 0.05)
        neck = edge(0.20 + 0.03 * an.habitus - across, 0.05)
        waist = an.trunk - 0.04 * _bump(y, 0.35, 0.35) + 0.5 * np.maximum(-0.25 - y, 0) ** 2
        flank = np.clip(1 - across / waist, 0, 1)
        trunk = edge(waist - across, 0.02) * (0.38 + 0.62 * np.minimum(np.sqrt(flank * 2.2), 1))
        arm_at = an.trunk + an.arms + 0.17 + 0.12 * (y + 0.2)
        limb = np.clip(1 - ((across - arm_at) * np.float32(1 / 0.19)) ** 2, 0, 1)
        girdle = edge(-0.18 - y - 0.7 * np.maximum(across - 0.85, -0.2), 0.16) * 0.62
        tissue: Plane = below * np.maximum(np.maximum(trunk, girdle), 0.55 * np.sqrt(limb))
        tissue = np.maximum(tissue, 0.62 * neck * edge(y + 1.3, 0.1))
        tissue *= 0.80 + 0.07 * an.habitus
        belly = edge(y - self.dome, 0.03) * edge(self.cage + 0.04 - self.across, 0.13)
        tissue += 0.27 * belly
        if an.female:
            size = 0.24 + 0.03 * an.habitus
            r = np.hypot((across - 0.40) * np.float32(1 / (size * 1.15)), (y - 0.27) * np.float32(1 / size))
            tissue += (0.13 + 0.04 * an.habitus) * edge(1 - r, 0.07) * edge(y - 0.05, 0.25)
        if an.stomach:
            r = np.hypot((self.x - 0.36) / (an.stomach * 1.5), (y - self.domes[1] - 0.05 - an.stomach) / an.stomach)
            tissue -= 0.16 * edge(1 - r, 0.25) * (1 - self.above)
        return tissue

    def centre(self) -> Plane:
        """What the mediastinum and the heart add, less the air in the trachea and main bronchi."""
        an = self.anatomy
        core = self.core * (0.17 + 0.03 * edge(self.y + 0.3, 0.3)) + self.heart * 0.13 * self.heart_depth
        core *= edge(self.y - an.apex - 0.08, 0.20) * (0.15 + 0.85 * edge(self.dome + 0.03 - self.y, 0.12))
        aorta = edge(0.03 - np.abs(self.x - 0.10 - an.rotation), 0.02) * edge(self.y + 0.35, 0.05) * 0.03
        off = np.abs(self.x - 0.5 * an.rotation)
        trachea = edge(0.036 - off, 0.016) * edge(-0.30 - self.y, 0.05)
        fork = edge(0.020 - np.abs(self.y + 0.28 - 0.9 * off), 0.016) * edge(0.15 - off, 0.04)
        layer: Plane = core + aorta - 0.13 * np.maximum(trachea, 0.6 * fork)
        return layer

    def bones(self) -> Plane:
        """Ribs behind and in front, spine, clavicles, scapulae and humeral heads."""
        an = self.anatomy
        q, y, across = np.minimum(self.outward, 1.1), self.y, self.across
        q2 = q * q
        wall = self.cage * np.float32(1)
        within = edge(wall + 0.025 - across, 0.02)
        turn = q2 * q2 * q2
        # posterior arcs: up from the spine, over, and down at the side
        arc = (y - an.apex - an.rib_slope * (1.15 * q2 - 0.75 * q) - 0.10 * turn) / an.rib_gap - an.rib_phase
        behind = _ribs(arc, 0.27) * (0.55 + 0.30 * q + 0.65 * turn) * edge(across - SPINE - 0.03, 0.06)
        behind *= edge(arc + 0.6, 0.3) * edge(9.6 - arc, 0.4)
        # anterior arcs: fainter, steeper, ending in cartilage
        arc = (y - an.apex - 0.32 * (1 - q) - 0.06 * q2) / (an.rib_gap * 1.12) - an.rib_phase - 0.4
        front = _ribs(arc, 0.30) * edge(q - 0.50, 0.16) * edge(arc - 0.4, 0.3) * edge(6.4 - arc, 0.5)
        cage = within * (0.125 * behind + 0.05 * front)
        rim = 0.05 * edge(0.022 - np.abs(wall + 0.012 - across), 0.018) * edge(y - an.apex - 0.05, 0.08)
        column = edge(SPINE + 0.012 * (y + 0.5) - across, 0.014)
        disc = np.cos((2 * np.pi / 0.125) * y + an.rib_phase)
        spine = column * (0.075 + 0.020 * disc) * (0.6 + 0.4 * edge(0.1 - y, 0.5))
        inner = np.where(self.right, an.rotation, -an.rotation).astype(np.float32)
        along = across - 0.07 - inner
        line = an.clavicle - an.clavicle_tilt * along + 0.035 * np.sin(along * 8.5)
        collar = edge(0.026 - np.abs(y - line), 0.012) * edge(along, 0.02) * edge(0.66 - along, 0.06)
        collar = collar * (0.7 + 0.3 * edge(np.abs(y - line) - 0.014, 0.008))
        head_at = an.shoulder + 0.20
        head = edge(1 - np.hypot(across - 1.02, y - head_at) * np.float32(1 / 0.14), 0.25)
        shaft = edge(0.05 - np.abs(across - 1.06 - 0.10 * (y - head_at)), 0.02) * edge(y - head_at, 0.05)
        blade = edge(0.016 - np.abs(across - an.chest - 0.03 - 0.25 * (y + 0.45)), 0.014) * _bump(y, -0.35, 0.22)
        wing = edge(0.03 - np.abs(y - an.clavicle + 0.02 + 0.2 * (across - 0.75)), 0.02) * edge(
            0.19 - np.abs(across - 0.78), 0.05
        )
        layer: Plane = an.bone * (
            cage + rim + spine + 0.16 * collar + 0.10 * np.maximum(head, shaft) + 0.04 * blade + 0.07 * wing
        )
        return layer


def _ribs(phase: Plane, half: float) -> Plane:
    """Bands of half-width `half` about every whole number, denser at both rims like the cortex of a bone."""
    off = np.abs(phase - np.rint(phase))
    return edge(half - off, 0.11) * (0.75 + 0.35 * edge(off - 0.6 * half, 0.10))


def _vessel_points(anatomy: Anatomy, spacing: float, upper: float) -> tuple[Plane, Plane, Plane, Plane]:
    """The branching vessels of both lungs as points (x, y, diameter, mass), float32 [m] each.

    `spacing` is the distance between points; `mass` is a point's share of its vessel's cross-section, so that
    a drawing does not depend on `spacing`. `upper` is the diameter of upper-lobe vessels against lower-lobe
    ones: 0.7 upright, more in congestion. The tree itself depends on the anatomy alone.
    """
    rng = np.random.default_rng(anatomy.vessel_seed)
    found: list[npt.NDArray[np.float64]] = []
    for sign in (-1.0, 1.0):
        roots = 11
        angle = np.linspace(-1.45, 1.35, roots) + rng.uniform(-0.14, 0.14, roots)  # -pi/2 up .. +pi/2 down
        start = np.stack(
            [
                HILUM[0] + rng.uniform(-0.02, 0.02, roots),
                HILUM[1] + 0.10 * np.sin(angle) + (0.02 if sign < 0 else -0.02),
            ]
        )
        length = rng.uniform(0.16, 0.24, roots)
        width = rng.uniform(0.024, 0.034, roots)
        for _ in range(4):
            curve = rng.uniform(-0.35, 0.35, len(angle))
            count = max(2, int(np.ceil(float(length.max()) / spacing)))
            t = (np.arange(count) + 0.5) / count
            heading = angle[:, None] + curve[:, None] * t
            step = length[:, None] / count
            px = start[0][:, None] + np.cumsum(np.cos(heading) * step, axis=1)
            py = start[1][:, None] + np.cumsum(np.sin(heading) * step, axis=1)
            lobe = np.where(py < HILUM[1], upper, 1.0)
            diameter = width[:, None] * (1 - 0.25 * t) * lobe
            found.append(np.stack([sign * px + anatomy.rotation, py, diameter, diameter**2 * step]).reshape(4, -1))
            end = np.stack([px[:, -1], py[:, -1]])
            fork = rng.uniform(0.22, 0.55, (2, len(angle))) * np.array([[-1.0], [1.0]])
            angle = (heading[:, -1] + fork).ravel()
            start = np.concatenate([end, end], axis=1)
            length = np.concatenate([length, length]) * rng.uniform(0.62, 0.85, len(angle))
            width = np.concatenate([width, width]) * 0.70
    x, y, diameter, mass = np.concatenate(found, axis=1).astype(np.float32)
    return x, y, diameter, mass


def _splat(columns: Plane, rows: Plane, mass: Plane, size: int) -> Plane:
    """Sum of `mass` per pixel, shared between the four nearest pixel centres; float32 [size, size]."""
    keep = (columns > 0) & (columns < size - 1) & (rows > 0) & (rows < size - 1)
    columns, rows, mass = columns[keep], rows[keep], mass[keep]
    c0, r0 = columns.astype(np.intp), rows.astype(np.intp)
    fc, fr = columns - c0, rows - r0
    flat = r0 * size + c0
    index = np.concatenate([flat, flat + 1, flat + size, flat + size + 1])
    weight = np.concatenate([(1 - fc) * (1 - fr), fc * (1 - fr), (1 - fc) * fr, fc * fr]) * np.tile(mass, 4)
    return np.bincount(index, weight, minlength=size * size).astype(np.float32).reshape(size, size)


def vessels(
    anatomy: Anatomy, shift: tuple[float, float], zoom: float, rotation: float, fine: int, upper: float
) -> Plane:
    """Attenuation of the vessel tree on a film of `fine` pixels, about 0.1 along a large vessel."""
    pixel = 2 / fine
    x, y, diameter, mass = _vessel_points(anatomy, 1.2 * pixel * max(1.0, fine / 256), upper)
    cos, sin = math.cos(rotation), math.sin(rotation)
    across = (cos * x - sin * y) * np.float32(zoom) + np.float32(shift[0])
    down = (sin * x + cos * y) * np.float32(zoom) + np.float32(shift[1])
    columns, rows = (across + 1) / pixel - np.float32(0.5), (down + 1) / pixel - np.float32(0.5)
    mass = mass * np.float32(zoom**2 * 5.0 / pixel**2)
    large = diameter > 0.016
    layer = blur(_splat(columns[large], rows[large], mass[large], fine), 0.0075 / pixel)
    layer = layer + blur(_splat(columns[~large], rows[~large], mass[~large], fine), max(0.0035 / pixel, 0.5))
    return np.minimum(layer, 0.28)
