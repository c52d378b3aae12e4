"""Rounds over a Grid: order, quorum, retries, refusals, nonsense, silence; and the local Grid itself."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.conftest import tiny
from xfed.common.codec import decode_request, encode
from xfed.common.errors import FederationError
from xfed.common.journal import Journal
from xfed.common.messages import Describe, Description, Examples, Refusal, ShowExamples
from xfed.server.census import census_of
from xfed.server.checkpoints import Checkpoints
from xfed.server.exchange import Exchange
from xfed.server.joining import join
from xfed.server.run import Run
from xfed.simulations.flower import LocalGrid


def _app(behave: Any) -> ClientApp:
    app = ClientApp()

    @app.query("ask")
    def ask(message: Message, context: Context) -> Message:
        reply = behave(int(context.node_config["partition-id"]), decode_request(message.content))
        return Message(reply if isinstance(reply, RecordDict) else encode(reply), reply_to=message)

    return app


def _describe(partition: int, request: Any) -> Description:
    counts = np.full((3, 3), 5, np.int64)
    return Description(
        site=f"site-{partition}",
        patients=9,
        share_examples=False,
        software="test",
        counts={"counts": counts, "drawn": counts[0], "holders": counts[0] // 5},
    )


def _join(grid: LocalGrid, folder: Path, sites: int, limit: float) -> Any:
    study = tiny(sites={"count": sites}, federation={"join_limit_s": limit, "secure_aggregation": "off"})
    return join(grid, study, Journal(folder / "events.jsonl"))


def _run(grid: LocalGrid, sites: int, folder: Path, **federation: Any) -> Run:
    study = tiny(
        sites={"count": sites},
        federation={"time_limit_s": 2.0, "join_limit_s": 10, "secure_aggregation": "off", **federation},
    )
    exchange, descriptions = join(grid, study, Journal(folder / "events.jsonl"))
    return Run(
        study=study,
        folder=folder,
        exchange=exchange,
        journal=Journal(folder / "events.jsonl"),
        checkpoints=Checkpoints(folder / "checkpoints", study.digest),
        descriptions=descriptions,
        census=census_of(descriptions, 3, secure=False),
    )


def test_answers_come_in_the_order_of_asking_whatever_the_order_of_finishing(tmp_path: Path) -> None:
    def behave(partition: int, request: Any) -> Any:
        if isinstance(request, Describe):
            return _describe(partition, request)
        time.sleep(0.3 if partition == 0 else 0.0)
        return Examples(site=f"site-{partition}", arrays={"images": np.full(2, partition, np.uint8)})

    grid = LocalGrid(_app(behave), 3, 3)
    try:
        exchange, _ = _join(grid, tmp_path, 3, 10)
        asked = [(site, ShowExamples(study="s", count=1)) for site in exchange.sites]
        got = [
            answer.reply.arrays["images"][0] for answer in exchange.ask(asked, 10) if isinstance(answer.reply, Examples)
        ]
        assert got == [0, 1, 2]
    finally:
        grid.close()


def test_finished_replies_do_not_pile_up(tmp_path: Path) -> None:
    """No more replies lie unpulled than there are workers, and pulling a late one first does not deadlock."""
    started: list[int] = []
    lock = threading.Lock()

    def behave(partition: int, request: Any) -> Any:
        if isinstance(request, ShowExamples):
            with lock:
                started.append(partition)
        return _describe(partition, request)

    grid = LocalGrid(_app(behave), 12, 2)
    try:
        _join(grid, tmp_path, 12, 10)
        nodes = sorted(grid.get_node_ids())
        ids = []
        for node in nodes:
            message = Message(encode(ShowExamples(study="s", count=1)), dst_node_id=node, message_type="query.ask")
            ids += list(grid.push_messages([message]))
        time.sleep(0.6)
        assert len(started) <= 4  # two workers, two finished and unpulled at most, while nobody pulls
        deadline = time.monotonic() + 10
        waiting = list(reversed(ids))
        while waiting and time.monotonic() < deadline:
            if list(grid.pull_messages([waiting[0]])):
                waiting.pop(0)
        assert not waiting
        assert len(started) == 12
    finally:
        grid.close()


def test_failures_are_named_and_the_quorum_decides(tmp_path: Path) -> None:
    calls = {"count": 0}

    def behave(partition: int, request: Any) -> Any:
        if isinstance(request, Describe):
            return _describe(partition, request)
        calls["count"] += 1
        if partition == 0:
            raise RuntimeError("the disk caught fire")
        if partition == 1:
            return Refusal(site="site-1", error="RefusedError", reason="not on a Sunday")
        if partition == 2:
            return RecordDict()
        return Examples(site=f"site-{partition}", arrays={"images": np.zeros(1, np.uint8)})

    grid = LocalGrid(_app(behave), 5, 2)
    try:
        run = _run(grid, 5, tmp_path, quorum=0.4, retries=1)
        seen: list[str] = []
        requests = [(site, ShowExamples(study="s", count=1)) for site in run.exchange.sites]
        run.ask("test", 1, requests, lambda site, request, reply: seen.append(site))
        assert seen == ["site-3", "site-4"]
        problems = {e["site"]: e["text"] for e in run.journal.read() if e["kind"] == "problem"}
        assert "the disk caught fire" in problems["site-0"]
        assert "not on a Sunday" in problems["site-1"]
        assert "not a message" in problems["site-2"]
        strict = _run(grid, 5, tmp_path, quorum=0.8, retries=1)
        before = calls["count"]
        with pytest.raises(FederationError, match="2 of 5 sites answered"):
            strict.ask("test", 2, requests, lambda site, request, reply: None)
        assert calls["count"] - before == 5 + 3  # the second attempt asks only those who are missing
    finally:
        grid.close()


def test_a_silent_site_costs_the_time_limit_and_no_more(tmp_path: Path) -> None:
    gate = threading.Event()

    def behave(partition: int, request: Any) -> Any:
        if isinstance(request, ShowExamples) and partition == 0:
            gate.wait(20)
        return _describe(partition, request) if isinstance(request, Describe) else Examples(site="x", arrays={})

    grid = LocalGrid(_app(behave), 2, 2)
    try:
        run = _run(grid, 2, tmp_path, time_limit_s=0.8, retries=0, quorum=0.5)
        started = time.monotonic()
        requests = [(site, ShowExamples(study="s", count=1)) for site in run.exchange.sites]
        run.ask("test", 1, requests, lambda site, request, reply: None)
        assert 0.7 < time.monotonic() - started < 5
        (problem,) = [e for e in run.journal.read() if e["kind"] == "problem"]
        assert problem["site"] == "site-0"
        assert "no answer within" in problem["text"]
    finally:
        gate.set()
        grid.close()


def test_a_fold_that_refuses_an_update_counts_as_no_answer(tmp_path: Path) -> None:
    grid = LocalGrid(_app(_describe), 2, 1)
    try:
        run = _run(grid, 2, tmp_path, quorum=1.0, retries=0)

        def fold(site: str, request: Any, reply: Any) -> None:
            raise FederationError(f"{site} sent NaN")

        with pytest.raises(FederationError, match="0 of 2"):
            run.ask("test", 1, [(site, ShowExamples(study="s", count=1)) for site in run.exchange.sites], fold)
        assert sum("sent NaN" in event.get("text", "") for event in run.journal.read()) == 2
    finally:
        grid.close()


def test_joining_waits_in_bounded_time_and_names_must_differ(tmp_path: Path) -> None:
    def twins(partition: int, request: Any) -> Any:
        return Description(site="same", patients=1, share_examples=False, software="t", counts={})

    grid = LocalGrid(_app(_describe), 2, 1)
    try:
        with pytest.raises(FederationError, match="2 of 3 sites joined within"):
            _join(grid, tmp_path, 3, 0.3)
    finally:
        grid.close()
    grid = LocalGrid(_app(twins), 2, 1)
    try:
        with pytest.raises(FederationError, match="two sites call themselves 'same'"):
            _join(grid, tmp_path, 2, 5)
    finally:
        grid.close()


def test_checkpoints_fall_back_to_the_last_whole_one_and_refuse_another_study(tmp_path: Path) -> None:
    from xfed.common.errors import CheckpointError

    kept = Checkpoints(tmp_path, "study-a")
    for round in range(1, 5):
        kept.save("gan", round, {"w": np.full(3, round, np.float32)}, {"round": round})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gan-000003.safetensors", "gan-000004.safetensors"]
    latest = kept.latest("gan")
    assert latest is not None
    assert latest.round == 4
    newest = tmp_path / "gan-000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-2])
    latest = kept.latest("gan")
    assert latest is not None
    assert (latest.round, latest.facts) == (3, {"round": 3})
    assert kept.latest("classifier") is None
    with pytest.raises(CheckpointError, match="another study"):
        Checkpoints(tmp_path, "study-b").latest("gan")


def test_exchange_needs_no_real_clock() -> None:
    """A clock that jumps past the limit ends the wait: the bound is the clock's, not a count of polls."""

    class Silent(LocalGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            return []

    ticks = itertools.chain([0.0] * 6, itertools.repeat(100.0))
    grid = Silent(_app(_describe), 1, 1)
    try:
        exchange = Exchange(grid, {"a": 2}, clock=lambda: next(ticks))
        (answer,) = exchange.ask([("a", Describe(study="s"))], 50)
        assert answer.problem == "no answer within 50 s"
    finally:
        grid.close()


def test_a_reply_past_its_time_to_live_is_dropped_and_blocks_nobody(tmp_path: Path) -> None:
    def behave(partition: int, request: Any) -> Any:
        if isinstance(request, ShowExamples):
            time.sleep(0.5)
        return _describe(partition, request)

    grid = LocalGrid(_app(behave), 1, 1)
    try:
        node = next(iter(grid.get_node_ids()))
        late = Message(encode(ShowExamples(study="s", count=1)), dst_node_id=node, message_type="query.ask", ttl=0.1)
        (late_id,) = grid.push_messages([late])
        time.sleep(0.9)
        assert list(grid.pull_messages([late_id])) == []
        exchange, _ = _join(grid, tmp_path, 1, 5)  # the pool still works
        assert exchange.sites == ("site-0",)
    finally:
        grid.close()


def test_send_and_receive_gives_every_reply_or_gives_up_in_time() -> None:
    grid = LocalGrid(_app(_describe), 3, 2)
    try:
        messages = [
            Message(encode(Describe(study="s")), dst_node_id=node, message_type="query.ask")
            for node in grid.get_node_ids()
        ]
        assert len(list(grid.send_and_receive(messages, timeout=10))) == 3
        started = time.monotonic()
        slow = Message(encode(Describe(study="s")), dst_node_id=2, message_type="query.nobody")
        (reply,) = grid.send_and_receive([slow], timeout=10)
        assert reply.has_error()
        assert list(grid.send_and_receive([], timeout=0.2)) == []
        assert time.monotonic() - started < 5
    finally:
        grid.close()
