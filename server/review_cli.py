"""`xfed-server review RUN`: the coordinator's people go through a study's archive, on this machine alone.

::

    RUN/archive --xfed.common.review_page on 127.0.0.1--> RUN/archive-review-<reader>.jsonl (signed), .key
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["review"]


def review(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or an archive.", metavar="RUN_OR_ARCHIVE")],
    reader: Annotated[str | None, typer.Option(help="Who decides; default: the name of this account.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 = a free one.")] = 0,
    log: Annotated[
        Path | None, typer.Option(help="Log of decisions; default: beside the archive, one per reader.")
    ] = None,
) -> None:
    """Look at an archive's images in the browser: accept each, or reject it with a reason. Go on any time by running it again."""
    from xfed.common.review_page import review_folder  # the web server takes a second: not for --help

    review_folder(folder, reader=reader, log=log, port=port, tell=lambda line: print(line, flush=True))
