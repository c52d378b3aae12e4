"""Asking sites over a Flower `Grid`: push, poll, yield replies in the order of asking, give up in bounded time.

::

    [(site, request), ...] --push--> grid ... --pull next id--> decode --> Answer(site, request, reply | problem) --> caller folds
                               ^                     |
                               +-- asked again, once the site is back --+ it went offline, restarted, or its answer broke off

Only the reply that is folded next is pulled; later ones wait in Flower's store (or in the local backend's
pool), so the coordinator holds one reply at a time and folds in a fixed order. Flower hands a message out once: a site that
was killed with it in hand would be waited for in vain, so it is asked again when it comes back. A site answers the same
request with the same stored answer, so asking twice costs traffic and nothing else. A site that refuses, fails, answers
nonsense or stays away is an `Answer` with a `problem`: the round's owner decides whether the quorum still stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from xfed.common.codec import decode_reply, encode, payload_bytes
from xfed.common.errors import FederationError
from xfed.common.messages import Refusal, Reply, Request

__all__ = ["Answer", "Exchange", "Presence", "presences"]

POLL_S = 0.05
PRESENCE_S = 0.5
TTL_SLACK_S = 310.0
_AWAY = frozenset({3, 4, 5})  # Flower's codes for a message or reply that is gone and for a node that is offline


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One site's answer to one request: a `reply`, or the `problem` in words."""

    site: str
    request: Request
    reply: Reply | None
    problem: str | None
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class Presence:
    """A node as Flower's `Grid.get_nodes` shows it; `session` changes when the site's process comes back."""

    node: int
    name: str
    online: bool
    session: str


def presences(grid: Grid) -> dict[int, Presence]:
    """All nodes of a grid by their number; where a grid knows numbers only, all are online and nameless."""
    return {
        info.node_id: Presence(info.node_id, info.name, info.status == "online", info.last_activated_at)
        for info in grid.get_nodes()
    }


@dataclass
class _Asked:
    """A request under way at one site."""

    site: str
    request: Request
    message_id: str
    session: str
    sent: int


class Exchange:
    """The sites by name, and how to ask them."""

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        absence_limit_s: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
        notice: Callable[[str, str], None] = lambda site, text: None,
    ) -> None:
        self._grid = grid
        self._nodes = dict(sorted(nodes.items()))
        self._absence_limit_s = absence_limit_s
        self._clock = clock
        self._notice = notice
        self._present: dict[int, Presence] = {}
        self._looked = float("-inf")
        self._away_since: dict[str, float] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(self._nodes)

    def ask(self, requests: Sequence[tuple[str, Request]], time_limit_s: float) -> Iterator[Answer]:
        """Send all requests, then yield the answers in the same order, each within `time_limit_s` of the sending."""
        encoded: dict[int, RecordDict] = {}
        waiting: list[_Asked] = []
        self._look(now=True)
        for site, request in requests:
            if id(request) not in encoded:
                encoded[id(request)] = encode(request)
            record = encoded[id(request)]
            asked = _Asked(site, request, "", "", payload_bytes(record))
            self._push(asked, record, time_limit_s)
            waiting.append(asked)
        encoded.clear()
        deadline = self._clock() + time_limit_s
        for asked in waiting:
            yield self._collect(asked, deadline, time_limit_s)

    def _push(self, asked: _Asked, record: RecordDict, time_limit_s: float) -> None:
        message = Message(
            record,
            dst_node_id=self._nodes[asked.site],
            message_type=asked.request.flower_type,
            ttl=time_limit_s + TTL_SLACK_S,
            group_id=asked.request.key[:200],
        )
        (asked.message_id,) = self._grid.push_messages([message])
        asked.session = self._session(asked.site)

    def _look(self, now: bool = False) -> None:
        if now or self._clock() - self._looked >= PRESENCE_S:
            self._present = presences(self._grid)
            self._looked = self._clock()
            for site, node in self._nodes.items():
                present = self._present.get(node)
                if present is None or present.online:
                    if self._away_since.pop(site, None) is not None:
                        self._notice(site, "is back")
                elif site not in self._away_since:
                    self._away_since[site] = self._looked
                    self._notice(site, "went offline")

    def _session(self, site: str) -> str:
        present = self._present.get(self._nodes[site])
        return present.session if present is not None else ""

    def _collect(self, asked: _Asked, deadline: float, time_limit_s: float) -> Answer:
        reply: Reply | None = None
        problem: str | None = None
        received = 0
        while reply is None and problem is None:
            message = self._pull(asked)
            if message is not None:
                received = payload_bytes(message.content) if message.has_content() else 0
                reply, problem = self._read(message)
                del message
                continue
            now = self._clock()
            self._look()
            away = self._away_since.get(asked.site)
            if now >= deadline:
                problem = f"no answer within {time_limit_s:g} s"
            elif away is not None and now - away >= self._absence_limit_s:
                problem = f"offline for {self._absence_limit_s:g} s"
            elif away is None and (not asked.message_id or asked.session != self._session(asked.site)):
                self._forget(asked.message_id)
                record = encode(asked.request)
                asked.sent += payload_bytes(record)
                self._push(asked, record, deadline - now)
                self._notice(asked.site, f"is asked again: {asked.request.key}")
            time.sleep(POLL_S)
        if reply is None:
            self._forget(asked.message_id)
        if isinstance(reply, Refusal):
            problem, reply = f"refused ({reply.error}): {reply.reason}", None
        return Answer(
            site=asked.site,
            request=asked.request,
            reply=reply,
            problem=problem,
            sent_bytes=asked.sent,
            received_bytes=received,
        )

    def _pull(self, asked: _Asked) -> Message | None:
        """The reply that has come, if one has; a message that Flower gave up on is to be sent again."""
        if not asked.message_id:
            return None
        for message in self._grid.pull_messages([asked.message_id]):
            if not message.has_content() and message.error.code in _AWAY:
                asked.message_id = ""
                return None
            return message
        return None

    def _read(self, message: Message) -> tuple[Reply | None, str | None]:
        if not message.has_content():
            return None, f"the site failed: {message.error.reason} (Flower error {message.error.code})"
        try:
            return decode_reply(message.content), None
        except FederationError as error:
            return None, str(error)
        finally:
            # Flower's records lie in a reference cycle: without this the decoded copy's twin waits for the collector
            for arrays in message.content.array_records.values():
                arrays.clear()

    def _forget(self, message_id: str) -> None:
        discard: Any = getattr(self._grid, "discard", None)  # grids that keep payloads for others offer it
        if message_id and discard is not None:
            discard(message_id)
