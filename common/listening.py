"""A web server in a thread: bound first, so that the port is known and a taken one is said at once; ended with its block.

::

    bound_socket(host, port) --> socket --served(config, socket)--> uvicorn in a thread --> the block runs --> ended, closed
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from xfed.common.errors import StorageError

__all__ = ["bound_socket", "served"]

START_S = 30.0
END_S = 5.0


@contextlib.contextmanager
def bound_socket(host: str, port: int, remedy: str) -> Iterator[socket.socket]:
    """A TCP socket on `host`:`port` (0: a free one) while the block runs. Raises `StorageError`, with `remedy` in its words."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise StorageError(
                f"cannot listen on {host}:{port} ({why}): another program uses the port, or it needs rights. {remedy}"
            ) from error
        yield bound
    finally:
        bound.close()


@contextlib.contextmanager
def served(config: uvicorn.Config, bound: socket.socket, name: str) -> Iterator[threading.Thread]:
    """`config`'s application on `bound` while the block runs; gives its thread. Raises `StorageError` when it does not start."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name=name, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    try:
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise StorageError(f"the {name} did not start: try again, on another port if it happens again")
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        thread.join(timeout=END_S)
        server.force_exit = True
        thread.join(timeout=END_S)
