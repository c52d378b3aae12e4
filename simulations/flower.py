"""Two ways to run the same ServerApp and ClientApp on one machine; the one place that touches Flower's internals.

::

    local:  ServerApp(main thread) --Grid--> LocalGrid: a queue --> worker threads: ClientApp(message, context)
    ray:    ServerApp(thread)      --Grid--> Flower's simulation engine --> Ray actors: ClientApp(message, context)

`LocalGrid` implements Flower's public `Grid`. Messages start in the order of pushing; while as many finished replies lie unpulled
as there are workers, nothing new starts (but for a message that is being waited for), so the coordinator's memory
stays flat however many sites there are.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from xfed.common.errors import ConfigError

__all__ = ["LocalGrid", "run_local", "run_ray"]

RUN_ID = 1
SERVER_NODE = 1
WAIT_S = 0.5
APP_FAILED = 2


class LocalGrid(Grid):
    """Flower's `Grid` over worker threads of this process. Node ids are 2, 3, ...; their partition ids 0, 1, ..."""

    def __init__(
        self, client_app: ClientApp, nodes: int, workers: int, start: Callable[[], None] = lambda: None
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1
        self._client_app = client_app
        self._contexts = {
            SERVER_NODE + 1 + partition: Context(
                run_id=RUN_ID,
                node_id=SERVER_NODE + 1 + partition,
                node_config=UserConfig({"partition-id": partition, "num-partitions": nodes}),
                state=RecordDict(),
                run_config=UserConfig(),
            )
            for partition in range(nodes)
        }
        self._busy: set[int] = set()
        self._queue: OrderedDict[str, Message] = OrderedDict()
        self._finished: dict[str, Message] = {}
        self._wanted: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._limit = workers
        self._threads = [
            threading.Thread(target=self._work, args=(start,), name=f"site-worker-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def set_run(self, run: Any) -> None:
        """Not used: this grid has one run."""

    @property
    def run(self) -> Any:
        """This grid has no Flower `Run` record."""
        raise NotImplementedError("the local backend has no Flower Run record")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's: a message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all simulated sites."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        """Flower's node infos: simulated sites are nameless and always online."""
        return [NodeInfo(node_id=node, status="online") for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids = []
        with self._changed:
            for message in messages:
                message_id = uuid.uuid4().hex
                message.metadata.__dict__["_message_id"] = message_id
                self._queue[message_id] = message
                ids.append(message_id)
            self._changed.notify_all()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there, after a short wait for at least one. Each is handed out once."""
        ids = list(message_ids)
        with self._changed:
            self._wanted.update(ids)
            self._changed.notify_all()
            self._changed.wait_for(lambda: any(i in self._finished for i in ids) or self._closed, timeout=WAIT_S)
            replies = [self._finished.pop(i) for i in ids if i in self._finished]
            self._wanted.difference_update(ids)
            self._changed.notify_all()
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all replies are there or `timeout` seconds have passed."""
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            pulled = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            replies.extend(pulled)
        return replies

    def close(self) -> None:
        """Stop the workers after what they are doing now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=60)

    def _next(self) -> tuple[str, Message] | None:
        """The first message that may start now. One site does one thing at a time."""
        full = len(self._finished) >= self._limit
        for message_id, message in self._queue.items():
            if message.metadata.dst_node_id in self._busy:
                continue
            if not full or message_id in self._wanted:
                return message_id, message
        return None

    def _work(self, start: Callable[[], None]) -> None:
        start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                chosen = self._next()
                if chosen is None:
                    continue
                message_id, message = chosen
                del self._queue[message_id]
                node = message.metadata.dst_node_id
                self._busy.add(node)
            try:
                reply = self._client_app(message, self._contexts[node])
            except Exception as error:  # a handler may raise anything: as Flower does, it becomes an error reply
                reply = Message(Error(code=APP_FAILED, reason=f"{type(error).__name__}: {error}"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            # a reply past its message's time to live is dropped, as Flower does: nobody waits for it any more
            late = time.time() > message.metadata.created_at + message.metadata.ttl
            with self._changed:
                self._busy.discard(node)
                if not late:
                    self._finished[message_id] = reply
                self._changed.notify_all()
            del message, reply


def run_local(server_app: ServerApp, client_app: ClientApp, *, nodes: int, workers: int, threads: int) -> None:
    """Run the apps in this process on `workers` threads (0: one per core), each with `threads` torch threads."""

    def start() -> None:
        torch.set_num_threads(threads)

    start()
    grid = LocalGrid(client_app, nodes, min(workers or os.cpu_count() or 1, nodes), start)
    try:
        server_app(grid, Context(RUN_ID, 0, UserConfig(), RecordDict(), UserConfig()))
    finally:
        grid.close()


def run_ray(server_app: ServerApp, client_app: ClientApp, *, nodes: int, workers: int, threads: int) -> None:
    """Run the apps under Flower's own simulation engine. Raises `ConfigError` when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "runtime.backend is ray, but Ray is not installed: pip install 'xfed[ray]', or use --backend local"
        )
    from flwr.simulation import run_simulation

    cores = os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    at_once = min(workers or cores, nodes)
    torch.set_num_threads(threads)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=nodes,
        backend_name="ray",
        backend_config={
            "init_args": {"num_cpus": cores, "include_dashboard": False, "logging_level": 40, "log_to_driver": False},
            "client_resources": {"num_cpus": max(1, cores // at_once), "num_gpus": gpus / at_once if gpus else 0.0},
        },
    )
