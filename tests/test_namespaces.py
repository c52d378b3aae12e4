"""Sites in network namespaces, each with an address and a link of its own that loses, delays and limits: they finish a study.

::

    coordinator 10.x.y.1 --veth--+
    site-01     10.x.y.11 -tap---+-- bridge in a namespace of its own: nothing of the machine's network is touched
    site-02     10.x.y.12 -tap---+
    each site's link: tests/bad_link.py, 2 % loss and 20 Mbit/s in each direction, 100 ms of delay

With the namespaces all of it is gone. Linux, root, iproute2 and /dev/net/tun are needed; else a skip that says which. The
kernel's own netem is not used: many kernels are built without it, and here the losses come from a seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import tiny
from xfed.common.config import Study
from xfed.common.journal import Journal
from xfed.common.weights import digest_of, load_arrays
from xfed.simulations.deployed import Deployed
from xfed.simulations.run import run_study

LOSS, BITS_PER_S = 0.02, 20e6
BAD_LINK = Path(__file__).with_name("bad_link.py")
LIMITS = {"join_limit_s": 180, "time_limit_s": 180}
SMALL = {
    "classes": ["Cardiomegaly", "Normal"],
    "data": {"phantom": {"patients": {"Cardiomegaly": 30, "Normal": 30}}},
    "gan": {"rounds": 1, "steps_per_round": 1},
    "classifier": {"rounds": 1, "arms": ["DS1"]},
    "archive": {"balance": "fixed", "per_class": 8, "minimum": 8},
    "federation": LIMITS,
}


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("ip", *arguments), capture_output=True, text=True, timeout=20, check=True)


@dataclass(frozen=True)
class Network:
    """`parties` by name to namespace and address; `switch` is the namespace of the bridge."""

    tag: str
    subnet: str
    delay_s: float
    parties: Sequence[str]
    cables: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def switch(self) -> str:
        return f"xfed-{self.tag}-switch"

    def namespace(self, party: str) -> str:
        return f"xfed-{self.tag}-{party}"

    def address(self, party: str) -> str:
        return f"{self.subnet}.{1 if party == 'server' else 10 + int(party.removeprefix('site-'))}"

    def port(self, party: str) -> str:
        """The bridge's end of a party's link."""
        return "p0" if party == "server" else f"p{int(party.removeprefix('site-'))}"

    def build(self) -> None:
        """Namespaces, bridge, the coordinator's good link and the sites' bad ones."""
        for space in (self.switch, *map(self.namespace, self.parties)):
            _ip("netns", "add", space)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for party in self.parties:
            space, port = self.namespace(party), self.port(party)
            if party == "server":
                _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            else:
                self._cable(space, port)
            _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "address", "add", f"{self.address(party)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")

    def _cable(self, space: str, port: str) -> None:
        ends = (space, "eth0", self.switch, port, str(LOSS), str(self.delay_s), str(BITS_PER_S), str(len(self.cables)))
        cable = subprocess.Popen(
            [sys.executable, str(BAD_LINK), *ends], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.cables.append(cable)
        if cable.stdout is None or cable.stderr is None or cable.stdout.readline() != "ready\n":
            _, errors = cable.communicate(timeout=10)
            raise PermissionError(f"/dev/net/tun: {errors.strip().splitlines()[-1]}")

    def unplug(self) -> list[dict[str, int]]:
        """Take the bad links away; returns what went through each, direction by direction."""
        counted: list[dict[str, int]] = []
        for cable in self.cables:
            cable.terminate()
            out, _ = cable.communicate(timeout=20)
            counted += json.loads(out or "[]")
        self.cables.clear()
        return counted

    def cut(self, party: str, *, back: bool = False) -> None:
        _ip("-n", self.switch, "link", "set", self.port(party), "up" if back else "down")

    def round_trip_s(self, party: str) -> float:
        """The shortest of five TCP handshakes with a port that nobody listens on (one of them may be lost)."""
        code = (
            "import socket, sys, time\nfound = []\nfor _ in range(5):\n    began = time.monotonic()\n"
            "    try: socket.create_connection((sys.argv[1], 1), 5)\n    except OSError: pass\n"
            "    found.append(time.monotonic() - began)\nprint(min(found))"
        )
        line = (*self.inside(party), sys.executable, "-c", code, self.address("server"))
        return float(subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout)

    def inside(self, party: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace(party))

    def destroy(self) -> None:
        """Leave nothing behind."""
        self.unplug()
        for space in (*map(self.namespace, self.parties), self.switch):
            subprocess.run(("ip", "netns", "delete", space), capture_output=True, timeout=20, check=False)


@contextlib.contextmanager
def _network(study: Study, delay_s: float) -> Iterator[Network]:
    """The network, or a skip with the reason why this machine does not allow it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("network namespaces are Linux's")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    if shutil.which("ip") is None:
        pytest.skip("ip not found: install iproute2")
    tag, number = secrets.token_hex(3), secrets.randbelow(200)
    network = Network(tag, f"10.{30 + number}.{secrets.randbelow(250)}", delay_s, ("server", *study.site_names()))
    try:
        try:
            network.build()
        except PermissionError as error:
            pytest.skip(f"not allowed here: {error}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"not allowed here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield network
    finally:
        network.destroy()


@contextlib.contextmanager
def _deployed(study: Study, root: Path, delay_s: float) -> Iterator[tuple[Deployed, Network]]:
    with _network(study, delay_s) as network, Deployed(study, root, host=network.address("server")) as deployed:
        deployed.prefix |= {party: network.inside(party) for party in network.parties}
        for site in deployed.sites:
            assert network.round_trip_s(site) > 2 * delay_s, "the link is not as slow as it was made"
        deployed.found()
        deployed.start_all()
        deployed.approve_when_received(120)
        yield deployed, network
        for party in list(deployed.processes):
            deployed.kill(party)
        counted = network.unplug()
        assert len(counted) == 2 * len(deployed.sites)
        for direction in counted:
            assert direction["bytes"] > 20_000, "the study did not go through this link"
        frames = sum(one["passed"] + one["lost"] for one in counted)
        assert 0.3 * LOSS < sum(one["lost"] for one in counted) / frames < 3 * LOSS


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: digest_of(load_arrays(path)[0]) for path in sorted((folder / "models").glob("*.safetensors"))}


def _same_as_simulated(deployed: Deployed, out: Path) -> None:
    run_study(deployed.study, out)
    assert _weights(deployed.out) == _weights(out)
    assert _weights(out)


def _when(deployed: Deployed, kind: str, time_limit_s: float) -> None:
    deadline = time.monotonic() + time_limit_s
    while not any(event["kind"] == kind for event in Journal(deployed.out / "events.jsonl").read()):
        assert deployed.processes["server"].poll() is None, deployed.tail("server")
        assert time.monotonic() < deadline, f"no event {kind}: {deployed.tail('server')}"
        time.sleep(0.1)


def test_two_sites_over_bad_links(tmp_path: Path) -> None:
    """100 ms there and back."""
    study = tiny(name="links", **SMALL)
    with _deployed(study, tmp_path / "deployed", 0.05) as (deployed, _):
        assert deployed.wait(200) == 0, deployed.tail("server")
        _same_as_simulated(deployed, tmp_path / "sim")


@pytest.mark.slow
def test_three_sites_over_bad_links_one_of_which_is_cut(tmp_path: Path) -> None:
    """100 ms each way, secure aggregation, and 20 s in which one site cannot be reached."""
    study = tiny(name="cut", **{**SMALL, "sites": {"count": 3}})
    with _deployed(study, tmp_path / "deployed", 0.1) as (deployed, network):
        _when(deployed, "phase", 120)
        network.cut("site-02")
        time.sleep(20)
        assert deployed.processes["server"].poll() is None, "the study did not need the site that was cut off"
        network.cut("site-02", back=True)
        assert deployed.wait(300) == 0, deployed.tail("server")
        _same_as_simulated(deployed, tmp_path / "sim")


def test_nothing_of_the_network_is_left(tmp_path: Path) -> None:
    with _network(tiny(), 0.0) as network:
        assert network.switch in _ip("netns", "list").stdout
        network.cut("site-01")
    assert network.tag not in _ip("netns", "list").stdout
    assert network.tag not in _ip("link", "show").stdout
