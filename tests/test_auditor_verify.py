"""xfed-audit verify: nothing passes that was edited, cut, forked, swapped or re-keyed; everything honest does."""

from __future__ import annotations

import ast
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from tests.audited import SiteLedger, poisson, run_folder, study, study_ledger
from tests.conftest import ROOT, tiny
from xfed.common.auditor.attempts import follow
from xfed.common.auditor.chain import Mark, audit_site
from xfed.common.auditor.cli import app
from xfed.common.auditor.evidence import check_report, gather, study_digest
from xfed.common.auditor.keys import p384_signed, read_json
from xfed.common.auditor.lines import KEYS, read_line
from xfed.common.dp_events import Event
from xfed.common.identity import fingerprint, public_text, sign_bytes
from xfed.common.ledger_lines import KEYS as WRITTEN_KEYS
from xfed.common.ledger_lines import LineContent, endorse, sign_head, write_line
from xfed.server.report_signature import sign_report

STUDY = study()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ledgers = [study_ledger("site-01", STUDY), study_ledger("site-02", STUDY, 1.2)]
    return run_folder(tmp_path_factory.mktemp("run") / "run", STUDY, ledgers)


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def found(run: Path, **keys: str) -> str:
    return "\n".join(str(problem) for problem in gather([run], None, keys).problems)


def ledger_of(site: str = "site-01", build: Callable[[SiteLedger], None] | None = None) -> SiteLedger:
    ledger = SiteLedger(site, STUDY.digest)
    if build is None:
        ledger.attempt("generators", "Normal", 1, [poisson(0.1, 1.0, 5)])
        ledger.attempt("classifier", None, 1, [poisson(0.05, 1.0, 5)])
    else:
        build(ledger)
    return ledger


def pieces(ledger: SiteLedger) -> tuple[bytes, bytes, bytes]:
    head = json.dumps(sign_head(ledger.head, site=ledger.site, key=ledger.key), indent=2).encode() + b"\n"
    key = json.dumps(endorse(ledger.site, ledger.key.public_key(), ledger.identity), indent=2).encode() + b"\n"
    return b"".join(ledger.lines), head, key


def test_an_honest_run_is_untouched(honest: Path) -> None:
    assert found(honest) == ""
    evidence = gather([honest / "ledgers" / "site-01.jsonl"], None, {})
    assert evidence.verified
    assert evidence.run == honest
    assert list(evidence.sites) == ["site-01"]
    assert evidence.study == STUDY.digest


def test_the_auditor_reads_the_format_that_sites_write() -> None:
    assert KEYS == WRITTEN_KEYS
    assert study_digest(STUDY.resolved()) == STUDY.digest


def test_ten_thousand_single_bit_edits_are_all_found(honest: Path) -> None:
    names = ["site-01.jsonl", "site-01.head.json", "site-01.pub.json"]
    site_files = dict(zip(names, pieces(ledger_of()), strict=True))
    report_files = {name: (honest / name).read_bytes() for name in ("report.json", "report.sig.json", "report.html")}

    def clean(files: dict[str, bytes]) -> bool:
        if "report.json" in files:
            return not check_report(files)[0]
        return audit_site("site-01", *(files[name] for name in names)).verified

    assert clean(site_files)
    assert clean(report_files)
    rng = random.Random(4)
    targets = [*names, "report.json", "report.sig.json"]
    missed = []
    for number in range(10_000):
        name = targets[number % len(targets)]
        files = dict(site_files if name in site_files else report_files)
        data = bytearray(files[name])
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        files[name] = bytes(data)
        if clean(files):
            missed.append((name, place, bit))
    assert missed == []


def test_every_bit_of_a_short_ledger_counts() -> None:
    ledger = SiteLedger("site-01", "ab")
    ledger.put("refuse", {"reason": "no"}, "scores", None, 1)
    data, head, key = pieces(ledger)
    for place in range(len(data)):
        edited = bytearray(data)
        edited[place] ^= 1 << (place % 8)
        assert not audit_site("site-01", bytes(edited), head, key).verified


def test_a_dropped_last_line_is_found_by_head_coordinator_and_report(run: Path) -> None:
    path = run / "ledgers" / "site-01.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    text = found(run)
    assert "cut off at the end: ledgers/site-01.head.json" in text
    assert "cut off at the end: report.json" in text
    assert "events.jsonl line" in text
    path.write_bytes(b"".join(lines)[:-1])
    assert "has no end" in found(run)


@pytest.mark.parametrize("place", [0, 3, -2])
def test_a_line_taken_out_put_twice_or_moved_is_found(place: int) -> None:
    ledger = ledger_of()
    _, head, key = pieces(ledger)
    for edit in ("drop", "twice", "swap"):
        lines = list(ledger.lines)
        at = place % len(lines)
        if edit == "drop":
            del lines[at]
        elif edit == "twice":
            lines.insert(at, lines[at])
        else:
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        assert not audit_site("site-01", b"".join(lines), head, key).verified


def test_a_fork_signed_by_the_site_itself_is_found() -> None:
    ledger = ledger_of()
    _, old_head, key = pieces(ledger)
    seen = Mark(source="events.jsonl line 9", seq=4, hash=ledger.heads[4][1])
    content = LineContent(
        kind="refuse", event={"reason": "x"}, study=STUDY.digest, phase="scores", class_name=None, round=1, attempt=1
    )
    other = ledger.lines[:3]
    other.append(write_line(content, ledger.heads[3], site="site-01", software="xfed", key=ledger.key))
    values = json.loads(other[-1])
    fork = b"".join(other)
    new_head = json.dumps(sign_head((4, values["hash"]), site="site-01", key=ledger.key)).encode()
    assert "cut off" in str(audit_site("site-01", fork, old_head, key).problems)
    # with a head to fit it is whole in itself: only who remembers the other line can tell
    assert audit_site("site-01", fork, new_head, key, marks=[seen]).problems[0].what.startswith("rewritten: events")
    spliced = b"".join([*other, *ledger.lines[4:]])
    assert "forked" in str(audit_site("site-01", spliced, old_head, key).problems)


def test_swapped_sites_are_found(run: Path) -> None:
    ledgers = run / "ledgers"
    for suffix in ("jsonl", "head.json", "pub.json"):
        a, b = ledgers / f"site-01.{suffix}", ledgers / f"site-02.{suffix}"
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    text = found(run)
    assert "foreign: it is of the site 'site-02'" in text
    assert "ledgers/site-02.pub.json: it is of the site 'site-01'" in text


def test_a_replaced_key_is_found_wherever_it_was_replaced() -> None:
    ledger = ledger_of()
    data, head, key = pieces(ledger)
    known = fingerprint(public_text(ledger.identity.public_key()))
    assert audit_site("site-01", data, head, key, known_key=known).verified
    ledger.key = Ed25519PrivateKey.generate()
    _, new_head, new_key = pieces(ledger)
    assert "forged" in str(audit_site("site-01", data, head, new_key).problems)
    assert "forged" in str(audit_site("site-01", data, new_head, key).problems)
    forged = json.loads(new_key) | {"signature": json.loads(key)["signature"]}
    assert "changed or replaced" in str(audit_site("site-01", data, new_head, json.dumps(forged).encode()).problems)
    # a whole forgery, with another site's key, is told by the fingerprint alone
    stranger = ledger_of()
    assert audit_site("site-01", *pieces(stranger)).verified
    assert "the key was replaced" in str(audit_site("site-01", *pieces(stranger), known_key=known).problems)


def test_a_forged_endorsement_does_not_pass_by_its_fingerprint() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    other = ec.generate_private_key(ec.SECP384R1())
    name = fingerprint(public_text(key.public_key()))
    for number in range(20):
        data = f"content {number}".encode()
        domain = b"xfed ledger-key v1\n" + data
        good = sign_bytes("ledger-key", data, key)
        assert p384_signed(name, domain, good)
        assert not p384_signed(name, domain + b".", good)
        assert not p384_signed(name, domain, sign_bytes("ledger-key", data, other))
        assert not p384_signed(fingerprint(public_text(other.public_key())), domain, good)
    for nonsense in ("", "AAAA", "MAYCAQACAQA=", good + "=", good.replace("M", "N", 1)):
        assert not p384_signed(name, domain, nonsense)


@pytest.mark.parametrize("suffix", ["head.json", "pub.json", "jsonl"])
def test_missing_files_are_said(run: Path, suffix: str) -> None:
    (run / "ledgers" / f"site-01.{suffix}").unlink()
    assert "missing" in found(run)
    assert "site-01" in found(run)


def test_the_report_is_held_to_its_signature(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["privacy"]["sites"]["site-01"]["epsilon"] = 0.1
    (run / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    assert "report.json: changed: it is not the file that was signed" in found(run)
    coordinator = gather([run], None, {}).coordinator
    (run / "report.key").unlink()
    sign_report(run)  # by somebody else: whole in itself
    assert found(run) == ""
    assert coordinator is not None
    assert "the coordinator's key is" in found(run, coordinator=coordinator)
    (run / "report.html").write_text("other")
    assert "report.html: changed" in found(run)
    (run / "report.sig.json").unlink()
    assert "nobody signed report.json" in found(run)


def test_another_study_or_a_report_without_the_head_is_found(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epsilon: 8.0", "epsilon: 80.0"))
    assert "config.yaml: it is not the study that report.json tells of" in found(run)
    assert "no line is of this study" in found(run)
    (run / "config.yaml").write_text(text)
    report = json.loads((run / "report.json").read_text())
    report["privacy"]["sites"]["site-01"]["ledger"] = None
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    sign_report(run)
    assert "which ledger it rests on" in found(run)


def test_spends_after_the_report_are_found(tmp_path: Path) -> None:
    ledger = study_ledger("site-01", STUDY)
    run = run_folder(tmp_path / "run", STUDY, [ledger])
    ledger.attempt("scores", None, 2, [poisson(0.1, 1.0, 1)])
    ledger.write(run / "ledgers")
    assert "the report states too little" in found(run)


def event(steps: int = 5, sigma: float = 1.0) -> dict[str, Any]:
    return Event(sampling="poisson", q=0.1, sigma=sigma, steps=steps, clip=1.0).as_json()


G = ("generators", "Normal", 1)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([("spend", event())], "never reserved"),
        ([("release", {"sha256": "ab" * 32})], "never spent"),
        ([("reserve", event()), ("release", {"sha256": "ab" * 32})], "never spent"),
        ([("reserve", event()), ("spend", event()), ("spend", event())], "second time"),
        ([("reserve", event()), ("spend", event(6))], "6 steps of 5"),
        ([("reserve", event()), ("spend", event(5, 0.5))], "another mechanism"),
        ([("reserve", event()), ("resume", {"reason": "x"}), ("spend", event())], "broken off"),
        ([("resume", {"reason": "x"})], "not open"),
        ([("reserve", event(), 2)], "do not count up"),
        ([("reserve", event(), 1), ("spend", event(), 1), ("reserve", event(), 3)], "do not count up"),
        ([("reserve", event()), ("spend", event()), *[("release", {"sha256": "ab" * 32})] * 2], "second time"),
        ([("refuse", {"reason": "x"}, 3)], "do not count up"),
    ],
)
def test_unlawful_orders_are_found(steps: list[tuple[Any, ...]], said: str) -> None:
    def build(ledger: SiteLedger) -> None:
        for kind, what, *attempt in steps:
            ledger.put(kind, what, *G, *(attempt or [1]))

    audit = audit_site("site-01", *pieces(ledger_of(build=build)))
    (problem,) = audit.problems
    assert said in problem.what
    assert problem.line == len(steps)
    spends = sum(step[0] == "spend" for step in steps)
    assert sum(len(attempt.spent) for attempt in audit.attempts) == spends  # unlawful or not, it is counted


def test_lawful_orders_pass_with_two_mechanisms_kills_and_refusals() -> None:
    a, b = poisson(0.1, 1.0, 5), poisson(0.2, 2.0, 3)

    def build(ledger: SiteLedger) -> None:
        ledger.put("reserve", a.as_json(), *G)
        ledger.put("reserve", b.as_json(), *G)
        ledger.put("resume", {"reason": "killed"}, *G)
        ledger.put("refuse", {"reason": "over"}, *G, 2)
        ledger.attempt(*G, [a, b], 3)
        ledger.attempt(*G, [a], 4, kinds="reserve")

    audit = audit_site("site-01", *pieces(ledger_of(build=build)))
    assert audit.problems == ()
    assert [len(one.spent) for one in audit.attempts] == [0, 2, 0]
    assert [len(one.standing) for one in audit.attempts] == [0, 0, 1]


def test_what_the_site_itself_writes_is_lawful(tmp_path: Path) -> None:
    from xfed.client.ledger import Ledger

    key = Ed25519PrivateKey.generate()
    ledger = Ledger(tmp_path / "ledger.jsonl", "site-01", key)
    of = (STUDY.digest, "generators", "Normal", 1)
    ledger.reserve(*of, [poisson(0.1, 1.0, 5)])
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"seq":')
    ledger = Ledger(tmp_path / "ledger.jsonl", "site-01", key)
    ledger.resume(*of)
    ledger.refuse(*of, "over budget")
    reservation = ledger.reserve(*of, [poisson(0.1, 1.0, 5), poisson(0.2, 1.0, 5)])
    ledger.spend(reservation)
    ledger.release(reservation, "ab" * 32)
    lines = [read_line(line) for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)]
    kinds = " ".join(line.kind for line in lines)
    assert kinds == "reserve resume resume refuse reserve reserve spend spend release"
    assert follow(lines)[1] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "forget"),
        ("phase", "warm-up"),
        ("round", -1),
        ("attempt", 0),
        ("class", ""),
        ("event", {}),
        ("event", event() | {"unit": "image"}),
        ("event", event() | {"mechanism": "laplace"}),
        ("event", event() | {"sampling": "shuffle"}),
        ("event", event() | {"sigma": 0}),
        ("event", event() | {"steps": 0}),
        ("event", event() | {"q": 1.5}),
        ("event", event() | {"steps": True}),
        ("event", event() | {"extra": 1}),
    ],
)
def test_events_that_nobody_can_account_for_are_refused_never_skipped(key: str, value: Any) -> None:
    import hashlib

    def build(ledger: SiteLedger) -> None:
        ledger.attempt(*G, [poisson(0.1, 1.0, 5)])
        values = json.loads(ledger.lines[-2])
        values = {name: values[name] for name in WRITTEN_KEYS[:-2]} | {key: value}
        values["hash"] = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
        values["sig"] = json.loads(ledger.lines[-2])["sig"]
        ledger.lines[-2] = json.dumps(values, separators=(",", ":")).encode() + b"\n"

    audit = audit_site("site-01", *pieces(ledger_of(build=build)))
    assert not audit.readable
    assert audit.problems[0].line == 2


def test_files_are_read_in_one_spelling_only() -> None:
    values = {"a": 1e5, "b": "ü"}
    for text in (json.dumps(values), json.dumps(values, indent=2) + "\n", json.dumps(values, ensure_ascii=False)):
        assert read_json(text.encode()) == values
    for text in ('{"a": 1E5}', '{"a":1, "a":1}', '{"a": 1}\n\n', "[1]", "{", '{"a": NaN}', ' {"a": 1}'):
        with pytest.raises(ValueError, match="it "):
            read_json(text.encode())


def test_the_command_line(run: Path) -> None:
    runner = CliRunner()
    one = runner.invoke(app, ["verify", str(run / "ledgers" / "site-01.jsonl"), "--json"])
    assert one.exit_code == 0, one.output
    assert json.loads(one.stdout)["untouched"] is True
    whole = runner.invoke(app, ["verify", str(run)])
    assert whole.exit_code == 0
    assert "Untouched" in whole.stdout
    path = run / "ledgers" / "site-02.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sigma":1.2', b'"sigma":2.1', 1))
    broken = runner.invoke(app, ["verify", "--run", str(run), "--json"])
    assert broken.exit_code == 4
    problem = json.loads(broken.stdout)["problems"][0]
    assert problem["file"] == "ledgers/site-02.jsonl"
    assert problem["line"] == 1
    assert problem["remedy"]
    for wrong in (["verify"], ["verify", str(run / "none")], ["verify", str(run), "--key", "site-01"]):
        assert runner.invoke(app, wrong).exit_code != 0
    unknown = runner.invoke(app, ["verify", str(run), "--key", "site-09=SHA256:x"])
    assert "nothing here was signed by" in str(unknown.exception)


def test_a_ledger_without_a_run_is_verified_by_its_head(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (run / "ledgers").glob("site-01.*"):
        shutil.copy(path, alone / path.name)
    evidence = gather([alone / "site-01.jsonl"], None, {})
    assert evidence.verified
    assert evidence.run is None
    assert evidence.notes
    (alone / "site-01.head.json").unlink()
    assert "cut off at the end" in str(gather([alone / "site-01.jsonl"], None, {}).problems[0])
    assert gather([alone / "site-01.jsonl"], run, {}).run == run


def test_the_auditor_names_a_study_as_everybody_else_does() -> None:
    study = tiny(experiment={"folds": 3}, runtime={"workers": 7})
    assert study_digest(study.resolved()) == study.digest == tiny().digest


def test_the_auditor_does_not_depend_on_what_it_audits() -> None:
    allowed = {"errors", "console", "durable", "version", "auditor"}
    for path in sorted((ROOT / "common" / "auditor").glob("*.py")):
        more = {"config", "budget", "accounting"} if path.name == "plan.py" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                assert parts[0] not in ("torch", "flwr", "httpx"), (path.name, name)
                if parts[0] == "xfed":
                    assert parts[1] == "common", (path.name, name)
                    assert parts[2] in allowed | more, (path.name, name)
