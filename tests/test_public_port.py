"""The public port: the fleet API that sites need, and 404 for everything else, however it is spelt."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.router import router as fleet_router

from tests.coordinator import Attacker, Coordinator, coordinator, quiet_flower
from xfed.server.gate import PATHS

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
NOT_SERVED = {"/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("port")) as made:
        yield made


@pytest.fixture
def member(running: Coordinator) -> Attacker:
    """An admitted site that tries more than it may."""
    return running.attacker(running.homes["site-01"].private_key)


def _flower_paths() -> set[str]:
    """Every path that Flower's own SuperLink serves: control, runtime, fleet, health, responses, documentation."""
    with quiet_flower():
        served = {context.path for context in iter_route_contexts(create_app().routes)}
    assert {"/health", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/runtime/push-messages"} <= served
    return served | {path for _, path in PROTOBUF_REQUEST_TYPES}


def test_the_gate_knows_flowers_fleet_routes_and_leaves_out_three() -> None:
    theirs = {context.path for context in iter_route_contexts(fleet_router.routes)}
    assert theirs - PATHS == NOT_SERVED
    assert theirs >= PATHS


def test_nothing_else_of_flower_is_there(running: Coordinator, member: Attacker) -> None:
    paths = sorted(_flower_paths() - PATHS) + sorted(NOT_SERVED)
    assert len(paths) > 60
    with httpx.Client(
        verify=member.trust, timeout=10, trust_env=False, base_url=f"https://{running.address}"
    ) as client:
        for path in paths:
            plain = re.sub(r"{[^}]*}", "1", path)
            for method in ("GET", "POST"):
                answer = client.request(method, plain, headers=member.signed(), content=b"")
                assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"}), (method, path)


def test_nothing_else_of_ours_is_there(member: Attacker) -> None:
    for path in (
        "/",
        "/status",
        "/metrics",
        "/control.json",
        "/v1",
        "/v1/fleet",
        "/v1/fleet/",
        "/favicon.ico",
        "/redoc",
    ):
        status, body = member.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert status == 404, path
        assert b"server:" not in body.lower()


def test_fleet_paths_answer_to_post_only(running: Coordinator, member: Attacker) -> None:
    with httpx.Client(
        verify=member.trust, timeout=10, trust_env=False, base_url=f"https://{running.address}"
    ) as client:
        for path in sorted(PATHS):
            for method in METHODS:
                if method != "POST":
                    answer = client.request(method, path, headers=member.signed())
                    assert answer.status_code == 404, (method, path)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_fleet_paths_need_a_signature(running: Coordinator, path: str) -> None:
    assert running.attacker().post(path, b"").status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages;a",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%2f",
        "/v1/fleet/pull-messages%3Fa",
        "/V1/FLEET/PULL-MESSAGES",
        "/v1/fleet/Pull-Messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/../fleet/pull-messages",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
        "/v1/control%2flist-runs",
        "/v1/control/list-runs?/v1/fleet/pull-messages",
        "/v1/control/list-runs#/v1/fleet/pull-messages",
        "https://127.0.0.1/v1/control/list-runs",
        "http://elsewhere.example/v1/control/list-runs",
        "/http://127.0.0.1/v1/fleet/pull-messages",
        "/v1/fleet\\pull-messages",
        "/v1/fleet/pull-messages%09",
        "/v1/fleet/pull-messages%EF%BC%8F",
    ],
)
def test_a_path_spelt_otherwise_leads_nowhere(member: Attacker, target: str) -> None:
    status, _ = member.raw(_request(member, target))
    assert status in (404, 400), status


@pytest.mark.parametrize("target", ["*", "127.0.0.1:443", "", "/v1/fleet/pull-messages HTTP/1.1 x", "\x00", "?", "::"])
def test_a_target_that_is_no_path_leads_nowhere(member: Attacker, target: str) -> None:
    status, _ = member.raw(_request(member, target))
    assert status in (0, 400, 404), status


@pytest.mark.parametrize("target", ["/v1/fleet/pull%2Dmessages", "https://elsewhere.example/v1/fleet/pull-messages"])
def test_a_listed_path_is_guarded_in_every_spelling_that_reaches_it(running: Coordinator, target: str) -> None:
    status, _ = running.attacker().raw(f"POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
    assert status == 401


def test_a_second_request_behind_the_first_is_judged_by_itself(running: Coordinator, member: Attacker) -> None:
    hidden = _request(member, "/v1/control/list-runs")
    _, came = member.raw(_request(member, "/v1/fleet/get-fab") + hidden)
    assert b"HTTP/1.1 404" in came
    # a body that looks like a request is a body
    outer = _request(member, "/v1/control/stop-run", body=hidden)
    status, came = member.raw(outer)
    assert status == 404
    assert came.count(b"HTTP/1.1") == 1


def test_no_websocket(member: Attacker) -> None:
    for target in ("/v1/fleet/pull-messages", "/"):
        status, _ = member.raw(
            f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert status in (400, 403, 404, 500), status


def test_plain_text_gets_no_answer(running: Coordinator, member: Attacker) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as plain:
        plain.sendall(_request(member, "/v1/fleet/pull-messages"))
        came = b""
        try:
            while piece := plain.recv(65536):
                came += piece
        except ConnectionError:
            pass
    assert b"HTTP" not in came
    assert running.attacker().raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 404  # and it still serves


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(running: Coordinator, version: ssl.TLSVersion) -> None:
    trust = running.attacker().trust
    trust.set_ciphers("ALL:@SECLEVEL=0")
    trust.minimum_version = trust.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        trust.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_refusal_says_the_same_of_everything(member: Attacker) -> None:
    """Nobody learns from a 404 whether something is there."""
    _, one = member.raw(_request(member, "/v1/fleet/get-fab"))
    _, other = member.raw(_request(member, "/no/such/thing"))
    assert _without_date(one) == _without_date(other)


def _without_date(came: bytes) -> list[bytes]:
    return sorted(line for line in came.split(b"\r\n") if not line.lower().startswith(b"date:"))


def _request(member: Attacker, target: str, body: bytes = b"") -> bytes:
    headers = {"host": "127.0.0.1", "content-length": str(len(body)), **member.signed()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body
