"""A question for messages waits for one, never longer than it may, and never when one is there."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import pytest
from starlette.responses import Response

from xfed.server import patience
from xfed.server.patience import Patience


class _Post:
    """Flower's part: messages of nodes, handed out one by one. A "request" here is the node's number, or a word."""

    def __init__(self) -> None:
        self.patience = Patience(lambda request: request if isinstance(request, int) else None)
        self.stored: dict[int, deque[bytes]] = {1: deque(), 2: deque()}

    def push(self, node: int, text: bytes) -> None:
        self.stored[node].append(text)
        self.patience.pushed(node)

    async def _route(self, request: Any) -> Response:
        waiting = self.stored.get(request)
        return Response(waiting.popleft() if waiting else b"")

    async def ask(self, request: Any) -> tuple[bytes, float]:
        began = time.monotonic()
        response = await self.patience.hold(request, self._route)
        return bytes(response.body), time.monotonic() - began


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> _Post:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.4)
    made = _Post()
    made.patience.begin()
    return made


def test_what_is_there_is_handed_out_at_once(post: _Post) -> None:
    for text in (b"a", b"b"):
        post.push(1, text)
    for text in (b"a", b"b"):
        assert (found := asyncio.run(post.ask(1)))[0] == text
        assert found[1] < 0.2


def test_nothing_is_waited_for_so_long_and_no_longer(post: _Post) -> None:
    for _ in range(2):
        text, seconds = asyncio.run(post.ask(1))
        assert text == b""
        assert 0.4 <= seconds < 2


def test_a_message_ends_the_waiting_of_its_site_alone(post: _Post) -> None:
    async def both() -> list[tuple[bytes, float]]:
        asyncio.get_running_loop().call_later(0.1, post.push, 2, b"for two")
        return list(await asyncio.gather(post.ask(1), post.ask(2)))

    one, two = asyncio.run(both())
    assert one[0] == b""
    assert one[1] >= 0.4
    assert two[0] == b"for two"
    assert two[1] < 0.4


def test_the_end_of_the_run_ends_the_waiting(post: _Post) -> None:
    async def ask() -> tuple[bytes, float]:
        asyncio.get_running_loop().call_later(0.1, post.patience.end)
        return await post.ask(1)

    assert asyncio.run(ask())[1] < 0.4
    assert asyncio.run(post.ask(1))[1] < 0.4


def test_other_requests_never_wait(post: _Post) -> None:
    assert asyncio.run(post.ask("heartbeat"))[1] < 0.2


def test_a_withdrawn_message_costs_one_question(post: _Post) -> None:
    post.push(1, b"withdrawn")
    post.stored[1].clear()
    assert asyncio.run(post.ask(1))[1] < 0.2  # counted as there, found to be gone
    assert asyncio.run(post.ask(1))[1] >= 0.4
    post.push(1, b"new")
    assert asyncio.run(post.ask(1))[0] == b"new"


def test_a_message_that_nobody_counted_is_handed_out_too(post: _Post) -> None:
    post.stored[1].append(b"from before")
    assert asyncio.run(post.ask(1))[0] == b"from before"
    post.push(1, b"next")
    assert [asyncio.run(post.ask(1))[0] for _ in range(2)] == [b"next", b""]
