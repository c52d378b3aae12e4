"""Runs the tasks of a study: a few processes at a time, each cell's base before its arms, every one resumable.

::

    tasks --plan_task--> TASK/task.json --finished? skip-- else --> python -m xfed.simulations.study_job TASK (log: TASK/log)
                                             TASK/run*/events.jsonl --last line--> progress

A task that fails leaves its log; the others go on. After a kill or Ctrl-C the same command continues every task where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xfed.common.errors import XfedError
from xfed.simulations.study_grid import Task
from xfed.simulations.study_job import OUTCOMES, plan_task

__all__ = ["Progress", "Standing", "check_failures", "run_tasks"]

POLL_S = 0.5
GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a study is: finished and all tasks, what is under way (a line each), names of those that failed."""

    finished: int
    tasks: int
    running: tuple[str, ...]
    failed: tuple[str, ...]


Progress = Callable[[Standing], None]


@dataclass(frozen=True)
class _Job:
    task: Task
    folder: Path
    process: subprocess.Popen[bytes]


def run_tasks(tasks: Sequence[Task], out: Path, data: Path | None, jobs: int, progress: Progress) -> dict[str, str]:
    """Run all that is not finished; returns the folders of failed tasks (relative to `out`) and why. Raises `XfedError`.

    `jobs` processes at a time (at least 1); each uses one thread, so that figures do not depend on `jobs`.
    """
    waiting = {plan_task(task, out, data): task for task in tasks}
    failed: dict[str, str] = {}
    running: list[_Job] = []
    finished = 0
    try:
        while waiting or running:
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if (job.folder / OUTCOMES).is_file():
                    finished += 1
                else:
                    failed[_name(job.folder, out)] = _why(job.folder)
            for folder, task in list(waiting.items()):
                if (folder / OUTCOMES).is_file():
                    finished += 1
                    del waiting[folder]
                elif not task.base and _name(task.base_folder(out), out) in failed:
                    failed[_name(folder, out)] = "the base of its cell failed"
                    del waiting[folder]
                elif len(running) < jobs and (task.base or (task.base_folder(out) / OUTCOMES).is_file()):
                    running.append(_Job(task, folder, _start(folder)))
                    del waiting[folder]
            lines = tuple(f"{_name(job.folder, out)}  {_under_way(job.folder)}" for job in running)
            progress(Standing(finished=finished, tasks=len(tasks), running=lines, failed=tuple(failed)))
            if running:
                time.sleep(POLL_S)
    finally:
        _end([job.process for job in running])
    return failed


def _name(folder: Path, out: Path) -> str:
    return str(folder.relative_to(out / "cells"))


def _start(folder: Path) -> subprocess.Popen[bytes]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "xfed.simulations.study_job", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why(folder: Path) -> str:
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'ended without a word'} (see {folder / 'log'})"


def _under_way(folder: Path) -> str:
    """Phase and round from the newest events.jsonl; empty before the first event."""
    logs = sorted(folder.glob("run*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return "images"
    with logs[-1].open("rb") as file:
        file.seek(max(0, logs[-1].stat().st_size - 65536))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("kind") in ("round", "phase"):
            return f"{event.get('phase')} {event.get('round')}/{event.get('rounds')}"
    return ""


def check_failures(failed: dict[str, str]) -> None:
    """Raises `XfedError` that names each failed task and its reason."""
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise XfedError(f"{len(failed)} tasks failed, the report is without them: {told}. Run the same command again.")
