"""The live page of a study: what `xfed.server.live` knows, on 127.0.0.1, read-only.

::

    GET /live                    LiveRun.snapshot as JSON: asked for every two seconds
    GET /sample/ROUND/CLASS      one synthetic image as PNG

There is no route that changes anything. What guards these is `xfed.common.page_guard`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from PIL import Image

from xfed.common.errors import ConfigError
from xfed.common.pages import AppFactory, add_page, page_app, running_page
from xfed.server.live import LiveRun

__all__ = ["live_page", "page_beside", "page_port"]


def live_page(run: LiveRun) -> AppFactory:
    """The page of one run folder."""
    folder = Path(str(resources.files("xfed.server")))

    def make(token: str, port: int) -> FastAPI:
        app = page_app(title="xfed: live", token=token, port=port)
        assets = {name: folder / name for name in ("live_page.js", "live_charts.js", "live_page.css")}
        add_page(app, token=token, page=folder / "live_page.html", assets=assets)

        @app.get("/live")
        def live() -> dict[str, Any]:
            return run.snapshot()

        @app.get("/sample/{round}/{label}")
        def sample(round: int, label: int) -> Response:
            pixels = run.sample(round, label)
            if pixels is None:
                raise HTTPException(404, "There is no such sample.")
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            return Response(buffer.getvalue(), media_type="image/png")

        return app

    return make


def page_port(text: str | None) -> int | None:
    """The port that ``--page PORT|auto`` names: 0 for auto, None without the option. Raises `ConfigError`."""
    if text is None or text == "auto":
        return None if text is None else 0
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"--page {text!r}: give a port number, or auto for a free one")
    return int(text)


@contextmanager
def page_beside(
    folder: Path,
    port: int | None,
    announce: Callable[[str], None],
    presences: Callable[[], Mapping[str, bool]] | None = None,
) -> Iterator[None]:
    """Serve the page of `folder` while the block runs a study; without a port, do nothing. Raises `StorageError`: port in use."""
    if port is None:
        yield
        return
    with LiveRun(folder, presences) as run, running_page(live_page(run), port=port) as url:
        announce(url)
        yield
