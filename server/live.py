"""A run folder as the live page sees it, while the study runs and afterwards: read, never written.

::

    events.jsonl  --xfed.server.live_state--> phases, curves, sites, problems -----------------+
    config.yaml, plan.json  --> the study, who takes part -------------------------------------+--> LiveRun.snapshot (JSON)
    checkpoints/gan-*  --shown samples; the newest generators rendered once per round----------+    LiveRun.sample (pixels)
    ledgers/*.jsonl    --spend lines--> epsilon per site (by the first accountant alone)-------+
    .lock, who holds it? (/proc/locks), or the coordinator itself --> running, stopped, finished

What takes seconds (samples, epsilon) is computed by one thread beside; a snapshot gives what is known so far and never waits.
Samples are synthetic; nothing of a patient is in a run folder.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError, safe_open

from xfed.common.accounting import epsilon
from xfed.common.config import Study, parse_study
from xfed.common.config_family import sample_names
from xfed.common.dp_events import exposures
from xfed.common.errors import XfedError
from xfed.common.ledger_lines import Line, read_line
from xfed.common.weights import load_arrays
from xfed.server.live_state import EventTail, Story

__all__ = ["LiveRun"]

FRESH_S = 10.0
KEPT = 16
_CHECKPOINT = re.compile(r"gan-(\d{6})\.safetensors")
Samples = dict[int, npt.NDArray[np.uint8]]


class LiveRun:
    """One run folder. `presences` says who is connected, where this process is the coordinator itself; else None."""

    def __init__(self, folder: Path, presences: Callable[[], Mapping[str, bool]] | None = None) -> None:
        self._folder, self._presences = folder, presences
        self._lock = threading.Lock()
        self._tail = EventTail(folder / "events.jsonl")
        self._study: Study | None = None
        self._story = Story()
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="live-page")
        self._under_way: Future[None] | None = None
        self._samples: Samples = {}
        self._gone: Samples = {}
        self._samples_of: Path | None = None
        self._budgets: dict[str, dict[str, Any]] = {}
        self._ledger_sizes: dict[str, int] = {}

    def close(self) -> None:
        """End the thread beside."""
        self._beside.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows, as JSON values; times in seconds since 1970."""
        now = time.time()
        with self._lock:
            self._read_study()
            events = list(self._tail.new())
            if self._tail.begun_anew:
                self._story, self._samples, self._samples_of = Story(self._names()), {}, None
            for event in events:
                self._story.take(event)
            view = self._story.view(now)
            # a later version may know more fields of a study than the one that ran it, and so give it another digest
            digest = self._story.digest or (self._study.digest[:12] if self._study else None)
            study, finished = self._study, self._story.finished
            samples = sorted(self._samples)
            known = {path.stem for path in (self._folder / "ledgers").glob("*.jsonl")}
            budgets = {name: self._budgets.get(name) for name in sorted(known)}
        self._look_beside(digest or "")
        state = self._state(finished, view["last"], now)
        if self._presences is not None:
            for name, online in self._presences().items():
                if name in view["sites"]:
                    view["sites"][name]["online"] = online
                    view["sites"][name]["seen"] = now if online else view["sites"][name]["seen"]
        elif state != "running":
            for site in view["sites"].values():
                site["online"] = None
        return {
            "now": now,
            "state": state,
            "name": study.name if study else None,
            "digest": digest,
            "classes": list(study.classes) if study else [],
            "samples_of": sample_names(study.classes, study.gan.family) if study else [],
            "arms_planned": list(study.classifier.arms) if study else [],
            "private": study.private if study else False,
            "secure": study.secure if study else False,
            "simulated": (self._folder / "sites").is_dir(),
            "guessing": 1 / len(study.classes) if study else None,
            "samples": samples,
            # a site without a ledger here has shown none yet; one with None is being computed
            "budget": {"epsilon": study.privacy.epsilon, "delta": study.privacy.delta, "sites": budgets}
            if study and study.private
            else None,
            **view,
        }

    def sample(self, round: int, label: int) -> npt.NDArray[np.uint8] | None:
        """The synthetic image of a shown round and a class, uint8 [S, S]; None where there is none."""
        with self._lock:
            images = self._samples.get(round, self._gone.get(round))
        return images[label] if images is not None and 0 <= label < len(images) else None

    def _read_study(self) -> None:
        if self._study is None and (self._folder / "config.yaml").is_file():
            try:
                values = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
                self._study = parse_study(values, str(self._folder / "config.yaml"))
            except (OSError, ValueError, yaml.YAMLError, XfedError):
                return  # of another version, perhaps: the events say enough
            for name in self._names():
                self._story.sites.setdefault(name, Story((name,)).sites[name])

    def _names(self) -> tuple[str, ...]:
        """The sites' names: of the plan, of a simulation's folders; () while neither is there."""
        try:
            plan = json.loads((self._folder / "plan.json").read_text(encoding="utf-8"))
            return tuple(sorted(json.loads(plan["plan"])["members"]))
        except (OSError, ValueError, KeyError, TypeError):
            simulated = (self._folder / "sites").is_dir() and self._study is not None
            return self._study.site_names() if simulated and self._study else ()

    def _state(self, finished: bool, last: float | None, now: float) -> str:
        if self._presences is not None:
            return "finished" if finished else "running"
        held = _is_held(self._folder / ".lock")
        if finished and not held:
            return "finished"
        if held or (last is not None and now - last < FRESH_S):
            return "running"
        return "waiting" if last is None else "stopped"

    def _look_beside(self, digest: str) -> None:
        """Begin what takes longer, unless it is under way."""
        with self._lock:
            if self._study is not None and (self._under_way is None or self._under_way.done()):
                self._under_way = self._beside.submit(self._catch_up, self._study, digest)

    def _catch_up(self, study: Study, digest: str) -> None:
        checkpoints = (self._folder / "checkpoints").glob("gan-*.safetensors")
        newest = max((path for path in checkpoints if _CHECKPOINT.fullmatch(path.name)), default=None)
        models = {name: self._folder / "models" / f"generator-{name}.safetensors" for name in study.generators}
        if newest is None and all(path.is_file() for path in models.values()):
            newest = models[study.generators[0]]  # fitted to embeddings alone: there are no rounds
        if newest is not None and newest != self._samples_of:
            found = _read_samples(study, newest) if newest not in models.values() else _read_models(study, models)
            if found is not None:
                with self._lock:
                    # a page that was told of a round a moment ago still asks for it
                    self._gone = dict([*self._gone.items(), *self._samples.items()][-KEPT:])
                    self._samples, self._samples_of = found, newest
        if not study.private:
            return
        for path in sorted((self._folder / "ledgers").glob("*.jsonl")):
            size = path.stat().st_size
            if size != self._ledger_sizes.get(path.stem):
                entry = _spent(study, digest, path)
                with self._lock:
                    self._budgets[path.stem] = entry
                    self._ledger_sizes[path.stem] = size


def _is_held(path: Path) -> bool:
    """Whether a process of this machine holds the lock file, as the kernel lists it; asking does not touch the lock."""
    try:
        facts = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    return any(place in line.split() for line in lines)


def _read_samples(study: Study, path: Path) -> Samples | None:
    """Samples of the rounds that the checkpoint keeps, and of its own round. None when it has been replaced meanwhile."""
    from xfed.server.generators import sample_images  # torch takes seconds to load

    number = _CHECKPOINT.fullmatch(path.name)
    shown: Samples = {}
    average: dict[str, dict[str, npt.NDArray[Any]]] = {name: {} for name in study.generators}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, rest = key.partition("/")
                if kind == "shown":
                    shown[int(rest)] = file.get_tensor(key)
                elif kind == "ema":
                    name, _, parameter = rest.partition("/")
                    average[name][parameter] = file.get_tensor(key)
        if number is not None and int(number[1]) not in shown:
            shown[int(number[1])] = sample_images(study, average, int(number[1]))
    except (OSError, SafetensorError, ValueError, KeyError, XfedError):
        return None
    return shown


def _read_models(study: Study, paths: Mapping[str, Path]) -> Samples | None:
    from xfed.server.generators import sample_images

    try:
        return {0: sample_images(study, {name: load_arrays(path)[0] for name, path in paths.items()})}
    except XfedError:
        return None


def _spent(study: Study, digest: str, path: Path) -> dict[str, Any]:
    """What the coordinator's copy of a site's ledger says this study has spent: epsilon per class, the largest, releases."""
    data = path.read_bytes()
    try:
        lines: list[Line] = [read_line(line + b"\n") for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]
    except ValueError:
        return {"epsilon": None, "per_class": {}, "releases": 0}
    mine = [line for line in lines if (line.content.study or "").startswith(digest)]
    spent = [(line.content.class_name, line.event) for line in mine if line.content.kind == "spend"]
    exposed = exposures(spent, overlap=study.privacy.overlap)
    delta = float(study.privacy.delta or 0)
    per_class = {name: epsilon(exposed.get(name, exposed[None]), delta) if spent else 0.0 for name in study.classes}
    return {
        "epsilon": max(per_class.values()),
        "per_class": per_class,
        "releases": sum(line.content.kind == "release" for line in mine),
    }
