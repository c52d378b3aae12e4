"""The figures of a study of many arms, as SVG for the page and for papers, and as PNG.

::

    plain numbers --matplotlib, in the look of `xfed.server.figures`--> Drawing(svg, png)

    forest       paired differences between arms            counts    class counts per data set (Figure 4 of the paper)
    curves       validation accuracy by round (Figure 5)    classes   each class's sensitivity, a row per arm
    utility      balanced accuracy beside epsilon

Arms differ by colour, by the kind of their line, and by a name at the line's end, so that no reader depends on one of them.
Every function is pure: equal numbers give equal bytes. "The paper" is Salehinejad et al. 2018 (ICASSP).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xfed.server.figures import (
    GRID,
    INK,
    MUTED,
    REAL,
    SYNTHETIC,
    arm_colour,
    class_panels,
    data_uri,
    look,
    svg_text,
)

__all__ = ["Drawing", "classes", "counts", "curves", "forest", "utility"]

Row = Mapping[str, Any]
SHOWN = "#0b6e6e"
WIDTH = 11.0
LINES: Mapping[str, Any] = {
    "DS2": (0, (6, 2)),
    "plain": (0, (1, 1.2)),
    "filled": (0, (6, 1.5, 1, 1.5)),
    "duplicated": (0, (6, 2)),
    "weighted": (0, (6, 1.5, 1, 1.5)),
    "augmented": (0, (3, 1.5)),
    "synthetic": (0, (3, 1.5)),
    "pretrained": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    "alone": (0, (1, 1.2)),
}
"""Kinds of line by arm; an arm that is not here has a whole one."""


@dataclass(frozen=True)
class Drawing:
    """One figure: `svg` text, and `png` of 160 dots per inch on white."""

    svg: str
    png: bytes

    @property
    def uri(self) -> str:
        """The SVG as what an `img` loads from the page itself."""
        return data_uri(self.svg)


def _drawing(figure: Figure) -> Drawing:
    svg = svg_text(figure)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Drawing(svg, buffer.getvalue())


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


def forest(comparisons: Sequence[Row], guide: str) -> Drawing:
    """Differences first - second arm: a dot, a bar for its own interval, a thin line for the simultaneous one.

    `comparisons`: a, b, score, value, low, high, low_single?, high_single?, shown. Filled: the simultaneous interval leaves
    out 0. `guide` names the intervals below the axis. A score's name stands above its rows where there are several.
    """
    scores = list(dict.fromkeys(str(row["score"]) for row in comparisons))
    lines: list[tuple[str, Row | None]] = []
    for score in scores:
        lines += [(_words(score), None)] if len(scores) > 1 else []
        lines += [(f"{row['a']} − {row['b']}", row) for row in comparisons if row["score"] == score]
    with look():
        figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1.2)
        for y, (_, row) in enumerate(lines):
            if row is None:
                continue
            colour = SHOWN if row["shown"] else REAL
            if row.get("low_single") is not None and row.get("high_single") is not None:
                span = [row["low_single"], row["high_single"]]
                axes.plot(span, [y, y], color=colour, linewidth=6, solid_capstyle="butt", alpha=0.35)
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6, marker="|", markersize=7)
            fill = colour if row["shown"] else "white"
            axes.plot([row["value"]], [y], "o", color=colour, markerfacecolor=fill, markersize=7.5, markeredgewidth=1.8)
            text = f"{_signed(row['value'])}  [{_signed(row['low'])}, {_signed(row['high'])}]"
            weight = "bold" if row["shown"] else "normal"
            axes.annotate(
                text, (1.015, y), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9.5, weight=weight
            )
        reach = max(0.02, *(abs(row[key]) for row in comparisons for key in ("low", "high")))
        axes.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(len(lines) - 0.4, -0.6))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:+.2g}".replace("-", "−") if value else "0")
        axes.set_yticks(range(len(lines)), [label for label, _ in lines])
        for tick, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if row is None else "normal")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_title("← second arm better", fontsize=9.5, color=MUTED, loc="left")
        axes.set_title("first arm better →", fontsize=9.5, color=MUTED, loc="right")
        axes.set_xlabel(guide)
        return _drawing(figure)


def _words(score: str) -> str:
    return score.replace("_", " ") if score != "auc" else "AUC"


def same_counts(arms: Mapping[str, Row]) -> list[tuple[list[str], Mapping[str, Row]]]:
    """The data sets among the arms: those with equal class counts together, in the order of the arms."""
    found: list[tuple[list[str], Mapping[str, Row]]] = []
    for arm, facts in arms.items():
        if not facts.get("counts"):
            continue
        same = next((names for names, known in found if known == facts["counts"]), None)
        if same is None:
            found.append(([arm], facts["counts"]))
        else:
            same.append(arm)
    return found


def counts(arms: Mapping[str, Row], names: Sequence[str]) -> Drawing | None:
    """Training images per class `names`, real and synthetic stacked: a panel per data set (arms of equal counts share one)."""
    sets = same_counts(arms)
    if not sets:
        return None
    columns = 2 if len(sets) == 4 else min(3, len(sets))
    lines = -(-len(sets) // columns)
    with look():
        figure = Figure(figsize=(WIDTH, 0.7 + lines * (0.75 + 0.3 * len(names))), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        most = 1
        for axes, (arm_names, table) in zip(grid, sets, strict=False):
            real = [int((table.get(name) or {}).get("real") or 0) for name in names]
            synthetic = [int((table.get(name) or {}).get("synthetic") or 0) for name in names]
            rows = range(len(names))
            axes.barh(rows, real, color=REAL, height=0.64, label="real")
            axes.barh(rows, synthetic, left=real, color=SYNTHETIC, height=0.64, hatch="///", edgecolor="white", lw=0)
            for row, (a, b) in enumerate(zip(real, synthetic, strict=True)):
                text = f"{a:,} + {b:,}" if b else f"{a:,}"
                axes.annotate(text, (a + b, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
                most = max(most, a + b)
            axes.set_title(textwrap.fill(", ".join(arm_names), 34), fontsize=10, weight="bold")
            axes.set_yticks(rows, names)
            axes.set_ylim(len(names) - 0.45, -0.55)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", labelbottom=True)
        grid[0].set_xlim(0, 1.45 * most)
        grid[0].xaxis.get_major_locator().set_params(integer=True, nbins=4)
        grid[0].xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        for axes in grid[len(sets) :]:
            axes.set_axis_off()
        figure.supxlabel("training images", fontsize=9, color=MUTED)
        real_box, synthetic_box = (axes_box[0] for axes_box in (grid[0].containers[0], grid[0].containers[1]))
        figure.legend([real_box, synthetic_box], ["real", "synthetic"], loc="outside upper right", ncols=2, fontsize=9)
        return _drawing(figure)


def curves(arms: Mapping[str, Row]) -> Drawing | None:
    """Mean balanced accuracy on validation patients by round: all arms in one chart, named at their ends; each alone with one sd.

    Reads `curve` {round [n], mean [n], sd [n] or None, runs} of each arm; up to three arms keep their bands in the one chart.
    """
    drawn = {arm: facts["curve"] for arm, facts in arms.items() if (facts.get("curve") or {}).get("round")}
    if not drawn:
        return None
    small = len(drawn) > 3
    columns = min(6, len(drawn))
    lines = -(-len(drawn) // columns) if small else 0
    with look():
        figure = Figure(figsize=(WIDTH, 4.6 + 1.55 * lines), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[4.6, 1.55 * lines]) if small else [figure]
        axes = parts[0].add_subplot()
        for arm, curve in drawn.items():
            _line(axes, arm, curve, band=not small)
        axes.set(xlabel="round", ylabel="balanced accuracy, validation patients")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _ends(axes, drawn)
        if small:
            grid = parts[1].subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
            for panel, (arm, curve) in zip(grid, drawn.items(), strict=False):
                for other in drawn.values():
                    panel.plot(other["round"], other["mean"], color=GRID, linewidth=1)
                _line(panel, arm, curve, band=True)
                panel.set_title(textwrap.shorten(arm, 24, placeholder="…"), fontsize=9.5, weight="bold")
                panel.xaxis.get_major_locator().set_params(integer=True, nbins=3)
            for panel in grid[len(drawn) :]:
                panel.set_axis_off()
            for panel in grid[len(drawn) - columns : len(drawn)]:
                panel.tick_params(labelbottom=True)
        return _drawing(figure)


def _line(axes: Any, arm: str, curve: Row, *, band: bool) -> None:
    x, mean, colour = curve["round"], curve["mean"], arm_colour(arm)
    if band and curve.get("sd"):
        below = [m - s for m, s in zip(mean, curve["sd"], strict=True)]
        above = [m + s for m, s in zip(mean, curve["sd"], strict=True)]
        axes.fill_between(x, below, above, color=colour, alpha=0.18, linewidth=0)
    wide = 2.6 if arm in ("DS1", "DS3") else 1.9
    axes.plot(x, mean, color=colour, linestyle=LINES.get(arm, "-"), linewidth=wide, marker="o" if len(x) == 1 else None)


def _ends(axes: Any, drawn: Mapping[str, Row]) -> None:
    """Names at the right, each behind a piece of its line, pushed apart so that none hides another."""
    first, last = min(c["round"][0] for c in drawn.values()), max(c["round"][-1] for c in drawn.values())
    low, high = axes.get_ylim()
    step = (high - low) / 19
    order = sorted(drawn, key=lambda arm: drawn[arm]["mean"][-1])
    places: list[float] = []
    for arm in order:
        wanted = drawn[arm]["mean"][-1]
        places.append(max(wanted, places[-1] + step) if places else wanted)
    excess = max(0.0, places[-1] - (high - 0.3 * step))
    for index in reversed(range(len(places))):
        ceiling = places[index + 1] - step if index + 1 < len(places) else places[index] - excess
        places[index] = min(places[index], ceiling)
    length = max(1.0, last - first)
    starts, ends = last + 0.03 * length, last + 0.075 * length
    for arm, y in zip(order, places, strict=True):
        x, value = drawn[arm]["round"][-1], drawn[arm]["mean"][-1]
        axes.plot([x, starts], [value, y], color=MUTED, linewidth=0.6, alpha=0.6)
        axes.plot([starts, ends], [y, y], color=arm_colour(arm), linestyle=LINES.get(arm, "-"), linewidth=2.4)
        name = textwrap.shorten(arm, 24, placeholder="…")
        axes.annotate(name, (ends, y), (5, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_xticks([tick for tick in axes.get_xticks() if first <= tick <= last])
    axes.set_xlim(first - 0.02 * length, last + 0.2 * length)
    axes.set_ylim(min(low, places[0] - step), high)


def classes(arms: Mapping[str, Row], names: Sequence[str], guessing: float) -> Drawing | None:
    """Sensitivity of each class with its interval: a panel per class, a row per arm."""
    rows = {arm: {name: _span(facts, name) for name in names} for arm, facts in arms.items()}
    if not any(span for spans in rows.values() for span in spans.values()):
        return None
    with look():
        return _drawing(class_panels(rows, names, guessing, "sensitivity"))


def _span(facts: Row, name: str) -> tuple[float, float, float] | None:
    entry = ((facts.get("per_class") or {}).get(name) or {}).get("sensitivity") or {}
    if entry.get("value") is None or entry.get("low") is None or entry.get("high") is None:
        return None
    return entry["value"], entry["low"], entry["high"]


def utility(rows: Sequence[Row], guessing: float) -> Drawing | None:
    """Balanced accuracy with its interval beside epsilon on a logarithmic axis; "not private" stands at the right."""
    known = [row for row in rows if (row.get("balanced_accuracy") or {}).get("value") is not None]
    finite = sorted({row["epsilon"] for row in known if row["epsilon"] is not None})
    if not finite or len(known) < 2:
        return None
    places: dict[float | None, float] = {value: math.log10(value) for value in finite}
    places[None] = math.log10(finite[-1]) + max(0.5, 0.35 * (math.log10(finite[-1]) - math.log10(finite[0])))
    series: dict[tuple[str, str], list[Row]] = {}
    for row in known:
        series.setdefault((str(row.get("arm")), str(row.get("generators") or "")), []).append(row)
    makers = list(dict.fromkeys(maker for _, maker in series))
    with look():
        figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(guessing, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        spread = 0.018 * (places[None] - places[finite[0]] + 0.5)
        for number, ((arm, maker), entries) in enumerate(series.items()):
            shift = (number - (len(series) - 1) / 2) * spread
            entries = sorted(entries, key=lambda row: places[row["epsilon"]])
            x = [places[row["epsilon"]] + shift for row in entries]
            mark = "osD^v"[makers.index(maker) % 5]
            colour, label = arm_colour(arm), f"{arm} · {maker}" if maker else arm
            y = [row["balanced_accuracy"]["value"] for row in entries]
            private = sum(row["epsilon"] is not None for row in entries)
            axes.plot(x[:private], y[:private], color=colour, linestyle=LINES.get(arm, "-"), linewidth=1.3, alpha=0.7)
            axes.plot(x, y, mark, color=colour, markersize=7, label=label)
            for place, row in zip(x, entries, strict=True):
                span = [row["balanced_accuracy"].get(key) for key in ("low", "high")]
                if None not in span:
                    axes.plot([place, place], span, color=colour, linewidth=2.6, alpha=0.35, solid_capstyle="round")
        ticks = [v for i, v in enumerate(finite) if not i or places[v] - places[finite[i - 1]] > 0.05]
        axes.set_xticks([*(places[v] for v in ticks), places[None]], [*(f"{v:.2g}" for v in ticks), "not private"])
        axes.set(ylim=(0, 1), xlabel="epsilon of the whole study (dashed: guessing)", ylabel="balanced accuracy")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper right", ncols=min(4, len(series)), fontsize=9)
        return _drawing(figure)
