"""`xfed-sim study`: its options, and what a person sees while it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from xfed.simulations.study_pool import Standing

__all__ = ["study"]

SAY_EVERY_S = 300.0


def study(
    config: Annotated[Path, typer.Argument(help="study file; its section experiment says what to repeat")],
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<name>-study")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of images and labels, instead of phantoms")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="override a field: --set experiment.folds=3")
    ] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time; 0 = one per core", min=0, max=256)] = 0,
    utility: Annotated[
        list[Path] | None, typer.Option(help="folder of xfed.simulations.privacy_utility, shown beside")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print study.json at the end, nothing else")] = False,
) -> None:
    """Compare DS1, DS2, DS3 and their controls over folds and seeds, or continue: one table, figures and a verdict."""
    import json

    from xfed.simulations.run import load_run_study
    from xfed.simulations.study import conduct_study
    from xfed.simulations.study_grid import cells_of, tasks_of
    from xfed.simulations.study_report import terminal_tables

    chosen = load_run_study(config, settings=setting or [], data=data)
    folder = out or Path("runs") / f"{chosen.name}-study"
    console = Console(stderr=as_json)
    cells = cells_of(chosen)
    runs = sum(1 for cell in cells for _ in tasks_of(cell))
    console.print(
        f"[bold]{chosen.name}[/bold]: {len(cells)} cells, {runs} runs, arms {', '.join(chosen.experiment.arms)}; {folder}",
        highlight=False,
    )
    with StandingDisplay(console) as display:
        page = conduct_study(chosen, folder, data, jobs=jobs, utility=utility or (), progress=display.show)
    text = (folder / "study.json").read_text(encoding="utf-8")
    if as_json:
        print(text)
        return
    console.print(terminal_tables(json.loads(text)))
    console.print(f"Report: {page.resolve()}", highlight=False, soft_wrap=True)


class StandingDisplay:
    """A bar and a line per running task; in a log file, a line whenever a run is finished and every five minutes."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True)
        self._said = (-1, -1)
        self._at = 0.0

    def __enter__(self) -> StandingDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, standing: Standing) -> None:
        """Draw how far the study is."""
        spent = time.monotonic() - self._started
        head = f"{standing.finished} of {standing.tasks} runs, {spent / 60:.0f} min"
        if standing.failed:
            head += f", {len(standing.failed)} failed"
        if self._console.is_terminal:
            bar = ProgressBar(total=standing.tasks, completed=standing.finished, width=40)
            self._live.update(Group(Text(head), bar, *(Text(f"  {line}") for line in standing.running)))
        elif (now := (standing.finished, len(standing.failed))) != self._said or spent - self._at > SAY_EVERY_S:
            self._said, self._at = now, spent
            self._console.print("; ".join([head, *standing.running]), highlight=False, soft_wrap=True)
