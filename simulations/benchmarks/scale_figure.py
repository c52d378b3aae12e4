"""The scale benchmark's figure and table: seconds, bytes and memory against the number of hospitals.

::

    plain values of `Scale` --matplotlib, in the look of `xfed.server.figures`--> SVG text
                            --rich--> table

Pure functions: equal numbers give equal bytes. Open is a solid line with dots, secure a dashed one with squares, so that no
reader depends on colour; the series with as many images in all is drawn thin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from xfed.server.figures import INK, MUTED, REAL, look, svg_text

__all__ = ["draw", "table"]

Row = Mapping[str, Any]
OPEN, SECURE = "#0b6e6e", "#b3561d"


def draw(rows: Sequence[Row]) -> str:
    """The figure of `rows` (each as `xfed.simulations.benchmarks.scale.plain` gives it) as SVG text."""
    with look():
        figure = Figure(figsize=(10, 6.6), layout="constrained")
        seconds, sums, traffic, memory = figure.subplots(2, 2).flatten()
        _lines(seconds, rows, lambda row: row["round_s"])
        seconds.set_title("Processor seconds of a round of both phases")
        _lines(sums, rows, lambda row: row["secure_s"] or None)
        _guide(sums, rows)
        sums.set_title("of these, for secure sums (all hospitals and coordinator)")
        _lines(traffic, rows, lambda row: sum(cost["bytes_per_site"] for cost in row["phases"].values()) / 1e6)
        traffic.set_title("MB of a round, per hospital")
        _lines(memory, rows, lambda row: row["peak_mib"])
        memory.set_title("Peak memory of the whole simulation, MiB")
        for axes in (traffic, memory):
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        for axes in (seconds, sums):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        counts = sorted({row["sites"] for row in rows})
        for axes in (seconds, sums, traffic, memory):
            axes.set_xscale("log")
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xticks([], minor=True)
            axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        figure.supxlabel("hospitals", fontsize=9, color=MUTED)
        handles, labels = seconds.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=9)
        return svg_text(figure)


def _lines(axes: Any, rows: Sequence[Row], figure: Callable[[Row], float | None]) -> None:
    for series, name in (("hospital", "as many images at each"), ("total", "as many in all")):
        for secure in (False, True):
            chosen = [row for row in rows if row["series"] == series and row["secure"] == secure]
            points = sorted((row["sites"], value) for row in chosen if (value := figure(row)) is not None)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=SECURE if secure else OPEN,
                    linestyle="--" if secure else "-",
                    linewidth=2 if series == "hospital" else 0.9,
                    marker="s" if secure else "o",
                    markersize=6 if series == "hospital" else 3.5,
                    label=f"{'secure' if secure else 'open'}, {name}",
                )


def _guide(axes: Any, rows: Sequence[Row]) -> None:
    """A dotted line that grows with the square, through the secure point of the most hospitals."""
    found = [(row["sites"], row["secure_s"]) for row in rows if row["secure_s"]]
    if found:
        sites, top = max(found)
        x = (max(min(found)[0], sites / 30), sites)
        axes.plot(x, (top * (x[0] / sites) ** 2, top), color=REAL, linestyle=":", linewidth=1.4)
        axes.annotate(
            "with the square", (x[0], top * (x[0] / sites) ** 2), (14, 0), textcoords="offset points", color=INK
        )


def table(rows: Sequence[Row]) -> Table:
    """One line per study of `rows` (as for `draw`), in their order."""
    result = Table(title="The last round of each phase; processor seconds unless it says wall")
    for heading in (
        "series",
        "sites",
        "sums",
        "images",
        "gan wall",
        "gan",
        "outside",
        "classifier wall",
        "classifier",
        "outside",
        "KB per site",
        "MB in all",
        "peak MiB",
        "study wall",
        "study",
        "load",
    ):
        result.add_column(heading, justify="right")
    for row in rows:
        costs = [row["phases"][phase] for phase in ("gan", "classifier")]
        result.add_row(
            row["series"],
            str(row["sites"]),
            ("secure" if row["secure"] else "open") + (" (ray)" if row["backend"] == "ray" else ""),
            str(row["images"]),
            *(f"{cost[clock]:.2f}" for cost in costs for clock in ("wall_s", "processor_s", "outside_s")),
            f"{sum(cost['bytes_per_site'] for cost in costs) / 1e3:.0f}",
            f"{sum(cost['bytes_in_all'] for cost in costs) / 1e6:.1f}",
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['wall_s']:.0f}",
            f"{row['processor_s']:.0f}",
            f"{row['load']:.1f}",
        )
    return result
