"""`xfed-server`: what the coordinating site does.

::

    xfed-server init, approve, revoke, renew, members    membership (xfed.server.federation_cli)
    xfed-server plan, start, status                      a study    (xfed.server.operations_cli)
    xfed-server watch RUN             the live page of a run (xfed.server.live_cli)
    xfed-server report DIR            DIR/report.json --> DIR/report.html
    xfed-server review DIR            accept or reject each image of an archive  (xfed.server.review_cli)
    xfed-server archive verify, export, curate           an archive (xfed.server.archive_cli)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xfed.common.console import EXIT_CODES, run_app
from xfed.server.archive_cli import archive
from xfed.server.federation_cli import approve, init, members, renew, revoke
from xfed.server.live_cli import watch
from xfed.server.operations_cli import plan, start, status
from xfed.server.review_cli import review

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


for command in (init, approve, revoke, renew, members, plan, start, status, watch, review):
    app.command(epilog=EXIT_CODES)(command)


app.add_typer(archive, name="archive")


def main() -> None:
    """Entry point of `xfed-server`."""
    run_app(app)
