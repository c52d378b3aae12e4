"""`xfed-server`: what the coordinating site does with a run.

::

    xfed-server report DIR    DIR/report.json --> DIR/report.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xfed.common.console import EXIT_CODES, run_app

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Coordinate hospitals in an xfed study.")


@app.callback()
def _server() -> None:
    """Coordinate hospitals in an xfed study."""


@app.command(epilog=EXIT_CODES)
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a finished run", metavar="DIR")],
) -> None:
    """Write report.html anew from a run's report.json."""
    from xfed.server.report import render_again  # matplotlib takes a second: not for --help

    print(render_again(folder))


def main() -> None:
    """Entry point of `xfed-server`."""
    run_app(app)
