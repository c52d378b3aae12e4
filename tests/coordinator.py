"""A coordinator in this process, as `xfed-server start` makes it but for the study, and what an attacker needs to talk to it.

::

    found_federation, enrolments --> members --> Link, Gate --_serving (the product's own listener)--> loopback, TLS
    Attacker --raw requests, signed or not, on sockets of its own--> public port
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from tests.conftest import tiny
from xfed.client.home import SiteHome, ask_to_enrol, found_home, install_kit
from xfed.common.bundle import DIGEST
from xfed.common.config import Study
from xfed.common.plan import Plan, read_request
from xfed.server.deployment import Deployment, _following, _Members, _serving, plan_for
from xfed.server.federation import Federation, found_federation
from xfed.server.gate import Gate
from xfed.server.link import Link, LinkGrid
from xfed.server.status import Board
from xfed.simulations.deployed import free_port


@contextlib.contextmanager
def quiet_flower() -> Iterator[None]:
    """Flower makes its database with an Alembic configuration that Alembic calls old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No path_separator found", DeprecationWarning)
        yield


def enrol(folder: Path, name: str, federation: Federation) -> SiteHome:
    """A site's folder, joined to `federation`."""
    found_home(folder, name)
    request = ask_to_enrol(folder)
    _, kit = federation.approve(read_request(request.path))
    return install_kit(folder, kit)


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """A running public port, and all that stands behind it."""

    federation: Federation
    plan: Plan
    homes: Mapping[str, SiteHome]
    link: Link
    grid: LinkGrid
    gate: Gate
    port: int

    @property
    def address(self) -> str:
        """As sites dial it."""
        return f"127.0.0.1:{self.port}"

    def node(self, site: str) -> int:
        """Flower's number of a site."""
        return next(info.node_id for info in self.link.nodes() if info.name == site)

    def attacker(self, key: ec.EllipticCurvePrivateKey | None = None) -> Attacker:
        """Somebody who reaches the port, holding `key`."""
        return Attacker(self.port, self.federation.ca_pem, key)


@contextlib.contextmanager
def coordinator(folder: Path, study: Study | None = None, bundle: str = DIGEST) -> Iterator[Coordinator]:
    """A federation of `study`'s sites, with its public port open and a run begun."""
    study = study or tiny()
    port = free_port()
    federation = found_federation(folder / "federation", name="tests", address=f"127.0.0.1:{port}")
    homes = {name: enrol(folder / name, name, federation) for name in study.site_names()}
    plan = plan_for(federation, study, folder)
    with quiet_flower():
        link = Link(federation.state_path)
    members = _Members(federation, link, lambda event: None)
    grid = link.begin(bundle)
    gate = Gate(link.fleet_app(), lambda: members.keys)
    board = Board(study.name, study.digest, plan.digest, dict.fromkeys(plan.members, ""), dict)
    deployment = Deployment(
        federation=federation, plan=plan, out=folder, listen=("127.0.0.1", port), control=("127.0.0.1", 0)
    )
    with _serving(deployment, gate, board), _following(members):
        try:
            yield Coordinator(federation=federation, plan=plan, homes=homes, link=link, grid=grid, gate=gate, port=port)
        finally:
            grid.end(False)


@dataclass(frozen=True)
class Attacker:
    """Requests that no client of ours would make."""

    port: int
    ca_pem: str
    key: ec.EllipticCurvePrivateKey | None = None

    @property
    def trust(self) -> ssl.SSLContext:
        """TLS that believes the federation's CA, and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.ca_pem)
        return context

    @property
    def public(self) -> bytes:
        """The key as Flower names it."""
        if self.key is None:
            raise ValueError("this attacker has no key")
        return bytes(public_key_to_bytes(self.key.public_key()))

    def signed(self, stamp: str | None = None) -> dict[str, str]:
        """Flower's three headers, for now or for the time written in `stamp`."""
        stamp = stamp or datetime.now(UTC).isoformat(timespec="microseconds")
        return {
            "flwr-public-key": base64.b64encode(self.public).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(sign_message(self.key, stamp.encode())).decode(),
        }

    def post(self, path: str, message: Any = None, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """One request on a new connection; signed now unless `headers` are given."""
        content = message if isinstance(message, bytes) else b"" if message is None else message.SerializeToString()
        if headers is None:
            headers = self.signed() if self.key is not None else {}
        with httpx.Client(verify=self.trust, timeout=10, trust_env=False) as client:
            return client.post(
                f"https://127.0.0.1:{self.port}{path}",
                content=content,
                headers={"content-type": PROTOBUF_MEDIA_TYPE, **headers},
            )

    def activate(self, headers: Mapping[str, str] | None = None, key: bytes | None = None) -> httpx.Response:
        """Come online as `key` (its own)."""
        request = ActivateNodeRequest(public_key=key or self.public, heartbeat_interval=30.0)
        return self.post("/v1/fleet/activate-node", request, headers)

    def pull(self, node: int, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Ask for the messages of `node`."""
        return self.post("/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=node)), headers)

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Send bytes over TLS; returns the status (0: hung up without an answer) and all that came."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            tls.sendall(request)
            came = b""
            with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
                tls.settimeout(5)
                while not _whole(came) and (piece := tls.recv(65536)):
                    came += piece
        head = came.split(b"\r\n", 1)[0].split(b" ")
        return (int(head[1]) if len(head) > 1 and head[0].startswith(b"HTTP/") else 0), came


def _whole(came: bytes) -> bool:
    head, found, body = came.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    return bool(found) and len(body) >= int(fields.get(b"content-length", b"0"))
