"""Guides, units and metrics say what is true: commands exist, messages and fields are listed, units are valid."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import typer.main
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.coordinator import Coordinator, coordinator
from xfed.client.cli import app as client_app
from xfed.client.policy import Policy
from xfed.common import errors
from xfed.common.messages import REPLIES, REQUESTS
from xfed.server.cli import app as server_app
from xfed.server.gate import PATHS
from xfed.server.status import Board
from xfed.simulations.cli import app as sim_app

DOCS = ROOT / "docs"
OPERATIONS = DOCS / "operations"
UNITS = sorted(OPERATIONS.glob("*.service"))
GUIDES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *UNITS)
PROGRAMS = {
    name: typer.main.get_command(app)
    for name, app in (("xfed-client", client_app), ("xfed-server", server_app), ("xfed-sim", sim_app))
}


# --- commands named in the guides


def _words(line: str) -> list[str]:
    """A shell line up to its comment, pipe or redirection; [] when it does not run one of our commands."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split()
    for start, word in enumerate(words):
        if Path(word).name in PROGRAMS:
            mine = [Path(word).name, *words[start + 1 :]]
            ends = [at for at, each in enumerate(mine) if each in ("|", "&", ";", ">") or each.endswith(";")]
            return mine[: ends[0] + mine[ends[0]].endswith(";") * (mine[ends[0]] != ";")] if ends else mine
    return []


def _commands(text: str) -> Iterator[list[str]]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecStart=")]
    lines += re.findall(r"^# +(sudo -u .*)", text, re.MULTILINE)
    for line in lines:
        if words := [word.rstrip(";") for word in _words(line.lstrip("$ "))]:
            yield words


def _problem(words: list[str]) -> str | None:
    """Why this command line is none of ours."""
    command: click.Command = PROGRAMS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"{command.name} has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {opt for parameter in command.params for opt in parameter.opts} | {"--help"}
    unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]
    return f"{words[0]} {command.name} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_command_and_option_in_the_guides_exists(path: Path) -> None:
    wrong = [
        problem
        for words in _commands(path.read_text())
        if "|" not in words and (problem := _problem(words)) is not None
    ]
    assert not wrong


def test_the_check_of_commands_sees_commands_and_can_fail() -> None:
    found = [words for path in GUIDES for words in _commands(path.read_text())]
    named = {(words[0], words[1]) for words in found if len(words) > 1}
    assert {("xfed-client", name) for name in ("enroll", "check", "approve", "start", "audit", "import")} <= named
    assert {("xfed-server", name) for name in ("init", "approve", "plan", "start", "revoke", "renew")} <= named
    assert len(found) > 50
    assert _problem(["xfed-client", "enrol"]) == "xfed-client has no command enrol"
    assert _problem(["xfed-client", "enroll", "--nome", "x"]) == "xfed-client enroll has no --nome"
    assert list(_commands("```console\n$ sudo -u x /a/xfed-client audit --verify   # --not-this\n```")) == [
        ["xfed-client", "audit", "--verify"]
    ]
    assert list(_commands("run `xfed-server\nstatus --json` now")) == [["xfed-server", "status", "--json"]]


def test_links_between_the_guides_lead_somewhere() -> None:
    for path in (ROOT / "README.md", *DOCS.glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
            file = (path.parent / target) if target else path
            assert file.exists(), (path.name, target)
            if anchor:
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in slugs, (path.name, target, anchor)


@pytest.mark.parametrize("name", ["hospital-it.md", "coordinator.md", "threat-model.md", "policy.md", "what-leaves.md"])
def test_a_guide_is_a_page_or_two(name: str) -> None:
    assert len((DOCS / name).read_text().splitlines()) <= 110


# --- what the guides must list


def test_every_message_is_listed() -> None:
    text = (DOCS / "what-leaves.md").read_text()
    missing = [name for name in (*REQUESTS, *REPLIES) if f"`{name}`" not in text]
    assert not missing


def test_every_field_of_the_policy_is_explained_with_its_default() -> None:
    rows = [line for line in (DOCS / "policy.md").read_text().splitlines() if line.startswith("| `")]
    explained = {name: row for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained.keys() == Policy.model_fields.keys()
    for name, field in Policy.model_fields.items():
        cell = explained[name].split("|")[2]
        if not isinstance(field.default, tuple):
            assert json.dumps(field.default) in cell, (name, cell)


def test_the_figures_in_the_threat_model_are_the_codes() -> None:
    from xfed.server.gate import AHEAD_S, BEHIND_S, BODY_LIMIT

    threats, hospital = (DOCS / "threat-model.md").read_text(), (DOCS / "hospital-it.md").read_text()
    assert len(PATHS) == 9
    assert "nine fleet routes" in threats
    assert f"at most {BODY_LIMIT // 2**20} MiB" in threats
    assert f"more than {AHEAD_S:g} s ahead" in hospital
    assert f"more than {BEHIND_S:g} s behind" in hospital
    for text in (threats, (DOCS / "coordinator.md").read_text(), (DOCS / "configuration.md").read_text()):
        assert "averaging only" in " ".join(text.split())
    assert "Epsilon is infinite" in threats


# --- systemd

HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ReadWritePaths": "/var/lib/xfed",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    "SystemCallFilter": "@system-service",
    "CapabilityBoundingSet": "",
    "Restart": "on-failure",
    "User": "xfed",
}


def _settings(unit: Path) -> dict[str, str]:
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    assert len(settings) == len(lines)
    return settings


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_hardened_and_do_not_restart_in_vain(unit: Path) -> None:
    settings = _settings(unit)
    assert {name: settings[name] for name in HARDENED} == HARDENED
    assert "MemoryDenyWriteExecute" not in settings
    in_vain = (errors.ConfigError, errors.CheckpointError, errors.RefusedError, errors.IdentityError)
    assert settings["RestartPreventExitStatus"] == " ".join(str(error.exit_code) for error in in_vain)
    written = [part for part in settings["ExecStart"].split() if part.startswith("/var")]
    assert written
    assert all(Path(part).is_relative_to(settings["ReadWritePaths"]) for part in written)


def _verify(unit: Path, tmp_path: Path, more: str = "") -> str:
    """What systemd says about a unit whose program is there."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not on this machine")
    text = unit.read_text()
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE) + more)
    done = subprocess.run(
        [tool, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    return "\n".join(said) + ("" if done.returncode == 0 or said else done.stderr)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_the_units(unit: Path, tmp_path: Path) -> None:
    assert _verify(unit, tmp_path) == ""
    assert "NoSuchKey" in _verify(unit, tmp_path, "\n[Service]\nNoSuchKey=yes\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory-deny-write-execute is Linux's")
def test_pytorch_still_needs_what_the_units_leave_out() -> None:
    """The units say why MemoryDenyWriteExecute is missing; when this fails, add it."""
    code = (
        "import ctypes, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit(77)\n"
        "import torch\n"
        "net = torch.nn.Conv2d(1, 8, 3)\n"
        "net(torch.randn(4, 1, 32, 32)).sum().backward()\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77:
        pytest.skip("this kernel cannot deny memory that is written and executed")
    if done.returncode == 0:
        pytest.skip("PyTorch on this machine does without: its processor needs no compiled convolutions")
    assert "could not create a primitive" in done.stderr


# --- Prometheus

TRAFFIC = {"site-01": {"sent": 1000, "received": 500}, "site-02": {"sent": 70, "received": 30}}
EVENTS: tuple[dict[str, Any], ...] = (
    {"kind": "joining", "site": "site-01", "text": 'approved the plan "as is"\n'},
    {"kind": "phase", "phase": "generators", "round": 0, "rounds": 20},
    {"kind": "round", "phase": "generators", "round": 3, "rounds": 20, "losses": {}},
    {"kind": "exchange", "phase": "generators", "round": 3, "traffic": TRAFFIC},
    {"kind": "exchange", "phase": "generators", "round": 4, "traffic": {"site-01": {"sent": 1, "received": 2}}},
    {"kind": "problem", "time": "t", "phase": "generators", "round": 4, "site": "site-02", "text": "silent"},
    {"kind": "problem", "time": "t", "phase": "generators", "round": 4, "site": "site-02", "text": "refused"},
    {"kind": "something else", "of": "no concern"},
)


def _board() -> Board:
    board = Board('a "study"\\', "d" * 64, "p" * 64, {"site-01": "SHA256:a", "site-02": ""}, lambda: {"site-01": True})
    board.refused = lambda: {"clock": 4, "member": 1}
    board.expiries = {"site-01": 12.34, "server certificate": -1.0}
    for event in EVENTS:
        board.note(event)
    return board


def _samples(text: str) -> dict[tuple[str, Any], float]:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert all(family.documentation for family in families)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def _key(name: str, **labels: str) -> tuple[str, Any]:
    return name, frozenset(labels.items())


def _metrics(board: Board) -> dict[tuple[str, Any], float]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(board)
    return _samples(generate_latest(registry).decode())


def test_the_metrics_say_what_the_events_said() -> None:
    study = {"study": 'a "study"\\', "phase": "generators"}
    assert _metrics(_board()) == {
        _key("xfed_round", **study): 3,
        _key("xfed_rounds_planned", **study): 20,
        _key("xfed_site_online", site="site-01"): 1,
        _key("xfed_site_online", site="site-02"): 0,
        _key("xfed_sent_bytes_total", site="site-01"): 1001,
        _key("xfed_sent_bytes_total", site="site-02"): 70,
        _key("xfed_received_bytes_total", site="site-01"): 502,
        _key("xfed_received_bytes_total", site="site-02"): 30,
        _key("xfed_problems_total", site="site-01"): 0,
        _key("xfed_problems_total", site="site-02"): 2,
        _key("xfed_requests_refused_total", reason="clock"): 4,
        _key("xfed_requests_refused_total", reason="member"): 1,
        _key("xfed_expires_days", what="site-01"): 12.3,
        _key("xfed_expires_days", what="server certificate"): -1,
    }


def test_rules_and_guide_speak_of_metrics_that_exist() -> None:
    served = {name for name, _ in _metrics(_board())}
    rules = yaml.safe_load((OPERATIONS / "prometheus-rules.yml").read_text())
    asked = {
        name
        for group in rules["groups"]
        for rule in group["rules"]
        for name in re.findall("xfed_[a-z_]+", rule["expr"])
    }
    assert asked
    assert asked <= served
    guide = set(re.findall("`(xfed_[a-z_]+)`", (DOCS / "coordinator.md").read_text()))
    assert guide == served


def test_prometheus_scrapes_the_port_that_the_unit_serves() -> None:
    config = yaml.safe_load((OPERATIONS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert f"--control {target}" in (OPERATIONS / "xfed-server.service").read_text()
    assert f"--control {target}" in (DOCS / "coordinator.md").read_text()
    assert all((OPERATIONS / name).is_file() for name in config["rule_files"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("operations")) as made:
        yield made


def _control(running: Coordinator) -> Mapping[str, Any]:
    values: dict[str, Any] = json.loads((running.federation.folder / "control.json").read_text())
    return values


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is this machine on Linux only")
def test_the_check_for_loopback_can_fail() -> None:
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        assert _answers("127.0.0.2", everywhere.getsockname()[1])
        assert not _answers("127.0.0.2", here.getsockname()[1])


def test_status_and_metrics_are_served_on_loopback_and_nowhere_else(running: Coordinator) -> None:
    host, _, port = str(_control(running)["control"]).rpartition(":")
    with httpx.Client(trust_env=False, timeout=10) as client:
        answer = client.get(f"http://{host}:{port}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert _key("xfed_site_online", site="site-01") in _samples(answer.text)
        assert client.get(f"http://{host}:{port}/status").json()["study"] == "tiny"
        rebound = client.get(f"http://{host}:{port}/metrics", headers={"host": "evil.example"})
        assert rebound.status_code == 404
        assert client.post(f"http://{host}:{port}/metrics").status_code == 404
    assert not _answers("127.0.0.2", int(port)), "it listens on more than 127.0.0.1"
    attacker = running.attacker(running.homes["site-01"].private_key)
    with httpx.Client(verify=attacker.trust, trust_env=False, timeout=10) as client:
        for path in ("/metrics", "/status"):
            assert client.get(f"https://{running.address}{path}", headers=attacker.signed()).status_code == 404


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:9093", "example.org:9093", "[::]:9093"])
def test_no_option_publishes_the_metrics(running: Coordinator, tmp_path: Path, address: str) -> None:
    from typer.testing import CliRunner

    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(running.plan.study.resolved()))
    folder = str(running.federation.folder)
    done = CliRunner().invoke(server_app, ["start", str(study), "--dir", folder, "--control", address])
    assert isinstance(done.exception, errors.ConfigError)
    assert "127.0.0.1" in str(done.exception)


# --- the README's federation


@pytest.mark.slow
def test_the_readmes_federation_runs_as_written(tmp_path: Path) -> None:
    for port in (9092, 9093):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} of this machine is taken")
    (block,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = tmp_path / "out.log"
    with log.open("wb") as out:
        done = subprocess.Popen(
            ["bash", "-e", "-c", block],
            cwd=tmp_path,
            env={**os.environ, "PATH": paths, "STUDY": str(ROOT / "configs" / "demo.yaml"), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = done.wait(500)
        finally:
            _end_group(done.pid)
    assert code == 0, log.read_text()[-3000:]
    report = json.loads((tmp_path / "federation" / "runs" / "demo" / "report.json").read_text())
    assert report["secure_aggregation"]
    assert "Untouched" in log.read_text()


def _end_group(group: int) -> None:
    """Whatever the block left running, and nothing else."""
    try:
        os.killpg(group, 9)
    except ProcessLookupError:
        return
