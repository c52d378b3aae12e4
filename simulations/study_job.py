"""One task of a study in a process of its own: `python -m xfed.simulations.study_job TASK`, killed and continued at will.

::

    TASK/task.json --base--> run_study: three phases in TASK/run/
                   --arm---> the base's stores (hard links) + the base's archive --run_study (archive.reuse)--> TASK/run/
                   --alone-> TASK/run-<site>/ with that site's store; --pooled--> TASK/run/ with one store of everybody
    models/classifier-<arm> of each run --> all test images of the base's sites, in one order --> TASK/outcomes.npz (the commit)

outcomes.npz: sites, rows, labels, patients int64 [n]; probabilities float32 [m, n, C], m models (sites for `alone`, else 1).
The process ends with the one that began it, however that ended: a task without a pool would hold its folder's lock unseen.
Checkpoints, answers and copies go when the task is finished: report.json, report.html and models/ stay.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.site import SiteSettings, found_site
from xfed.client.store import SPLITS, Store, open_store, write_store
from xfed.common.classifier import predict
from xfed.common.config import Study, parse_study
from xfed.common.devices import choose_device
from xfed.common.durable import link_or_copy, remove_tree, write_bytes, write_json
from xfed.common.errors import XfedError
from xfed.common.registry import load_classifier
from xfed.server.archive_manifest import read_manifest
from xfed.simulations.hospitals import site_folders
from xfed.simulations.run import run_study
from xfed.simulations.study_grid import ALONE, POOLED, Task

__all__ = ["OUTCOMES", "main", "plan_task", "read_outcomes", "run_task"]

OUTCOMES = "outcomes.npz"
PLAN = "task.json"
TEST = SPLITS.index("test")


def plan_task(task: Task, out: Path, data: Path | None) -> Path:
    """Write what the process must know into the task's folder; a folder that was begun for something else is emptied first."""
    folder, source = task.folder(out), str(data.resolve()) if data is not None else "phantom"
    digest = task.digest(source)
    plan = folder / PLAN
    if plan.is_file() and json.loads(plan.read_text(encoding="utf-8"))["digest"] != digest:
        remove_tree(folder)
    write_json(
        plan,
        {
            "digest": digest,
            "arm": task.arm,
            "base": str(task.base_folder(out)) if not task.base else None,
            "data": str(data) if data is not None else None,
            "study": task.study.resolved(),
        },
    )
    return folder


def run_task(folder: Path) -> None:
    """Run or continue the task of `folder` to its outcomes. Raises `XfedError`."""
    if (folder / OUTCOMES).is_file():
        return
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    study = parse_study(plan["study"], str(folder / PLAN))
    data = Path(plan["data"]) if plan["data"] is not None else None
    if plan["base"] is None:
        runs, home = [folder / "run"], folder / "run"
        run_study(study, runs[0], data)
    else:
        home = Path(plan["base"]) / "run"
        runs = _run_arm(folder, plan["arm"], study, home, data)
    device = choose_device(study.runtime.device)
    files = [run / "models" / f"classifier-{study.classifier.arms[0]}.safetensors" for run in runs]
    base = parse_study(json.loads((home / "sites" / "site-01" / "study.json").read_text()), str(home))
    _write_outcomes(folder, _stores(home, base), files, study, device)
    for run in runs:
        _trim(run, keep_archive=plan["base"] is None)


def _stores(run: Path, study: Study) -> list[Store]:
    return [open_store(folder / "store") for folder in site_folders(run, study)]


def _run_arm(folder: Path, arm: str, study: Study, home: Path, data: Path | None) -> list[Path]:
    archive = home / "archive"
    values = study.resolved()
    values["archive"]["reuse"] = read_manifest(archive)["root_sha256"]
    study = parse_study(values, f"arm {arm}")
    base = parse_study(json.loads((home / "sites" / "site-01" / "study.json").read_text()), str(home))
    if arm not in (ALONE, POOLED):
        run = folder / "run"
        run_study(study, run, data, archive=archive, borrow=partial(_borrow, home / "sites"))
        return [run]
    stores = _stores(home, base)
    runs = []
    for index in range(len(stores) if arm == ALONE else 1):
        run = folder / (f"run-{index + 1:02d}" if arm == ALONE else "run")
        one = partial(_one_site, study, stores, index if arm == ALONE else None, home)
        run_study(study, run, data, archive=archive, borrow=one)
        runs.append(run)
    return runs


def _borrow(source: Path, place: Path) -> None:
    """The base's hospitals, without what they did: stores as hard links, settings and keys as copies; ready.json last."""
    remove_tree(place)
    for site in sorted(path for path in source.iterdir() if path.is_dir()):
        (place / site.name / "store").mkdir(parents=True)
        for file in sorted((site / "store").iterdir()):
            if file.is_file():
                link_or_copy(file, place / site.name / "store" / file.name)
        for name in ("site.json", "key", "members.json"):
            shutil.copy2(site / name, place / site.name / name)
    write_json(place / "ready.json", json.loads((source / "ready.json").read_text(encoding="utf-8")))


def _one_site(study: Study, stores: Sequence[Store], only: int | None, home: Path, place: Path) -> None:
    """One hospital that trains on all stores, or on the one numbered `only`; tested on everybody's test patients."""
    remove_tree(place)
    chosen = [
        np.flatnonzero((store.splits == TEST) | np.bool_(only is None or index == only))
        for index, store in enumerate(stores)
    ]
    folder = site_folders(place.parent, study)[0]
    folder.mkdir(parents=True)
    starts = np.cumsum([0, *(int(store.patients.max()) + 1 for store in stores)])
    parts = list(zip(stores, chosen, starts[:-1], strict=True))
    write_store(
        folder / "store",
        classes=study.classes,
        images=np.concatenate([store.images[rows] for store, rows, _ in parts]),
        labels=np.concatenate([store.labels[rows] for store, rows, _ in parts]),
        patients=np.concatenate([store.patients[rows] + start for store, rows, start in parts]),
        splits=np.concatenate([store.splits[rows] for store, rows, _ in parts]),
    )
    key = found_site(folder, SiteSettings(name=folder.name), study)
    write_json(folder / "members.json", {folder.name: key})
    write_json(place / "ready.json", json.loads((home / "sites" / "ready.json").read_text(encoding="utf-8")))


def _write_outcomes(
    folder: Path, stores: Sequence[Store], files: Sequence[Path], study: Study, device: torch.device
) -> None:
    rows = [store.rows("test") for store in stores]
    probabilities = []
    for file in files:
        model = load_classifier(file).model
        told = [
            predict(model, store.images[own], device=device, precision=study.precision)
            for store, own in zip(stores, rows, strict=True)
            if len(own)
        ]
        probabilities.append(np.concatenate(told))
    starts = np.cumsum([0, *(int(store.patients.max()) + 1 for store in stores)])
    pairs = list(zip(stores, rows, strict=True))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        sites=np.concatenate([np.full(len(own), index, np.int64) for index, own in enumerate(rows)]),
        rows=np.concatenate(rows),
        labels=np.concatenate([store.labels[own] for store, own in pairs]),
        patients=np.concatenate(
            [store.patients[own] + start for (store, own), start in zip(pairs, starts[:-1], strict=True)]
        ),
        probabilities=np.stack(probabilities),
    )
    write_bytes(folder / OUTCOMES, buffer.getvalue())


def read_outcomes(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a finished task; see the module docstring."""
    with np.load(io.BytesIO((folder / OUTCOMES).read_bytes()), allow_pickle=False) as arrays:
        return dict(arrays)


def _trim(run: Path, keep_archive: bool) -> None:
    """Drop what only a run under way needs."""
    remove_tree(run / "checkpoints")
    remove_tree(run / "data")
    for site in sorted((run / "sites").iterdir()):
        for name in ("answers", "state", "archive", "secure"):
            remove_tree(site / name)
        if site.is_dir() and not keep_archive:
            remove_tree(site / "store")
    if not keep_archive:
        remove_tree(run / "archive")


def _end_with_parent(every_s: float = 1.0) -> None:
    """End this process when the one that began it is gone. Nothing is lost: every task goes on from what is on disk."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process; exit code 1 with the reason on stderr where the task cannot be done."""
    torch.set_num_threads(1)
    _end_with_parent()
    try:
        run_task(Path(arguments[0]))
    except XfedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
