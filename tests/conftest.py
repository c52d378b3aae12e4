"""What tests share: one thread, a tiny study, its hospitals, and the real X-rays where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import hypothesis
import pytest
import torch

from xfed.common.config import Study, parse_study

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "nih-cxr5"

TINY: dict[str, Any] = {
    "name": "tiny",
    "image_size": 32,
    "classes": ["Cardiomegaly", "Normal", "Pleural Effusion"],
    "data": {"phantom": {"patients": {"Cardiomegaly": 30, "Normal": 40, "Pleural Effusion": 24}}},
    "sites": {"count": 2},
    "gan": {"width": 4, "rounds": 3, "steps_per_round": 2, "batch": 8, "minimum_images": 2},
    "archive": {"minimum": 40},
    "classifier": {"width": 4, "rounds": 3, "batch": 16},
    "runtime": {"workers": 2},
}

# machines under load take their time; pytest-timeout ends what hangs
hypothesis.settings.register_profile("xfed", deadline=None)
hypothesis.settings.load_profile("xfed")


def tiny(**changes: Any) -> Study:
    """The tiny study with sections updated: ``tiny(gan={"rounds": 1})``."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return parse_study(values, "tests")


@pytest.fixture
def real_data() -> Path:
    """The folder of real X-rays; skips where it is absent (it is never part of the repository)."""
    if not (REAL / "labels.csv").is_file():
        pytest.skip("the real X-rays (../shared/data/nih-cxr5) are not on this machine")
    return REAL
