"""The site's half of Flower: its fleet protocol over HTTPS, outbound only.

::

    receive: PullMessages --> PullObject per chunk --> ConfirmMessageReceived --> Letter (header, data; nothing is executed)
    send:    PushMessages --> PushObject for what the coordinator lacks

The one place on this side that touches Flower's internals. It does what Flower's SuperNode does, but for three things: it never
asks for a bundle's code (the run's bundle digest is compared and that is all), it polls more often while there is work, and
a lost connection is an exception that the agent answers with patience, not the end of the process. Every request is signed
with the site's key.
"""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from xfed.common.codec import packed, unwrap
from xfed.common.durable import write_text
from xfed.common.errors import ConfigError, FederationError, IdentityError

__all__ = ["FleetLink", "Letter", "LinkLostError", "StaleError"]

HEARTBEAT_S = 15.0
CALL_TIMEOUT_S = 60.0
T = TypeVar("T")


class LinkLostError(FederationError):
    """The coordinator cannot be reached just now."""


class StaleError(FederationError):
    """The coordinator no longer wants this message: its run has ended."""


class _StillOnlineError(LinkLostError):
    """The coordinator takes this site for online already."""


@dataclass(frozen=True)
class Letter:
    """One message from the coordinator: our packed request, and whose it is."""

    run: int
    message_id: str
    header: str
    data: bytes
    message: Any = field(repr=False)


class _Signature:
    """Signs each request's time; no two requests of this process carry the same."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = base64.b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self._last = datetime.min.replace(tzinfo=UTC)
        self._lock = threading.Lock()

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Add Flower's three headers."""
        with self._lock:
            self._last = max(datetime.now(UTC), self._last + timedelta(microseconds=1))
            stamp = self._last.isoformat(timespec="microseconds")
        signature = base64.b64encode(sign_message(self._key, stamp.encode("ascii"))).decode("ascii")
        context.request.headers.update(
            {"flwr-public-key": self._public, "flwr-timestamp": stamp, "flwr-signature": signature}
        )
        return call_next(context)


class FleetLink:
    """A connection to the coordinator at `address` ("host:port"), whose certificate must come from the CA in `ca_pem`.

    `memory` is a file for the node number that Flower gave this site: after a kill, the coordinator still takes the dead
    process for a live one, and only its number can end it.
    """

    def __init__(self, address: str, ca_pem: str, key: ec.EllipticCurvePrivateKey, memory: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca_pem)
        try:
            self._client = FleetHttpClient(
                f"https://{address}", interceptors=[_Signature(key)], verify=context, timeout=CALL_TIMEOUT_S
            )
        except ValueError as error:
            raise ConfigError(f"the proxy in HTTPS_PROXY or ALL_PROXY cannot be used: {error}") from error
        self._public = public_key_to_bytes(key.public_key())
        self._memory = memory
        self._node: Any = None
        self._bundles: dict[int, str] = {}
        self._stopped = threading.Event()
        self._pulse: threading.Thread | None = None

    def connect(self) -> None:
        """Come online. Raises `LinkLostError`, or `IdentityError` when the coordinator does not know this site."""
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_S)
        try:
            node_id = self._call(lambda: self._client.ActivateNode(request)).node_id
        except _StillOnlineError as error:
            before = self._remembered()
            if before is None:
                raise  # killed before it could write its number down: only patience ends the dead process's session
            try:
                self._call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=before)))
            except IdentityError:
                raise error from None  # the file was damaged: this is not the site's number
            node_id = self._call(lambda: self._client.ActivateNode(request)).node_id
        write_text(self._memory, f"{node_id}\n")
        self._node = Node(node_id=node_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, self._node.node_id, 0
        if self._pulse is None:
            self._pulse = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._pulse.start()

    def _remembered(self) -> int | None:
        try:
            return int(self._memory.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S * 0.6):
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
            try:
                self._call(lambda request=request: self._client.SendNodeHeartbeat(request))  # type: ignore[misc]
            except FederationError:
                continue  # the main loop meets the same trouble and reports it
            except IdentityError:
                continue

    def close(self) -> None:
        """Say goodbye, if the coordinator still listens."""
        self._stopped.set()
        if self._node is not None:
            with contextlib.suppress(httpx.HTTPError, RuntimeError, RunNotRunningException):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def receive(self) -> Letter | None:
        """The next message, whole, or None. Raises `LinkLostError`, `StaleError`, `IdentityError`, `FederationError`."""
        response = self._call(lambda: self._client.PullMessages(PullMessagesRequest(node=self._node)))
        if not response.messages_list:
            return None
        message = message_from_proto(response.messages_list[0])
        run, message_id = message.metadata.run_id, message.metadata.message_id
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run)
        ids = [node.object_id for node in iterate_object_tree(response.message_object_trees[0])]
        contents = self._call(lambda: pull_objects(ids, pull, max_tries_per_object=30))
        confirm = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=message_id)
        self._call(lambda: self._client.ConfirmMessageReceived(confirm))
        whole = cast(Message, inflate_object_from_contents(message_id, contents))
        whole.metadata.__dict__["_message_id"] = message_id
        header, data = unwrap(whole.content)
        return Letter(run, message_id, header, data, remove_content_from_message(whole))

    def bundle_of(self, run: int) -> str:
        """The bundle digest that the coordinator's run record names."""
        if run not in self._bundles:
            request = GetRunRequest(node=self._node, run_id=run)
            self._bundles[run] = self._call(lambda: self._client.GetRun(request)).run.fab_hash
        return self._bundles[run]

    def send(self, letter: Letter, header: str, data: bytes) -> None:
        """Answer a letter. Raises `LinkLostError`, `StaleError`, `IdentityError`."""
        TaskIdentity.run_id = letter.run
        message = Message(packed(header, data), reply_to=letter.message)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(lambda: self._client.PushMessages(request))
            wanted = set(response.objects_to_push)
            push = make_push_object_fn_protobuf(self._client.PushObject, self._node, letter.run, response.session_id)
            pieces = ((name, thing.deflate()) for name, thing in objects.items() if name in wanted)
            self._call(lambda: push_object_contents_from_iterable(pieces, push))

    def _call(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            raise _translated(error) from error
        except httpx.ConnectError as error:
            if "certificate is not yet valid" in str(error):
                raise LinkLostError(
                    f"the server's certificate is not yet valid: is this machine's clock right? ({error})"
                ) from error
            if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
                raise IdentityError(
                    f"the server's certificate is not this federation's ({error}). Someone else answers at this address, or the "
                    "coordinator made a new CA: ask for a new kit before going on."
                ) from error
            raise LinkLostError(f"the coordinator cannot be reached ({error})") from error
        except httpx.TransportError as error:
            raise LinkLostError(f"the connection broke ({type(error).__name__}: {error})") from error
        except RunNotRunningException as error:
            raise StaleError("the coordinator's run has ended") from error
        except (ObjectPullError, ObjectPushError) as error:
            raise StaleError(f"the coordinator dropped this message ({error})") from error


def _translated(error: httpx.HTTPStatusError) -> FederationError | IdentityError:
    status, text = error.response.status_code, error.response.text[:2000]
    try:
        detail = str(json.loads(text).get("detail", text))
    except (ValueError, AttributeError):
        detail = text
    if status == 401:
        if detail.startswith(("clock", "replay")):
            return LinkLostError(f"the coordinator refused a request ({detail})")
        return IdentityError(f"the coordinator does not admit this site ({detail})")
    if status == 412:
        return _StillOnlineError(
            "the coordinator still takes the process before this one for alive; it will notice soon"
        )
    if status in (403, 409, 410, 422):
        return StaleError(f"the coordinator dropped this message ({status}: {detail:.200})")
    return LinkLostError(f"the coordinator answered {status}: {detail:.200}")
