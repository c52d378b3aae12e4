"""A real federation on one machine: the installed commands as processes, loopback TLS, one folder per party.

::

    build_hospitals --store/--> <root>/<site>/store        (as an import would)
    xfed-client enroll --> request.json --> xfed-server approve --> kit --> xfed-client enroll --kit
    xfed-server start, xfed-client start ... as processes; xfed-client approve when a plan has come

For tests, benchmarks and `xfed.simulations.chaos`. Nothing here is a shortcut through Python: a party is what its command
line is. Only processes that were started here are ended, by their own numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from xfed.common.config import Study
from xfed.common.durable import write_text
from xfed.common.errors import FederationError
from xfed.simulations.hospitals import build_hospitals, site_folders

__all__ = ["Deployed", "free_port"]

COMMANDS = {"xfed-server": "xfed.server.cli", "xfed-client": "xfed.client.cli"}
POLICY = "allow_non_private: true\nminimum_images: 1\nsmallest_count: 0\nshare_examples: true\n"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def command(name: str, *arguments: str | Path) -> list[str]:
    """The command line of `xfed-server` or `xfed-client` in this Python."""
    return [sys.executable, "-c", f"from {COMMANDS[name]} import main; main()", *map(str, arguments)]


class Deployed:
    """Coordinator and hospitals of `study` under `root`. As a context manager it ends its processes."""

    def __init__(self, study: Study, root: Path, *, host: str = "127.0.0.1", port: int | None = None) -> None:
        self.study, self.root, self.host = study, root, host
        self.port = port or free_port()
        self.federation = root / "federation"
        self.sites = study.site_names()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.prefix: dict[str, Sequence[str]] = {}
        self.environment: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> Deployed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.processes):
            self.kill(name)

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.federation / "runs" / self.study.name

    @property
    def study_file(self) -> Path:
        """The study file given to the coordinator."""
        return self.root / "study.yaml"

    def site(self, name: str) -> Path:
        """The folder of a hospital."""
        return self.root / name

    def run(self, name: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises `FederationError` with its output when `check` and it failed."""
        done = subprocess.run(
            command(name, *arguments), capture_output=True, text=True, timeout=120, env=self._env(""), check=False
        )
        if check and done.returncode:
            raise FederationError(f"{name} {' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
        return done

    def _env(self, party: str) -> dict[str, str]:
        plain = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return {**plain, **self.environment.get(party, {})}

    def found(self) -> None:
        """Make the hospitals' images, the federation, and let every site join."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.study_file, yaml.safe_dump(self.study.resolved(), sort_keys=False))
        build_hospitals(self.study, self.root / "made", None)
        address = f"{self.host}:{self.port}"
        self.run("xfed-server", "init", "--name", "tests", "--address", address, "--dir", self.federation)
        for folder in site_folders(self.root / "made", self.study):
            self.join(folder.name)
            shutil.copytree(folder / "store", self.site(folder.name) / "store")

    def join(self, name: str) -> None:
        """Enrolment, approval, kit; and a policy that lets this study run."""
        home = self.site(name)
        self.run("xfed-client", "enroll", "--name", name, "--dir", home)
        self.run("xfed-server", "approve", home / "request.json", "--yes", "--dir", self.federation)
        self.run("xfed-client", "enroll", "--kit", self.federation / "kits" / f"{name}.kit.json", "--dir", home)
        write_text(home / "policy.yaml", POLICY)

    def start(self, party: str, *more: str) -> None:
        """Start the coordinator ("server") or a hospital as a process; its words go to <root>/<party>.log."""
        if party == "server":
            listen = f"{'0.0.0.0' if self.host != '127.0.0.1' else self.host}:{self.port}"  # noqa: S104
            line = command("xfed-server", "start", self.study_file, "--dir", self.federation, "--listen", listen)
        else:
            line = command("xfed-client", "start", "--dir", self.site(party))
        with (self.root / f"{party}.log").open("ab") as log:
            self.processes[party] = subprocess.Popen(
                [*self.prefix.get(party, ()), *line, *more], stdout=log, stderr=log, env=self._env(party)
            )

    def start_all(self) -> None:
        """The coordinator and every hospital."""
        for party in ("server", *self.sites):
            self.start(party)

    def kill(self, party: str) -> None:
        """SIGKILL, and wait for the end."""
        process = self.processes.pop(party)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()

    def approve_when_received(self, time_limit_s: float = 60) -> None:
        """Approve the newest plan at every site, as a person there would. Raises `FederationError` when none comes."""
        deadline = time.monotonic() + time_limit_s
        waiting = list(self.sites)
        while waiting:
            site = waiting[0]
            if any((self.site(site) / "plans").glob("*.json")):
                self.run("xfed-client", "approve", "--yes", "--dir", self.site(site))
                waiting.pop(0)
            elif time.monotonic() > deadline:
                raise FederationError(f"{site} received no plan within {time_limit_s:g} s: {self.tail('server')}")
            else:
                time.sleep(0.1)

    def wait(self, time_limit_s: float) -> int:
        """Wait for the coordinator to end; returns its exit code. Raises `FederationError` when it does not."""
        try:
            return self.processes["server"].wait(time_limit_s)
        except subprocess.TimeoutExpired as error:
            raise FederationError(f"the coordinator did not end: {self.tail('server')}") from error

    def tail(self, party: str) -> str:
        """The last words of a process."""
        log = self.root / f"{party}.log"
        return log.read_text(errors="replace")[-3000:] if log.is_file() else ""

    def status(self) -> dict[str, Any]:
        """`xfed-server status --json`."""
        facts: dict[str, Any] = json.loads(self.run("xfed-server", "status", "--json", "--dir", self.federation).stdout)
        return facts
