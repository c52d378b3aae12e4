"""What a hostile network may try, a test each: it is refused, told why where that helps an honest site, and nothing happens."""

from __future__ import annotations

import base64
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree, no_object_id_recompute
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.task_identity import TaskIdentity

from tests.conftest import tiny
from tests.coordinator import Attacker, Coordinator, coordinator, enrol
from xfed.client import agent
from xfed.client.agent import run_agent
from xfed.client.desk import Desk
from xfed.client.home import load_home
from xfed.client.link import FleetLink, LinkLostError
from xfed.client.policy import default_policy_text
from xfed.common.bundle import DIGEST
from xfed.common.codec import decode_reply, encode
from xfed.common.durable import write_json, write_text
from xfed.common.errors import IdentityError
from xfed.common.messages import Describe, PlanStatus, ProposePlan, Refusal
from xfed.common.packing import pack, unpack_reply
from xfed.common.plan import new_plan
from xfed.common.stopping import StopFlag
from xfed.server import patience
from xfed.server.federation import Federation, found_federation
from xfed.server.gate import AHEAD_S, BEHIND_S, BODY_LIMIT, PATHS
from xfed.simulations.deployed import command

TTL_S = 60.0


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question for messages is answered at once: there seldom are any here."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("refusals"), tiny(sites={"count": 3})) as made:
        yield made


@pytest.fixture
def member(running: Coordinator) -> Attacker:
    return running.attacker(running.homes["site-01"].private_key)


@pytest.fixture
def other(running: Coordinator) -> Attacker:
    return running.attacker(running.homes["site-02"].private_key)


def _detail(answer: httpx.Response) -> str:
    return str(answer.json()["detail"])


def _stamp(shift_s: float = 0.0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=shift_s)).isoformat(timespec="microseconds")


def _online(coordinator: Coordinator, attacker: Attacker) -> int:
    answer = attacker.activate()
    if answer.status_code == 412:  # it is online already
        name = next(n for n, home in coordinator.homes.items() if home.private_key is attacker.key)
        return coordinator.node(name)
    assert answer.status_code == 200, answer.text
    return int(ActivateNodeResponse.FromString(answer.content).node_id)


# ---------------------------------------------------------------- who speaks


def test_an_admitted_site_is_let_in(running: Coordinator, member: Attacker) -> None:
    """The control: every refusal below is of something that differs from this."""
    node = _online(running, member)
    assert node == running.node("site-01")
    assert member.pull(node).status_code == 200


def test_no_key(running: Coordinator) -> None:
    for path in sorted(PATHS):
        answer = running.attacker().post(path, b"")
        assert answer.status_code == 401
        assert _detail(answer).startswith("credential")


def test_a_key_that_nobody_admitted(running: Coordinator) -> None:
    stranger = running.attacker(ec.generate_private_key(ec.SECP384R1()))
    answer = stranger.activate()
    assert answer.status_code == 401
    assert _detail(answer).startswith("member")
    assert len(running.link.nodes()) == 3


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("flwr-public-key", ""),
        ("flwr-public-key", "!!!"),
        ("flwr-public-key", base64.b64encode(b"-----BEGIN PUBLIC KEY-----\n").decode()),
        ("flwr-signature", ""),
        ("flwr-signature", "%%%"),
        ("flwr-signature", base64.b64encode(b"\x30\x06\x02\x01\x00\x02\x01\x00").decode()),
        ("flwr-signature", base64.b64encode(bytes(96)).decode()),
        ("flwr-timestamp", ""),
        ("flwr-timestamp", "now"),
        ("flwr-timestamp", "2026-01-01T00:00:00"),
        ("flwr-timestamp", "9999-12-31T23:59:59.999999+00:00"),
        ("flwr-timestamp", "0001-01-01T00:00:00.000000+23:59"),
        ("flwr-timestamp", "1e400"),
    ],
)
def test_a_credential_that_is_none(member: Attacker, header: str, value: str) -> None:
    assert member.activate({**member.signed(), header: value}).status_code == 401


@pytest.mark.parametrize("missing", ["flwr-public-key", "flwr-signature", "flwr-timestamp"])
def test_half_a_credential(member: Attacker, missing: str) -> None:
    headers = {name: value for name, value in member.signed().items() if name != missing}
    answer = member.activate(headers)
    assert answer.status_code == 401
    assert _detail(answer).startswith("credential")


def test_a_members_key_with_a_strangers_signature(running: Coordinator, member: Attacker) -> None:
    stranger = running.attacker(ec.generate_private_key(ec.SECP384R1()))
    stamp = _stamp()
    forged = {**stranger.signed(stamp), "flwr-public-key": member.signed(stamp)["flwr-public-key"]}
    answer = member.activate(forged)
    assert answer.status_code == 401
    assert _detail(answer).startswith("signature")


def test_another_members_number(running: Coordinator, member: Attacker, other: Attacker) -> None:
    mine, theirs = _online(running, member), _online(running, other)
    assert mine != theirs
    assert member.pull(theirs).status_code == 401
    answer = member.post("/v1/fleet/deactivate-node", DeactivateNodeRequest(node_id=theirs))
    assert answer.status_code == 401
    assert next(info for info in running.link.nodes() if info.node_id == theirs).status == "online"


def test_another_members_key_in_the_body(running: Coordinator, member: Attacker, other: Attacker) -> None:
    assert member.activate(key=other.public).status_code == 401


def test_credentials_of_two(running: Coordinator, member: Attacker, other: Attacker) -> None:
    """Gate and Flower must not read different ones of two headers: a member could speak for another with what it recorded."""
    _online(running, other)
    theirs, recorded = running.node("site-02"), other.signed()
    assert other.pull(theirs, recorded).status_code == 200  # seen on the wire, and used up
    body = PullMessagesRequest(node=Node(node_id=theirs)).SerializeToString()
    for first, second in ((recorded, member.signed()), (member.signed(), recorded)):
        lines = "".join(f"{name}: {value}\r\n" for pair in (first, second) for name, value in pair.items())
        status, came = member.raw(
            f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\n{lines}\r\n".encode()
            + body
        )
        assert status == 401, came


# ---------------------------------------------------------------- when


@pytest.mark.parametrize("shift", [AHEAD_S + 5, 3600.0, 86400.0 * 365])
def test_a_time_to_come(member: Attacker, shift: float) -> None:
    answer = member.activate(member.signed(_stamp(shift)))
    assert answer.status_code == 401
    assert _detail(answer).startswith("clock")
    seen = datetime.fromisoformat(answer.json()["server_time"])
    assert abs((datetime.now(UTC) - seen).total_seconds()) < 5  # an honest site learns by how much it is wrong


@pytest.mark.parametrize("shift", [-BEHIND_S - 5, -3600.0, -86400.0 * 365])
def test_a_time_long_gone(member: Attacker, shift: float) -> None:
    answer = member.activate(member.signed(_stamp(shift)))
    assert answer.status_code == 401
    assert _detail(answer).startswith("clock")


def test_a_request_from_before_this_coordinator_started(member: Attacker) -> None:
    """What was recorded before a restart is not good after it, though nothing of used signatures is kept on disk."""
    answer = member.activate(member.signed(_stamp(-BEHIND_S + 20)))
    assert answer.status_code == 401
    assert "older than the running coordinator" in _detail(answer)


def test_the_same_request_again(running: Coordinator, member: Attacker) -> None:
    node, headers = _online(running, member), member.signed()
    assert member.pull(node, headers).status_code == 200
    for _ in range(2):
        answer = member.pull(node, headers)
        assert answer.status_code == 401
        assert _detail(answer).startswith("replay")


def test_the_signature_of_one_request_on_another(running: Coordinator, member: Attacker) -> None:
    node, headers = _online(running, member), member.signed()
    assert member.pull(node, headers).status_code == 200
    assert member.pull(node + 1, headers).status_code == 401  # another body
    answer = member.post("/v1/fleet/deactivate-node", DeactivateNodeRequest(node_id=node), headers)  # another path
    assert answer.status_code == 401
    assert _detail(answer).startswith("replay")
    assert next(info for info in running.link.nodes() if info.node_id == node).status == "online"


def test_the_same_signature_written_otherwise(running: Coordinator, member: Attacker) -> None:
    """(r, s) and (r, -s) sign the same: the second is no new request."""
    node, headers = _online(running, member), member.signed()
    assert member.pull(node, headers).status_code == 200
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    r, s = decode_dss_signature(base64.b64decode(headers["flwr-signature"]))
    twin = base64.b64encode(encode_dss_signature(r, order - s)).decode()
    answer = member.pull(node, {**headers, "flwr-signature": twin})
    assert answer.status_code == 401
    assert _detail(answer).startswith("replay")


def test_the_same_time_spelt_otherwise_needs_a_signature_of_its_own(running: Coordinator, member: Attacker) -> None:
    node, headers = _online(running, member), member.signed()
    assert member.pull(node, headers).status_code == 200
    for spelling in (headers["flwr-timestamp"].replace("+00:00", "Z"), headers["flwr-timestamp"].replace("T", " ")):
        assert member.pull(node, {**headers, "flwr-timestamp": spelling}).status_code == 401


def test_of_many_copies_at_once_one_is_taken(running: Coordinator, member: Attacker) -> None:
    node, headers, codes = _online(running, member), member.signed(), []
    threads = [threading.Thread(target=lambda: codes.append(member.pull(node, headers).status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] + [401] * 7


# ---------------------------------------------------------------- how much


def test_a_body_that_is_too_large_is_not_read(member: Attacker) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in member.signed().items())
    for length in (str(BODY_LIMIT + 1), "9" * 19):
        head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{lines}\r\n"
        assert member.raw(head.encode())[0] in (400, 413), length


@pytest.mark.parametrize(
    "length", ["", "Content-Length: -1\r\n", "Content-Length: 0x10\r\n", "Content-Length: 1\r\nContent-Length: 2\r\n"]
)
def test_a_body_without_a_length(member: Attacker, length: str) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in member.signed().items())
    status, _ = member.raw(f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\n{length}{lines}\r\n".encode())
    assert status in (400, 413), status


@pytest.mark.parametrize("length", ["", "Content-Length: 5\r\n"])
def test_a_body_in_chunks(member: Attacker, length: str) -> None:
    """Its size is known at its end only; with a length beside it, two readers could disagree where it ends."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in member.signed().items())
    head = f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n{length}{lines}\r\n"
    assert member.raw(head.encode() + b"5\r\nhello\r\n0\r\n\r\n")[0] in (400, 413)


def test_a_body_that_is_no_message(running: Coordinator, member: Attacker) -> None:
    _online(running, member)
    for path in sorted(PATHS):
        answer = member.post(path, b"\xff" * 64)
        assert 400 <= answer.status_code < 500, path
        assert "Traceback" not in answer.text


# ---------------------------------------------------------------- whose messages


def _asked(running: Coordinator, site: str) -> Message:
    # Flower keeps who speaks in a class; an agent in this process says it is the site
    before = TaskIdentity.run_id, TaskIdentity.node_id
    TaskIdentity.run_id, TaskIdentity.node_id = running.grid.run_id, SUPERLINK_NODE_ID
    try:
        message = Message(
            encode(Describe(study=running.plan.study.digest)),
            dst_node_id=running.node(site),
            message_type=Describe.flower_type,
            ttl=TTL_S,
            group_id="test",
        )
        (message_id,) = running.grid.push_messages([message])
    finally:
        TaskIdentity.run_id, TaskIdentity.node_id = before
    assert message_id
    return message


def _reply_as(source: int, asked: Message) -> Message:
    """A reply to `asked`, said to come from `source`."""
    reply = Message(encode(Refusal(site="site-02", error="RefusedError", reason="forged")), reply_to=asked)
    reply.metadata.__dict__["_src_node_id"] = source
    return reply


def _push(sender: Attacker, node: int, message: Message) -> httpx.Response:
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )
    return sender.post("/v1/fleet/push-messages", request)


def test_an_answer_in_anothers_name(running: Coordinator, member: Attacker, other: Attacker) -> None:
    mine, theirs = _online(running, member), _online(running, other)
    asked = _asked(running, "site-02")
    forged = _push(member, mine, _reply_as(theirs, asked))
    assert forged.status_code == 403
    assert list(running.grid.pull_messages([asked.metadata.message_id])) == []
    honest = _push(other, theirs, _reply_as(theirs, asked))
    assert honest.status_code == 200
    assert PushMessagesResponse.FromString(honest.content).objects_to_push
    running.grid.discard(asked.metadata.message_id)


def test_a_request_in_the_coordinators_name(running: Coordinator, member: Attacker, other: Attacker) -> None:
    """Flower stores what is pushed without a `reply_to` as a request to whom it names: a member could instruct another one."""
    mine, theirs = _online(running, member), _online(running, other)
    forged = Message(
        encode(Describe(study=running.plan.study.digest)),
        dst_node_id=theirs,
        message_type=Describe.flower_type,
        ttl=TTL_S,
        group_id="forged",
    )
    for name, value in (("_src_node_id", SUPERLINK_NODE_ID), ("_run_id", running.grid.run_id)):
        forged.metadata.__dict__[name] = value
    assert _push(member, mine, forged).status_code == 403
    assert list(PullMessagesResponse.FromString(other.pull(theirs).content).messages_list) == []


def test_what_one_site_can_read_of_another(running: Coordinator, member: Attacker, other: Attacker) -> None:
    """Flower hands an object to any admitted site that names its SHA-256. So names must not be guessable, and are not told:
    a site sees its own messages only, and a name covers the content, the receiver and the time of sending.
    """
    mine, theirs = _online(running, member), _online(running, other)
    asked = _asked(running, "site-02")
    assert list(PullMessagesResponse.FromString(member.pull(mine).content).messages_list) == []
    run = running.grid.run_id

    def read(object_id: str, run_id: int = run) -> httpx.Response:
        request = PullObjectRequest(node=Node(node_id=mine), run_id=run_id, object_id=object_id)
        return member.post("/v1/fleet/pull-object", request)

    assert PullObjectResponse.FromString(read(asked.metadata.message_id).content).object_found  # what is not kept apart
    assert not PullObjectResponse.FromString(read("0" * 64).content).object_found
    assert read(asked.metadata.message_id, run + 1).status_code >= 400  # another run
    # nobody takes away what another one waits for, when both were sent the same content
    again = _asked(running, "site-01")
    shared = {node.object_id for node in iterate_object_tree(get_object_tree(asked))}
    shared &= {node.object_id for node in iterate_object_tree(get_object_tree(again))}
    assert shared
    for object_id in shared:
        gone = ConfirmMessageReceivedRequest(node=Node(node_id=mine), run_id=run, message_object_id=object_id)
        member.post("/v1/fleet/confirm-message-received", gone)
    received = PullMessagesResponse.FromString(other.pull(theirs).content)
    for node in iterate_object_tree(received.message_object_trees[0]):
        pull = PullObjectRequest(node=Node(node_id=theirs), run_id=run, object_id=node.object_id)
        assert PullObjectResponse.FromString(other.post("/v1/fleet/pull-object", pull).content).object_content
    for message in (asked, again):
        running.grid.discard(message.metadata.message_id)


# ---------------------------------------------------------------- revoked


def test_a_revoked_key_is_shut_out_at_once(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        member = running.attacker(running.homes["site-01"].private_key)
        node = _online(running, member)
        with httpx.Client(verify=member.trust, timeout=10, trust_env=False) as client:

            def ask() -> httpx.Response:
                body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
                headers = {"content-type": PROTOBUF_MEDIA_TYPE, **member.signed()}
                return client.post(f"https://{running.address}/v1/fleet/pull-messages", content=body, headers=headers)

            assert ask().status_code == 200
            running.federation.revoke("site-01", "left the study")
            revoked = time.monotonic()
            while (answer := ask()).status_code == 200:  # on the connection that was open before
                assert time.monotonic() - revoked < 2
                time.sleep(0.05)
        assert answer.status_code == 401
        assert _detail(answer).startswith("member")
        assert member.activate().status_code == 401
        deadline = time.monotonic() + 5
        while [info.name for info in running.link.nodes()] != ["site-02"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.attacker(running.homes["site-02"].private_key).activate().status_code == 200


def test_a_membership_that_ended(tmp_path: Path) -> None:
    with coordinator(tmp_path) as running:
        member = running.attacker(running.homes["site-01"].private_key)
        assert member.activate().status_code == 200
        record = running.federation.members()["site-01"]
        ended = dataclasses.replace(record, expires=datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1))
        write_json(running.federation.folder / "members" / "site-01.json", ended.values())
        written = time.monotonic()
        while (answer := member.post("/v1/fleet/pull-messages", b"")).status_code != 401 or "member" not in answer.text:
            assert time.monotonic() - written < 2
            time.sleep(0.05)


# ---------------------------------------------------------------- the site's side: who answers, and what comes


class _NoWorker:
    """Stands for the worker process, and must not be asked."""

    asked = 0

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def ask(self, *_: Any) -> tuple[str, bytes]:
        _NoWorker.asked += 1
        raise AssertionError("the worker was asked")


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_NoWorker]]:
    monkeypatch.setattr(agent, "Worker", _NoWorker)
    _NoWorker.asked = 0
    yield _NoWorker
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


def _serve(running: Coordinator, site: str, until: Callable[[], bool], limit_s: float = 20) -> list[BaseException]:
    """Run the real agent of a site until something is so; returns what it died of."""
    stop, died = StopFlag(), []

    def serve() -> None:
        try:
            run_agent(running.homes[site], lambda kind, facts: None, stop)
        except BaseException as error:
            died.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    deadline, ended = time.monotonic() + limit_s, False
    try:
        while not ended and time.monotonic() < deadline:
            ended = until() or not thread.is_alive()
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join(limit_s)
    assert ended, "it did not come to that"
    return died


def test_a_foreign_bundle_is_refused_and_nothing_of_it_is_opened(tmp_path: Path, no_worker: type[_NoWorker]) -> None:
    with coordinator(tmp_path, bundle="0" * 64) as running:
        asked: list[Message] = []
        replies: list[Message] = []

        def answered() -> bool:
            if asked:
                replies.extend(running.grid.pull_messages([asked[0].metadata.message_id]))
            elif any(info.name == "site-01" and info.status == "online" for info in running.link.nodes()):
                asked.append(_asked(running, "site-01"))
            return bool(replies)

        assert _serve(running, "site-01", answered) == []
        reply = decode_reply(replies[0].content)
        assert isinstance(reply, Refusal)
        assert (reply.site, reply.error) == ("site-01", "RefusedError")
        assert "bundle 000000000000" in reply.reason
        assert DIGEST[:12] in reply.reason
        assert no_worker.asked == 0


def test_a_revoked_site_ends_with_the_reason(tmp_path: Path, no_worker: type[_NoWorker]) -> None:
    with coordinator(tmp_path) as running:
        began = time.monotonic()
        done: list[float] = []

        def revoke() -> bool:
            online = any(info.name == "site-01" and info.status == "online" for info in running.link.nodes())
            if online and not done:
                running.federation.revoke("site-01", "left the study")
                done.append(time.monotonic() - began)
            return False

        (error,) = _serve(running, "site-01", revoke)
        assert isinstance(error, IdentityError)
        assert "revoked" in str(error)
        assert time.monotonic() - began - done[0] < 20  # 2 s on a quiet machine


def test_a_server_of_another_ca(running: Coordinator, tmp_path: Path) -> None:
    """The same address and name, but a certificate of somebody else's federation: the site sends it nothing."""
    pretender = found_federation(tmp_path / "other", name="tests", address=running.address)
    home = enrol(tmp_path / "site", "site-09", pretender)
    before = dict(running.gate.refused)
    link = FleetLink(running.address, home.ca_pem, home.private_key, tmp_path / "node")
    with pytest.raises(IdentityError, match="certificate is not this federation's"):
        link.connect()
    link.close()
    assert running.gate.refused == before


def test_a_server_under_another_name(running: Coordinator, tmp_path: Path) -> None:
    home = running.homes["site-03"]
    link = FleetLink(f"localhost:{running.port}", home.ca_pem, home.private_key, tmp_path / "node")
    with pytest.raises(IdentityError, match="certificate"):
        link.connect()
    link.close()


def test_a_server_without_tls(tmp_path: Path, running: Coordinator) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as plain:
        heard: list[bytes] = []

        def answer() -> None:
            connection, _ = plain.accept()
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        home = running.homes["site-03"]
        link = FleetLink(f"127.0.0.1:{plain.getsockname()[1]}", home.ca_pem, home.private_key, tmp_path / "node")
        with pytest.raises((LinkLostError, IdentityError)):
            link.connect()
        link.close()
        thread.join(10)
    assert heard[0][:1] == b"\x16"  # a TLS handshake, not a request
    assert b"flwr" not in heard[0]


def test_the_client_command_ends_with_9_at_a_server_of_another_ca(running: Coordinator, tmp_path: Path) -> None:
    import subprocess

    pretender = found_federation(tmp_path / "other", name="tests", address=running.address)
    enrol(tmp_path / "site", "site-09", pretender)
    done = subprocess.run(
        command("xfed-client", "start", "--dir", tmp_path / "site"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    assert "certificate is not this federation's" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_command_ends_with_9_when_revoked(tmp_path: Path) -> None:
    import subprocess

    with coordinator(tmp_path) as running:
        running.federation.revoke("site-01", "left the study")
        done = subprocess.run(
            command("xfed-client", "start", "--dir", running.homes["site-01"].folder),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 9, done.stderr
    assert "revoked" in done.stderr


# ---------------------------------------------------------------- plans


@dataclasses.dataclass(frozen=True)
class _Hospital:
    desk: Desk
    folder: Path
    federation: Federation

    def propose(self, text: str, signature: str, study: str = "0" * 64) -> Any:
        request = ProposePlan(study=study, plan=text, signature=signature)
        return unpack_reply(*self.desk.answer_packed({"run": "1"}, *pack(request)))

    def plans(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "plans").glob("*.json"))


@pytest.fixture
def hospital(tmp_path: Path) -> _Hospital:
    federation = found_federation(tmp_path / "federation", name="tests", address="127.0.0.1:9092")
    home = enrol(tmp_path / "site-01", "site-01", federation)
    enrol(tmp_path / "site-02", "site-02", federation)
    write_text(home.folder / "policy.yaml", default_policy_text())
    return _Hospital(Desk(home.folder), home.folder, federation)


def _plan(federation: Federation, **changes: Any) -> Any:
    members = {name: member.public_key for name, member in federation.active_members().items()}
    return new_plan(tiny(**changes), federation=federation.name, members=members, bundle=DIGEST)


def test_a_genuine_plan_is_kept_and_waits(hospital: _Hospital) -> None:
    plan = _plan(hospital.federation)
    reply = hospital.propose(plan.text, hospital.federation.sign("plan", plan.values()))
    assert isinstance(reply, PlanStatus)
    assert not reply.approved
    assert hospital.plans() == [f"{plan.digest}.json"]


def _one_more_round(text: str) -> str:
    changed = text.replace('"rounds":3', '"rounds":9', 1)
    assert changed != text
    return changed


@pytest.mark.parametrize(
    "change",
    [
        _one_more_round,
        lambda text: text.replace('"site-02"', '"site-03"', 1),
        lambda text: text + " ",
        lambda text: " " + text,
        lambda text: text[:-1],
        lambda text: text.replace(":", ": ", 1),
        lambda text: text.replace("{", '{"gan":{},', 1),
        lambda text: "",
        lambda text: "{}",
    ],
)
def test_a_changed_plan(hospital: _Hospital, change: Callable[[str], str]) -> None:
    plan = _plan(hospital.federation)
    reply = hospital.propose(change(plan.text), hospital.federation.sign("plan", plan.values()))
    assert isinstance(reply, Refusal)
    assert reply.error == "IdentityError"
    assert hospital.plans() == []


def test_a_plan_with_a_signature_that_is_not_its_own(hospital: _Hospital, tmp_path: Path) -> None:
    plan, longer = _plan(hospital.federation), _plan(hospital.federation, gan={"rounds": 9})
    stranger = found_federation(tmp_path / "other", name="tests", address="127.0.0.1:9092")
    good = hospital.federation.sign("plan", plan.values())
    raw = bytearray(base64.b64decode(good))
    raw[-1] ^= 1
    forged = {
        "none": "",
        "not base64": "!" + good[1:],
        "one bit": base64.b64encode(bytes(raw)).decode(),
        "of another plan": hospital.federation.sign("plan", longer.values()),
        "of the same words for another purpose": hospital.federation.sign("kit", plan.values()),
        "of another federation of the same name": stranger.sign("plan", plan.values()),
    }
    for kind, signature in forged.items():
        reply = hospital.propose(plan.text, signature)
        assert isinstance(reply, Refusal), kind
        assert reply.error == "IdentityError", kind
    assert hospital.plans() == []


def test_a_plan_of_another_federation_or_for_others(hospital: _Hospital) -> None:
    federation, base = hospital.federation, _plan(hospital.federation)
    without = {name: key for name, key in base.members.items() if name != "site-01"}
    alone = new_plan(tiny(sites={"count": 1}), federation=federation.name, members=without, bundle=DIGEST)
    mixed = {"site-01": base.members["site-02"], "site-02": base.members["site-01"]}
    for plan in (
        dataclasses.replace(base, federation="others"),
        dataclasses.replace(base, members=mixed),
        alone,
        dataclasses.replace(base, bundle="0" * 64),
    ):
        assert isinstance(hospital.propose(plan.text, federation.sign("plan", plan.values())), Refusal)
    assert hospital.plans() == []


def test_an_old_plan_again_approves_nothing(hospital: _Hospital) -> None:
    """A genuine plan of an earlier study may be recorded and shown again: the study at hand stays unapproved."""
    from xfed.client.approval import Plans
    from xfed.client.policy import Policy

    federation, home = hospital.federation, load_home(hospital.folder)
    old, new = _plan(federation), _plan(federation, gan={"rounds": 9})
    hospital.propose(old.text, federation.sign("plan", old.values()))
    plans = Plans(hospital.folder, home.ca_pem, home.federation, home.name, home.public_key)
    plans.approve(old.digest, Policy.permissive())
    hospital.propose(new.text, federation.sign("plan", new.values()), study=new.study.digest)
    again = hospital.propose(old.text, federation.sign("plan", old.values()), study=new.study.digest)
    assert isinstance(again, PlanStatus)
    assert again.digest == old.digest  # the coordinator is told which plan is meant
    reply = unpack_reply(*hospital.desk.answer_packed({"run": "1"}, *pack(Describe(study=new.study.digest))))
    assert isinstance(reply, Refusal)
    assert reply.error == "RefusedError"
    assert "waits for approval" in reply.reason


def test_an_approved_plan_that_was_changed_on_disk(hospital: _Hospital) -> None:
    federation, plan = hospital.federation, _plan(hospital.federation)
    hospital.propose(plan.text, federation.sign("plan", plan.values()))
    path = hospital.folder / "plans" / f"{plan.digest}.json"
    text = path.read_text().replace('\\"rounds\\":3', '\\"rounds\\":9', 1)
    assert text != path.read_text()
    write_text(path, text)
    write_text(path.with_suffix(".approved.json"), f'{{"digest": "{plan.digest}", "approved": "now", "by": "me"}}')
    reply = unpack_reply(*hospital.desk.answer_packed({"run": "1"}, *pack(Describe(study=plan.study.digest))))
    assert isinstance(reply, Refusal)
    assert reply.error == "IdentityError"
