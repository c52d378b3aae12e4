"""Whether a broken run ended as the unbroken one: the same weights, nothing lost, nothing computed twice, nothing left behind.

::

    root (finished run) + Outcome --> Facts: digests of models, archive, report; answers kept per site and request
    Facts of the unbroken run, Facts of the broken run --compare--> [] or what differs, in words
    <site>/audit.jsonl --> chain whole? one request, one answer, however often it was asked for?

Formal guarantees, if there is no complaint
    Every file in models/ has the same weights, bit for bit, and the same facts. The archive's root and the report's
    figures are the same.
    Every answer that a site had stored in the unbroken run was stored in the broken one, to the same request, with the same
    arrays. None was computed again after it was stored, unless the schedule damaged the site's stored answers.
    No two answers to one request with different arrays left a site.
Not covered
    Signatures of session keys (`SessionKeys`): ECDSA signs with fresh randomness, so these answers may differ in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfed.client.audit import read_audit, verify_audit
from xfed.common.config import Study
from xfed.common.errors import CheckpointError
from xfed.common.weights import digest_of, load_arrays
from xfed.server.archive import verify_archive
from xfed.server.gate import AHEAD_S, BEHIND_S
from xfed.simulations.chaos_schedule import Fault, Schedule
from xfed.simulations.chaos_supervisor import Outcome

__all__ = ["Facts", "compare", "facts_of", "judge"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What must be the same in two runs of one study."""

    models: dict[str, str]
    report: dict[str, Any]
    answers: dict[str, dict[str, str]]


def facts_of(root: Path, study: Study, outcome: Outcome) -> Facts:
    """Read a finished run."""
    out = root / "federation" / "runs" / study.name
    models = {path.name: _model_digest(path) for path in sorted((out / "models").glob("*.safetensors"))}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    facts = {name: report[name] for name in ("arms", "gan", "archive", "totals", "digests")}
    facts["gan"] = {name: value for name, value in report["gan"].items() if name != "cost"}  # seconds differ
    return Facts(
        models=models,
        report=facts,
        answers={site: _stored(root / site, outcome.kept.get(site, [])) for site in study.site_names()},
    )


def _stored(home: Path, told: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Request to answer, as digests: what the worker told, and what is on disk. A worker killed in the act tells nothing."""
    answers = {digest: answer for digest, answer, _ in told}
    for path in sorted(home.glob("studies/*/answers/*.safetensors")):
        try:
            arrays, facts = load_arrays(path)
        except CheckpointError:
            continue
        answers.setdefault(str(facts["request"]), digest_of(arrays))
    return answers


def _model_digest(path: Path) -> str:
    """Of weights and facts; not of the file's bytes, for safetensors writes the facts in any order."""
    try:
        arrays, facts = load_arrays(path)
    except CheckpointError as error:
        return f"damaged: {error}"
    return hashlib.sha256((digest_of(arrays) + json.dumps(facts, sort_keys=True)).encode()).hexdigest()


def compare(expected: Facts, found: Facts) -> list[str]:
    """What differs between two runs, in words."""
    problems = []
    for name in sorted(expected.models.keys() | found.models.keys()):
        if expected.models.get(name) != found.models.get(name):
            problems.append(f"models/{name} is not that of the unbroken run")
    for name, value in expected.report.items():
        if found.report.get(name) != value:
            problems.append(f"report.json: {name} is not that of the unbroken run")
    for site, answers in expected.answers.items():
        mine = found.answers.get(site, {})
        if lost := sorted(answers.keys() - mine.keys()):
            problems.append(f"{site}: {len(lost)} answers of the unbroken run were never stored")
        if more := sorted(mine.keys() - answers.keys()):
            problems.append(f"{site}: {len(more)} answers to requests that the unbroken run never made")
        if other := [digest for digest in answers.keys() & mine.keys() if answers[digest] != mine[digest]]:
            problems.append(f"{site}: {len(other)} answers differ from the unbroken run's")
    return problems


def judge(root: Path, study: Study, schedule: Schedule, outcome: Outcome, expected: Facts) -> list[str]:
    """Every complaint about a run that has ended; empty when it passed."""
    problems = list(outcome.problems)
    if not outcome.finished:
        return problems or ["the coordinator did not finish"]
    out = root / "federation" / "runs" / study.name
    problems += compare(expected, facts_of(root, study, outcome))
    problems += [f"archive: {text}" for text in verify_archive(out / "archive")]
    for site in study.site_names():
        problems += [f"{site}: audit.jsonl: {text}" for text in verify_audit(root / site / "audit.jsonl")]
        problems += [f"{site}: {text}" for text in _twice(root / site / "audit.jsonl")]
        problems += [f"{site}: {text}" for text in _again(site, schedule, outcome)]
    return problems + _untold(root, schedule, outcome)


def _twice(audit: Path) -> list[str]:
    """Requests that were answered with different arrays."""
    problems, answered = [], dict[str, str]()
    asked: dict[str, Any] = {}
    for event in read_audit(audit):
        if event["kind"] == "asked":
            asked = event
        elif event["kind"] == "left" and event["request"] != "AdvertiseKeys":
            if (event["who"], event["key"]) != (asked.get("who"), asked.get("key")):
                problems.append(f"audit.jsonl: entry {event['seq']} left without having been asked for")
                continue
            arrays = json.dumps(event["arrays"], sort_keys=True)
            if answered.setdefault(asked["digest"], arrays) != arrays:
                problems.append(f"audit.jsonl: {event['key']} was answered twice, differently")
    return problems


def _again(site: str, schedule: Schedule, outcome: Outcome) -> list[str]:
    """Answers that were stored and computed again."""
    damaged = any(
        fault.kind == "damage" and fault.detail["what"] in ("answer", "state") and fault.party.startswith(site)
        for fault in schedule.faults
        if fault.number in outcome.fired
    )
    problems = []
    counts = Counter(digest for digest, _, _ in outcome.kept.get(site, []))
    answers = {(digest, answer) for digest, answer, _ in outcome.kept.get(site, [])}
    if not damaged and (more := [digest for digest, count in counts.items() if count > 1]):
        problems.append(f"{len(more)} answers were stored and yet computed again")
    if len(answers) > len(counts):
        problems.append("an answer was computed twice, with different bits")
    return problems


def _must_be_told(fault: Fault) -> bool:
    """Whether a wrong clock puts signatures outside the window of +5/-305 s.

    A site whose clock jumps back goes on from the last time that it signed, so only a jump ahead can be seen.
    """
    ahead = float(fault.detail["shift_s"]) * (-1 if fault.party == "server" else 1)
    return ahead >= AHEAD_S or (fault.party == "server" and ahead <= -BEHIND_S)


def _untold(root: Path, schedule: Schedule, outcome: Outcome) -> list[str]:
    """Sites whose clock was outside the window and who were not told so."""
    problems = []
    for fault in schedule.faults:
        if fault.kind != "clock" or fault.number not in outcome.fired or not _must_be_told(fault):
            continue
        since = [at - outcome.fired_s[fault.number] for at in outcome.fired_s.values()]
        if any(0 < each < fault.detail["seconds"] + 1 for each in since):
            continue  # whoever was killed at once could not be told
        sites = (
            [path.parent for path in root.glob("*/agent.jsonl")] if fault.party == "server" else [root / fault.party]
        )
        if not any("clock" in (site / "agent.jsonl").read_text(encoding="utf-8") for site in sites):
            problems.append(f"{fault.party}: its clock was wrong by {fault.detail['shift_s']:g} s and nobody was told")
    return problems
