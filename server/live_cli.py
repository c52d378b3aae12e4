"""`xfed-server watch RUN`: the live page of any run folder, from its files alone, while the study runs and afterwards.

::

    RUN/events.jsonl, checkpoints/, ledgers/ --xfed.server.live--> xfed.server.live_page on 127.0.0.1, until Ctrl-C
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xfed.common.errors import DataError

__all__ = ["watch"]


def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 = a free one.")] = 0,
) -> None:
    """Watch a study in the browser: sites, rounds, curves, samples, budgets. Reads the run's folder and changes nothing."""
    from xfed.common.pages import serve_page  # the web server takes a second: not for --help
    from xfed.server.live import LiveRun
    from xfed.server.live_page import live_page

    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} holds no study (config.yaml): give the folder of a run, for instance runs/demo")
    with LiveRun(folder) as run:
        serve_page(live_page(run), port=port, announce=lambda url: print(f"Open {url}", flush=True))
