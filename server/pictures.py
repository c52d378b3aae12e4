"""The images of a report as data URIs, by kind and class, ready for a page.

::

    report-panels.npz: "real"?, "synthetic"?, "progress"?            --> strips of films, how they sharpened
                       "cam_real"?, "first_real"?, and _synthetic    --> heat maps (xfed.server.heat_panels)

Every part may be missing: reports of older versions have fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.server import figures

__all__ = ["KINDS", "pictures"]

KINDS = ("real", "synthetic")
MOST_PROGRESS = 8
MOST_SIDE = 128

Panels = Mapping[str, npt.NDArray[np.uint8]]


def pictures(report: Mapping[str, Any], panels: Panels) -> dict[str, Any]:
    """Images as data URIs: "real" and "synthetic" {class: [..]}, "progress" {class: [..]} with its "rounds"; "cam" and
    "first" {kind: {class: ..}} of the heat maps, a list and one strip.
    """
    classes: list[str] = report["classes"]
    result: dict[str, Any] = {}
    for kind in KINDS:
        if kind in panels:
            rows = zip(classes, panels[kind], strict=False)
            result[kind] = {name: [figures.pixels(image) for image in row if image.any()] for name, row in rows}
    progress = panels.get("progress")
    if progress is not None and len(progress):
        rounds = (report.get("gan") or {}).get("progress_rounds") or list(range(1, len(progress) + 1))
        chosen = np.unique(np.linspace(0, len(progress) - 1, min(len(progress), MOST_PROGRESS)).round().astype(int))
        result["rounds"] = [rounds[i] for i in chosen if i < len(rounds)]
        result["progress"] = {
            name: [figures.pixels(progress[i, c], most=MOST_SIDE) for i in chosen if i < len(rounds)]
            for c, name in enumerate((report.get("gan") or {}).get("progress_of") or classes)
        }
    return result | _heat(classes, panels)


def _heat(classes: list[str], panels: Panels) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in KINDS:
        if f"cam_{kind}" in panels and kind in panels:
            rows = zip(classes, panels[kind], panels[f"cam_{kind}"], strict=False)
            result.setdefault("cam", {})[kind] = {
                name: [figures.overlay(image, heat, most=MOST_SIDE) for image, heat in pairs if image.any()]
                for name, pairs in ((name, list(zip(images, heats, strict=False))) for name, images, heats in rows)
            }
        if f"first_{kind}" in panels:
            result.setdefault("first", {})[kind] = {
                name: figures.strip(maps, most=MOST_SIDE) if maps.any() else None
                for name, maps in zip(classes, panels[f"first_{kind}"], strict=False)
            }
    return result
