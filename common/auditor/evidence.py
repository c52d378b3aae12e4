"""What the auditor was given: files of a run folder or single ledgers, read once and checked against each other.

::

    LEDGER... or RUN folder
      ledgers/SITE.jsonl, .head.json, .pub.json --audit_site--------> SiteAudit per site --+
      events.jsonl   "ledger" lines: what the coordinator saw -- Mark --^                  |
      report.json    privacy.sites.SITE.ledger ---------------- Mark --^                   +--> Evidence
      report.sig.json  Ed25519 over the digests of report.json and report.html             |
      config.yaml    the study; its digest must be the report's and the ledgers' ----------+

Nothing is written. A run folder is known from a ledger's place (``RUN/ledgers/SITE.jsonl``), or given.

Formal guarantees
    Without problems: report.json and report.html are byte for byte what the holder of the coordinator's report key signed, they
    belong to config.yaml, and every ledger holds every line that report.json and events.jsonl name.
Not covered
    events.jsonl is not signed: what was taken out of it is not missed. Whose the report's key is: compare its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xfed.common.auditor.chain import Mark, Problem, SiteAudit, audit_site
from xfed.common.auditor.keys import canonical, ed25519_fingerprint, ed25519_signed, plain_base64, read_json
from xfed.common.errors import ConfigError

__all__ = ["COORDINATOR", "Evidence", "check_report", "gather", "phases_read", "study_digest"]

COORDINATOR = "coordinator"
_SIGNED = b"xfed report v1\n"
_MESSAGES = {
    "generators": {"GanUpdate", "Embedding"},
    "classifier": {"ClassifierUpdate"},
    "scores": {"Scores", "NoisyScores"},
}
"""What a site's answers are called that are computed from patients, by the ledger's phase."""
_NOT_IN_DIGEST = {"runtime", "experiment"}  # as xfed.common.config has it; an auditor needs none of that
_ASK = "ask the coordinator for the run folder again, and keep this copy"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All findings. `config` and `report` are empty where there is no run folder or no finished report.

    `study` is the digest of the run's study; `coordinator` the fingerprint of the key that signed the report.
    """

    sites: Mapping[str, SiteAudit]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    run: Path | None
    study: str | None
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    coordinator: str | None

    @property
    def verified(self) -> bool:
        """Whether nothing was found, in any file."""
        return not self.problems


def gather(paths: Sequence[Path], run: Path | None, known_keys: Mapping[str, str]) -> Evidence:
    """Read and check everything. `known_keys`: site (or "coordinator") to fingerprint, known from elsewhere.

    Raises `ConfigError` where there is nothing to read.
    """
    folder, ledgers, whole = _ledgers(paths, run)
    known = dict(known_keys)
    problems: list[Problem] = []
    notes: list[str] = []
    config: dict[str, Any] = {}
    report: dict[str, Any] = {}
    study = coordinator = None
    marks: dict[str, list[Mark]] = {}
    if folder is not None:
        config, study = _config(folder / "config.yaml", problems)
        report, coordinator = _report(folder, problems, notes, known.pop(COORDINATOR, None))
        if report and study is not None and report.get("study_digest") not in (None, study):
            problems.append(_problem("config.yaml", None, "it is not the study that report.json tells of"))
        _marks_of_events(folder / "events.jsonl", marks, problems, notes)
        _marks_of_report(report, config, marks, problems)
    else:
        notes.append("no run folder: not compared with what the coordinator saw")
    sites = {}
    for path in ledgers:
        site = path.name.removesuffix(".jsonl")
        sites[site] = audit_site(
            site,
            _read(path) or b"",
            _read(path.with_name(f"{site}.head.json")),
            _read(path.with_name(f"{site}.pub.json")),
            marks=marks.get(site, ()),
            known_key=known.pop(site, None),
            file=f"ledgers/{path.name}" if folder is not None else path.name,
        )
    if known:
        raise ConfigError(f"--key names {', '.join(sorted(known))}, which nothing here was signed by")
    for site in sorted(set(marks) - set(sites)) if whole else ():
        text = f"the ledger is missing, though the coordinator saw line {max(m.seq for m in marks[site])} of it"
        problems.append(_problem(f"ledgers/{site}.jsonl", None, text))
    if study is not None:
        problems += _belongs(sites, study, marks, report)
    problems += [problem for audit in sites.values() for problem in audit.problems]
    return Evidence(
        sites=dict(sorted(sites.items())),
        problems=tuple(problems),
        notes=tuple(notes),
        run=folder,
        study=study,
        config=config,
        report=report,
        coordinator=coordinator,
    )


def _ledgers(paths: Sequence[Path], run: Path | None) -> tuple[Path | None, list[Path], bool]:
    """The run folder if there is one, the ledgers, and whether these are to be all of the run."""
    given = list(paths) or ([run] if run is not None else [])
    found: dict[Path, None] = {}
    folders = set() if run is None else {run.resolve()}
    whole = False
    for path in given:
        if path.is_dir():
            inner = path / "ledgers" if (path / "ledgers").is_dir() else path
            found |= dict.fromkeys(sorted(inner.glob("*.jsonl")))
            whole = True
            if inner != path or inner.name == "ledgers":
                folders.add(inner.resolve().parent)
        elif path.is_file() and path.name.endswith(".jsonl"):
            found[path] = None
            parent = path.resolve().parent
            if run is None and parent.name == "ledgers" and _is_run(parent.parent):
                folders.add(parent.parent)
        else:
            raise ConfigError(f"{path} is neither a ledger (SITE.jsonl) nor a run folder with ledgers in it")
    if not found and not any(_is_run(folder) for folder in folders):
        raise ConfigError(
            f"there is no ledger in {', '.join(map(str, given)) or 'what was given'}: name SITE.jsonl or a run"
        )
    if len(folders) > 1:
        raise ConfigError("the ledgers belong to more than one run: audit one run at a time, or give --run")
    names = [path.name for path in found]
    if len(set(names)) < len(names):
        raise ConfigError("two ledgers have the same name, and a ledger's name is its site: audit them one at a time")
    return next(iter(folders), None), list(found), whole


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "report.json", "events.jsonl"))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _problem(file: str, line: int | None, what: str, remedy: str = _ASK) -> Problem:
    return Problem(file=file, line=line, what=what, remedy=remedy)


def study_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a resolved study without `runtime` and `experiment`: how reports and ledgers name it."""
    values = {key: value for key, value in config.items() if key not in _NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _config(path: Path, problems: list[Problem]) -> tuple[dict[str, Any], str | None]:
    data = _read(path)
    if data is None:
        problems.append(
            _problem(path.name, None, "the file is missing: which study this was, and its delta, is not known")
        )
        return {}, None
    try:
        values = yaml.safe_load(data)
        if not isinstance(values, dict):
            raise ValueError("it holds no study")
        return values, study_digest(values)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problems.append(_problem(path.name, None, f"it cannot be read: {error}".replace("\n", " ")))
        return {}, None


def _report(
    folder: Path, problems: list[Problem], notes: list[str], known: str | None
) -> tuple[dict[str, Any], str | None]:
    names = ("report.json", "report.html", "report.sig.json")
    files = {name: data for name in names if (data := _read(folder / name)) is not None}
    if not files:
        notes.append("no report yet: the study is under way, or was never finished")
        return {}, None
    found, report, fingerprint = check_report(files, known)
    problems += found
    return report, fingerprint


def check_report(
    files: Mapping[str, bytes], known_key: str | None = None
) -> tuple[list[Problem], dict[str, Any], str | None]:
    """What is wrong with a report, its content, and its signer's fingerprint. `files`: name to bytes, absent ones left out."""
    name = "report.sig.json"
    report: dict[str, Any] = {}
    problems: list[Problem] = []
    try:
        report = read_json(files["report.json"]) if "report.json" in files else {}
    except ValueError as error:
        problems.append(_problem("report.json", None, f"changed: {error}"))
    if name not in files:
        what = "the file is missing: nobody signed report.json, so it may have been changed"
        return [*problems, _problem(name, None, what)], report, None
    try:
        values = read_json(files[name])
    except ValueError as error:
        return [*problems, _problem(name, None, f"changed: {error}")], report, None
    digests: Any = values.get("sha256")
    sig: Any = values.get("sig")
    public = plain_base64(values.get("public_key"))
    well_formed = isinstance(digests, dict) and isinstance(sig, str) and public is not None and len(public) == 32
    if values.keys() != {"sha256", "public_key", "time", "sig"} or not well_formed:
        what = "it must hold sha256, public_key, time and sig"
        return [*problems, _problem(name, None, what)], report, None
    rest = {key: value for key, value in values.items() if key != "sig"}
    if public is None or not ed25519_signed(public, _SIGNED + canonical(rest), sig):
        problems.append(
            _problem(name, None, "the signature does not fit: the file was changed, or somebody else signed")
        )
        return problems, report, None
    if "report.json" not in digests:
        problems.append(_problem(name, None, "report.json is not among the files it signs"))
    for file, digest in digests.items():
        if file not in files:
            problems.append(_problem(str(file), None, "the file is missing, and it was signed"))
        elif hashlib.sha256(files[file]).hexdigest() != digest:
            problems.append(_problem(str(file), None, "changed: it is not the file that was signed"))
    fingerprint = ed25519_fingerprint(public)
    if known_key is not None and known_key != fingerprint:
        what = f"signed by {fingerprint}, but the coordinator's key is {known_key:.60}"
        problems.append(_problem(name, None, what))
    return problems, report, fingerprint


def _marks_of_events(path: Path, marks: dict[str, list[Mark]], problems: list[Problem], notes: list[str]) -> None:
    data = _read(path)
    if data is None:
        notes.append("events.jsonl is missing: not compared with what the coordinator saw round by round")
        return
    lines = data.split(b"\n")
    torn = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            problems.append(_problem(path.name, number, "it cannot be read"))
            continue
        if event.get("kind") != "ledger":
            continue
        site, seq, digest = event.get("site"), event.get("seq"), event.get("hash")
        if not isinstance(site, str) or type(seq) is not int or not isinstance(digest, str):
            problems.append(_problem(path.name, number, "it names no site, line and hash of a ledger"))
            continue
        mark = Mark(source=f"{path.name} line {number}", seq=seq, hash=digest)
        before = marks.setdefault(site, [])
        if before and seq < before[-1].seq:
            problems.append(
                _problem(path.name, number, f"the ledger of {site:.80} became shorter than in {before[-1].source}")
            )
        before.append(mark)
    if torn:
        notes.append("the last line of events.jsonl has no end: the coordinator was stopped while it wrote")


def _marks_of_report(
    report: Mapping[str, Any], config: Mapping[str, Any], marks: dict[str, list[Mark]], problems: list[Problem]
) -> None:
    privacy = report.get("privacy")
    sites = privacy.get("sites") if isinstance(privacy, dict) else None
    private = _section(config, "privacy").get("epsilon") is not None
    for site, entry in sites.items() if isinstance(sites, dict) else ():
        ledger = entry.get("ledger") if isinstance(entry, dict) else None
        if isinstance(ledger, dict) and type(ledger.get("seq")) is int and isinstance(ledger.get("hash"), str):
            marks.setdefault(site, []).append(Mark(source="report.json", seq=ledger["seq"], hash=ledger["hash"]))
        elif ledger is not None or (private and phases_read(report, site)):
            what = f"privacy.sites.{site}.ledger names no line: the report does not say which ledger it rests on"
            problems.append(_problem("report.json", None, what))


def phases_read(report: Mapping[str, Any], site: str) -> frozenset[str]:
    """The phases that read patients of the site, by a finished report: all, unless its list of messages denies it."""
    if not report:
        return frozenset()
    messages = _section(_section(_section(report, "traffic"), site), "messages")
    if not messages or "Masked" in messages:
        return frozenset(_MESSAGES)
    return frozenset(phase for phase, names in _MESSAGES.items() if names & messages.keys())


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _belongs(
    sites: Mapping[str, SiteAudit], study: str, marks: Mapping[str, list[Mark]], report: Mapping[str, Any]
) -> list[Problem]:
    """Ledgers against the study: what the coordinator saw must hold it, and nothing of it may come after the report."""
    problems = []
    for site, audit in sites.items():
        own = [line.seq for line in audit.lines if line.study == study]
        if marks.get(site) and not own and max(mark.seq for mark in marks[site]):
            what = "no line is of this study (config.yaml): the ledger or the study was exchanged"
            problems.append(_problem(audit.file, None, what))
        seen = [mark.seq for mark in marks.get(site, ()) if mark.source == "report.json"]
        late = [line.seq for line in audit.lines if line.study == study and line.kind in ("spend", "release")]
        if report and seen and late and max(late) > max(seen):
            what = "it spends or releases for this study after the report was made: the report states too little"
            problems.append(_problem(audit.file, max(late), what, "ask the coordinator for a report of all rounds"))
    return problems
