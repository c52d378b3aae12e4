"""What stands before Flower's fleet routes on the public port: a short list of paths, a signature, no second use.

::

    request --> path on the list? (404) --> body small enough? (413) --> key of a member? clock right? signature good?
            seen before? (401) --> Flower's fleet routes

Flower's signature covers a timestamp only, so a request that somebody recorded could be sent again for five minutes, with any
body. Here every signature is good once, and none that is older than this process: nothing about used ones has to survive
a restart.
An `ASGI <https://asgi.readthedocs.io>`_ filter; it knows nothing of Flower but its header names.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

__all__ = ["BODY_LIMIT", "PATHS", "Gate"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
BODY_LIMIT = 32 * 2**20
AHEAD_S = 5.0
BEHIND_S = 305.0
_KEY, _SIGNATURE, _TIME = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"


class Gate:
    """An ASGI app before `inner`. `members` gives the PEM public keys that may speak now, None while nobody knows them."""

    def __init__(
        self,
        inner: App,
        members: Callable[[], frozenset[bytes] | None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._inner = inner
        self._members = members
        self._clock = clock
        self._born = clock()
        self._seen: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self.refused: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        if scope["method"] != "POST" or scope["path"] not in PATHS:
            await self._refuse(send, 404, "path", {"detail": "Not Found"})
        elif not headers.get(b"content-length", b"").isdigit() or int(headers[b"content-length"]) > BODY_LIMIT:
            await self._refuse(send, 413, "size", {"detail": f"a request has a length, of at most {BODY_LIMIT} bytes"})
        elif self._members() is None:
            # not 401: an honest site would take that for its revocation, and give up
            await self._refuse(
                send, 503, "members", {"detail": "the coordinator cannot read its list of members just now"}
            )
        elif (problem := self._doubled(scope) or self._problem(headers)) is not None:
            body = {"detail": problem, "server_time": self._clock().isoformat()}
            await self._refuse(send, 401, problem.split(":")[0], body)
        else:
            await self._inner(scope, receive, send)

    def _doubled(self, scope: Scope) -> str | None:
        # of two equal headers this filter and Flower's own check could each read another one
        names = [name for name, _ in scope["headers"] if name in (_KEY, _SIGNATURE, _TIME)]
        return "credential: it is there more than once" if len(names) != len(set(names)) else None

    def _problem(self, headers: dict[bytes, bytes]) -> str | None:
        try:
            key = base64.b64decode(headers[_KEY], validate=True)
            signature = base64.b64decode(headers[_SIGNATURE], validate=True)
            stamp = headers[_TIME]
            signed = datetime.fromisoformat(stamp.decode("ascii"))
            age = (self._clock() - signed).total_seconds()
        except (KeyError, ValueError, TypeError, binascii.Error):
            return "credential: a signed timestamp of a registered site is missing"
        if key not in (self._members() or ()):
            return "member: this key belongs to no member of the federation, or was revoked"
        if not -AHEAD_S < age < BEHIND_S:
            return f"clock: the site's clock differs by {-age:.0f} s; set it with NTP"
        try:
            public = cast(ec.EllipticCurvePublicKey, load_pem_public_key(key))
            public.verify(signature, stamp, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError, AttributeError):
            return "signature: it does not belong to this key and time"
        return self._used_before(key + stamp, signed)

    def _used_before(self, mark: bytes, signed: datetime) -> str | None:
        # the signature of one timestamp can be written in two ways (s and -s): the key and timestamp are what must not come twice
        now = self._clock().timestamp()
        with self._lock:
            if len(self._seen) > 10_000:
                self._seen = {mark: until for mark, until in self._seen.items() if until > now}
            if mark in self._seen:
                return "replay: this request was made before"
            if (self._born - signed).total_seconds() > AHEAD_S:
                return "replay: this request is older than the running coordinator"
            self._seen[mark] = now + AHEAD_S + BEHIND_S
        return None

    async def _refuse(self, send: Send, status: int, reason: str, body: dict[str, Any]) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        data = json.dumps(body).encode()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())],
            }
        )
        await send({"type": "http.response.body", "body": data})
