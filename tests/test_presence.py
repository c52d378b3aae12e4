"""Sites that go and come back: asked again when they return, waited for in bounded time, and named."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from xfed.common.codec import decode_request, encode
from xfed.common.messages import Examples, ShowExamples
from xfed.server.exchange import Answer, Exchange
from xfed.simulations.flower import LocalGrid

NODE = 2


class Unsteady(LocalGrid):
    """One site. `script` says, look by look, whether it is online and in which session; messages to an old session are lost."""

    def __init__(self, script: Iterable[tuple[bool, str]], losing: set[str], error: int | None = None) -> None:
        app = ClientApp()
        self.answered = 0

        @app.query("ask")
        def ask(message: Message, context: Context) -> Message:
            self.answered += 1
            count = decode_request(message.content).count  # type: ignore[attr-defined]
            return Message(encode(Examples(site="a", arrays={"images": np.full(1, count, np.uint8)})), reply_to=message)

        super().__init__(app, 1, 1)
        self._script = iter(script)
        self._now = next(self._script)
        self._losing, self._error = losing, error
        self._lost: dict[str, Message] = {}
        self.discarded: list[str] = []

    def get_nodes(self) -> Iterable[Any]:
        self._now = next(self._script, self._now)
        online, session = self._now
        status = "online" if online else "offline"
        return [SimpleNamespace(node_id=NODE, name="a", status=status, last_activated_at=session)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        if self._now[1] in self._losing:
            self._lost[f"lost-{len(self._lost)}"] = message
            return [f"lost-{len(self._lost) - 1}"]
        return super().push_messages([message])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        if message_id in self._lost:
            if self._error is None:
                return []
            message = self._lost.pop(message_id)
            message.metadata.__dict__["_message_id"] = message_id
            return [Message(Error(self._error, "gone"), reply_to=message)]
        return super().pull_messages([message_id])

    def discard(self, message_id: str) -> None:
        self.discarded.append(message_id)


def _ask(grid: Unsteady, absence: float = 30.0, limit: float = 30.0) -> tuple[Answer, list[str]]:
    """Ask once, with a clock that ticks a second per look at it."""
    said: list[str] = []
    ticks = iter(range(10_000))
    exchange = Exchange(
        grid, {"a": NODE}, absence, clock=lambda: float(next(ticks)), notice=lambda site, text: said.append(text)
    )
    try:
        (answer,) = exchange.ask([("a", ShowExamples(study="s", count=7))], limit)
    finally:
        grid.close()
    return answer, said


def test_a_site_that_was_killed_with_the_message_is_asked_again() -> None:
    grid = Unsteady([(True, "one"), (True, "one"), (True, "two")], losing={"one"})
    answer, said = _ask(grid)
    assert isinstance(answer.reply, Examples)
    assert answer.reply.arrays["images"].tolist() == [7]
    assert grid.answered == 1
    assert any("asked again" in text for text in said)
    assert grid.discarded == ["lost-0"]


def test_a_site_that_flower_gave_up_on_is_asked_again_once_it_is_back() -> None:
    for code in (3, 4, 5):
        grid = Unsteady([(True, "one"), (False, "one"), (False, "one"), (True, "two")], losing={"one"}, error=code)
        answer, said = _ask(grid)
        assert isinstance(answer.reply, Examples)
        assert said[:2] == ["went offline", "is back"]


def test_an_error_of_the_site_itself_is_final() -> None:
    grid = Unsteady([(True, "one"), (True, "two")], losing={"one", "two"}, error=2)
    answer, _ = _ask(grid)
    assert answer.reply is None
    assert "the site failed: gone" in str(answer.problem)


def test_an_absent_site_is_waited_for_as_long_as_the_study_says_and_no_longer() -> None:
    answer, said = _ask(Unsteady([(True, "one"), (False, "one")], losing={"one"}), absence=5)
    assert answer.problem == "offline for 5 s"
    assert said == ["went offline"]
    answer, _ = _ask(Unsteady([(True, "one")], losing={"one"}), limit=9)
    assert answer.problem == "no answer within 9 s"


def test_a_site_that_stays_is_asked_once() -> None:
    grid = Unsteady([(True, "one")], losing=set())
    answer, said = _ask(grid)
    assert isinstance(answer.reply, Examples)
    assert (grid.answered, said, grid.discarded) == (1, [], [])
