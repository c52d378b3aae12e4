"""A bad network between the sites and the coordinator: a relay of TCP connections that can be told to misbehave.

::

    site --TCP--> relay: one listener per site --TCP--> coordinator
                    ^ {"site", "what", "seconds"} from the supervisor:
                      cut (connections dropped, new ones refused), reset (dropped once), stall (bytes are held), slow (20 kB/s)

It sees TLS only. A process of its own, forked by the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["run_relay"]

_CHUNK = 65536
_SLOW_CHUNK = 1024
_SLOW_PAUSE_S = 0.05


@dataclass
class _Wire:
    """One site's way to the coordinator: until when (monotonic seconds) it misbehaves, and its open connections."""

    cut: float = 0.0
    stall: float = 0.0
    slow: float = 0.0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def drop(self) -> None:
        """Reset every connection."""
        for writer in list(self.writers):
            with contextlib.suppress(OSError, AttributeError):
                linger = struct.pack("ii", 1, 0)  # a reset, no goodbye
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


def run_relay(listeners: Mapping[str, socket.socket], target: tuple[str, int], control: socket.socket) -> None:
    """Relay each site's listener to `target` until `control` (SOCK_SEQPACKET) is closed."""
    asyncio.run(_relay(listeners, target, control))


async def _relay(listeners: Mapping[str, socket.socket], target: tuple[str, int], control: socket.socket) -> None:
    wires = {site: _Wire() for site in listeners}
    servers = [
        await asyncio.start_server(lambda r, w, wire=wires[site]: _join(r, w, wire, target), sock=listener)  # type: ignore[misc]
        for site, listener in listeners.items()
    ]
    control.setblocking(False)
    loop = asyncio.get_running_loop()
    while order := await loop.sock_recv(control, 4096):
        said = json.loads(order)
        for site in wires if said["site"] == "all" else (said["site"],):
            _obey(wires[site], said["what"], float(said["seconds"]))
        await loop.sock_sendall(control, b"{}")
    for server in servers:
        server.close()


def _obey(wire: _Wire, what: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    if what in ("cut", "reset"):
        wire.cut = until if what == "cut" else wire.cut
        wire.drop()
    elif what == "stall":
        wire.stall = until
    else:
        wire.slow = until


async def _join(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: _Wire, target: tuple[str, int]
) -> None:
    wire.writers.add(writer)
    onward: asyncio.StreamWriter | None = None
    try:
        if time.monotonic() >= wire.cut:
            back, onward = await asyncio.open_connection(*target)
            wire.writers.add(onward)
            await asyncio.gather(_pump(reader, onward, wire), _pump(back, writer, wire))
    except OSError:
        pass  # the coordinator is down, or the wire was cut: either way the site sees its connection end
    finally:
        for each in (writer, onward):
            if each is not None:
                wire.writers.discard(each)
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: _Wire) -> None:
    while data := await reader.read(_SLOW_CHUNK if time.monotonic() < wire.slow else _CHUNK):
        while time.monotonic() < wire.stall:
            await asyncio.sleep(0.02)
        if time.monotonic() < wire.slow:
            await asyncio.sleep(_SLOW_PAUSE_S)
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
