"""A cable between two network namespaces that loses, delays and limits, as `tc netem` does where a kernel has it.

::

    namespace A: tap <--frames--> this process (per direction: loss, queue, rate, delay) <--frames--> tap :namespace B

Run as ``python bad_link.py A DEV B DEV LOSS DELAY_S BITS_PER_S SEED``; it says "ready" when both devices are there, and what it
counted, as JSON, when it gets SIGTERM. Its devices vanish with it. Linux and root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import signal
import struct
import sys
import time
from collections import deque
from pathlib import Path

_TUNSETIFF, _TAP, _NO_INFO, _NEW_NETWORK = 0x400454CA, 0x0002, 0x1000, 0x40000000
_QUEUE = 500


class Direction:
    """Frames from one device to the other."""

    def __init__(
        self, source: int, sink: int, loss: float, delay_s: float, bits_per_s: float, rng: random.Random
    ) -> None:
        self.source, self.sink = source, sink
        self._loss, self._delay_s, self._bits_per_s, self._rng = loss, delay_s, bits_per_s, rng
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0
        self.passed = self.lost = self.overflowed = self.bytes = 0

    def take(self, frame: bytes, now: float) -> None:
        """A frame has come: it is lost, finds the queue full, or is under way until its time."""
        if self._rng.random() < self._loss:
            self.lost += 1
        elif len(self._under_way) >= _QUEUE:
            self.overflowed += 1
        else:
            self._free_at = max(now, self._free_at) + 8 * len(frame) / self._bits_per_s
            self._under_way.append((self._free_at + self._delay_s, frame))

    def deliver(self, now: float) -> None:
        """Hand on what has arrived; a device that is down takes nothing."""
        while self._under_way and self._under_way[0][0] <= now:
            frame = self._under_way.popleft()[1]
            with contextlib.suppress(OSError):
                os.write(self.sink, frame)
                self.passed += 1
                self.bytes += len(frame)

    def next_at(self) -> float:
        """When the next frame arrives."""
        return self._under_way[0][0] if self._under_way else float("inf")


def _tap(namespace: str, device: str) -> int:
    """A tap device in a namespace; it lives as long as the file that is returned is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as file:
        if libc.setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP | _NO_INFO))
    return handle


def main() -> None:
    """See the module's docstring."""
    a, b = _tap(sys.argv[1], sys.argv[2]), _tap(sys.argv[3], sys.argv[4])
    loss, delay_s, bits_per_s, seed = float(sys.argv[5]), float(sys.argv[6]), float(sys.argv[7]), int(sys.argv[8])
    directions = [
        Direction(source, sink, loss, delay_s, bits_per_s, random.Random(seed + number))
        for number, (source, sink) in enumerate(((a, b), (b, a)))
    ]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    print("ready", flush=True)
    while not stopped:
        now = time.monotonic()
        wait = min(0.2, max(0.0, min(each.next_at() for each in directions) - now))
        ready, _, _ = select.select([each.source for each in directions], [], [], wait)
        for each in directions:
            if each.source in ready:
                with contextlib.suppress(OSError):  # down, or nothing more to read
                    for _ in range(64):
                        each.take(os.read(each.source, 65536), time.monotonic())
            each.deliver(time.monotonic())
    counted = [{name: getattr(each, name) for name in ("passed", "lost", "overflowed", "bytes")} for each in directions]
    print(json.dumps(counted), flush=True)


if __name__ == "__main__":
    main()
