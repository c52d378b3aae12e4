"""The coordinator's own conduct: who is a member while it runs, which plan it goes on with, how large an answer may be."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from tests.conftest import tiny
from tests.coordinator import coordinator
from tests.joined import federation_of
from xfed.client.link import FleetLink, LinkLostError
from xfed.common import messages as m
from xfed.common.codec import encode
from xfed.common.durable import write_json
from xfed.common.errors import ConfigError, IdentityError
from xfed.common.packing import pack
from xfed.server.deployment import plan_for


def _wait_for_refusal(link: FleetLink, kind: type[Exception]) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            link.receive()
        except kind as error:
            return str(error)
        time.sleep(0.1)
    raise AssertionError(f"no {kind.__name__} within 10 s")


def test_a_damaged_member_file_makes_sites_wait_and_a_revocation_makes_them_leave(tmp_path: Path) -> None:
    with coordinator(tmp_path) as host:
        home = host.homes["site-01"]
        link = FleetLink(host.address, home.ca_pem, home.private_key, tmp_path / "node")
        link.connect()
        assert link.receive() is None
        path = host.federation.folder / "members" / "site-02.json"
        whole = path.read_text()
        path.write_text(whole[:50])
        assert "503" in _wait_for_refusal(link, LinkLostError)
        path.write_text(whole)
        deadline = time.monotonic() + 10
        while True:
            try:
                assert link.receive() is None
                break
            except LinkLostError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        host.federation.revoke("site-01", "left the study")
        assert "revoked" in _wait_for_refusal(link, IdentityError)
        link.close()


def test_a_begun_study_keeps_its_members_and_a_new_one_takes_those_who_are_there(tmp_path: Path) -> None:
    federation, _ = federation_of(tmp_path, "a", "b", "c")
    study = tiny(sites={"count": 3}, federation={"quorum": 0.6})
    begun = plan_for(federation, study, tmp_path / "run")
    write_json(tmp_path / "run" / "plan.json", {"plan": begun.text, "signature": "", "digest": begun.digest})
    federation.revoke("c", "left")
    assert plan_for(federation, study, tmp_path / "run").digest == begun.digest
    with pytest.raises(ConfigError, match=r"3 sites .*2 active members"):
        plan_for(federation, study, tmp_path / "another")
    other = tiny(sites={"count": 2}, federation={"quorum": 0.6})
    assert sorted(plan_for(federation, other, tmp_path / "run").members) == ["a", "b"]


def test_an_answer_larger_than_any_answer_of_the_study_is_left_out(tmp_path: Path) -> None:
    with coordinator(tmp_path) as host:
        host.grid._reply_limit = 100_000
        server = TaskIdentity.run_id, TaskIdentity.node_id
        home = host.homes["site-01"]
        link = FleetLink(host.address, home.ca_pem, home.private_key, tmp_path / "node")
        link.connect()
        for size, fits in ((1_000, True), (1_000_000, False)):
            TaskIdentity.run_id, TaskIdentity.node_id = (
                server  # Flower keeps who speaks in a class, and both sides are here
            )
            record = encode(m.ShowExamples(study="s", count=1))
            asked = Message(record, dst_node_id=host.node("site-01"), message_type="query.ask", ttl=60)
            (message_id,) = host.grid.push_messages([asked])
            TaskIdentity.node_id = host.node("site-01")
            letter = link.receive()
            assert letter is not None
            images = np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8)
            link.send(letter, *pack(m.Examples(site="site-01", arrays={"images": images})))
            (reply,) = host.grid.pull_messages([message_id])
            assert reply.has_content() == fits
            assert fits or "larger than the 100,000 bytes" in reply.error.reason
        link.close()
