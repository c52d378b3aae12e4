"""One schedule from beginning to end: starts the parties, makes the faults, starts again what died, as systemd would.

::

    template (founded once) --copy--> <root>/federation, <root>/<site>      one of them on a small file system of its own (disk)
    fork: coordinator, agents, workers, relay      <--channels--> "fired", "kept", "start a worker for me"
    a party ended otherwise than it should --> damage its file, if the schedule says so --> start it again (bounded)
    plans came --> xfed-client approve, as a person would                    coordinator ended with 0 --> stop all --> Outcome

The supervisor has everything imported and no thread, so a party is a fork: a process with its own session, which a SIGKILL
kills as it kills any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xfed.common.config import Study
from xfed.simulations.chaos_armed import become, die_with_parent
from xfed.simulations.chaos_damage import Disk, damage
from xfed.simulations.chaos_network import run_relay
from xfed.simulations.chaos_schedule import Fault, Schedule

__all__ = ["Outcome", "Supervisor", "free_port_from"]

RESTARTS = 12
RESTART_PAUSE_S = 0.05
TIME_LIMIT_S = 300.0
STOP_LIMIT_S = 10.0
ADDRESS = "127.0.0.1"


@dataclass
class Outcome:
    """What a run of a schedule left behind, besides its files."""

    finished: bool = False
    seconds: float = 0.0
    processor_s: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)
    fired: list[int] = field(default_factory=list)
    fired_s: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    passed: dict[str, dict[str, int]] = field(default_factory=dict)
    kept: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)


@dataclass
class _Party:
    pid: int
    line: socket.socket
    starts: float


def free_port_from(first: int) -> int:
    """A free TCP port of this machine, `first` or the next; outside the range that outgoing connections use."""
    for port in range(first, first + 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((ADDRESS, port))
            return port
    raise OSError(f"no free port from {first} on")


class Supervisor:
    """Runs `schedule` (or nothing but the study, with `schedule` None) under `root`, from the founded `template`."""

    def __init__(self, study: Study, template: Path, root: Path, schedule: Schedule | None, first_port: int) -> None:
        self.study, self.root, self.schedule = study, root, schedule
        self.sites = study.site_names()
        self.outcome = Outcome()
        self._faults: tuple[Fault, ...] = schedule.faults if schedule is not None else ()
        self._watch = schedule is None
        self._parties: dict[str, _Party] = {}
        self._again: dict[str, float] = {}
        self._orphans: dict[int, str] = {}
        self._port = free_port_from(first_port)
        self._disks = {
            fault.party.removesuffix("/worker"): Disk(self._folder(fault.party))
            for fault in self._faults
            if fault.kind == "disk"
        }
        root.mkdir(parents=True)
        for disk in self._disks.values():
            disk.mount()
        for name in ("federation", *self.sites):
            shutil.copytree(template / name, root / name, dirs_exist_ok=True)
        shutil.copy(template / "study.yaml", root / "study.yaml")
        self._listeners: dict[str, socket.socket] = {}
        for site in self.sites:
            self._listeners[site] = socket.create_server((ADDRESS, 0))
        self._relay, self._relay_pid = self._start_relay()

    def _folder(self, party: str) -> Path:
        return self.root / ("federation" if party == "server" else party.removesuffix("/worker"))

    # starting

    def _fork(self) -> int:
        return os.fork()

    def _start_relay(self) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = self._fork()
        if pid == 0:
            ours.close()
            die_with_parent()
            with contextlib.suppress(BaseException):
                run_relay(self._listeners, (ADDRESS, self._port), theirs)
            os._exit(0)
        theirs.close()
        return ours, pid

    def _command(self, party: str) -> list[str]:
        if party == "server":
            folder, listen = self.root / "federation", f"{ADDRESS}:{self._port}"
            return ["xfed-server", "start", str(self.root / "study.yaml"), "--dir", str(folder), "--listen", listen]
        address = f"{ADDRESS}:{self._listeners[party].getsockname()[1]}"
        return ["xfed-client", "start", "--dir", str(self.root / party), "--address", address]

    def _due(self, party: str) -> list[Fault]:
        """The faults that a process of `party` is started with: those not yet come, up to the first that ends it."""
        due = []
        for fault in self._faults:
            if fault.party == party and fault.number not in self.outcome.fired:
                due.append(fault)
                if fault.ends_the_process:
                    break
        return due

    def _start(self, party: str, command: Sequence[str], stdio: Sequence[int] = ()) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        faults = self._due(party)
        pid = self._fork()
        if pid == 0:
            ours.close()
            for other in self._parties.values():
                other.line.close()
            self._relay.close()
            for listener in self._listeners.values():
                listener.close()
            if not stdio:
                log = os.open(self.root / f"{party}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                stdio = (os.open(os.devnull, os.O_RDONLY), log, log)
            become(party, command, theirs, faults, stdio=stdio, watch=self._watch)
        theirs.close()
        ours.setblocking(False)  # recv_fds ignores its flags
        self._parties[party] = _Party(pid, ours, time.monotonic())
        return pid

    def _start_worker(self, agent: str, lifeline_folder: str, line: socket.socket, fds: list[int]) -> None:
        stdin, stdout, stderr, lifeline = fds
        party = f"{agent}/worker"
        if party in self._parties:  # the last one of a killed agent: it dies by itself, at once
            before = self._parties.pop(party)
            self._orphans[before.pid] = party
            before.line.close()
        command = ["xfed.client.worker", lifeline_folder, str(lifeline)]
        pid = self._start(party, command, (stdin, stdout, stderr))
        end = os.pidfd_open(pid)
        socket.send_fds(line, [json.dumps({"pid": pid}).encode()], [end])
        for fd in (*fds, end):
            os.close(fd)

    # the loop

    def run(self) -> Outcome:
        """Run to the end of the study, the time limit or the last restart; afterwards nothing runs any more."""
        started, used = time.monotonic(), os.times()
        try:
            for party in ("server", *self.sites):
                self._start(party, self._command(party))
            while not self.outcome.finished and not self.outcome.problems:
                self._listen(0.02)
                self._reap()
                self._restart()
                self._approve()
                for disk in self._disks.values():
                    disk.release(due_only=True)
                if time.monotonic() - started > TIME_LIMIT_S:
                    self.outcome.problems.append(f"the study did not end within {TIME_LIMIT_S:g} s")
        finally:
            self.outcome.seconds = time.monotonic() - started
            self._end()
            now = os.times()
            self.outcome.processor_s = (
                now.children_user + now.children_system - used.children_user - used.children_system
            )
        return self.outcome

    def _listen(self, seconds: float) -> None:
        lines = {party.line: name for name, party in self._parties.items()}
        for line in select.select(list(lines), [], [], seconds)[0]:
            while line.fileno() >= 0 and self._hear(lines[line], line):  # closed when its worker was replaced meanwhile
                pass

    def _hear(self, party: str, line: socket.socket) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(line, 1 << 16, 4)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not data:
            time.sleep(0.002)  # its end was closed: it is about to be reaped
            return False
        said = json.loads(data)
        if "passed" in said:
            counts = self.outcome.passed.setdefault(party, {})
            counts[said["passed"]] = counts.get(said["passed"], 0) + 1
        elif "kept" in said:
            kept = (said["kept"], said["answer"], said["key"])
            self.outcome.kept.setdefault(party.removesuffix("/worker"), []).append(kept)
        elif "worker" in said:
            self._start_worker(party, said["worker"], line, fds)
        elif "fired" in said:
            self._fire(self._faults[said["fired"]], line, bool(said.get("wait")))
        return True

    def _fire(self, fault: Fault, line: socket.socket, waits: bool) -> None:
        self.outcome.fired.append(fault.number)
        self.outcome.fired_s[fault.number] = time.monotonic()
        answer: dict[str, Any] = {}
        if fault.kind == "disk":
            answer["pretend"] = not self._disks[fault.party.removesuffix("/worker")].fill(fault.detail["seconds"])
        elif fault.kind == "network":
            site = "all" if fault.party == "server" else fault.party
            self._relay.send(json.dumps({"site": site, **fault.detail}).encode())
            self._relay.recv(4096)
        if waits:
            with contextlib.suppress(OSError):
                line.send(json.dumps(answer).encode())

    def _reap(self) -> None:
        for name, party in list(self._parties.items()):
            pid, status = os.waitpid(party.pid, os.WNOHANG)
            if not pid:
                continue
            while self._hear(name, party.line):
                pass
            party.line.close()
            del self._parties[name]
            self._ended(name, os.waitstatus_to_exitcode(status))
        for pid in list(self._orphans):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._orphans[pid]

    def _ended(self, name: str, code: int) -> None:
        for fault in self._faults:
            if (
                fault.kind == "damage"
                and fault.party == name
                and self.outcome.fired[-1:] == [fault.number]
                and code == -9
            ):
                self.outcome.notes.append(damage(self._folder(name), fault, self.study))
        for disk in self._disks.values():
            disk.release()
        if name == "server" and code == 0:
            self.outcome.finished = True
        elif name.endswith("/approve"):
            return
        elif not name.endswith("/worker"):  # an agent starts its worker itself
            self.outcome.notes.append(f"{name} ended with {code}")
            restarts = self.outcome.restarts
            restarts[name] = restarts.get(name, 0) + 1
            self._again[name] = time.monotonic() + RESTART_PAUSE_S * min(restarts[name], 6)
            if restarts[name] > RESTARTS:
                self.outcome.problems.append(f"{name} was started {RESTARTS} times again and ended with {code} again")
        else:
            self.outcome.restarts[name] = self.outcome.restarts.get(name, 0) + 1

    def _restart(self) -> None:
        for name, due in list(self._again.items()):
            if time.monotonic() >= due:
                del self._again[name]
                self._start(name, self._command(name))

    def _approve(self) -> None:
        for site in self.sites:
            party, log = f"{site}/approve", self.root / f"{site}.approve.log"
            plans = [p for p in (self.root / site / "plans").glob("*.json") if ".approved" not in p.name]
            if party in self._parties or all(plan.with_suffix(".approved.json").exists() for plan in plans):
                continue
            stdin, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            command = ["xfed-client", "approve", "--yes", "--dir", str(self.root / site)]
            self._start(party, command, (stdin, out, out))
            os.close(stdin)
            os.close(out)

    def _end(self) -> None:
        """SIGTERM to the agents; whoever lives on after a while is a problem, and is killed by its number."""
        for name, party in self._parties.items():
            if not name.endswith("/worker"):
                os.kill(party.pid, signal.SIGTERM if self.outcome.finished else signal.SIGKILL)
        deadline = time.monotonic() + STOP_LIMIT_S
        waiting = {party.pid: name for name, party in self._parties.items()} | self._orphans
        while waiting and time.monotonic() < deadline:
            self._listen(0.02)
            for pid in [pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0]]:
                del waiting[pid]
        for pid, name in waiting.items():
            self.outcome.problems.append(f"{name} (process {pid}) was still there {STOP_LIMIT_S:g} s after the end")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for party in self._parties.values():
            party.line.close()
        self._relay.close()
        os.kill(self._relay_pid, signal.SIGKILL)
        os.waitpid(self._relay_pid, 0)
        for listener in self._listeners.values():
            listener.close()
        for disk in self._disks.values():
            disk.unmount()
