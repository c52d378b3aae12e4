"""`python -m xfed.simulations.chaos`: breaks a federation in seeded ways and compares how it ends with the unbroken run.

::

    found two federations (open: 2 sites; secure: 3 sites) --> templates --> one unbroken run of each --> facts
    seeds --> --jobs processes (chaos_job): schedule --> supervisor --> verdict --> a line each --> table, results.json
    a failure: its seed, what differs, and its folder

A schedule's faults: `xfed.simulations.chaos_schedule`; the points: `--list`; what is compared: `xfed.simulations.chaos_verdict`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xfed.common.console import run_app
from xfed.common.durable import append_line, remove_tree, write_json
from xfed.common.errors import ConfigError, FederationError
from xfed.simulations.chaos_job import template_of
from xfed.simulations.chaos_points import KINDS, POINTS
from xfed.simulations.chaos_schedule import FAULTS, chaos_study
from xfed.simulations.deployed import Deployed

__all__ = ["main", "run_chaos"]

Result = dict[str, Any]
FIRST_PORT, PORTS = 20000, 1000
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
}


class _Job:
    """A `chaos_job` process."""

    def __init__(self, out: Path, number: int, only: str | None) -> None:
        command = [sys.executable, "-m", "xfed.simulations.chaos_job", str(out), str(FIRST_PORT + PORTS * number)]
        with (out / f"job-{number}.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, *([only] if only else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **_ENVIRONMENT},
            )
        self._log = out / f"job-{number}.log"

    def ask(self, **order: Any) -> Result:
        """Have one order carried out. Raises `FederationError` when the process dies over it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise FederationError("a job has no pipes")
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise FederationError(f"a job died over {order}: {self._log.read_text()[-2000:]}")
        result: Result = json.loads(line)
        return result

    def close(self) -> None:
        """No more orders: it ends by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)
        if self._process.stdout is not None:
            self._process.stdout.close()


def run_chaos(
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    only: str | None = None,
    tell: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Run the schedules of `seeds`; `tell` hears each result at once. Raises `FederationError` when the unbroken run fails."""
    out = out.resolve()
    for kind in KINDS:
        if not (template_of(out, kind) / "ready").is_file():
            remove_tree(template_of(out, kind))
            Deployed(chaos_study(kind), template_of(out, kind)).found()
            (template_of(out, kind) / "ready").touch()
        remove_tree(out / f"unbroken-{kind}")
    workers = [_Job(out, number, only) for number in range(jobs)]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    results: list[Result] = []
    errors: list[Exception] = []
    try:
        for number, kind in enumerate(KINDS):
            tell(workers[number % jobs].ask(unbroken=kind))

        def work(job: _Job) -> None:
            try:
                while True:
                    result = job.ask(seed=waiting.get_nowait())
                    results.append(result)
                    tell(result)
            except queue.Empty:
                return
            except FederationError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(job,)) for job in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for job in workers:
            job.close()
    if errors:
        raise errors[0]
    return sorted(results, key=lambda result: result["seed"])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def chaos(
    schedules: Annotated[int, typer.Option(min=1, help="How many schedules.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The first schedule's seed; the others follow.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, max=12, help="Schedules at the same time.")] = 2,
    out: Annotated[Path, typer.Option(help="Where federations, results and the folders of failures go.")] = Path(
        "runs/chaos"
    ),
    only: Annotated[
        str | None, typer.Option(help=f"Kind of fault beside the kill: {', '.join(FAULTS)}; default: in turn.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the points and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")] = False,
) -> None:
    """Kill, starve, cut off and confuse a federation in seeded ways; it must end as if nothing had happened."""
    if listed:
        _list(as_json)
        return
    if only is not None and only not in FAULTS:
        raise ConfigError(f"--only {only!r} is not one of {', '.join(FAULTS)}")
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    done = iter(range(1, schedules + 1))

    def tell(result: Result) -> None:
        if "unbroken" in result:
            console.print(
                f"unbroken {result['unbroken']}: {result['seconds']:.1f} s ({result['processor_s']:.1f} s of processor)",
                highlight=False,
            )
            return
        append_line(out / "results.jsonl", json.dumps(result))  # a run that is interrupted has its results too
        verdict = "[green]passed[/green]" if not result["problems"] else "[red]FAILED[/red]"
        came = sum(fault["came"] for fault in result["faults"])
        restarts = sum(result["restarts"].values())
        spent = f"{result['seconds']:.1f} s ({result['processor_s']:.1f} s of processor)"
        facts = f"{spent}, {came} of {len(result['faults'])} faults, {restarts} restarts"
        who = f"{next(done)}/{schedules} seed {result['seed']} ({result['kind']})"
        console.print(f"{who}: {verdict} {facts}", highlight=False, soft_wrap=True)
        for problem in result["problems"]:
            console.print(f"    {problem}", highlight=False, markup=False)

    results = run_chaos(range(seed, seed + schedules), out, jobs=jobs, only=only, tell=tell)
    facts = _summary(results, time.monotonic() - started)
    write_json(out / "results.json", {"summary": facts, "results": results})
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(console, facts)
    if facts["failed"]:
        raise FederationError(
            f"schedules {facts['failed']} failed; their folders are in {out}, repeat one with --seed N --schedules 1"
        )


def _summary(results: Sequence[Result], seconds: float) -> Result:
    planned = Counter(fault["kind"] for result in results for fault in result["faults"])
    came = Counter(fault["kind"] for result in results for fault in result["faults"] if fault["came"])
    killed = {
        f["point"] for result in results for f in result["faults"] if f["came"] and f["kind"] in ("kill", "damage")
    }
    roles: Counter[str] = Counter()
    for result in results:
        for party, count in result["restarts"].items():
            roles["server" if party == "server" else "worker" if party.endswith("/worker") else "agent"] += count
    times = sorted(result["seconds"] for result in results)
    return {
        "schedules": len(results),
        "passed": sum(not result["problems"] for result in results),
        "failed": [result["seed"] for result in results if result["problems"]],
        "faults": {kind: {"planned": planned[kind], "came": came[kind]} for kind in FAULTS},
        "points_killed_at": len(killed),
        "points": len(POINTS),
        "points_not_killed_at": sorted({point.name for point in POINTS} - killed),
        "restarts": dict(sorted(roles.items())),
        "seconds": round(seconds, 1),
        "schedule_seconds": {"median": round(times[len(times) // 2], 1), "longest": round(times[-1], 1)},
    }


def _print(console: Console, facts: Result) -> None:
    table = Table(
        title=f"{facts['passed']} of {facts['schedules']} schedules ended as the unbroken run", title_justify="left"
    )
    for heading in ("fault", "planned", "came"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    for kind, counts in facts["faults"].items():
        table.add_row(kind, str(counts["planned"]), str(counts["came"]))
    console.print(table)
    restarts = ", ".join(f"{role} {count}" for role, count in facts["restarts"].items()) or "none"
    each = facts["schedule_seconds"]
    console.print(
        f"killed at {facts['points_killed_at']} of {facts['points']} points; restarts: {restarts}", highlight=False
    )
    console.print(
        f"{facts['seconds']:.0f} s in all; a schedule {each['median']} s (median), {each['longest']} s (longest)"
    )


def _list(as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                [{"name": p.name, "role": p.role, "when": p.when, "about": p.about, "only": p.only} for p in POINTS],
                indent=2,
            )
        )
        return
    table = Table(title=f"{len(POINTS)} points")
    for heading in ("point", "study", "killed when"):
        table.add_column(heading)
    for point in POINTS:
        table.add_row(point.name, point.only or "both", point.about)
    Console().print(table)


def main() -> None:
    """Entry point of `python -m xfed.simulations.chaos`."""
    run_app(app)


if __name__ == "__main__":
    main()
