"""The report's figures as data URIs, so that one HTML file holds everything and loads nothing.

::

    numbers --matplotlib (SVG, no display)--> data:image/svg+xml;base64,...
    uint8 pixels --Pillow (PNG)-------------> data:image/png;base64,...

Every function is pure: equal numbers give equal bytes. Colours are told apart by lightness as well as hue.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

__all__ = [
    "ARM_COLOURS",
    "GRID",
    "INK",
    "MANY_ARMS",
    "MUTED",
    "REAL",
    "SYNTHETIC",
    "arm_colour",
    "class_panels",
    "counts_bars",
    "data_uri",
    "distances",
    "gan_losses",
    "heat_scale",
    "interval_dots",
    "look",
    "overlay",
    "pixels",
    "sensitivity_dots",
    "strip",
    "svg_text",
    "training_curves",
]

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
ARM_COLOURS = {
    "DS1": "#7b8794",
    "DS2": "#a8558c",
    "DS3": "#0b6e6e",
    "TSTR": "#d9a441",
    "plain": "#3d4a57",
    "filled": "#3fae97",
    "duplicated": "#b3561d",
    "weighted": "#6f4aa0",
    "augmented": "#2f6fbf",
    "synthetic": "#d9a441",
    "pretrained": "#7f9c1e",
    "alone": "#c9506d",
    "pooled": "#11151a",
}
REAL, SYNTHETIC = "#7b8794", "#d9a441"
MANY_ARMS = 4  # from here on tables and figures have a row per arm
HEAT = "inferno"  # lightness rises evenly from cold to hot
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "xfed",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "text.parse_math": False,
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def look() -> AbstractContextManager[None]:
    """Within it matplotlib draws, and writes, as all pages here do."""
    look: AbstractContextManager[None] = mpl.rc_context(_STYLE)
    return look


def svg_text(figure: Figure) -> str:
    """The figure as SVG whose letters are text; to be called within `look`."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r"(font: [^;\"]*?px) [^;\"]+", rf"\1 {_FONTS}", text)


def data_uri(svg: str) -> str:
    """An SVG as what an `img` loads from the page itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _svg(figure: Figure) -> str:
    return data_uri(svg_text(figure))


def pixels(image: npt.NDArray[np.uint8], most: int | None = None) -> str:
    """A grey image uint8 [H, W] as a PNG, shrunk so that its longer side is `most` pixels at the most."""
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    return _png(picture, most)


def _png(picture: Image.Image, most: int | None) -> str:
    if most is not None and max(picture.size) > most:
        picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.uint8], most: int | None = None) -> str:
    """A grey image [H, W] under its heat [H, W] (255 = hottest): colour by heat, the colder the more grey shows through."""
    strength = heat.astype(np.float64)[..., None] / 255
    coloured = 255 * mpl.colormaps[HEAT](heat)[..., :3]
    mixed = (1 - 0.65 * strength) * image[..., None] + 0.65 * strength * coloured
    return _png(Image.fromarray(np.rint(mixed).astype(np.uint8)), most)


def strip(maps: npt.NDArray[np.uint8], most: int) -> str:
    """Maps [n, h, w] side by side as one PNG, each at most `most` wide, in the colours of heat, 2 px apart."""
    gap = np.zeros((*maps.shape[1:2], 2), np.uint8)
    row = np.concatenate([part for one in maps for part in (one, gap)][:-1], axis=1)
    return _png(Image.fromarray((255 * mpl.colormaps[HEAT](row)[..., :3]).astype(np.uint8)), most * len(maps))


def heat_scale() -> str:
    """The colours of heat from cold to hot, as a strip 128 px long."""
    ramp = np.linspace(0, 255, 128).astype(np.uint8)[None].repeat(8, axis=0)
    return _png(Image.fromarray((255 * mpl.colormaps[HEAT](ramp)[..., :3]).astype(np.uint8)), None)


def distances(rows: Mapping[str, tuple[float, float] | None], label: str) -> str:
    """Per row name (floor, figure) on a logarithmic axis: a ring for the floor, a dot for the figure, a line between them."""
    shown = [(row, pair) for row, pair in enumerate(rows.values()) if pair and min(pair) > 0]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for row, (floor, value) in shown:
            axes.plot([floor, value], [row, row], color=SYNTHETIC, linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot([floor], [row], "o", markersize=8, markerfacecolor="white", color=MUTED)
            axes.plot([value], [row], "o", markersize=8, color=SYNTHETIC)
            text = f"{value / floor:.1f} times"
            axes.annotate(text, (max(floor, value), row), (9, 0), textcoords="offset points", va="center", fontsize=9)
        axes.plot([], [], "o", markerfacecolor="white", color=MUTED, label="floor: two halves of the real images")
        axes.plot([], [], "o", color=SYNTHETIC, label="synthetic against real")
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, place: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="x", which="minor", labelsize=9)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.16)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper right", ncols=2, fontsize=9)
        return _svg(figure)


def arm_colour(arm: str) -> str:
    """An arm's colour, the same on every page."""
    return ARM_COLOURS.get(arm, "#3e6fb0")


def interval_dots(
    arms: Mapping[str, Mapping[str, tuple[float, float, float] | None]], guessing: float, label: str
) -> str:
    """Per arm and row name: (value, low, high) as a dot and a bar, on 0..1, with a dashed line at `guessing`."""
    rows = list(dict.fromkeys(name for values in arms.values() for name in values))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.46 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(guessing, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate("guessing", (guessing, -0.62), color=MUTED, fontsize=8.5, ha="center", va="bottom")
        for number, (arm, values) in enumerate(arms.items()):
            offset = (number - (len(arms) - 1) / 2) * 0.26
            drawn = [(row + offset, values[name]) for row, name in enumerate(rows) if values.get(name)]
            for y, entry in drawn:
                value, low, high = entry or (0.0, 0.0, 0.0)
                axes.plot([low, high], [y, y], color=arm_colour(arm), linewidth=3, solid_capstyle="round", alpha=0.4)
                axes.plot([value], [y], "o", color=arm_colour(arm), markersize=7)
            axes.plot([], [], "o-", color=arm_colour(arm), label=arm)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.65), xlabel=label)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper right", ncols=min(5, len(arms)), fontsize=9)
        return _svg(figure)


def class_panels(
    arms: Mapping[str, Mapping[str, tuple[float, float, float] | None]],
    classes: Sequence[str],
    guessing: float,
    label: str,
) -> Figure:
    """Many arms: a panel per class on one scale 0..1, a row per arm with (value, low, high) as a dot and a bar.

    The dashed line is `guessing`. To be called within `look`, five panels to a line.
    """
    columns = min(5, max(1, len(classes)))
    lines = -(-len(classes) // columns)
    figure = Figure(figsize=(11, lines * (0.85 + 0.27 * len(arms))), layout=ConstrainedLayoutEngine(wspace=0.04))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(grid, classes, strict=False):
        axes.axvline(guessing, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for row, (arm, values) in enumerate(arms.items()):
            if entry := values.get(name):
                axes.plot(entry[1:], [row, row], color=arm_colour(arm), linewidth=3, solid_capstyle="round", alpha=0.4)
                axes.plot(entry[:1], [row], "o", color=arm_colour(arm), markersize=6)
        axes.set_title("\n".join(textwrap.wrap(name, 22)) or name, fontsize=10)
        axes.set(xlim=(0, 1), ylim=(len(arms) - 0.5, -0.5), xticks=(0, 0.5, 1))
        axes.set_xticklabels(("0", "0.5", "1"))
        axes.tick_params(labelbottom=True)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
    for axes in grid[len(classes) :]:
        axes.set_axis_off()
    figure.supxlabel(f"{label} (dashed: guessing)", fontsize=9, color=MUTED)
    return figure


def sensitivity_dots(arms: Mapping[str, Mapping[str, Any]], classes: Sequence[str], guessing: float) -> str:
    """Each class's sensitivity with its interval, per arm (summaries of `xfed.common.metrics`)."""
    rows: dict[str, dict[str, tuple[float, float, float] | None]] = {}
    for arm, facts in arms.items():
        rows[arm] = {}
        for name in classes:
            entry = facts.get("per_class", {}).get(name, {})
            interval = entry.get("sensitivity_interval")
            rows[arm][name] = (entry["sensitivity"], interval[0], interval[1]) if interval else None
    if len(arms) >= MANY_ARMS:
        with look():
            return _svg(class_panels(rows, classes, guessing, "sensitivity"))
    return interval_dots(rows, guessing, "sensitivity")


def _column(rounds: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(int(entry["round"]), float(entry[key])) for entry in rounds if entry.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


def training_curves(arms: Mapping[str, Mapping[str, Any]], guessing: float) -> str:
    """Validation balanced accuracy, and training and validation loss, per round and arm; a ring marks the best round."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.axhline(guessing, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for arm, facts in arms.items():
            rounds = facts.get("rounds") or []
            x, y = _column(rounds, "validation_balanced_accuracy")
            left.plot(x, y, color=arm_colour(arm), label=arm, marker="o" if len(x) == 1 else None)
            best = facts.get("best_round")
            if best in x:
                left.plot([best], [y[x.index(best)]], "o", markersize=9, markerfacecolor="none", color=arm_colour(arm))
            for key, style in (("loss", (0, (2, 2))), ("validation_loss", "-")):
                x, y = _column(rounds, key)
                right.plot(x, y, color=arm_colour(arm), linestyle=style, marker="o" if len(x) == 1 else None)
        left.set(title="Balanced accuracy on validation patients", xlabel="round", ylim=(0, 1))
        right.set(title="Loss: validation (solid), training (dotted)", xlabel="round")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper right", ncols=min(5, len(arms)), fontsize=9)
        return _svg(figure)


def gan_losses(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """Generator and discriminator losses per round, one small panel per class on common axes."""
    names = list(classes)
    columns = min(5, max(1, len(names)))
    lines = -(-len(names) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.5 + 1.9 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, name in zip(grid, names, strict=False):
            for key, colour, label in (("loss_g", SYNTHETIC, "generator"), ("loss_d", INK, "discriminator")):
                x, y = _column(classes[name].get("rounds") or [], key)
                axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker="o" if len(x) == 1 else None, ms=4)
            axes.set_title(name, fontsize=9)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
        figure.supxlabel("round", fontsize=9, color=MUTED)
        return _svg(figure)


def counts_bars(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Training images per class: real, and synthetic stacked on it (as Figure 4 of Salehinejad et al. 2018)."""
    names = list(counts)
    real = [int(counts[name].get("real") or 0) for name in names]
    synthetic = [int(counts[name].get("synthetic") or 0) for name in names]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 0.9 + 0.42 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(names, real, color=REAL, height=0.62, label="real")
        axes.barh(names, synthetic, left=real, color=SYNTHETIC, height=0.62, label="synthetic")
        for row, (a, b) in enumerate(zip(real, synthetic, strict=True)):
            text = f"{a:,} + {b:,}" if b else f"{a:,}"
            axes.annotate(text, (a + b, row), (6, 0), textcoords="offset points", va="center", fontsize=9, color=MUTED)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(1, *(a + b for a, b in zip(real, synthetic, strict=True))))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("training images")
        figure.legend(loc="outside upper right", ncols=2, fontsize=9)
        return _svg(figure)
