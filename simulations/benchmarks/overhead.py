"""What a federated round costs beside training: real processes, real TLS, loopback, two sites, one training step per round.

::

    Deployed: xfed-server start, xfed-client start per site (agent + warm worker), plan approved, phases 1 and 2 minimal
    phase 3, one arm, GoogLeNet as wide as the wanted megabytes:
      round = weights out, one step, weights in, mean --> weights out again, validation scores in --> checkpoint
      events.jsonl: time of each round's end ----------------+
      sites' stored answers: seconds of each training step --+--> Round(round_s, training_s) --> table, JSON

The time outside training is the whole round less the longest training of a site in it: polling, TLS, hashing, packing, pipes,
policy and audit, stored answers, folding, secure sums, the checkpoint, and also the scoring of the validation images, which
no site reports apart. So the figure is an upper bound. A round sends the weights to each site twice and gets them back once.
The first round is left out: the worker opens its store and torch warms up in it.

Run ``python -m xfed.simulations.benchmarks.overhead``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from xfed.common.config import Study, parse_study
from xfed.common.console import run_app
from xfed.common.errors import FederationError
from xfed.common.journal import Journal
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.simulations.deployed import Deployed

__all__ = ["LIMITS_S", "WIDTHS", "Overhead", "Round", "measure", "rounds_of", "study_of"]

WIDTHS: Mapping[int, int] = {1: 14, 100: 131}
"""Megabytes wanted to the narrowest GoogLeNet of three classes that has them."""
LIMITS_S: Mapping[int, float] = {1: 3.0, 100: 15.0}
"""Megabytes to the most seconds outside training that a round of two sites may take."""
MEGABYTE = 10**6
LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: its length, and the longest training of a site in it, in seconds."""

    round: int
    round_s: float
    training_s: float

    @property
    def outside_s(self) -> float:
        """Everything but training."""
        return self.round_s - self.training_s


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The measured rounds of one deployment; `model_mb` is float32 weights in 10^6 bytes."""

    model_mb: float
    sites: int
    secure: bool
    rounds: tuple[Round, ...]

    @property
    def median_s(self) -> float:
        """Median time outside training."""
        return statistics.median(one.outside_s for one in self.rounds)


def study_of(width: int, *, sites: int = 2, rounds: int = 6, secure: bool = False) -> Study:
    """A study whose third phase does little more than carry a GoogLeNet of `width`; the first round is not measured."""
    return parse_study(
        {
            "name": "overhead",
            "image_size": 32,
            "classes": ["Cardiomegaly", "Normal", "Pleural Effusion"],
            "data": {"phantom": {"patients": {"Cardiomegaly": 12, "Normal": 12, "Pleural Effusion": 12}}},
            "sites": {"count": sites},
            "gan": {"width": 4, "rounds": 1, "steps_per_round": 1, "batch": 2, "minimum_images": 1},
            "archive": {"balance": "fixed", "per_class": 4, "minimum": 4},
            "classifier": {
                "model": "googlenet",
                "width": width,
                "arms": ["DS1"],
                "rounds": 1 + rounds,
                "patience": 1 + rounds,
                "steps_per_round": 1,
                "batch": 2,
            },
            "federation": {"secure_aggregation": "on" if secure else "off", "time_limit_s": 300},
        },
        "overhead benchmark",
    )


def rounds_of(events: Sequence[Mapping[str, Any]], training: Mapping[int, float]) -> tuple[Round, ...]:
    """The rounds of phase 3 but the first, from events.jsonl and the longest training of each round in seconds."""
    ends = {
        event["round"]: datetime.fromisoformat(event["time"])
        for event in events
        if event["kind"] == "round" and event["phase"] == "classifier"
    }
    return tuple(
        Round(round=number, round_s=(ends[number] - ends[number - 1]).total_seconds(), training_s=training[number])
        for number in sorted(ends)
        if number - 1 in ends
    )


def measure(width: int, root: Path, *, sites: int = 2, rounds: int = 6, secure: bool = False) -> Overhead:
    """Run the study under `root`, and take its rounds apart. Raises `FederationError` when it does not succeed."""
    study = study_of(width, sites=sites, rounds=rounds, secure=secure)
    size = sum(array.nbytes for array in parameters_of(build_classifier(study)).values())
    training: dict[tuple[int, str], float] = {}
    with Deployed(study, root) as deployed:
        deployed.found()
        deployed.start_all()
        deployed.approve_when_received()
        server, deadline = deployed.processes["server"], time.monotonic() + 300 + 60 * rounds
        while server.poll() is None and time.monotonic() < deadline:
            _note_training(deployed, training)
            time.sleep(LOOK_S)
        if server.poll() != 0:
            raise FederationError(f"the study did not succeed: {deployed.tail('server')}")
        events = list(Journal(deployed.out / "events.jsonl").read())
    longest: dict[int, float] = {}
    for (number, _), seconds in training.items():
        longest[number] = max(longest.get(number, 0.0), seconds)
    found = rounds_of(events, longest)
    return Overhead(model_mb=size / MEGABYTE, sites=sites, secure=secure, rounds=found)


def _note_training(deployed: Deployed, training: dict[tuple[int, str], float]) -> None:
    """Read the seconds of training from the answers that the sites keep for a round or two."""
    for site in deployed.sites:
        answers = deployed.site(site) / "studies" / deployed.study.digest[:16] / "answers"
        for path in answers.glob("TrainClassifier-*.safetensors"):
            number = int(path.stem.rpartition("-")[2])
            if (number, site) not in training:
                with contextlib.suppress(FileNotFoundError), safe_open(path, framework="numpy") as file:  # else: pruned
                    training[number, site] = json.loads(file.metadata()["values"])["seconds"]


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        model = {key.strip(): value.strip() for key, value in lines.items()}.get("model name", model)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def overhead(
    megabytes: Annotated[list[int] | None, typer.Option(help="1 or 100; repeat the option")] = None,
    rounds: Annotated[int, typer.Option(help="measured rounds", min=1)] = 6,
    sites: Annotated[int, typer.Option(min=2)] = 2,
    secure: Annotated[bool | None, typer.Option("--secure/--open", help="default: both")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Seconds of a round outside training: coordinator and sites as processes on this machine, over TLS."""
    found: list[tuple[int, Overhead]] = []
    for wanted in megabytes or list(WIDTHS):
        if wanted not in WIDTHS:
            raise typer.BadParameter(f"{wanted}: choose from {', '.join(map(str, WIDTHS))}")
        for one in (False, True) if secure is None else (secure,):
            with tempfile.TemporaryDirectory() as folder:
                found.append(
                    (wanted, measure(WIDTHS[wanted], Path(folder) / "overhead", sites=sites, rounds=rounds, secure=one))
                )
    if as_json:
        results = [{**asdict(one), "limit_s": LIMITS_S[wanted], "median_s": one.median_s} for wanted, one in found]
        print(json.dumps({"machine": _machine(), "results": results}, indent=2))
        return
    table = Table(title="Seconds of a round: median \\[least, greatest]")
    for heading in (
        "model MB",
        "sites",
        "aggregation",
        "rounds",
        "whole round",
        "training",
        "outside training",
        "limit",
    ):
        table.add_column(heading, justify="right")
    for wanted, each in found:
        table.add_row(
            f"{each.model_mb:.1f}",
            str(each.sites),
            "secure" if each.secure else "open",
            str(len(each.rounds)),
            _spread([one.round_s for one in each.rounds]),
            _spread([one.training_s for one in each.rounds]),
            _spread([one.outside_s for one in each.rounds]),
            f"{LIMITS_S[wanted]:g}",
        )
    console = Console(width=130)
    console.print(table)
    console.print(_machine(), highlight=False)


if __name__ == "__main__":
    run_app(app)
