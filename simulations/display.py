"""What a person sees while a study runs: one bar per phase, with the losses or scores that matter."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["StudyDisplay"]

TITLES = {
    "data": "Images",
    "gan": "1  Generators",
    "archive": "2  Archive",
    "classifier": "3  Classifiers",
    "quality": "   Archive quality",
}


class StudyDisplay:
    """A journal listener that draws progress bars; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StudyDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def images(self, done: int, total: int) -> None:
        """Progress of an import."""
        self._update("data", done, total, "")

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one journal event."""
        if event["kind"] in ("phase", "round"):
            self._update(event["phase"], event["round"], event["rounds"], _facts(event))
        elif event["kind"] == "problem":
            self._progress.console.print(
                f"[yellow]{event['phase']}, round {event['round']}: {event['site']}: {event['text']}"
            )

    def _update(self, phase: str, done: int, total: int, facts: str) -> None:
        if phase not in self._tasks:
            title = TITLES.get(phase, phase)
            self._tasks[phase] = self._progress.add_task(title, total=total, facts=facts, completed=done)
        self._progress.update(self._tasks[phase], completed=done, total=total, facts=facts)


def _facts(event: dict[str, Any]) -> str:
    if "losses" in event:
        losses = list(event["losses"].values())
        return f"D {sum(x['loss_d'] for x in losses) / len(losses):.2f}  G {sum(x['loss_g'] for x in losses) / len(losses):.2f}"
    if "arms" in event:
        return "  ".join(
            f"{arm} {facts['validation_balanced_accuracy']:.3f}"
            for arm, facts in event["arms"].items()
            if facts["validation_balanced_accuracy"] is not None
        )
    return ""
