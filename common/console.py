"""What the command-line tools share: one way to end with an error, one progress bar.

::

    XfedError --(run_app)--> one block on stderr, exit code of the error
    Ctrl-C    --(run_app)--> exit code 130

Progress is drawn on stderr and only on a terminal, so that stdout stays free for what a machine reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xfed.common.errors import XfedError

__all__ = ["EXIT_CODES", "print_result", "progress_bar", "run_app"]

EXIT_CODES = (
    "Exit codes: 0 success, 1 other error, 2 wrong option or study file, 3 unusable images, labels or store, "
    "4 checkpoint of another study or damaged, 5 device missing, 6 disk full, read-only or locked, "
    "7 federated round failed, 8 refused by the site's policy, 9 identity, 130 interrupted."
)
"""Epilog of every command's --help."""


def run_app(app: typer.Typer) -> NoReturn:
    """Run a typer app and end the process with a documented exit code (see `EXIT_CODES`)."""
    try:
        app()
    except XfedError as error:
        text = str(error).encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no text
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {escape(text)}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def print_result(as_json: bool, values: dict[str, Any], *lines: str | Table) -> None:
    """`values` as JSON on stdout, or `lines` (rich markup or a table) for people."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; call what it gives with (done, total). Silent when stderr is not a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(escape(description), total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
