"""The preflight: each failure is really produced (servers, proxies, certificates, clocks, disks) and told apart."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from typer.testing import CliRunner

from tests.conftest import tiny
from xfed.client import check as preflight_module
from xfed.client import check_network, dialling
from xfed.client.approval import Plans
from xfed.client.audit import AuditLog
from xfed.client.check import check_folder, check_membership, preflight
from xfed.client.check_study import (
    SPARE_BYTES,
    bytes_needed,
    check_audit,
    check_device,
    check_disk,
    check_policy,
    check_store,
)
from xfed.client.cli import app
from xfed.client.finding import Finding, TooSlowError, bounded, exit_code, failed, ok, warning
from xfed.client.home import SiteHome, ask_to_enrol, found_home, install_kit
from xfed.client.policy import Policy
from xfed.client.store import write_store
from xfed.common.bundle import DIGEST
from xfed.common.config import Study
from xfed.common.durable import exclusive
from xfed.common.errors import DataError, FederationError, IdentityError, RefusedError, StorageError, XfedError
from xfed.common.identity import utc_now
from xfed.common.journal import Journal
from xfed.common.plan import new_plan, read_request
from xfed.server.federation import Federation, found_federation
from xfed.server.gate import Gate
from xfed.server.link import Link

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # Flower's use of alembic
POLICY = "allow_non_private: true\nminimum_images: 1\nsmallest_count: 0\n"
STUDY = tiny(sites={"count": 1}, gan={"minimum_images": 2})
NETWORK = ["proxy", "dns", "tcp", "tls", "coordinator", "clock"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None], port: int = 0) -> Iterator[int]:
    """A TCP server that hands each connection to `serve` in a thread."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=run, args=(connection,), daemon=True).start()

        def run(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


@contextlib.contextmanager
def serving(application: Any, federation: Federation) -> Iterator[int]:
    """uvicorn with the federation's certificate."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            ssl_certfile=federation.server_cert,
            ssl_keyfile=str(federation.server_key),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
        )
    )
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        bound.close()


@contextlib.contextmanager
def coordinating(federation: Federation, shift_s: float = 0) -> Iterator[str]:
    """A real coordinator's public port whose clock is shifted; gives its address."""
    link = Link(federation.state_path)
    link.reconcile({name: member.public_key for name, member in federation.active_members().items()})
    clock = lambda: datetime.now(UTC) + timedelta(seconds=shift_s)  # noqa: E731
    with serving(Gate(link.fleet_app(), federation.admitted_keys, clock), federation) as port:
        yield f"127.0.0.1:{port}"


async def greet(scope: Any, receive: Any, send: Any) -> None:
    """A web server that is no coordinator."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return found_federation(tmp_path / "federation", name="tests", address="127.0.0.1:9")


@pytest.fixture
def home(tmp_path: Path, federation: Federation) -> SiteHome:
    return join(federation, tmp_path / "site-01")


def join(federation: Federation, folder: Path) -> SiteHome:
    found_home(folder, "site-01")
    _, kit = federation.approve(read_request(ask_to_enrol(folder).path))
    (folder / "policy.yaml").write_text(POLICY)
    return install_kit(folder, kit)


def fill_store(folder: Path, study: Study = STUDY, *, splits: tuple[int, ...] = (0, 0, 1, 2), classes: int = 3) -> None:
    n = len(splits) * classes
    write_store(
        folder,
        classes=study.classes,
        images=np.zeros((n, study.image_size, study.image_size), np.uint8),
        labels=np.arange(n, dtype=np.int64) % classes,
        patients=np.arange(n, dtype=np.int64),
        splits=np.repeat(np.array(splits, np.int8), classes),
    )


def propose(federation: Federation, home: SiteHome, study: Study = STUDY, **changes: str) -> Plans:
    """Put a signed plan of the federation into the site's folder."""
    plan = new_plan(study, federation=federation.name, members={home.name: home.public_key}, bundle=DIGEST)
    plan = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
    plans = Plans(home.folder, home.ca_pem, home.federation, home.name, home.public_key)
    path = home.folder / "plans" / f"{plan.digest}.json"
    path.parent.mkdir(exist_ok=True)
    signature = federation.sign("plan", plan.values())
    path.write_text(json.dumps({"plan": plan.text, "signature": signature, "received": "2030-01-01T00:00:00+00:00"}))
    return plans


def found(findings: list[Finding], name: str) -> Finding:
    (one,) = [finding for finding in findings if finding.name == name]
    return one


def reach(home: SiteHome, address: str) -> list[Finding]:
    way = dialling.dial(address, home.ca_pem)
    return list(check_network.network_findings(way, home.federation, lambda: dialling.dial(address, None)))


def broken(findings: list[Finding], name: str, kind: type[XfedError]) -> Finding:
    """The one finding that failed: `name`, with a remedy; what follows it says so."""
    assert [finding.name for finding in findings] == NETWORK
    at = NETWORK.index(name)
    assert [finding.status for finding in findings[:at]] == ["ok"] * at
    assert findings[at].status == "failed"
    assert findings[at].exit_code == kind.exit_code
    assert findings[at].remedy
    assert all(f.status == "warning" and f"because {name} failed" in f.what for f in findings[at + 1 :])
    return findings[at]


# All is well, and the command


def test_a_site_that_is_ready(federation: Federation, home: SiteHome) -> None:
    fill_store(home.folder / "store")
    propose(federation, home).approve("", Policy(allow_non_private=True, minimum_images=1))
    AuditLog(home.folder / "audit.jsonl").write("started")
    heard: list[str] = []
    with coordinating(federation) as address:
        findings = preflight(home.folder, address, heard.append)
    assert [(f.name, f.what) for f in findings if f.status != "ok"] == []
    assert exit_code(findings) == 0
    names = [finding.name for finding in findings]
    study = ["plan", "versions", "policy", "store", "disk", "device", "audit"]
    assert names == ["folder", "membership", *NETWORK, "identity", *study]
    assert set(study) < set(heard)


def test_the_command_reports_all_and_ends_with_the_code(home: SiteHome) -> None:
    fill_store(home.folder / "store", tiny(image_size=64))
    result = CliRunner().invoke(app, ["check", "--dir", str(home.folder), "--json"])
    values = json.loads(result.stdout)
    assert result.exit_code == values["exit_code"] == 7
    assert not values["ok"]
    tcp = next(finding for finding in values["findings"] if finding["name"] == "tcp")
    assert tcp["status"] == "failed"
    assert "coordinator not reachable" in tcp["what"]
    assert "ask the coordinator whether it is running" in tcp["remedy"]
    assert all(finding["remedy"] for finding in values["findings"] if finding["status"] == "failed")
    result = CliRunner().invoke(app, ["check", "--dir", str(home.folder)], env={"COLUMNS": "300"})
    assert result.exit_code == 7
    assert "ask the coordinator whether it is running" in result.stdout
    result = CliRunner().invoke(app, ["check", "--dir", str(home.folder), "--address", "nowhere"])
    assert "--address" in str(result.exception)


def test_a_folder_that_is_no_site(tmp_path: Path) -> None:
    findings = preflight(tmp_path / "none")
    assert found(findings, "folder").exit_code == 9
    assert "enroll --name" in found(findings, "folder").remedy
    assert found(findings, "identity").what == "not checked, because folder failed"
    assert exit_code(findings) == 9


def test_the_code_is_that_of_the_most_telling_failure() -> None:
    federated, refused = failed("a", FederationError, "", ""), failed("b", RefusedError, "", "")
    data, storage = failed("c", DataError, "", ""), failed("d", StorageError, "", "")
    identity = failed("e", IdentityError, "", "")
    assert exit_code([ok("a", ""), warning("b", "", "")]) == 0
    assert exit_code([federated]) == 7
    assert exit_code([refused, federated]) == 7
    assert exit_code([refused, federated, storage]) == 6
    assert exit_code([storage, federated, data]) == 3
    assert exit_code([data, identity, storage]) == 9


def test_a_check_that_hangs_is_given_up() -> None:
    started = time.monotonic()
    with pytest.raises(TooSlowError, match=r"0\.1 s"):
        bounded(lambda: time.sleep(5), 0.1)
    assert time.monotonic() - started < 2
    with pytest.raises(DataError, match="mine"):
        bounded(lambda: (_ for _ in ()).throw(DataError("mine")), 5)


def test_a_check_that_breaks_is_a_finding(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(path: Path) -> Finding:
        raise RuntimeError("boom")

    monkeypatch.setattr(preflight_module, "check_audit", explode)
    audit = found(preflight(home.folder), "audit")
    assert (audit.status, audit.exit_code) == ("failed", 1)
    assert "boom" in audit.what


# The way to the coordinator


def test_nobody_listens(home: SiteHome) -> None:
    with listening(lambda connection: None) as port:
        pass
    finding = broken(reach(home, f"127.0.0.1:{port}"), "tcp", FederationError)
    assert "refuses connections" in finding.what


def test_a_name_that_nobody_knows(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = broken(reach(home, "xray.example.invalid:9092"), "dns", FederationError)
    assert "xray.example.invalid cannot be looked up" in finding.what


def test_a_name_server_that_does_not_answer(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: time.sleep(3))
    monkeypatch.setattr(dialling, "DIAL_S", 0.3)
    started = time.monotonic()
    broken(reach(home, "xray.example.invalid:9092"), "dns", FederationError)
    assert time.monotonic() - started < 2.5


def test_somebody_else_answers(home: SiteHome, tmp_path: Path) -> None:
    other = found_federation(tmp_path / "other", name="Proxy of the house", address="127.0.0.1:9")
    with serving(greet, other) as port:
        finding = broken(reach(home, f"127.0.0.1:{port}"), "tls", IdentityError)
    assert "somebody else answers" in finding.what
    assert "Proxy of the house" in finding.what
    assert "opens TLS" in finding.remedy


def test_an_authority_of_the_same_name_is_somebody_else(home: SiteHome, tmp_path: Path) -> None:
    other = found_federation(tmp_path / "other", name="tests", address="127.0.0.1:9")
    with serving(greet, other) as port:
        assert "somebody else" in broken(reach(home, f"127.0.0.1:{port}"), "tls", IdentityError).what


def test_a_certificate_for_another_host(tmp_path: Path) -> None:
    federation = found_federation(tmp_path / "federation", name="tests", address="xray.example.org:9")
    home = join(federation, tmp_path / "site-01")
    with coordinating(federation) as address:
        finding = broken(reach(home, address), "tls", IdentityError)
    assert "not for 127.0.0.1, it names xray.example.org" in finding.what
    assert "xfed-server renew --also 127.0.0.1" in finding.remedy


@pytest.mark.parametrize(("days", "words"), [(-500, "has expired: good from"), (2, "is not valid yet: good from")])
def test_a_certificate_at_the_wrong_time(federation: Federation, home: SiteHome, days: int, words: str) -> None:
    federation.renew(now=utc_now() + timedelta(days=days))
    with coordinating(federation) as address:
        finding = broken(reach(home, address), "tls", IdentityError)
    assert words in finding.what
    assert f"clock says {utc_now():%Y-%m-%d}" in finding.what
    assert "NTP" in finding.remedy
    assert "xfed-server renew" in finding.remedy


def test_a_certificate_that_soon_ends(federation: Federation, home: SiteHome) -> None:
    federation.renew(now=utc_now() - timedelta(days=390))
    with coordinating(federation) as address:
        findings = reach(home, address)
    assert found(findings, "tls").status == "warning"
    assert exit_code(findings) == 0


def test_a_port_without_tls(home: SiteHome) -> None:
    with listening(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n" * 20)) as port:
        assert "does not speak TLS" in broken(reach(home, f"127.0.0.1:{port}"), "tls", FederationError).what


def test_a_port_that_is_silent(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "STEP_S", 0.3)
    with listening(lambda connection: time.sleep(2)) as port:
        broken(reach(home, f"127.0.0.1:{port}"), "tls", FederationError)


def test_a_server_with_the_right_certificate_that_is_no_coordinator(federation: Federation, home: SiteHome) -> None:
    with serving(greet, federation) as port:
        finding = broken(reach(home, f"127.0.0.1:{port}"), "coordinator", FederationError)
    assert "answers 200" in finding.what


@pytest.mark.parametrize(
    ("shift", "status", "words"),
    [
        (-8, "failed", "ahead of"),
        (-3.5, "warning", "ahead of"),
        (0, "ok", ""),
        (100, "ok", "behind"),
        (200, "warning", "behind"),
        (330, "failed", "behind"),
    ],
)
def test_a_clock_that_is_wrong(federation: Federation, home: SiteHome, shift: float, status: str, words: str) -> None:
    with coordinating(federation, shift) as address:
        clock = found(reach(home, address), "clock")
    assert clock.status == status
    assert words in clock.what
    if status != "ok":
        assert "NTP" in clock.remedy
    if shift:
        said = float(clock.what.split(" is ")[1].split(" s ")[0])
        assert abs(said - abs(shift)) < 2


# Proxies


class Proxy:
    """A little HTTP proxy for CONNECT; answers `status` instead of connecting when it is not 200."""

    def __init__(self, status: str = "200 OK") -> None:
        self.status = status
        self.asked: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (piece := connection.recv(4096)):
                return
            request += piece
        self.asked.append(request.decode().splitlines()[0])
        connection.sendall(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
        if not self.status.startswith("200"):
            return
        host, _, port = self.asked[-1].split()[1].rpartition(":")
        with socket.create_connection((host, int(port)), 5) as other:
            threading.Thread(target=self._pump, args=(other, connection), daemon=True).start()
            self._pump(connection, other)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


def test_a_proxy_is_used_and_named(federation: Federation, home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    with coordinating(federation) as address, listening(proxy) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{port}")
        findings = reach(home, address)
        assert [finding.status for finding in findings] == ["ok"] * len(NETWORK)
        assert f"through the proxy 127.0.0.1:{port}" in found(findings, "proxy").what
        assert proxy.asked == [f"CONNECT {address} HTTP/1.1"]
        assert not any("secret" in finding.what for finding in findings)
        assert check_network.check_identity(home, address).status == "ok"
        assert len(proxy.asked) > 1, "the agent's own connection goes another way than the check's"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        asked = len(proxy.asked)
        assert "directly" in found(reach(home, address), "proxy").what
        assert len(proxy.asked) == asked


def test_a_proxy_that_opens_tls_is_told_from_the_coordinator(
    federation: Federation, home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = found_federation(tmp_path / "house", name="House CA", address="127.0.0.1:9")
    with serving(greet, house) as inside:

        class Opening(Proxy):
            def __call__(self, connection: socket.socket) -> None:
                request = connection.recv(4096).decode()
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                assert request.startswith("CONNECT")
                with socket.create_connection(("127.0.0.1", inside), 5) as other:
                    threading.Thread(target=self._pump, args=(other, connection), daemon=True).start()
                    self._pump(connection, other)

        with listening(Opening()) as port:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            finding = broken(reach(home, "127.0.0.1:9"), "tls", IdentityError)
    assert "House CA" in finding.what


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        ("403 Forbidden", "does not let this machine through", "allow CONNECT"),
        ("407 Proxy Authentication Required", "wants a user name", "USER:PASSWORD"),
        ("502 Bad Gateway", "coordinator not reachable", "whether it is running"),
    ],
)
def test_a_proxy_that_refuses(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch, status: str, words: str, remedy: str
) -> None:
    with listening(Proxy(status)) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        finding = broken(reach(home, "127.0.0.1:9"), "tcp", FederationError)
    assert words in finding.what
    assert remedy in finding.remedy


def test_a_proxy_whose_own_certificate_is_not_trusted(
    home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = found_federation(tmp_path / "house", name="House CA", address="127.0.0.1:9")
    with serving(greet, house) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{port}")
        finding = broken(reach(home, "127.0.0.1:9"), "tcp", FederationError)
    assert "the proxy" in finding.what
    assert "http://HOST:PORT" in finding.remedy


def test_a_proxy_that_is_not_there_or_none(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n")) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        finding = broken(reach(home, "127.0.0.1:9"), "tcp", FederationError)
        assert "allows CONNECT" in finding.remedy
    finding = broken(reach(home, "127.0.0.1:9"), "tcp", FederationError)
    assert f"the proxy 127.0.0.1:{port} refuses connections" in finding.what
    assert "NO_PROXY" in finding.remedy
    monkeypatch.setenv("HTTPS_PROXY", "gopher://127.0.0.1:70")
    assert "correct HTTPS_PROXY" in broken(reach(home, "127.0.0.1:9"), "proxy", FederationError).remedy


# Identity


def test_a_key_that_was_revoked(federation: Federation, home: SiteHome) -> None:
    with coordinating(federation) as address:
        assert check_network.check_identity(home, address).status == "ok"
        federation.revoke(home.name, "the key was lost")
        finding = check_network.check_identity(home, address)
    assert (finding.status, finding.exit_code) == ("failed", 9)
    assert "revoked" in finding.what
    assert "xfed-server members" in finding.remedy


def test_a_running_client_is_left_alone(home: SiteHome) -> None:
    with exclusive(home.folder / "agent"):
        assert check_network.check_identity(home, "127.0.0.1:9").status == "warning"
        journal = Journal(home.folder / "agent.jsonl")
        journal.write("connected", address="127.0.0.1:9")
        journal.write("answered", bytes=1)
        finding = check_network.check_identity(home, "127.0.0.1:9")
        assert finding.status == "ok"
        assert "running and connected" in finding.what
        journal.write("disconnected", text="the line is dead")
        finding = check_network.check_identity(home, "127.0.0.1:9")
        assert finding.status == "warning"
        assert "the line is dead" in finding.what
    assert check_network.check_identity(home, "127.0.0.1:9").exit_code == 7


# The folder, the membership, the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("only root can mount a small disk")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this machine does not let a disk be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_the_folder_is_its_owners_alone(home: SiteHome) -> None:
    assert check_folder(home.folder).status == "ok"
    before = sorted(home.folder.iterdir())
    home.folder.chmod(0o750)
    finding = check_folder(home.folder)
    assert (finding.status, finding.exit_code) == ("failed", 9)
    assert finding.remedy == f"chmod 700 {home.folder}"
    assert sorted(home.folder.iterdir()) == before
    home.folder.chmod(0o700)
    (home.folder / "key").chmod(0o644)
    findings = preflight(home.folder)
    assert found(findings, "folder").exit_code == 9
    assert "chmod 600" in found(findings, "folder").what


def test_a_disk_that_is_full_or_read_only(small_disk: Path, home: SiteHome) -> None:
    assert check_folder(small_disk).status == "ok"
    moved = dataclasses.replace(home, folder=small_disk)
    finding = check_disk(moved, None, None)
    assert (finding.status, finding.exit_code) == ("failed", 6)
    assert "1 MiB are free" in finding.what
    (small_disk / "filling").write_bytes(b"x" * 1_040_000)
    with pytest.raises(StorageError, match="No space left"):
        check_folder(small_disk)
    (small_disk / "filling").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only"):
        check_folder(small_disk)


def test_a_site_that_cannot_write_does_not_come_online(
    small_disk: Path, federation: Federation, home: SiteHome
) -> None:
    shutil.copytree(home.folder, small_disk, dirs_exist_ok=True)
    with contextlib.suppress(OSError):
        (small_disk / "filling").write_bytes(b"x" * 2**20)
    with coordinating(federation) as address:
        findings = preflight(small_disk, address)
    assert (found(findings, "folder").exit_code, found(findings, "disk").exit_code) == (6, 6)
    assert "make room" in found(findings, "folder").remedy
    assert found(findings, "clock").status == "ok"
    assert found(findings, "identity").what == "not checked, because folder failed"


def test_a_disk_that_is_too_small(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_free(count: int) -> Finding:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**50, 0, count))  # type: ignore[attr-defined]
        return check_disk(home, STUDY, Policy())

    need = bytes_needed(STUDY, Policy(), 0)
    assert with_free(need - 1).exit_code == 6
    assert with_free(need).status == "warning"
    assert with_free(2 * need).status == "ok"


def test_the_estimate_is_what_a_site_keeps() -> None:
    import torch

    from xfed.common.gan import new_gan_state, train_gan_round
    from xfed.common.randomness import torch_generator
    from xfed.common.registry import build_classifier
    from xfed.common.weights import parameters_of

    study = tiny(sites={"count": 2}, archive={"minimum": 40})
    images = np.zeros((8, 32, 32), np.uint8)
    state = new_gan_state(study, torch.device("cpu"), "d")
    train_gan_round(state, images, np.arange(8), study.gan, torch_generator(1, "x"), "float32")
    kept = sum(array.nbytes for array in state.arrays().values())
    generator = sum(array.nbytes for array in parameters_of(state.generator).values())
    model = sum(array.nbytes for array in parameters_of(build_classifier(study)).values())
    archive = 3 * max(40, 2 * 25) * (32 * 32 + 8)  # two sites with 25 images of the largest class
    two_rounds = 3 * 2 * (kept + generator) + 2 * 2 * model + archive
    being_written = kept + generator + model
    estimate = bytes_needed(study, Policy(), 25) - SPARE_BYTES
    assert estimate == pytest.approx(two_rounds + being_written, rel=0.002)  # Adam's step counts are left out
    fixed = tiny(archive={"balance": "fixed", "per_class": 10_000})
    more = bytes_needed(fixed, Policy(), 25) - bytes_needed(study, Policy(), 25)
    assert more == (30_000 - 150) * (32 * 32 + 8)
    assert bytes_needed(fixed, Policy(max_archive_images=150), 25) == bytes_needed(study, Policy(), 25)


def test_a_membership_that_ends(home: SiteHome) -> None:
    def after(days: int) -> Finding:
        return check_membership(home, utc_now() + timedelta(days=days))

    assert after(300).status == "ok"
    assert after(340).status == "warning"
    assert after(366).exit_code == 9
    assert all("enroll --rotate" in after(days).remedy for days in (340, 366))


# Plan, versions, policy, store, device, audit log


def test_plans(federation: Federation, home: SiteHome) -> None:
    assert found(preflight(home.folder), "plan").status == "warning"
    plans = propose(federation, home)
    finding = found(preflight(home.folder), "plan")
    assert finding.status == "warning"
    assert "xfed-client approve" in finding.remedy
    path = next((home.folder / "plans").glob("*.json"))
    path.write_text(path.read_text().replace('rounds\\":3', 'rounds\\":4'))
    with pytest.raises(IdentityError):
        plans.all()
    finding = found(preflight(home.folder), "plan")
    assert (finding.status, finding.exit_code) == ("failed", 9)
    assert "sends its plan again" in finding.remedy


def test_a_plan_of_another_version_or_for_another_key(federation: Federation, home: SiteHome, tmp_path: Path) -> None:
    propose(federation, home, bundle="0" * 64)
    findings = preflight(home.folder)
    assert found(findings, "versions").exit_code == 8
    assert "install the same xfed" in found(findings, "versions").remedy
    shutil.rmtree(home.folder / "plans")
    found_home(tmp_path / "b", "site-01")
    other = read_request(ask_to_enrol(tmp_path / "b").path).public_key
    kit = dataclasses.replace(home.kit, public_key=other)
    propose(federation, dataclasses.replace(home, kit=kit))
    finding = found(preflight(home.folder), "plan")
    assert (finding.status, finding.exit_code) == ("failed", 8)
    assert "present key" in finding.what


def test_packages_that_do_not_fit(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfed.client import check_study

    assert check_study.check_versions(home, None).status == "ok"
    monkeypatch.setattr(
        check_study, "requires", lambda name: ["flwr==1.2.*", "no-such-thing>=1", 'ray>=1; extra == "ray"']
    )
    finding = check_study.check_versions(home, None)
    assert (finding.status, finding.exit_code) == ("failed", 1)
    assert "xfed needs ==1.2.*" in finding.what
    assert "no-such-thing is not installed" in finding.what
    assert "ray" not in finding.what
    monkeypatch.setattr(check_study, "requires", lambda name: None)
    old = dataclasses.replace(home, kit=dataclasses.replace(home.kit, software="xfed 0.0.1"))
    assert check_study.check_versions(old, None).status == "warning"


def test_policies(federation: Federation, home: SiteHome) -> None:
    propose(federation, home)
    plan = Plans(home.folder, home.ca_pem, home.federation, home.name, home.public_key).all()[0].plan
    finding = check_policy(Policy(), plan)
    assert (finding.status, finding.exit_code) == ("failed", 8)
    assert "allow_non_private" in finding.what
    assert check_policy(Policy.permissive(), plan).status == "ok"
    assert check_policy(Policy(), None).status == "ok"
    (home.folder / "policy.yaml").write_text("max_bach: 3\n")
    findings = preflight(home.folder)
    assert (found(findings, "policy").status, found(findings, "policy").exit_code) == ("failed", 2)
    assert "max_bach" in found(findings, "policy").what


def test_stores(tmp_path: Path) -> None:
    loose = Policy.permissive()

    def of(name: str, study: Study = STUDY, policy: Policy = loose, **more: Any) -> Finding:
        fill_store(tmp_path / name, **more)
        return check_store(tmp_path / name, policy, study)

    assert of("good").status == "ok"
    assert of("size", tiny(image_size=64)).exit_code == 3
    assert "64 px" in of("size2", tiny(image_size=64)).what
    classes = tiny(classes=["Normal", "Cardiomegaly", "Pleural Effusion"])
    assert of("classes", classes).exit_code == 3
    assert of("untrained", splits=(1, 2)).exit_code == 3
    assert "test" in of("unjudged", splits=(0, 0, 1)).what
    assert of("unjudged2", splits=(0, 0, 1)).status == "warning"
    rare = of("rare", tiny(gan={"minimum_images": 3}))
    assert rare.status == "warning"
    assert "Normal 2" in rare.what
    assert of("counts", policy=Policy(smallest_count=3)).exit_code == 3, "small counts leave nothing to train on"
    (tmp_path / "good" / "images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="damaged"):
        check_store(tmp_path / "good", loose, STUDY)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = check_device(tiny(runtime={"device": "cuda"}))
    assert (finding.status, finding.exit_code) == ("failed", 5)
    assert check_device(tiny(runtime={"device": "cpu"})).status == "ok"
    monkeypatch.setattr("xfed.common.devices.bfloat16_is_native", lambda device: False)
    assert check_device(tiny(precision="bfloat16", runtime={"device": "cpu"})).status == "warning"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", fail)
    finding = check_device(tiny(runtime={"device": "cuda"}))
    assert (finding.status, finding.exit_code) == ("failed", 5)
    assert "nvidia-smi" in finding.remedy


def test_audit_logs(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert check_audit(path).status == "ok"
    log = AuditLog(path)
    log.write("started", note="one")
    log.write("stopped", note="two")
    assert check_audit(path).status == "ok"
    path.write_text(path.read_text().replace("one", "six"))
    finding = check_audit(path)
    assert (finding.status, finding.exit_code) == ("failed", 4)
    assert "line 1: changed" in finding.what
