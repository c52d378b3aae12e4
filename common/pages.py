"""Web pages for the person at this machine: a server on 127.0.0.1 that answers nobody without the page's token.

::

    serve_page(factory) --bind 127.0.0.1, new token--> factory(token, port): page_app + its routes --> announce(URL), until Ctrl-C
    request --> PageGuard (xfed.common.page_guard) --> add_page: / and /assets/NAME, routes of the page's own

The token is 256 bits from the operating system, new for each start, and kept in memory only. What is refused and what every
answer carries is the guard's to say.
"""

from __future__ import annotations

import html
import re
import secrets
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from xfed.common.errors import StorageError, XfedError
from xfed.common.listening import bound_socket, served
from xfed.common.page_guard import PageGuard
from xfed.common.stopping import StopFlag

__all__ = ["AppFactory", "add_page", "page_app", "running_page", "safe_file", "serve_page"]

AppFactory = Callable[[str, int], FastAPI]
"""Makes the app from (token, port): call `page_app` with both, then add routes."""

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_PLACE = re.compile(r"\{\{ *(token|title) *\}\}")


def page_app(*, title: str, token: str, port: int) -> FastAPI:
    """An app without routes behind the guard; an `XfedError` of a route is answered in its own words."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(PageGuard, token=token, port=port)
    app.add_exception_handler(XfedError, _explain)
    return app


def add_page(app: FastAPI, *, token: str, page: Path, assets: Mapping[str, Path]) -> None:
    """Serve the HTML file `page` at `/`, and files (js, css) at `/assets/NAME`.

    In the HTML, ``{{ token }}`` and ``{{ title }}`` are filled in, so that the page's script can send `X-Xfed-Token`.
    """
    values = {"token": token, "title": app.title}
    text = _PLACE.sub(lambda found: html.escape(values[found[1]]), page.read_text(encoding="utf-8"))
    files = {name: (path.read_bytes(), _KINDS[path.suffix]) for name, path in assets.items()}

    @app.get("/")
    async def index() -> Response:
        return Response(text, media_type=_KINDS[".html"])

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/assets/{name}")
    async def asset(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "There is no such file.")
        return Response(files[name][0], media_type=files[name][1])


def safe_file(root: Path, relative: str) -> Path:
    """The regular file `relative` below `root`. Raises `HTTPException` 404 outside of it, and for links anywhere on the way."""
    missing = HTTPException(404, "There is no such file.")
    parts = relative.split("/")
    if "\\" in relative or "\0" in relative or any(part in ("", ".", "..") for part in parts):
        raise missing
    path = root
    try:
        for part in parts:
            path = path / part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise missing
    except (OSError, ValueError) as error:
        raise missing from error
    if not stat.S_ISREG(mode):
        raise missing
    return path


def serve_page(app_factory: AppFactory, *, port: int, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; port 0 is a free one. `announce` is called once, with the address and its token.

    Call it from the main thread. Raises `StorageError` when the port is in use.
    """
    ended = StopFlag()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda *_: ended.set())  # no lock: see xfed.common.stopping
        with _listening(app_factory, port) as (url, thread):
            announce(url)
            while not ended.wait(0.5):
                if not thread.is_alive():
                    raise StorageError("the page's server ended by itself: start the command again")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running_page(app_factory: AppFactory, *, port: int = 0) -> Iterator[str]:
    """A page while the block runs, in a thread beside it; gives its address with the token. Raises as `serve_page` does."""
    with _listening(app_factory, port) as (url, _):
        yield url


@contextmanager
def _listening(app_factory: AppFactory, port: int) -> Iterator[tuple[str, threading.Thread]]:
    with bound_socket("127.0.0.1", port, "Choose another with --port, or --port 0 for a free one.") as bound:
        number, token = bound.getsockname()[1], secrets.token_urlsafe(32)
        config = uvicorn.Config(
            app_factory(token, number),
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=2,
        )
        with served(config, bound, "page's server") as thread:
            yield f"http://127.0.0.1:{number}/?token={token}", thread


async def _explain(request: Request, error: Exception) -> JSONResponse:
    status: Any = 507 if isinstance(error, StorageError) else 500
    return JSONResponse({"detail": str(error)}, status)
