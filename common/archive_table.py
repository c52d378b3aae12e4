"""An archive's figures for a person at the terminal: what `xfed-client score` and `xfed-server archive score` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_figures"]

COLUMNS = (
    "fid",
    "fid_floor",
    "kid",
    "kid_floor",
    "precision",
    "recall",
    "density",
    "coverage",
    "ms_ssim",
    "ms_ssim_real",
)
TITLES = ("FID", "floor", "KID", "floor", "precision", "recall", "density", "coverage", "alike", "real")


def print_figures(quality: Mapping[str, Mapping[str, Any]], features: str, digest: str, console: Console) -> None:
    """A table per class, with the network that looked and its digest; "–" is "not measured"."""
    table = Table(header_style="bold")
    table.add_column("class")
    for title in ("images", *TITLES):
        table.add_column(title, justify="right")
    for name, facts in quality.items():
        cells = ["–" if facts.get(key) is None else f"{facts[key]:.3g}" for key in COLUMNS]
        table.add_row(Text(name), f"{facts['images_real']}/{facts['images_compared']}", *cells)
    console.print(table)
    console.print(
        f"In the features of {features}, SHA-256 {digest}. Compare figures only with their floors, and with figures of the same "
        "network. Images: real half / synthetic. Alike: mean MS-SSIM of pairs.",
        highlight=False,
    )
