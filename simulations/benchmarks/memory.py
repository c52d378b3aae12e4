"""The coordinator's peak memory against the number of hospitals: is it flat?

::

    for each number of sites, in a fresh process:
        import everything --> resident memory (the baseline)
        join --> rounds x (Run.ask over a grid, sites answer with fresh weights, each folded into a RunningMean and dropped)
        --> peak resident memory

Two grids. "remote": a reply is not in this process before it is pulled, as with Flower's SuperLink, so what is measured is the
coordinator. "local": `LocalGrid` with two workers, as in ``xfed-sim``, so that the hospitals' own memory counts too; with
fewer sites than the pipeline is deep (two at work, three finished) less of it is filled.

With `collect` the replies are kept in a list until the round is over, as a coordinator that does not stream would: the
control that shows what the measurement can see. Run ``python -m xfed.simulations.benchmarks.memory``.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import typer
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from xfed.common.codec import decode_request, encode
from xfed.common.config import Study, parse_study
from xfed.common.console import run_app
from xfed.common.journal import Journal
from xfed.common.messages import ClassifierUpdate, Describe, Description, Reply, Request, TrainClassifier
from xfed.common.telemetry import silence
from xfed.common.version import SOFTWARE
from xfed.server.aggregate import RunningMean, check_update
from xfed.server.census import census_of
from xfed.server.checkpoints import Checkpoints
from xfed.server.joining import join
from xfed.server.run import Run
from xfed.simulations.flower import LocalGrid

__all__ = ["Footprint", "measure", "measure_here"]

MEBIBYTE = 2**20
ARRAYS = 8
WORKERS = 2
Arrays = dict[str, npt.NDArray[np.float32]]
GridName = Literal["remote", "local"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Resident memory in MiB: after the imports (`baseline`), and at the highest (`peak`)."""

    sites: int
    grid: GridName
    rounds: int
    model_mib: float
    collect: bool
    baseline_mib: float
    peak_mib: float

    @property
    def added_mib(self) -> float:
        """What the rounds added at the highest."""
        return self.peak_mib - self.baseline_mib


def _status(field: str) -> float | None:
    """A field of Linux's /proc/self/status in MiB, or None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


def _peak_mib() -> float:
    """The highest resident memory of this process so far.

    Linux's VmHWM counts from the start of this program; ``ru_maxrss`` would begin at the peak of the process that started it.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / MEBIBYTE


def _weights(mebibytes: float, value: float) -> Arrays:
    """A model of `mebibytes` MiB float32 in `ARRAYS` equal parts, every entry `value`."""
    entries = int(mebibytes * MEBIBYTE / 4 / ARRAYS)
    return {f"part{number}": np.full(entries, value, dtype=np.float32) for number in range(ARRAYS)}


def _answer(study: Study, number: int, model_mib: float, *, describe: bool) -> RecordDict:
    """What site `number` (from 0) answers: who it is, or new weights, every entry its number."""
    site = study.site_names()[number]
    reply: Reply
    if describe:
        ones = np.ones((3, len(study.classes)), dtype=np.int64)
        counts = {"counts": ones, "drawn": ones[0], "holders": ones[0]}
        reply = Description(site=site, patients=1, share_examples=False, software=SOFTWARE, counts=counts)
    else:
        weights = _weights(model_mib, number)
        reply = ClassifierUpdate(site=site, images=1 + number, loss=0.0, seconds=0.0, weights=weights)
    return encode(reply)


def _hospitals(study: Study, model_mib: float) -> ClientApp:
    """Sites for `LocalGrid` that answer at once."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        describe = isinstance(decode_request(message.content), Describe)
        number = int(context.node_config["partition-id"])
        return Message(_answer(study, number, model_mib, describe=describe), reply_to=message)

    app.query("ask")(answer)
    app.train("classifier")(answer)
    return app


class _RemoteGrid(LocalGrid):
    """A grid whose sites and whose message store are elsewhere: a reply comes to be when it is pulled."""

    def __init__(self, study: Study, model_mib: float) -> None:
        super().__init__(_hospitals(study, model_mib), study.sites.count, workers=0)
        self._study = study
        self._model_mib = model_mib
        self._asked: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Note who was asked what; the content is gone, as after sending."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            seen = message.metadata
            self._asked[ids[-1]] = Message(RecordDict(), seen.dst_node_id, seen.message_type, ttl=seen.ttl)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies, made now."""
        replies = []
        for message_id in message_ids:
            asked = self._asked.pop(message_id)
            describe = asked.metadata.message_type == Describe.flower_type
            number = list(self.get_node_ids()).index(asked.metadata.dst_node_id)
            replies.append(Message(_answer(self._study, number, self._model_mib, describe=describe), reply_to=asked))
        return replies


def _round(run: Run, number: int, weights: Arrays, *, collect: bool) -> Arrays:
    """One round as phase 3 does it; `collect` keeps all replies before it folds them."""
    mean = RunningMean()
    kept: list[ClassifierUpdate] = []

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ClassifierUpdate):
            raise TypeError(f"{site} answered with {type(reply).__name__}")
        check_update(reply.weights, weights, site)
        if collect:
            kept.append(reply)
        else:
            mean.add(reply.weights, reply.images)

    request = TrainClassifier(study=run.study.digest, arm="DS1", round=number, weights=weights)
    run.ask("classifier-DS1", number, [(site, request) for site in run.exchange.sites], fold)
    for reply in kept:
        mean.add(reply.weights, reply.images)
    return mean.mean()


def measure_here(
    sites: int, *, grid: GridName = "remote", model_mib: float = 20, rounds: int = 3, collect: bool = False
) -> Footprint:
    """Run the rounds in this process and measure it; only a fresh process gives a clean answer (see `measure`)."""
    silence()
    study = parse_study(
        {"name": "memory", "sites": {"count": sites}, "federation": {"secure_aggregation": "off"}}, "memory benchmark"
    )
    baseline = _status("VmRSS") or _peak_mib()
    sites_grid = (
        LocalGrid(_hospitals(study, model_mib), sites, min(WORKERS, sites))
        if grid == "local"
        else _RemoteGrid(study, model_mib)
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "events.jsonl")
            exchange, descriptions = join(sites_grid, study, journal)
            run = Run(
                study=study,
                folder=Path(folder),
                exchange=exchange,
                journal=journal,
                checkpoints=Checkpoints(Path(folder), study.digest),
                descriptions=descriptions,
                census=census_of(descriptions, len(study.classes), secure=False),
            )
            weights = _weights(model_mib, 0.0)
            for number in range(1, rounds + 1):
                weights = _round(run, number, weights, collect=collect)
    finally:
        sites_grid.close()
    count = np.arange(sites)
    expected = np.float32(((1 + count) * count).sum() / (1 + count).sum())
    if not all((value == expected).all() for value in weights.values()):
        raise ValueError(f"the mean over {sites} sites is not {expected}: the measured loop does not average")
    return Footprint(
        sites=sites,
        grid=grid,
        rounds=rounds,
        model_mib=model_mib,
        collect=collect,
        baseline_mib=baseline,
        peak_mib=_peak_mib(),
    )


def measure(
    sites: int, *, grid: GridName = "remote", model_mib: float = 20, rounds: int = 3, collect: bool = False
) -> Footprint:
    """`measure_here` in a fresh Python. Raises `subprocess.CalledProcessError` when that fails."""
    arguments = {"sites": sites, "grid": grid, "model_mib": model_mib, "rounds": rounds, "collect": collect}
    code = (
        "import json, sys; from dataclasses import asdict; from xfed.simulations.benchmarks.memory import measure_here; "
        "print(json.dumps(asdict(measure_here(**json.loads(sys.argv[1])))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Footprint(**json.loads(done.stdout))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def memory(
    sites: Annotated[list[int] | None, typer.Option(help="number of sites; repeat the option")] = None,
    model_mib: Annotated[float, typer.Option(help="size of the float32 weights, MiB", min=0.1)] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    collect: Annotated[bool, typer.Option(help="keep all replies: the control, grows")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Peak memory of the coordinator with few and with many hospitals, each in a fresh process."""
    grids: tuple[GridName, ...] = ("remote", "local")
    found = [
        measure(count, grid=grid, model_mib=model_mib, rounds=rounds, collect=collect)
        for grid in grids
        for count in sites or [2, 8, 32]
    ]
    if as_json:
        print(json.dumps([{**asdict(one), "added_mib": one.added_mib} for one in found], indent=2))
        return
    kept = ", replies kept (control)" if collect else ""
    table = Table(title=f"Coordinator's memory in MiB: model of {model_mib:g} MiB, {rounds} rounds{kept}")
    for heading in ("grid", "sites", "after imports", "peak", "/ fewest", "added by the rounds", "/ fewest"):
        table.add_column(heading, justify="right")
    for one in found:
        fewest = next(other for other in found if other.grid == one.grid)
        table.add_row(
            one.grid,
            str(one.sites),
            f"{one.baseline_mib:.0f}",
            f"{one.peak_mib:.0f}",
            f"{one.peak_mib / fewest.peak_mib:.2f}",
            f"{one.added_mib:.0f}",
            f"{one.added_mib / fewest.added_mib:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_app(app)
