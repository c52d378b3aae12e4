"""What a person sees while a study runs: a bar per phase with losses or scores; in a log file, a line per tenth."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
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
    "shared": "1  Shared start",
    "gan": "1  Generators",
    "archive": "2  Archive",
    "classifier": "3  Classifiers",
    "quality": "   Archive quality",
    "tstr": "   Synthetic alone",
    "vote": "   Vote on the archive",
    "attacks": "   Attacks on the archive",
}


class StudyDisplay:
    """A journal listener that draws progress; use as a context manager. `sites` shows their coming and going, too."""

    def __init__(self, console: Console, *, sites: bool = False) -> None:
        self._console = console
        self._sites_come_and_go = sites
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

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
        elif event["kind"] in ("joining", "presence") and self._sites_come_and_go:
            self._console.print(f"{escape(event['site'])}: {escape(event['text'])}", highlight=False)
        elif event["kind"] == "problem":
            text = f"{event['phase']}, round {event['round']}: {event['site']}: {event['text']}"
            self._console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False)

    def _update(self, phase: str, done: int, total: int, facts: str) -> None:
        title = TITLES.get(phase, phase)
        if not self._console.is_terminal:
            tenth = 10 * done // max(1, total)
            if tenth > self._tenths.get(phase, 0):
                self._tenths[phase] = tenth
                self._console.print(f"{title:<18} {done}/{total}  {facts}", highlight=False)
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(title, total=total, facts=facts, completed=done)
        self._progress.update(self._tasks[phase], completed=done, total=total, facts=facts)


def _facts(event: dict[str, Any]) -> str:
    if "losses" in event:
        losses = list(event["losses"].values())
        d, g = (sum(loss[key] for loss in losses) / len(losses) for key in ("loss_d", "loss_g"))
        return f"loss D {d:.2f}  G {g:.2f}"
    if "arms" in event:
        # a private study scores no round
        scores = {arm: facts.get("validation_balanced_accuracy") for arm, facts in event["arms"].items()}
        return "  ".join(f"{arm} {score:.3f}" for arm, score in scores.items() if score is not None)
    return f"{event['accepted']} accepted" if "accepted" in event else ""
