"""One process of `xfed.simulations.chaos`: runs the schedules it is told on stdin, one result per line on stdout.

::

    {"unbroken": "open"} --> the study without faults --> <out>/unbroken-open.json (facts, passes per point)
    {"seed": 7}          --> Supervisor --> judge --> {"seed", "problems", "restarts", ...}; the folder is kept if there are any

Every library is imported here once and no thread is started, so that each party can be forked from this process.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from xfed.simulations.chaos_armed import PRELOADED
from xfed.simulations.chaos_points import Kind
from xfed.simulations.chaos_schedule import FaultKind, Schedule, chaos_study, make_schedule
from xfed.simulations.chaos_supervisor import Supervisor
from xfed.simulations.chaos_verdict import Facts, facts_of, judge

__all__ = ["main", "preload", "run_schedule", "run_unbroken", "template_of", "unbroken_facts"]


def preload() -> None:
    """Import what the parties need. Raises `RuntimeError` when that started a thread: forks of it would be unsound."""
    for name in PRELOADED:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 (no paths)
        raise RuntimeError("a library started a thread on import: set OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1")


def template_of(out: Path, kind: Kind) -> Path:
    """Where the founded federation of a kind is, from which every schedule starts."""
    return out / f"template-{kind}"


def _facts_path(out: Path, kind: Kind) -> Path:
    return out / f"unbroken-{kind}.json"


def unbroken_facts(out: Path, kind: Kind) -> Facts:
    """The facts of the unbroken run, written by `run_unbroken`."""
    return Facts(**json.loads(_facts_path(out, kind).read_text(encoding="utf-8"))["facts"])


def run_unbroken(out: Path, kind: Kind, port: int) -> dict[str, Any]:
    """Run the study without faults; returns and writes its facts and how often each party passed each point."""
    study, root = chaos_study(kind), out / f"unbroken-{kind}"
    outcome = Supervisor(study, template_of(out, kind), root, None, port).run()
    if outcome.problems or not outcome.finished:
        raise RuntimeError(f"the unbroken run failed: {outcome.problems} {outcome.notes}; see {root}")
    facts = dataclasses.asdict(facts_of(root, study, outcome))
    result = {
        "unbroken": kind,
        "seconds": outcome.seconds,
        "processor_s": outcome.processor_s,
        "facts": facts,
        "passed": outcome.passed,
    }
    _facts_path(out, kind).write_text(json.dumps(result), encoding="utf-8")
    return result


def run_schedule(schedule: Schedule, out: Path, port: int) -> dict[str, Any]:
    """Run one schedule and judge it. Its folder <out>/seed-<seed> stays if it failed."""
    study, root = chaos_study(schedule.kind), out / f"seed-{schedule.seed:06d}"
    if root.exists():
        shutil.rmtree(root)
    supervisor = Supervisor(study, template_of(out, schedule.kind), root, schedule, port)
    outcome = supervisor.run()
    problems = judge(root, study, schedule, outcome, unbroken_facts(out, schedule.kind))
    if not problems:
        shutil.rmtree(root)
    return {
        "seed": schedule.seed,
        "kind": schedule.kind,
        "seconds": outcome.seconds,
        "processor_s": outcome.processor_s,
        "restarts": outcome.restarts,
        "faults": [
            {"kind": f.kind, "point": f.point, "words": f.words, "came": f.number in outcome.fired}
            for f in schedule.faults
        ],
        "notes": outcome.notes,
        "problems": problems,
    }


def main() -> None:
    """Entry point: `python -m xfed.simulations.chaos_job OUT PORT [KIND OF FAULT]`."""
    out, port = Path(sys.argv[1]), int(sys.argv[2])
    only: FaultKind | None = sys.argv[3] if len(sys.argv) > 3 else None  # type: ignore[assignment]
    preload()
    answers = os.dup(1)
    os.dup2(2, 1)
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        first = port + 7 * number % 900  # another port each time: the last run's connections may linger
        if "unbroken" in order:
            result = run_unbroken(out, order["unbroken"], first)
        else:
            result = run_schedule(make_schedule(order["seed"], only), out, first)
        os.write(answers, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main()
