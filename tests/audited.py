"""A private study's run folder as a coordinator leaves it, written with the project's own ledger lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.conftest import tiny
from xfed.common.config import Study
from xfed.common.dp_events import Event
from xfed.common.ledger_lines import START, Head, LineContent, endorse, sign_head, write_line
from xfed.server.report_signature import sign_report

DELTA = 1e-4
DECLARED = {"Cardiomegaly": 300, "Normal": 400, "Pleural Effusion": 240}


def study(**privacy: Any) -> Study:
    return tiny(
        privacy={"epsilon": 8.0, "delta": DELTA, **privacy},
        classifier={"balance": "none"},
        gan={"minimum_images": 2, "method": "dcgan"},
    )


def poisson(q: float, sigma: float, steps: int) -> Event:
    return Event(sampling="poisson", q=q, sigma=sigma, steps=steps, clip=1.0)


def once(sigma: float, clip: float = 1.0) -> Event:
    return Event(sampling="none", q=1.0, sigma=sigma, steps=1, clip=clip)


class SiteLedger:
    """One site's ledger under construction; `identity` is the key with which it was admitted."""

    def __init__(self, site: str, study_digest: str) -> None:
        self.site, self.study = site, study_digest
        self.key, self.identity = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
        self.lines: list[bytes] = []
        self.heads: list[Head] = [START]

    @property
    def head(self) -> Head:
        return self.heads[-1]

    def put(self, kind: str, event: Any, phase: Any, class_name: str | None, round: Any, attempt: Any = 1) -> None:
        study = self.study if phase is not None else None
        content = LineContent(
            kind=kind, event=event, study=study, phase=phase, class_name=class_name, round=round, attempt=attempt
        )
        line = write_line(content, self.head, site=self.site, software="xfed test", key=self.key)
        self.lines.append(line)
        values = json.loads(line)
        self.heads.append((values["seq"], values["hash"]))

    def attempt(
        self,
        phase: str,
        class_name: str | None,
        round: int,
        events: Sequence[Event],
        attempt: int = 1,
        *,
        kinds: str = "reserve spend release",
    ) -> None:
        for kind in kinds.split():
            if kind in ("reserve", "spend"):
                for event in events:
                    self.put(kind, event.as_json(), phase, class_name, round, attempt)
            elif kind == "release":
                self.put(kind, {"sha256": "ab" * 32}, phase, class_name, round, attempt)
            else:
                self.put(kind, {"reason": "no answer was kept"}, phase, class_name, round, attempt)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.site}.jsonl"
        path.write_bytes(b"".join(self.lines))
        for name, values in (
            ("head", sign_head(self.head, site=self.site, key=self.key)),
            ("pub", endorse(self.site, self.key.public_key(), self.identity)),
        ):
            (folder / f"{self.site}.{name}.json").write_text(json.dumps(values, indent=2) + "\n")
        return path

    def events(self) -> list[tuple[str | None, Event]]:
        values = [json.loads(line) for line in self.lines]
        return [(v["class"], Event.from_json(v["event"])) for v in values if v["kind"] == "spend"]


def study_ledger(site: str, of: Study, sigma: float = 1.5, classes: Sequence[str] = tuple(DECLARED)) -> SiteLedger:
    """Two generator rounds per class, two classifier rounds of one arm each, scores; a retry, a break, a refusal, a torn line."""
    ledger = SiteLedger(site, of.digest)
    for round in (1, 2):
        for name in classes:
            ledger.attempt("generators", name, round, [poisson(of.gan.batch / DECLARED[name], sigma, 20)])
    total = sum(DECLARED.values())
    event = poisson(of.classifier.batch / total, sigma, 30)
    ledger.attempt("classifier", None, 1, [event], kinds="reserve resume")
    ledger.put("resume", {"reason": "torn", "bytes": 7, "sha256": "cd" * 32}, None, None, None, None)
    ledger.attempt("classifier", None, 1, [event], 2)
    ledger.attempt("classifier", None, 2, [event])
    ledger.attempt("scores", None, 1, [once(4.0, 2**0.5)])
    ledger.put("refuse", {"reason": "over budget"}, "classifier", None, 3)
    return ledger


def run_folder(
    folder: Path,
    of: Study,
    ledgers: Sequence[SiteLedger],
    claimed: dict[str, float] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """The folder, signed. `claimed`: the epsilon that the report gives a site (default: generous)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(of.resolved(), sort_keys=False, allow_unicode=True))
    events: list[dict[str, Any]] = [{"time": "2030-01-01T00:00:00+00:00", "kind": "start"}]
    sites = {}
    for ledger in ledgers:
        ledger.write(folder / "ledgers")
        for seq, digest in (ledger.heads[len(ledger.heads) // 2], ledger.head):
            events.append(
                {"kind": "ledger", "site": ledger.site, "seq": seq, "hash": digest, "phase": "generators", "round": 1}
            )
        seq, digest = ledger.head
        sites[ledger.site] = {
            "epsilon": (claimed or {}).get(ledger.site, 100.0),
            "declared_patients": DECLARED,
            "ledger": {"seq": seq, "hash": digest},
        }
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    report = {"schema": 1, "name": of.name, "study_digest": of.digest, "privacy": {"sites": sites}, **(extra or {})}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (folder / "report.html").write_text("<!DOCTYPE html><title>report</title>\n")
    sign_report(folder)
    return folder
