"""Chaos itself is tested: schedules cover every point, a sample passes, and a party that is truly broken is found out."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from xfed.simulations.chaos import run_chaos
from xfed.simulations.chaos_damage import damage
from xfed.simulations.chaos_points import KINDS, POINTS, points_of
from xfed.simulations.chaos_schedule import FAULTS, Fault, Schedule, chaos_study, make_schedule
from xfed.simulations.chaos_supervisor import Outcome
from xfed.simulations.chaos_verdict import Facts, _untold, compare, facts_of, judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, pidfds and tmpfs as Linux has them")

SCHEDULES = 200


def test_a_schedule_is_made_from_its_seed_and_nothing_else() -> None:
    assert [make_schedule(seed) for seed in range(30)] == [make_schedule(seed) for seed in range(30)]
    assert len({str(make_schedule(seed)) for seed in range(30)}) == 30


def test_two_hundred_schedules_kill_at_every_point_and_make_every_kind_of_fault() -> None:
    schedules = [make_schedule(seed) for seed in range(SCHEDULES)]
    assert {schedule.faults[0].point for schedule in schedules} == {point.name for point in POINTS}
    assert all(schedule.faults[0].kind == "kill" for schedule in schedules)
    counts = {kind: sum(fault.kind == kind for s in schedules for fault in s.faults) for kind in FAULTS}
    assert all(count >= SCHEDULES // 4 for count in counts.values()), counts
    assert {schedule.kind for schedule in schedules} == set(KINDS)
    whats = {fault.detail["what"] for s in schedules for fault in s.faults if fault.kind == "damage"}
    assert whats == {"checkpoint", "events", "answer", "state", "shard", "node", "session"}
    assert {fault.detail["what"] for s in schedules for fault in s.faults if fault.kind == "network"} == {
        "cut",
        "stall",
        "reset",
        "slow",
    }


def test_there_are_at_least_forty_points_of_each_kind_of_study_and_all_three_parties() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS)
    for kind in KINDS:
        assert len(points_of(kind)) >= 40
        assert {point.role for point in points_of(kind)} == {"server", "agent", "worker"}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_point_names_something_that_exists(point: Any) -> None:
    module, _, path = point.target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)
    assert point.calls >= 1
    assert point.about


def test_a_fault_hits_a_party_that_has_its_point() -> None:
    roles = {point.name: point.role for point in POINTS}
    for seed in range(SCHEDULES):
        schedule = make_schedule(seed)
        sites = chaos_study(schedule.kind).site_names()
        for fault in schedule.faults:
            role = roles[fault.point]
            allowed = {"server": ("server",), "agent": sites, "worker": tuple(f"{site}/worker" for site in sites)}[role]
            assert fault.party in allowed


FACTS = Facts(models={"a": "1"}, report={"arms": {"x": 0.5}}, answers={"site-01": {"request": "answer"}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": {"a": "2"}}, "models/a"),
        ({"models": {}}, "models/a"),
        ({"models": {"a": "1", "b": "2"}}, "models/b"),
        ({"report": {"arms": {"x": 0.25}}}, "arms"),
        ({"answers": {"site-01": {}}}, "never stored"),
        ({"answers": {}}, "never stored"),
        ({"answers": {"site-01": {"request": "other"}}}, "differ"),
        ({"answers": {"site-01": {"request": "answer", "more": "x"}}}, "never made"),
    ],
)
def test_the_comparison_says_what_differs(change: dict[str, Any], said: str) -> None:
    assert compare(FACTS, FACTS) == []
    (problem,) = compare(FACTS, dataclasses.replace(FACTS, **change))
    assert said in problem


@pytest.mark.parametrize("how", ["truncate", "garble", "empty"])
@pytest.mark.parametrize(("what", "path"), [("answer", "studies/x/answers/a.safetensors"), ("node", "node")])
def test_damage_changes_the_newest_file_and_no_other(tmp_path: Path, what: str, path: str, how: str) -> None:
    study = chaos_study("open")
    fault = Fault(number=0, kind="damage", party="site-01/worker", point="x", call=1, detail={"what": what, "how": how})
    assert "no" in damage(tmp_path, fault, study)
    target = tmp_path / path
    target.parent.mkdir(parents=True, exist_ok=True)
    bystander = tmp_path / "site.json"
    for each in (bystander, target):
        each.write_bytes(b"0123456789" * 20)
    assert path in damage(tmp_path, fault, study)
    assert target.read_bytes() != b"0123456789" * 20
    assert bystander.read_bytes() == b"0123456789" * 20


def test_a_torn_log_loses_no_whole_line(tmp_path: Path) -> None:
    study = chaos_study("open")
    log = tmp_path / "runs" / study.name / "events.jsonl"
    log.parent.mkdir(parents=True)
    for how in ("truncate", "garble", "empty"):
        log.write_bytes(b'{"a": 1}\n{"b": 2}\n')
        fault = Fault(number=0, kind="damage", party="server", point="x", call=1, detail={"what": "events", "how": how})
        damage(tmp_path, fault, study)
        assert log.read_bytes().startswith(b'{"a": 1}\n')
        assert log.read_bytes() != b'{"a": 1}\n{"b": 2}\n'


@pytest.fixture(scope="module")
def chaos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


SAMPLE = (1, 2, 4, 6)


@pytest.mark.timeout(590)
def test_a_sample_of_schedules_ends_as_the_unbroken_run(chaos_folder: Path) -> None:
    kinds = {fault.kind for seed in SAMPLE for fault in make_schedule(seed).faults}
    assert kinds == set(FAULTS)
    results = run_chaos(SAMPLE, chaos_folder, jobs=2)
    assert [result["seed"] for result in results] == list(SAMPLE)
    assert {result["seed"]: result["problems"] for result in results} == {seed: [] for seed in SAMPLE}
    assert sum(fault["came"] for result in results for fault in result["faults"]) >= len(SAMPLE)
    passed = {kind: json.loads((chaos_folder / f"unbroken-{kind}.json").read_text())["passed"] for kind in KINDS}
    for kind in KINDS:
        for point in points_of(kind):
            parties = [name for name in passed[kind] if _role(name) == point.role]
            least = min(passed[kind][party].get(point.name, 0) for party in parties)
            assert least >= point.calls, f"{point.name} is passed {least} times in the unbroken {kind} run"


def _role(party: str) -> str:
    return "server" if party == "server" else "worker" if party.endswith("/worker") else "agent"


FORGETFUL = """
import os, sys
from pathlib import Path
import torch
from xfed.simulations import chaos_job
chaos_job.preload()
from xfed.client import open_training
from xfed.client.answers import Answers
Answers.find = lambda self, request: None
open_training.torch_generator = lambda *names: torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
schedule = chaos_job.make_schedule(int(sys.argv[2]))
result = chaos_job.run_schedule(schedule, Path(sys.argv[1]), 31000)
assert result["problems"], "a site that forgets and trains anew was not noticed"
print(result["problems"])
"""


@pytest.mark.timeout(300)
def test_a_site_that_forgets_its_answers_and_trains_anew_is_found_out(chaos_folder: Path) -> None:
    assert (chaos_folder / "unbroken-open.json").is_file(), "runs after the sample"
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, str(chaos_folder), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "models/" in done.stdout
    assert "answers differ" in done.stdout


def _finished(folder: Path) -> tuple[Path, Outcome, Facts]:
    """The unbroken run's folder, as if it had been a schedule's."""
    result = json.loads((folder / "unbroken-open.json").read_text())
    answers = result["facts"]["answers"]
    kept = {site: [(digest, answer, "") for digest, answer in found.items()] for site, found in answers.items()}
    return folder / "unbroken-open", Outcome(finished=True, kept=kept), Facts(**result["facts"])


def _spoil_model(root: Path) -> None:
    path = next((root / "federation/runs/chaos-open/models").glob("classifier-DS*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _spoil_archive(root: Path) -> None:
    next((root / "federation/runs/chaos-open/archive/images").rglob("*.png")).write_bytes(b"")


def _spoil_audit(root: Path) -> None:
    log = root / "site-01/audit.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3] + lines[4:]))


@pytest.mark.parametrize(
    ("spoil", "said"), [(_spoil_model, "models/"), (_spoil_archive, "archive: "), (_spoil_audit, "audit.jsonl")]
)
def test_one_changed_bit_or_line_is_found(
    chaos_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:

    folder, outcome, expected = _finished(chaos_folder)
    root = tmp_path / "run"
    shutil.copytree(folder, root)
    study, schedule = chaos_study("open"), make_schedule(0)
    assert facts_of(root, study, outcome) == expected
    assert judge(root, study, schedule, outcome, expected) == []
    spoil(root)
    assert any(said in problem for problem in judge(root, study, schedule, outcome, expected))


def test_the_points_can_be_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xfed.simulations.chaos", "--list", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert [point["name"] for point in json.loads(done.stdout)] == [point.name for point in POINTS]


def test_the_documentation_lists_every_point() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [point.name for point in POINTS if f"| `{point.name}` |" not in text] == []


@pytest.mark.parametrize(
    ("party", "shift", "told"),
    [
        ("site-01", 30.0, True),
        ("site-01", 3.0, False),
        ("site-01", -600.0, False),
        ("server", 3.0, False),
        ("server", 30.0, False),
        ("server", 86400.0, True),
        ("server", -600.0, True),
    ],
)
def test_a_clock_outside_the_window_must_have_been_told(tmp_path: Path, party: str, shift: float, told: bool) -> None:
    fault = Fault(number=0, kind="clock", party=party, point="x", call=1, detail={"shift_s": shift, "seconds": 1.0})
    schedule = Schedule(seed=0, kind="open", faults=(fault,))
    log = tmp_path / "site-01" / "agent.jsonl"
    log.parent.mkdir()
    log.write_text('{"kind": "disconnected", "text": "the connection broke"}\n')
    outcome = Outcome(finished=True, fired=[0], fired_s={0: 5.0})
    assert bool(_untold(tmp_path, schedule, outcome)) is told
    log.write_text('{"kind": "disconnected", "text": "refused a request (clock: it differs by 30 s)"}\n')
    assert not _untold(tmp_path, schedule, outcome)
