"""What a round costs as hospitals are added, open and under secure sums, with the real machinery on one machine.

::

    for each number of hospitals, open and secure, in a fresh process:
      run_study (phantoms at 32 px, small models, `ROUNDS` rounds of phases 1 and 3, archive, votes, attacks, report)
        every event --> Watch: wall clock, processor seconds of the process, of them training, keys, masks, ...
                               bytes per hospital (the event's own traffic)
      last round of a phase --> Cost                whole study --> seconds per stage, peak memory, digest of all results
    --> table, scale.json, scale.svg

Two series: as many images at every hospital ("hospital": more hospitals have more images), or as many in all ("total"). The
archive has a fixed size here; with `archive.balance: match`, the default, it grows with the images in all, and every hospital
fetches all of it.

On the local backend one process is the coordinator and all hospitals, so its processor seconds and its memory are theirs
together; "outside training" is what is left without the hospitals' training (weights into the model, steps, state on disk).
Processor seconds are steadier than wall seconds on a machine that does other work; the load is written beside them. With Ray
the hospitals are processes of their own: then processor seconds and memory are the coordinator's, and parts are not known.

Run ``python -m xfed.simulations.benchmarks.scale``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from xfed.client.open_training import OpenTraining
from xfed.client.secure import SecureSums
from xfed.common.config import Study, parse_study
from xfed.common.console import run_app
from xfed.common.durable import write_json, write_text
from xfed.common.secure_masks import MaskedSums
from xfed.simulations.benchmarks.scale_figure import draw, table
from xfed.simulations.run import run_study

__all__ = ["PHASES", "Cost", "Scale", "Watch", "costs_of", "growth", "measure", "measure_here", "study_of"]

Series = Literal["hospital", "total"]
Backend = Literal["local", "ray"]
SITES = (1, 3, 10, 30, 100)
ROUNDS = 2
WORKERS = 2
PATIENTS: Mapping[Series, int] = {"hospital": 8, "total": 300}
"""Patients of each of three classes, at every hospital or in all."""
PHASES: Mapping[str, tuple[str, ...]] = {"gan": ("gan",), "classifier": ("classifier", "classifier-validation")}
"""A phase's rounds, and the exchanges that a round of it is made of."""
PARTS: Mapping[str, tuple[tuple[type, str], ...]] = {
    "training": ((OpenTraining, "gan"), (OpenTraining, "classifier")),
    "keys": ((SecureSums, "advertise"), (SecureSums, "share")),
    "masks": ((SecureSums, "mask"),),
    "shares": ((SecureSums, "unmask"),),
    "sums": ((MaskedSums, "add"), (MaskedSums, "unmask")),
}
"""What is timed apart, in processor seconds and with its writing to disk: training, keys and sealed letters, masking and opening
letters at the hospitals, and the coordinator's sums."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One round of a phase. Seconds of the wall clock and of the processor, `parts` of the latter, payload bytes."""

    wall_s: float
    processor_s: float
    parts: Mapping[str, float]
    bytes_in_all: int
    bytes_per_site: float

    @property
    def outside_s(self) -> float:
        """Processor seconds that are not training."""
        return self.processor_s - self.parts.get("training", 0.0)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One study: the last round of each phase, all its stages as (wall, processor) seconds, and memory in MiB.

    `digest`: over models and archive; two runs of one study have the same. `load`: of the machine, at the end.
    """

    sites: int
    secure: bool
    series: Series
    backend: Backend
    images: int
    phases: Mapping[str, Cost]
    stages: Mapping[str, tuple[float, float]]
    bytes_in_all: int
    baseline_mib: float | None
    peak_mib: float | None
    digest: str
    load: float

    @property
    def round_s(self) -> float:
        """Processor seconds of a round of both phases."""
        return sum(cost.processor_s for cost in self.phases.values())

    @property
    def secure_s(self) -> float:
        """Those of them that went into keys, masks, shares and sums; 0 in an open study."""
        parts = [item for cost in self.phases.values() for item in cost.parts.items()]
        return sum(seconds for part, seconds in parts if part != "training")

    @property
    def wall_s(self) -> float:
        """Seconds from the first hospital's founding to the report."""
        return sum(wall for wall, _ in self.stages.values())

    @property
    def processor_s(self) -> float:
        """Processor seconds of the same."""
        return sum(processor for _, processor in self.stages.values())


def study_of(
    sites: int, *, secure: bool, series: Series = "hospital", backend: Backend = "local", rounds: int = ROUNDS
) -> Study:
    """The shortened study: three classes, all three phases. Raises `ConfigError` for a secure sum over one hospital."""
    patients = PATIENTS[series] * (sites if series == "hospital" else 1)
    classes = ["Cardiomegaly", "Normal", "Pleural Effusion"]
    return parse_study(
        {
            "name": "scale",
            "image_size": 32,
            "classes": classes,
            "data": {"phantom": {"patients": dict.fromkeys(classes, patients)}},
            "sites": {"count": sites},
            "gan": {"width": 4, "rounds": rounds, "steps_per_round": 2, "batch": 8, "minimum_images": 1},
            "archive": {"balance": "fixed", "per_class": 32, "minimum": 32, "tstr_steps": 20},
            "classifier": {"model": "googlenet", "width": 4, "rounds": rounds, "patience": rounds, "batch": 16},
            "federation": {"secure_aggregation": "on" if secure else "off", "time_limit_s": 7200},
            "runtime": {"backend": backend, "workers": WORKERS},
        },
        "scale benchmark",
    )


@dataclass
class Watch:
    """Notes the clocks at every event, and what the timed parts have taken by then. Used as a run's listener."""

    events: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __call__(self, event: dict[str, Any]) -> None:
        """Note an event of the study."""
        self.events.append({**event, **self.clocks()})

    def clocks(self) -> dict[str, Any]:
        """All clocks now."""
        return {"wall": time.perf_counter(), "processor": time.process_time(), "parts": dict(self.parts)}

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Within it the methods of `PARTS` are timed, each by the clock of the thread that it runs in."""
        before = [(kind, name, kind.__dict__[name]) for methods in PARTS.values() for kind, name in methods]
        for part, methods in PARTS.items():
            for kind, name in methods:
                setattr(kind, name, self._timed(part, kind.__dict__[name]))
        try:
            yield
        finally:
            for kind, name, method in before:
                setattr(kind, name, method)

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.parts[part] += time.thread_time() - started

        return timed


def costs_of(events: Sequence[Mapping[str, Any]], sites: int) -> dict[str, Cost]:
    """The last round of each phase, from the events and the clocks that `Watch` put beside them. Raises `ValueError`."""
    costs = {}
    for phase, exchanges in PHASES.items():
        marks = [event for event in events if event["kind"] in ("phase", "round") and event["phase"] == phase]
        if len(marks) < 2:
            raise ValueError(f"no round of phase {phase} was seen")
        before, after = marks[-2:]
        payload = sum(
            traffic["sent"] + traffic["received"]
            for event in events
            if event["kind"] == "exchange" and event["phase"] in exchanges and event["round"] == after["round"]
            for traffic in event["traffic"].values()
        )
        costs[phase] = Cost(
            wall_s=after["wall"] - before["wall"],
            processor_s=after["processor"] - before["processor"],
            parts={part: after["parts"].get(part, 0.0) - before["parts"].get(part, 0.0) for part in PARTS},
            bytes_in_all=payload,
            bytes_per_site=payload / sites,
        )
    return costs


def _stages(start: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of what lies between the events that end each stage."""
    ends: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "hospitals founded": lambda event: event["kind"] == "started",
        "joining, census": lambda event: event["kind"] == "phase" and event["phase"] == "gan",
        "generators": lambda event: event["kind"] == "round" and event["phase"] == "gan",
        "archive": lambda event: event["kind"] == "phase" and event["phase"] == "classifier",
        "classifier": lambda event: event["kind"] == "round" and event["phase"] == "classifier",
        "tests, votes, report": lambda event: event["kind"] == "finished",
    }
    stages, before = {}, start
    for name, is_end in ends.items():
        end = [event for event in events if is_end(event)][-1]
        stages[name] = (end["wall"] - before["wall"], end["processor"] - before["processor"])
        before = end
    return stages


def _memory_mib(figure: str) -> float | None:
    """Resident memory of this process, now (VmRSS) or at its highest (VmHWM), where the system is Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(figure + ":")), None)


def measure_here(
    sites: int,
    *,
    secure: bool,
    series: Series = "hospital",
    backend: Backend = "local",
    rounds: int = ROUNDS,
    folder: Path,
) -> Scale:
    """Run the study in `folder` and measure it; only a fresh process gives clean memory figures (see `measure`)."""
    study = study_of(sites, secure=secure, series=series, backend=backend, rounds=rounds)
    watch = Watch()
    baseline, start = _memory_mib("VmRSS"), watch.clocks()
    with watch.timing() if backend == "local" else contextlib.nullcontext():
        run_study(study, folder, listener=watch)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    results = {name: value for name, value in report["digests"].items() if name != "config.yaml"}
    costs = costs_of(watch.events, sites)
    return Scale(
        sites=sites,
        secure=secure,
        series=series,
        backend=backend,
        images=json.loads((folder / "sites" / "ready.json").read_text(encoding="utf-8"))["images"],
        phases=costs,
        stages=_stages(start, watch.events),
        bytes_in_all=sum(one["sent_bytes"] + one["received_bytes"] for one in report["traffic"].values()),
        baseline_mib=baseline,
        peak_mib=_memory_mib("VmHWM"),
        digest=hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest(),
        load=os.getloadavg()[0],
    )


def measure(
    sites: int, *, secure: bool, series: Series = "hospital", backend: Backend = "local", rounds: int = ROUNDS
) -> Scale:
    """`measure_here` in a fresh Python. Raises `subprocess.CalledProcessError` when that fails."""
    arguments = {"sites": sites, "secure": secure, "series": series, "backend": backend, "rounds": rounds}
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path; "
        "from xfed.simulations.benchmarks.scale import measure_here; "
        "scale = measure_here(**json.loads(sys.argv[1]), folder=Path(sys.argv[2])); "
        "Path(sys.argv[2], 'scale.json').write_text(json.dumps(asdict(scale)))"
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(arguments), folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        values = json.loads(Path(folder, "scale.json").read_text(encoding="utf-8"))
    values["phases"] = {name: Cost(**cost) for name, cost in values["phases"].items()}
    values["stages"] = {name: tuple(seconds) for name, seconds in values["stages"].items()}
    return Scale(**values)


def growth(few: Scale, many: Scale, figure: Callable[[Scale], float]) -> float:
    """The power p of the number of hospitals that `figure` grew with between two of them: 1 linear, 2 with the square."""
    return math.log(figure(many) / figure(few)) / math.log(many.sites / few.sites)


def plain(scale: Scale) -> dict[str, Any]:
    """All figures as plain values, the derived ones beside the measured."""
    values = asdict(scale)
    for name, cost in scale.phases.items():
        values["phases"][name]["outside_s"] = cost.outside_s
    derived = ("round_s", "secure_s", "wall_s", "processor_s")
    return {**values, **{name: getattr(scale, name) for name in derived}}


def _growths(found: Sequence[Scale]) -> Iterator[str]:
    """In words, the power that a round's processor seconds grew with between the two largest numbers of hospitals."""
    for series in PATIENTS:
        for secure, figure, name in (
            (False, lambda one: one.round_s, "open, all"),
            (True, lambda one: one.round_s, "secure, all"),
            (True, lambda one: one.secure_s, "secure, keys, masks, shares and sums alone"),
        ):
            rows = [one for one in found if (one.series, one.secure, one.backend) == (series, secure, "local")]
            if len(rows) > 1:
                few, many = sorted(rows, key=lambda one: one.sites)[-2:]
                power = growth(few, many, figure)
                yield f"{series}: from {few.sites} to {many.sites} hospitals with power {power:.2f} ({name})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scale(
    sites: Annotated[list[int] | None, typer.Option(help="number of hospitals; repeat the option", min=1)] = None,
    series: Annotated[list[str] | None, typer.Option(help="hospital or total; repeat the option")] = None,
    secure: Annotated[bool | None, typer.Option("--secure/--open", help="default: both")] = None,
    backend: Annotated[str, typer.Option(help="local or ray")] = "local",
    rounds: Annotated[int, typer.Option(help="rounds of each phase; the last is measured", min=1)] = ROUNDS,
    out: Annotated[Path | None, typer.Option(help="folder for scale.json and scale.svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Cost of a round against the number of hospitals: seconds, bytes, memory; open and under secure sums."""
    if backend not in ("local", "ray"):
        raise typer.BadParameter(f"{backend}: choose local or ray")
    found: list[Scale] = []
    for kind in series or list(PATIENTS):
        if kind not in PATIENTS:
            raise typer.BadParameter(f"{kind}: choose from {', '.join(PATIENTS)}")
        for count in sites or list(SITES):
            for one in (False, True) if secure is None else (secure,):
                if one and count < 2:  # a sum over one hospital hides nothing, and is refused
                    continue
                found.append(measure(count, secure=one, series=kind, backend=backend, rounds=rounds))  # type: ignore[arg-type]
                if out is not None:
                    write_json(out / "scale.json", [plain(each) for each in found])
                    write_text(out / "scale.svg", draw([plain(each) for each in found]))
    if as_json:
        print(json.dumps([plain(one) for one in found], indent=2))
        return
    console = Console(width=170)
    console.print(table([plain(one) for one in found]))
    for line in _growths(found):
        console.print(line, highlight=False)


if __name__ == "__main__":
    run_app(app)
