"""`xfed-server`: what the coordinating site does.

::

    xfed-server init, approve, revoke, renew, members    membership (xfed.server.federation_cli)
    xfed-server plan, start, status                      a study    (xfed.server.operations_cli)
    xfed-server report DIR            DIR/report.json --> DIR/report.html
    xfed-server archive verify DIR    DIR/manifest.json + every file --> untouched, or what was changed
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xfed.common.console import EXIT_CODES, run_app
from xfed.common.errors import CheckpointError
from xfed.server.federation_cli import approve, init, members, renew, revoke
from xfed.server.operations_cli import plan, start, status

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


for command in (init, approve, revoke, renew, members, plan, start, status):
    app.command(epilog=EXIT_CODES)(command)


archive = typer.Typer(no_args_is_help=True, help="Look after a synthetic archive.")
app.add_typer(archive, name="archive")


@archive.callback()
def _archive() -> None:
    """Look after a synthetic archive."""


@archive.command(epilog=EXIT_CODES)
def verify(
    folder: Annotated[Path, typer.Argument(help="the archive: the folder that holds manifest.json", metavar="DIR")],
) -> None:
    """Compare every file with the manifest's digests; ends with 0 only when all is untouched (exit code 4 otherwise)."""
    from xfed.server.archive import verify_archive

    problems = verify_archive(folder)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        raise CheckpointError(f"{folder}: {len(problems)} differences from the manifest; do not use it:\n{shown}")
    print(f"{folder}: untouched")


def main() -> None:
    """Entry point of `xfed-server`."""
    run_app(app)
