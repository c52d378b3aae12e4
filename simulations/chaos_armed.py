"""Inside a party that was started for chaos: wrappers around named functions, then the party's real entry point.

::

    supervisor --fork--> become(): own session, own log --> wrappers --> xfed-server | xfed-client | worker: main()
    n-th call of a point --> "fired" to the supervisor --> SIGKILL to itself            (kill, damage)
                                                      --> waits until it is done        (disk, network)
                                                      --> its own clock is shifted      (clock)
    agent starts its worker --> the supervisor forks it: the same pipes and lifeline, no second import of torch

Nothing of this is in the product. What is changed besides the points: how long a party waits before it asks or connects again.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import errno
import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from xfed.common.packing import digest_of_request
from xfed.common.weights import digest_of
from xfed.simulations.chaos_points import POINTS, Point
from xfed.simulations.chaos_schedule import Fault, point_named

__all__ = ["PRELOADED", "Channel", "become", "die_with_parent"]

PRELOADED = (
    "xfed.server.cli",
    "xfed.server.deployment",
    "xfed.server.display",
    "xfed.server.report",
    "xfed.client.cli",
    "xfed.client.agent",
    "xfed.client.desk",
    "xfed.client.worker",
)
"""What a supervisor imports before it forks: then a party starts in milliseconds."""

_IMPATIENCE: tuple[tuple[str, str, Any], ...] = (
    ("xfed.client.agent", "BACKOFF_S", (0.05, 0.5)),
    ("xfed.client.link", "HEARTBEAT_S", 10.0),
    ("xfed.server.joining", "APPROVAL_POLL_S", 0.2),
    ("xfed.server.deployment", "FAREWELL_S", 0.2),
)
_LONGEST = 1 << 16
_SET_DEATH_SIGNAL = 1


class Channel:
    """A party's line to its supervisor: JSON packets, with file descriptors where a worker is to be started."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._lock = threading.Lock()

    def tell(self, **facts: Any) -> None:
        """Send and go on."""
        with self._lock, contextlib.suppress(OSError):
            self._line.send(json.dumps(facts).encode())

    def ask(self, fds: Sequence[int] = (), **facts: Any) -> tuple[dict[str, Any], list[int]]:
        """Send and wait for the answer."""
        with self._lock:
            socket.send_fds(self._line, [json.dumps(facts).encode()], list(fds))
            data, received, _, _ = socket.recv_fds(self._line, _LONGEST, 4)
        return json.loads(data or b"{}"), list(received)


def become(
    party: str,
    arguments: Sequence[str],
    line: socket.socket,
    faults: Sequence[Fault],
    *,
    stdio: Sequence[int],
    watch: bool,
) -> None:
    """Turn this freshly forked process into `party`; never returns. `stdio`: its three descriptors. `watch`: count all points."""
    code = 1
    try:
        die_with_parent()
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        sys.stdin = os.fdopen(0, "r", closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ["COLUMNS"] = "200"
        channel = Channel(line)
        for module, name, value in _IMPATIENCE:
            setattr(importlib.import_module(module), name, value)
        _arm(channel, party, faults, watch)
        sys.argv = list(arguments)
        entry = {"xfed-server": "xfed.server.cli", "xfed-client": "xfed.client.cli"}.get(arguments[0], arguments[0])
        importlib.import_module(entry).main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the process that forked this one ends: nothing is left behind by an interrupted run."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _role(party: str) -> str:
    return "server" if party == "server" else "worker" if party.endswith("/worker") else "agent"


def _arm(channel: Channel, party: str, faults: Sequence[Fault], watch: bool) -> None:
    if _role(party) == "agent":
        subprocesses = SimpleNamespace(Popen=partial(_ForkedWorker, channel), PIPE=subprocess.PIPE)
        vars(importlib.import_module("xfed.client.worker"))["subprocess"] = subprocesses
    if _role(party) == "worker":
        _wrap("xfed.client.answers:Answers.keep", lambda *_: None, partial(_note_kept, channel))
    clock = _Clock()
    armed = [(point_named(fault.point), _Trap(fault, channel, clock)) for fault in faults]
    if watch:
        armed += [(p, partial(channel.tell, passed=p.name)) for p in POINTS if p.role == _role(party)]  # type: ignore[misc]
    targets: dict[str, list[tuple[Point, Callable[..., None]]]] = {}
    for point, trap in armed:
        targets.setdefault(point.target, []).append((point, trap))
    for target, traps in targets.items():
        _wrap(target, partial(_spring, traps, ("before", "torn")), partial(_spring_after, traps))
    if any(fault.kind == "clock" for fault in faults):
        clock.install()


def _note_kept(channel: Channel, _: Any, args: tuple[Any, ...]) -> None:
    _, request, reply = args
    arrays = {f"{n}/{k}": a for n, group in vars(reply).items() if isinstance(group, dict) for k, a in group.items()}
    channel.tell(kept=digest_of_request(request), answer=digest_of(arrays), key=request.key)


def _spring(traps: Sequence[tuple[Point, Callable[..., None]]], when: Sequence[str], args: tuple[Any, ...]) -> None:
    for point, trap in traps:
        if point.when in when and _fits(point, args):
            trap(args) if isinstance(trap, _Trap) else trap()


def _spring_after(traps: Sequence[tuple[Point, Callable[..., None]]], _: Any, args: tuple[Any, ...]) -> None:
    _spring(traps, ("after",), args)


def _fits(point: Point, args: tuple[Any, ...]) -> bool:
    if not point.path:
        return True
    subject = args[0]
    path = str(Path(f"/proc/self/fd/{subject}").readlink()) if isinstance(subject, int) else str(subject)
    return re.search(point.path, path) is not None


def _wrap(
    target: str, before: Callable[[tuple[Any, ...]], None], after: Callable[[Any, tuple[Any, ...]], None]
) -> None:
    """Put a wrapper around "module:function" or "module:Class.method", under every name that xfed's modules know it by."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        before(args)
        result = original(*args, **named)
        after(result, args)
        return result

    setattr(owner, name, wrapped)
    if isinstance(owner, ModuleType):
        for other in [m for n, m in sys.modules.items() if n.startswith("xfed.")]:
            for alias, value in list(vars(other).items()):
                if value is original:
                    setattr(other, alias, wrapped)


class _Trap:
    """Waits for the n-th call of its fault's point."""

    def __init__(self, fault: Fault, channel: Channel, clock: _Clock) -> None:
        self._fault, self._channel, self._clock = fault, channel, clock
        self._left = fault.call

    def __call__(self, args: tuple[Any, ...]) -> None:
        self._left -= 1
        if self._left:
            return
        fault = self._fault
        if fault.ends_the_process:
            if point_named(fault.point).when == "torn":
                _tear(args)
            self._channel.tell(fired=fault.number)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif fault.kind == "clock":
            self._channel.tell(fired=fault.number)
            self._clock.shift(fault.detail["shift_s"], fault.detail["seconds"])
        else:
            answer, _ = self._channel.ask(fired=fault.number, wait=True)
            if answer.get("pretend"):
                _refuse_writing(fault.detail["seconds"])


def _tear(args: tuple[Any, ...]) -> None:
    """Write half of what the call would write: the arguments tell the four functions apart."""
    match args:
        case (int() as file,):  # fsync
            os.ftruncate(file, os.fstat(file).st_size // 2)
        case (Path() as path, str() as line):  # append_line
            with path.open("a", encoding="utf-8") as log:
                log.write(line[: len(line) // 2])
        case (int() as file, bytes() as data, int() as at):  # the audit log
            os.pwrite(file, data[: len(data) // 2], at)
        case (stream, str(), _):  # a frame in a pipe
            stream.write(b"0" * 7)
            stream.flush()


def _refuse_writing(seconds: float) -> None:
    """A full disk where none can be mounted: syncing fails for a while, as it does when delayed allocation finds no room."""
    until, sync = time.monotonic() + seconds, os.fsync

    def refuse(file: int) -> None:
        if time.monotonic() < until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    os.fsync = refuse  # type: ignore[assignment]


class _Clock:
    """The party's clock: what signing, checking, logs and Flower's link state read. It is wrong from its first reading on."""

    def __init__(self) -> None:
        self._offset = self._seconds = 0.0
        self._until: float | None = None

    def shift(self, offset: float, seconds: float) -> None:
        """Wrong by `offset` seconds, until `seconds` after the next signature is made or checked."""
        self._offset, self._seconds, self._until = offset, seconds, None

    def _wrong_by(self, starts: bool) -> float:
        if self._offset and self._until is None and starts:
            self._until = time.monotonic() + self._seconds
        if self._until is not None and time.monotonic() >= self._until:
            self._offset, self._until = 0.0, None
        return self._offset

    def install(self) -> None:
        """Replace the clock in every module that has read it from `datetime` or from Flower."""
        flower: Any = importlib.import_module("flwr.supercore.date")
        honest, honest_time = flower.now, time.time
        time.time = lambda: honest_time() + self._wrong_by(False)
        for name, module in list(sys.modules.items()):
            if name.startswith("xfed.") and not name.startswith("xfed.simulations"):
                if vars(module).get("datetime") is dt.datetime:
                    starts = name in ("xfed.client.link", "xfed.server.gate")
                    vars(module)["datetime"] = _wrong_datetime(partial(self._wrong_by, starts))
            elif name.startswith("flwr"):
                for alias, value in list(vars(module).items()):
                    if value is honest:
                        vars(module)[alias] = lambda: honest() + dt.timedelta(seconds=self._wrong_by(False))


def _wrong_datetime(wrong_by: Callable[[], float]) -> type[dt.datetime]:
    class WrongDatetime(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return dt.datetime.now(tz) + dt.timedelta(seconds=wrong_by())

    return WrongDatetime


class _ForkedWorker:
    """What `subprocess.Popen` is to the agent, but forked by the supervisor."""

    def __init__(
        self, channel: Channel, command: Sequence[str], *, stderr: Any, pass_fds: Sequence[int], **_: Any
    ) -> None:
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        lifeline = pass_fds[0]
        said, (self._end,) = channel.ask((to_read, from_write, stderr.fileno(), lifeline), worker=command[-2])
        self.pid = int(said["pid"])
        for fd in (to_read, from_write):
            os.close(fd)
        self.stdin, self.stdout = os.fdopen(to_write, "wb"), os.fdopen(from_read, "rb")

    def poll(self) -> int | None:
        """None while it lives."""
        return self._ended(0)

    def wait(self) -> int | None:
        """Wait for its end."""
        return self._ended(None)

    def _ended(self, seconds: float | None) -> int | None:
        return -signal.SIGKILL if select.select([self._end], [], [], seconds)[0] else None

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._end, signal.SIGKILL)
