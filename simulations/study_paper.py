"""What was published of DS1, DS2 and DS3, to stand beside a study's own figures; and why the two are not comparable.

::

    model of a group --published--> rows [{arm, cells [(mean, sd | None) | None per class], total (mean, sd)}] + source + remark

Accuracy per class is sensitivity: of the test images of the class, the share called by it. The test set had as many images of
each class, so the total is what we call balanced accuracy: the mean of the class figures, but for slips that `remark` names.
All in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["COUNTS", "LECTURE_GOOGLENET", "PAPER", "WHY_NOT_COMPARABLE", "published"]

_CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")


def _rows(
    table: Mapping[str, tuple[Sequence[float], float, float]],
) -> dict[str, dict[str, tuple[float, float | None]]]:
    return {
        arm: {**{name: (value, None) for name, value in zip(_CLASSES, values, strict=True)}, "total": (total, sd)}
        for arm, (values, total, sd) in table.items()
    }


PAPER: Mapping[str, Any] = {
    "source": "Salehinejad et al. 2018 (ICASSP), Table 1",
    "arms": _rows(
        {
            "DS1": ((79.15, 77.75, 73.64, 65.86, 57.99), 70.87, 0.47),
            "DS2": ((71.73, 72.53, 51.23, 50.12, 48.92), 58.90, 0.48),
            "DS3": ((95.31, 95.02, 91.19, 89.68, 88.84), 92.10, 0.41),
        }
    ),
    "remark": "As printed, the classes’ mean for DS3 is 92.01, the total 92.10.",
}
"""DCNN. The standard deviation is given for the total alone."""

LECTURE_GOOGLENET: Mapping[str, Any] = {
    "source": "Lecture slides of the same work, GoogLeNet (there DS2 and DS3 bear each other’s names; here as in the paper)",
    "arms": _rows(
        {
            "DS1": ((80.64, 59.57, 74.07, 68.93, 59.57), 71.72, 0.62),
            "DS2": ((75.49, 48.19, 53.00, 44.65, 48.19), 59.72, 0.84),
            "DS3": ((96.64, 89.39, 94.75, 90.62, 89.39), 93.35, 0.52),
        }
    ),
    "remark": "As printed, “Normal” repeats “Pneumothorax” in all three rows, and the classes’ means (68.56, 53.90, 92.16) "
    "are not the totals: the figures for “Normal” are most likely a slip of the slide.",
}
"""GoogLeNet, as printed on the slide."""

COUNTS: Mapping[str, int] = {
    "Cardiomegaly": 17_098,
    "Normal": 15_781,
    "Pleural Effusion": 14_510,
    "Pulmonary Edema": 5_018,
    "Pneumothorax": 4_013,
}
"""Images of the paper's hospital (section 3.1), of which 1,000 were for validation and 1,000 for testing."""

WHY_NOT_COMPARABLE = (
    f"Other data: {sum(COUNTS.values()):,} films of one hospital with its own labels, at 256 pixels.",
    "The paper does not say that films of one patient were kept on one side of its splits; here all splits are by patient.",
    "There a team of radiologists removed inappropriate synthetic images before training; here nobody looks at them.",
    "There one hospital trained in one place; here hospitals train together without sharing images.",
    "Its ± belongs to the total of repeated cross-validation and is no interval for other patients. Nor is ours: it is the "
    "standard deviation over folds and seeds; the intervals are in the table of arms.",
    "The paper’s DS1 and DS3 had no control with classic augmentation or class weights; a gain over DS1 need not be owed to the "
    "synthetic images.",
)
"""Sentences for readers who would compare."""


def published(model: str, classes: Sequence[str]) -> dict[str, Any] | None:
    """The published rows for a study of `model` ("dcnn", "googlenet") and `classes`; None for another model or other classes.

    Returns {source, remark, rows [{arm, cells: (mean, sd | None) or None for each of `classes`, total (mean, sd)}]}.
    """
    table = {"dcnn": PAPER, "googlenet": LECTURE_GOOGLENET}.get(model)
    if table is None or not set(classes) & set(_CLASSES):
        return None
    rows = [
        {"arm": arm, "cells": [row.get(name) for name in classes], "total": row["total"]}
        for arm, row in table["arms"].items()
    ]
    return {"source": table["source"], "remark": table["remark"], "rows": rows}
