"""A site's question for messages waits until there is one: sites are told at once, and need not ask many times a second.

::

    site --"anything for me?"--> Patience.hold --nothing yet: wait, at most `PATIENCE_S`--> Flower's fleet route --> answer
    LinkGrid.push_messages --Patience.pushed(node)--> the waiting question goes on

Counts in memory only: messages pushed for a node, and handed out to it. They may run apart (a message that was withdrawn is never
handed out); the next empty answer sets them equal, so a mistake costs one question.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Patience"]

PATIENCE_S = 2.0
LOOK_S = 0.02


class Patience:
    """A Starlette middleware (`hold`). `asking` gives the node that a request asks messages for, None for other requests."""

    def __init__(self, asking: Callable[[Request], int | None]) -> None:
        self._asking = asking
        self._pushed: Counter[int] = Counter()
        self._handed_out: Counter[int] = Counter()
        self._open = False

    def begin(self) -> None:
        """A run has begun: there may be something to wait for."""
        self._open = True

    def end(self) -> None:
        """No more messages will come: nobody waits any longer."""
        self._open = False

    def pushed(self, node: int) -> None:
        """A message for `node` has been stored."""
        self._pushed[node] += 1

    async def hold(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Hand the request on, a question for messages not before there is one or the time is over."""
        node = self._asking(request)
        if node is None:
            return await call_next(request)
        deadline = time.monotonic() + PATIENCE_S
        while self._open and self._handed_out[node] >= self._pushed[node] and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        before = self._pushed[node]
        response = await call_next(request)
        if response.headers.get("content-length") == "0":
            self._handed_out[node] = before
        elif response.status_code == HTTPStatus.OK:
            self._handed_out[node] += 1
        return response
