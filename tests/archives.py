"""Archives for tests: built and released from untrained generators, with the facts of a study that never ran."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from tests.conftest import tiny
from xfed.common.gan import build_generator
from xfed.common.journal import Journal
from xfed.common.weights import parameters_of
from xfed.server.archive import build_archive
from xfed.server.archive_release import release_archive
from xfed.server.run import Run

REAL = {"Cardiomegaly": 30, "Normal": 70, "Pleural Effusion": 10}
VERDICT = "DS3 (real + synthetic) reached 0.70 [0.60, 0.80] balanced accuracy: no difference shown."


class FakeRun:
    """As much of a Run as the archive needs: one site with `REAL` training images."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.study = tiny(**changes)
        self.folder = folder
        self.journal = Journal(folder / "events.jsonl")
        self.exchange = SimpleNamespace(sites=("a",))
        self.census = SimpleNamespace(counts=np.array([list(REAL.values())] * 3))


def weights_of(run: FakeRun) -> dict[str, Any]:
    """Untrained generators, one per class."""
    return {name: parameters_of(build_generator(run.study, ("g", name))) for name in run.study.classes}


def built(folder: Path, per_class: int = 4, **changes: Any) -> Path:
    """An archive that was built and not released."""
    run = FakeRun(folder, **{"archive": {"balance": "fixed", "per_class": per_class}, **changes})
    build_archive(cast(Run, run), weights_of(run))
    return folder / "archive"


def report_of(classes: tuple[str, ...]) -> dict[str, Any]:
    """The facts of a report that the documents read."""
    figures = {"fid": 12.5, "fid_floor": 3.25, "kid": None, "kid_floor": None, "precision": 0.5}
    counts = {name: {"train": REAL[name], "validation": 4, "test": 5} for name in classes}
    return {
        "source": "folder",
        "sites": {"a": {}, "b": {}},
        "totals": {"patients": 120, "counts": counts},
        "archive": {
            "quality": {name: dict(figures) for name in classes},
            "features": "dcnn of DS1",
            "recognised": {"by": "DS1", "balanced_accuracy": 0.8, "per_class": dict.fromkeys(classes, 0.8)},
        },
    }


def released(folder: Path, per_class: int = 4, **changes: Any) -> Path:
    """A released archive: documents, manifest, signature."""
    place = built(folder, per_class, **changes)
    release_archive(folder, report_of(tiny(**changes).classes), VERDICT)
    return place
