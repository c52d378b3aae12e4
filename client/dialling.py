"""One unsigned request to the coordinator, made as the agent makes its own, and how far it came.

::

    HTTPS_PROXY, NO_PROXY, host:port, ca.pem --httpx--> connect -> (CONNECT) -> TLS -> 401 and the coordinator's time
                                                           |          |          |       |
                                                           +----------+----------+-------+--> Dialled

For `xfed.client.check_network`. The request is refused by any coordinator and changes nothing there. Nothing is written.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
from cryptography import x509

from xfed.client.finding import TooSlowError, bounded
from xfed.common.identity import parse_address

__all__ = ["DIAL_S", "Dialled", "dial"]

STEP_S = 5.0
"""For each of connecting, shaking hands, sending and receiving."""
DIAL_S = 20.0
"""For all of it: a name server has no other limit."""
_PATH = "/v1/fleet/pull-messages"
_MOST_BYTES = 65_536


@dataclass(kw_only=True)
class Dialled:
    """How far a request to `host`:`port` came. Every field is as it was when the request ended or was given up.

    `hop` is what was connected to first (a proxy, or the coordinator), `peer` its IP address, `distrusted` whether TLS with a
    proxy itself failed, `secure` whether the TLS handshake with the coordinator was completed, `certificate` what was shown in it
    (DER); times are this machine's clock.
    """

    host: str
    port: int
    hop: tuple[str, int] | None = None
    peer: str | None = None
    distrusted: bool = False
    secure: bool = False
    certificate: bytes | None = None
    status: int | None = None
    body: bytes = field(default=b"", repr=False)
    sent: datetime | None = None
    received: datetime | None = None
    error: Exception | None = None

    @property
    def proxied(self) -> bool:
        """Whether a proxy of the environment is used."""
        return self.hop is not None and self.hop != (self.host, self.port)

    @property
    def target(self) -> str:
        """host:port of the coordinator."""
        return _joined(self.host, self.port)

    @property
    def first(self) -> str:
        """What was connected to first, in words."""
        host, port = self.hop or (self.host, self.port)
        return f"the proxy {_joined(host, port)}" if self.proxied else self.target

    @property
    def shown(self) -> x509.Certificate | None:
        """The server's certificate, if one came that can be read."""
        try:
            return x509.load_der_x509_certificate(self.certificate) if self.certificate is not None else None
        except ValueError:
            return None

    @property
    def server_time(self) -> datetime | None:
        """What the coordinator says the time is; None when the answer is not a coordinator's."""
        try:
            moment = datetime.fromisoformat(json.loads(self.body)["server_time"])
        except (ValueError, KeyError, TypeError):
            return None
        return moment if moment.tzinfo is not None else None

    def note(self, event: str, facts: dict[str, Any]) -> None:
        """Listen to httpx's trace extension."""
        if event.endswith("connect_tcp.started"):
            host = facts["host"]
            self.hop = (host.decode() if isinstance(host, bytes) else str(host), int(facts["port"]))
        elif event.endswith("connect_tcp.complete"):
            self.peer = str(facts["return_value"].get_extra_info("server_addr")[0])
        elif self.proxied and event.startswith("connection.start_tls"):
            self.distrusted = event.endswith("failed")
        elif event.endswith("start_tls.complete"):
            self.secure = True
            self.certificate = facts["return_value"].get_extra_info("ssl_object").getpeercert(True)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial(address: str, ca_pem: str | None) -> Dialled:
    """Make one unsigned request, for `DIAL_S` seconds at the most; never raises for what the network does.

    Without `ca_pem` any certificate is taken, to see whose it is. Raises `IdentityError` when `address` is not host:port.
    """
    host, port = parse_address(address)
    way = Dialled(host=host.lower(), port=port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_pem is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=ca_pem)

    def ask() -> None:
        url = f"https://{way.target}{_PATH if ca_pem is not None else '/'}"
        method = "POST" if ca_pem is not None else "GET"
        with httpx.Client(verify=context, timeout=STEP_S, trust_env=True) as client:
            way.sent = datetime.now(UTC)
            with client.stream(method, url, extensions={"trace": way.note}) as response:
                way.received, way.status = datetime.now(UTC), response.status_code
                for piece in response.iter_raw(4096):
                    way.body += piece
                    if len(way.body) > _MOST_BYTES:
                        break

    try:
        bounded(ask, DIAL_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError, TooSlowError) as error:
        way.error = error
    return way
