"""A whole study with real processes and real TLS on loopback: it ends as the simulation of the same study does, to the bit."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import tiny
from xfed.client.audit import read_audit, verify_audit
from xfed.common.config import Study
from xfed.common.journal import Journal
from xfed.common.weights import digest_of, load_arrays
from xfed.simulations.deployed import POLICY, Deployed
from xfed.simulations.run import run_study

LIMITS = {"join_limit_s": 120, "time_limit_s": 120}
SECURE = tiny(sites={"count": 3}, gan={"rounds": 2}, classifier={"rounds": 2}, federation=LIMITS)
OPEN = tiny(name="open", gan={"rounds": 2}, classifier={"rounds": 2}, federation=LIMITS)
QUORUM = tiny(
    name="quorum",
    gan={"rounds": 1, "steps_per_round": 1},
    classifier={"rounds": 1, "arms": ["DS1"]},
    federation={**LIMITS, "quorum": 0.5, "retries": 0},
)


class _Watched:
    """What is seen of a running coordinator from beside it, on its own machine."""

    def __init__(self, deployed: Deployed) -> None:
        self.statuses: list[dict[str, Any]] = []
        self.metrics: list[str] = []
        deadline = time.monotonic() + 240
        while deployed.processes["server"].poll() is None and time.monotonic() < deadline:
            self._look(deployed.federation / "control.json")
            time.sleep(0.3)

    def _look(self, control: Path) -> None:
        try:
            address = json.loads(control.read_text())["control"]
            for page in ("status", "metrics"):
                with urllib.request.urlopen(f"http://{address}/{page}", timeout=10) as answer:
                    text = answer.read().decode()
                if page == "status":
                    self.statuses.append(json.loads(text))
                else:
                    self.metrics.append(text)
        except OSError:  # it has just ended
            return


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: digest_of(load_arrays(path)[0]) for path in sorted((folder / "models").glob("*.safetensors"))}


def _root(folder: Path) -> str:
    return str(json.loads((folder / "archive" / "manifest.json").read_text())["root_sha256"])


def _simulated(study: Study, out: Path) -> Path:
    run_study(study, out)
    return out


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployed, _Watched]]:
    with Deployed(SECURE, tmp_path_factory.mktemp("secure")) as deployed:
        deployed.found()
        planned = deployed.run(
            "xfed-server", "plan", deployed.study_file, "--dir", deployed.federation, "--json"
        ).stdout
        deployed.start_all()
        deployed.approve_when_received()
        early = deployed.status()
        watched = _Watched(deployed)
        assert deployed.wait(10) == 0, deployed.tail("server")
        watched.statuses.insert(0, early)
        (deployed.root / "planned.json").write_text(planned)
        yield deployed, watched


Case = tuple[Deployed, _Watched]


def test_weights_and_archive_are_those_of_the_simulation(secure: Case, tmp_path: Path) -> None:
    deployed, _ = secure
    simulated = _simulated(SECURE, tmp_path / "sim")
    assert len(_weights(simulated)) == len(SECURE.classes) + len(SECURE.classifier.arms) + 1  # TSTR's
    assert _weights(deployed.out) == _weights(simulated)
    assert _root(deployed.out) == _root(simulated)
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (deployed.out, simulated))
    assert ours["arms"] == theirs["arms"]


def test_the_report_shows_sums_only(secure: Case) -> None:
    deployed, _ = secure
    report = json.loads((deployed.out / "report.json").read_text())
    assert report["secure_aggregation"] is True
    assert report["sites"] == {site: {"patients": None, "counts": None} for site in deployed.sites}
    assert all(not arm.get("sites") for arm in report["arms"].values())
    assert (deployed.out / "report.html").is_file()
    kinds = [event["kind"] for event in Journal(deployed.out / "events.jsonl").read()]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("problem") == 0


def test_the_plan_was_the_one_that_was_announced(secure: Case) -> None:
    deployed, _ = secure
    announced = json.loads((deployed.root / "planned.json").read_text())["plan_digest"]
    assert json.loads((deployed.out / "plan.json").read_text())["digest"] == announced
    for site in deployed.sites:
        assert (deployed.site(site) / "plans" / f"{announced}.approved.json").is_file()


def test_it_could_be_watched(secure: Case) -> None:
    deployed, watched = secure
    last = watched.statuses[-1]
    assert last["study"] == SECURE.name
    assert set(last["sites"]) == set(deployed.sites)
    assert any(all(one["online"] for one in seen["sites"].values()) for seen in watched.statuses)
    assert {seen["phase"] for seen in watched.statuses} & {"gan", "classifier"}
    families = {family.name: family for family in text_string_to_metric_families(watched.metrics[-1])}
    assert {sample.labels["site"] for sample in families["xfed_site_online"].samples} == set(deployed.sites)
    assert sum(sample.value for sample in families["xfed_sent_bytes"].samples) > 0


def test_every_site_kept_an_audit_that_verifies(secure: Case) -> None:
    deployed, _ = secure
    for site in deployed.sites:
        path = deployed.site(site) / "audit.jsonl"
        assert verify_audit(path) == []
        entries = list(read_audit(path))
        assert {"asked", "left"} <= {entry["kind"] for entry in entries}
        sent = {entry["reply"] for entry in entries if entry["kind"] == "left"}
        assert "Masked" in sent
        assert not sent & {"GanUpdate", "ClassifierUpdate", "Scores"}  # alone, they never left


def test_no_private_key_is_anywhere_else(secure: Case) -> None:
    deployed, _ = secure
    keys = [deployed.federation / "ca.key", deployed.federation / "server.key"]
    keys += [deployed.site(site) / "key" for site in deployed.sites]
    seen = Counter(line for key in keys for line in key.read_bytes().split(b"\n"))
    own = {key: [line for line in key.read_bytes().split(b"\n") if len(line) > 40 and seen[line] == 1] for key in keys}
    others = {
        path: path.read_bytes() for path in deployed.root.rglob("*") if path.is_file() and path.stat().st_size < 5e6
    }
    for key, lines in own.items():
        assert key.stat().st_mode & 0o077 == 0, key
        assert len(lines) >= 2  # what keys of a kind have in common is left out
        for path, content in others.items():
            assert path == key or not any(line in content for line in lines), f"{key} is in {path}"
    for site in deployed.sites:
        assert deployed.site(site).stat().st_mode & 0o077 == 0
    logs = "".join((deployed.root / f"{party}.log").read_text() for party in ("server", *deployed.sites))
    assert "Traceback" not in logs
    assert "PRIVATE KEY" not in logs


def test_a_finished_study_is_finished(secure: Case) -> None:
    deployed, _ = secure
    for party in list(deployed.processes):  # no site is needed for it
        deployed.kill(party)
    before = _weights(deployed.out)
    started = time.monotonic()
    done = deployed.run(
        "xfed-server",
        "start",
        deployed.study_file,
        "--dir",
        deployed.federation,
        "--listen",
        f"127.0.0.1:{deployed.port}",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30
    assert _weights(deployed.out) == before


def test_another_study_in_the_same_run_folder_is_refused(secure: Case) -> None:
    deployed, _ = secure
    done = deployed.run(
        "xfed-server",
        "start",
        deployed.study_file,
        "--set",
        "gan.rounds=7",
        "--dir",
        deployed.federation,
        "--listen",
        f"127.0.0.1:{deployed.port}",
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert re.search("gan.rounds|another study", done.stderr)


@pytest.mark.slow
def test_two_sites_without_secure_aggregation(tmp_path: Path) -> None:
    with Deployed(OPEN, tmp_path / "deployed") as deployed:
        deployed.found()
        for party in ("site-02", "server", "site-01"):  # in another order than the simulation's
            deployed.start(party)
        deployed.approve_when_received()
        assert deployed.wait(240) == 0, deployed.tail("server")
        simulated = _simulated(OPEN, tmp_path / "sim")
        assert _weights(deployed.out) == _weights(simulated)
        assert _root(deployed.out) == _root(simulated)
        report = json.loads((deployed.out / "report.json").read_text())
        assert report["secure_aggregation"] is False
        for site in deployed.sites:
            assert verify_audit(deployed.site(site) / "audit.jsonl") == []


def test_a_site_that_refuses_is_left_out_where_the_quorum_allows(tmp_path: Path) -> None:
    with Deployed(QUORUM, tmp_path / "deployed") as deployed:
        deployed.found()
        deployed.start_all()
        deployed.approve_when_received()
        # tightened after the approval: it holds from the next request on
        (deployed.site("site-02") / "policy.yaml").write_text(POLICY + "phases: [generators]\n")
        assert deployed.wait(240) == 0, deployed.tail("server")
        problems = [event for event in Journal(deployed.out / "events.jsonl").read() if event["kind"] == "problem"]
        assert {problem["site"] for problem in problems} == {"site-02"}
        assert all("refused" in problem["text"] for problem in problems)
        report = (deployed.out / "report.json").read_text()
        assert "refused" in report
        audit = list(read_audit(deployed.site("site-02") / "audit.jsonl"))
        assert "refused" in {entry["kind"] for entry in audit}
        assert verify_audit(deployed.site("site-02") / "audit.jsonl") == []
