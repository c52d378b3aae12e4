"""Asking sites over a Flower `Grid`: push, poll, yield replies in the order of asking, give up in bounded time.

::

    [(site, request), ...] --push--> grid ... --pull next id--> decode --> Answer(site, request, reply | problem) --> caller folds

Only the reply that is folded next is pulled; later ones wait in Flower's store (or in the local backend's
pool), so the coordinator holds one reply at a time and folds in a fixed order. A site that refuses, fails,
answers nonsense or misses the time limit is an `Answer` with a `problem`: the round's owner decides whether
the quorum still stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from xfed.common.codec import decode_reply, encode, payload_bytes
from xfed.common.errors import FederationError
from xfed.common.messages import Describe, Description, Refusal, Reply, Request

__all__ = ["Answer", "Exchange", "join"]

POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One site's answer to one request: a `reply`, or the `problem` in words."""

    site: str
    request: Request
    reply: Reply | None
    problem: str | None
    sent_bytes: int
    received_bytes: int


class Exchange:
    """The sites by name, and how to ask them."""

    def __init__(self, grid: Grid, nodes: dict[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._nodes = dict(sorted(nodes.items()))
        self._clock = clock

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(self._nodes)

    def ask(self, requests: Sequence[tuple[str, Request]], time_limit_s: float) -> Iterator[Answer]:
        """Send all requests, then yield the answers in the same order, each within `time_limit_s` of the sending."""
        encoded: dict[int, RecordDict] = {}
        waiting: list[tuple[str, Request, str, int]] = []
        for site, request in requests:
            if id(request) not in encoded:
                encoded[id(request)] = encode(request)
            record = encoded[id(request)]
            message = Message(
                record,
                dst_node_id=self._nodes[site],
                message_type=request.flower_type,
                ttl=time_limit_s,
                group_id=request.key[:200],
            )
            (message_id,) = self._grid.push_messages([message])
            waiting.append((site, request, message_id, payload_bytes(record)))
        encoded.clear()
        deadline = self._clock() + time_limit_s
        for site, request, message_id, sent in waiting:
            yield self._collect(site, request, message_id, sent, deadline, time_limit_s)

    def _collect(
        self, site: str, request: Request, message_id: str, sent: int, deadline: float, time_limit_s: float
    ) -> Answer:
        reply: Reply | None = None
        problem: str | None = None
        received = 0
        while True:
            replies = list(self._grid.pull_messages([message_id])) if message_id else []
            if replies:
                message = replies[0]
                if not message.has_content():
                    problem = f"the site failed: {message.error.reason} (Flower error {message.error.code})"
                    break
                received = payload_bytes(message.content)
                try:
                    reply = decode_reply(message.content)
                except FederationError as error:
                    problem = str(error)
                # Flower's records lie in a reference cycle: without this the decoded copy's twin waits for the collector
                for arrays in message.content.array_records.values():
                    arrays.clear()
                break
            if self._clock() >= deadline:
                problem = f"no answer within {time_limit_s:g} s"
                break
            time.sleep(POLL_S)
        if isinstance(reply, Refusal):
            problem, reply = f"refused ({reply.error}): {reply.reason}", None
        return Answer(
            site=site, request=request, reply=reply, problem=problem, sent_bytes=sent, received_bytes=received
        )


def join(grid: Grid, study: str, expected: int, time_limit_s: float) -> tuple[Exchange, dict[str, Description]]:
    """Wait until `expected` nodes are online, ask each who it is, and name them. Raises `FederationError`."""
    deadline = time.monotonic() + time_limit_s
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() >= deadline:
            raise FederationError(
                f"{len(nodes)} of {expected} sites came online within {time_limit_s:g} s (federation.join_limit_s). "
                "Start the missing sites, or lower sites.count."
            )
        time.sleep(POLL_S)
    provisional = Exchange(grid, {f"node {node}": node for node in nodes})
    request = Describe(study=study)
    by_name: dict[str, int] = {}
    descriptions: dict[str, Description] = {}
    for answer, node in zip(
        provisional.ask([(name, request) for name in provisional.sites], time_limit_s),
        [int(name.removeprefix("node ")) for name in provisional.sites],
        strict=True,
    ):
        if not isinstance(answer.reply, Description):
            raise FederationError(f"{answer.site} could not join: {answer.problem or 'it sent an unexpected reply'}")
        if answer.reply.site in by_name:
            raise FederationError(f"two sites call themselves {answer.reply.site!r}: each needs a name of its own")
        by_name[answer.reply.site] = node
        descriptions[answer.reply.site] = answer.reply
    return Exchange(grid, by_name), dict(sorted(descriptions.items()))
