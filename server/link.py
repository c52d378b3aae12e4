"""The coordinator's half of Flower: its link state, its fleet routes, and a Grid on them without a detour over HTTP.

::

    members --reconcile--> LinkState (SQLite: nodes, messages)  <--fleet routes (ASGI)-- sites
                           ObjectStore (memory: chunks)
    ServerApp --Grid--> LinkGrid --push / pull--> LinkState, ObjectStore

The one place on this side that touches Flower's internals. Flower's Control and Runtime APIs, whose open-source form asks for no
credential, are not in this process: their routers are never mounted and the ServerApp reaches the link state directly.
What a restart must keep is elsewhere (checkpoints, members); the database keeps node numbers, so that sites stay who they are.
Payloads lie in memory only: no weights are left in the database file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from fastapi import FastAPI
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from sqlalchemy.exc import OperationalError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xfed.common.bundle import CONTENT, DIGEST, NAME, VERSION
from xfed.common.errors import FederationError
from xfed.server.patience import Patience

__all__ = ["Link", "LinkGrid", "LinkStateError"]

LinkStateError = OperationalError
"""What the link state raises when its database cannot be written: a full or read-only disk."""

HEARTBEAT_S = 10.0


def _pem(public_key: str) -> bytes:
    """Flower's form of an OpenSSH public key."""
    return cast(bytes, public_key_to_bytes(cast(ec.EllipticCurvePublicKey, load_ssh_public_key(public_key.encode()))))


def _not_kept(*_: Any, **__: Any) -> None:
    """In place of something that Flower would write down."""


def _asking(request: Request) -> int | None:
    body = getattr(request.state, "protobuf_request", None)
    return int(body.node.node_id) if isinstance(body, PullMessagesRequest) else None


async def _own_replies_only(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse to store what a site pushes as the coordinator's request, or as another site's reply: Flower does not look."""
    body = getattr(request.state, "protobuf_request", None)
    if isinstance(body, PushMessagesRequest):
        said = [message.metadata for message in body.messages_list]
        if not all(one.reply_to_message_id and one.src_node_id == body.node.node_id for one in said):
            return JSONResponse({"detail": "a site may push its own replies only"}, status_code=403)
    return await call_next(request)


def _admitted(state: Any) -> list[Any]:
    """Flower keeps the nodes that it has shut out; these are the others."""
    return [node for node in state.get_node_info(owner_aids=[NOOP_FLWR_AID]) if node.status != "unregistered"]


class Link:
    """The link state of one coordinator, in `database` (SQLite)."""

    def __init__(self, database: Path) -> None:
        objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        self._factory = LinkStateFactory(str(database), NoOpFederationManager(), objects)
        self.state: Any = self._factory.state()
        self.state.store_traffic = _not_kept  # a commit for each chunk, of figures that nobody reads
        self._patience = Patience(_asking)

    def reconcile(self, members: Mapping[str, str]) -> None:
        """Make the registered nodes those of `members` (name to OpenSSH public key); all others are shut out at once."""
        wanted = {_pem(key): name for name, key in members.items()}
        for node in self.nodes():
            if wanted.get(node.public_key) == node.name:
                del wanted[node.public_key]
            else:
                self.state.delete_node(NOOP_FLWR_AID, node.node_id)
        for key, name in wanted.items():
            try:
                self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)
            except ValueError as error:
                raise FederationError(
                    f"{name}: this key was shut out before, and Flower never takes one back. Let the site enrol again with a new "
                    "key: xfed-client enroll --rotate, then xfed-server approve --again"
                ) from error

    def nodes(self) -> list[Any]:
        """Flower's node infos of all admitted sites."""
        return _admitted(self.state)

    def fleet_app(self) -> FastAPI:
        """Flower's fleet routes and nothing else: no documentation, no health, no control, no runtime."""
        app = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=_own_replies_only),
                Middleware(BaseHTTPMiddleware, dispatch=self._patience.hold),
            ],
        )
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return app

    def begin(self, bundle: str = DIGEST, reply_limit: int = 2**32) -> LinkGrid:
        """A new Flower run as a Grid; it stays alive until `LinkGrid.end`. A reply may have `reply_limit` bytes."""
        self.state.store_fab(Fab(hash_str=DIGEST, content=CONTENT, verifications={}))
        run_id = self.state.create_run(
            NAME, VERSION, bundle, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[run_id])
        task = run.primary_task_id
        if self.state.claim_task(task) is None or not self.state.activate_task(task):
            raise FederationError(
                "Flower's link state could not start a run. Is another xfed-server using this folder?"
            )
        self._patience.begin()
        return LinkGrid(self.state, run_id, task, reply_limit, self._patience)


class LinkGrid(Grid):
    """Flower's `Grid`, straight on the link state of this process. Node infos carry the names the sites were admitted under."""

    def __init__(self, state: Any, run_id: int, task_id: int, reply_limit: int, patience: Patience) -> None:
        self._state = state
        self._patience = patience
        self._reply_limit = reply_limit
        self._arriving: dict[str, Message] = {}
        self.run_id = run_id
        self._task_id = task_id
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, task_id
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._keep_alive, name="run-heartbeat", daemon=True)
        self._pulse.start()

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._state.acknowledge_task_heartbeat(self._task_id)

    def end(self, succeeded: bool) -> None:
        """Close the run and drop its messages and payloads."""
        self._ended.set()
        self._patience.end()
        self._pulse.join(timeout=HEARTBEAT_S)
        self._state.finish_task(self._task_id, SubStatus.COMPLETED if succeeded else SubStatus.FAILED, "")
        self._state.cleanup_run(self.run_id)

    def set_run(self, run: Any) -> None:
        """Not used: this grid is made for one run."""

    @property
    def run(self) -> Any:
        """Flower's record of the run."""
        return self._state.get_run_info(run_ids=[self.run_id])[0]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's: a message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the sites that are online now."""
        return cast(set[int], self._state.get_nodes(self.run_id))

    def get_nodes(self) -> Iterable[Any]:
        """Flower's node infos (name, status, last_activated_at) of all admitted sites, online or not."""
        return _admitted(self._state)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages and the objects that are not stored yet; returns ids, "" for a site that cannot get any."""
        ids = []
        for message in messages:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                # the objects first: a site must not find a message without them. They go straight into the store in
                # memory; Flower's sessions of pushing, a few commits per object, are for those who push from afar
                objects = get_all_nested_objects(message)
                missing = self._state.object_store.preregister(self.run_id, get_object_tree(message))
                for object_id in missing:
                    self._state.object_store.put(object_id, objects[object_id].deflate())
                stored = self._state.store_message_ins(remove_content_from_message(message)) is not None
                if not stored:
                    self._state.object_store.delete(message.metadata.message_id)
                else:
                    self._patience.pushed(message.metadata.dst_node_id)
                ids.append(message.metadata.message_id if stored else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there and whole, errors included. Each is handed out once. Never waits.

        A reply whose objects are still on their way is looked at again at the next call: its site may be slow, or dead.
        """
        ids = set(message_ids)
        for message in self._state.get_message_res(ids - self._arriving.keys(), self.run_id):
            self._arriving[message.metadata.reply_to_message_id] = message
        waiting = {asked: self._arriving[asked] for asked in sorted(ids & self._arriving.keys())}
        arrived = {asked: self._arrived(message) for asked, message in waiting.items()}
        return [self._inflate(asked, waiting[asked], found) for asked, found in arrived.items() if found is not None]

    def _arrived(self, message: Message) -> dict[str, bytes] | Error | None:
        """All objects of a reply, the error that is in their place, or None while some are missing."""
        if not message.has_content():
            return message.error
        contents: dict[str, bytes] = {}
        size = 0
        try:
            for node in iterate_object_tree(self._state.object_store.get_object_tree(message.metadata.message_id)):
                content = self._state.object_store.get(node.object_id) or self._state.get_object(
                    self.run_id, node.object_id
                )
                if content == b"":
                    return None
                if content is None:
                    raise NoObjectInStoreError("its sending broke off")
                contents[node.object_id] = content
                size += len(content)
                if size > self._reply_limit:
                    reason = (
                        f"its reply is larger than the {self._reply_limit:,} bytes that any answer of this study needs"
                    )
                    return Error(ErrorCode.UNKNOWN, reason)
        except NoObjectInStoreError as error:
            return Error(ErrorCode.MESSAGE_UNAVAILABLE, f"the reply is not whole: {error}")
        return contents

    def _inflate(self, asked: str, message: Message, found: dict[str, bytes] | Error) -> Message:
        """The reply as a message with its content or error; the stores forget it and what it answers."""
        if isinstance(found, Error):
            reply = message if not message.has_content() else Message(found, reply_to=message)
        else:
            reply_id = message.metadata.message_id
            try:
                reply = cast(Message, inflate_object_from_contents(reply_id, found))
                reply.metadata.__dict__["_message_id"] = reply_id
            except (ValueError, KeyError) as error:
                reply = Message(
                    Error(ErrorCode.MESSAGE_UNAVAILABLE, f"the reply is damaged: {error}"), reply_to=message
                )
        self.discard(asked)
        return reply

    def discard(self, message_id: str) -> None:
        """Forget a message that nobody waits for any more, its reply, and their payloads."""
        reply = self._arriving.pop(message_id, None)
        self._state.delete_messages({message_id})
        self._state.object_store.delete(message_id)
        if reply is not None:
            self._state.object_store.delete(reply.metadata.message_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: `xfed.server.exchange` waits in its own way."""
        raise NotImplementedError("xfed asks through xfed.server.exchange")
