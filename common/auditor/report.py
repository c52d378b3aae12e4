"""The audit's report: one JSON object for machines, one HTML file that opens anywhere.

::

    Evidence + study? + delta --audit_facts--> {sites {site: {epsilon, delta, ..}}, artefacts, maximum, points [21], problems ..}
                                   `--render--> audit.html (no script, nothing is loaded) --write_audit--> OUT/audit.{json,html}

OUT/audit.json and OUT/audit.html are whole or absent when the power goes. An epsilon of None is infinite or unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from xfed.common.auditor.accountants import Mechanisms
from xfed.common.auditor.composition import ARTEFACTS, Scope, site_facts
from xfed.common.auditor.curve import curve_svg
from xfed.common.auditor.evidence import Evidence, phases_read
from xfed.common.auditor.statements import consequence, points
from xfed.common.durable import write_json, write_text
from xfed.common.errors import ConfigError
from xfed.common.version import SOFTWARE

__all__ = ["SCHEMA", "audit_facts", "render", "write_audit"]

SCHEMA = 1
Attack = Callable[[Mechanisms, float], dict[str, Any]]


def audit_facts(
    evidence: Evidence,
    *,
    study: str | None = None,
    delta: float | None = None,
    now: datetime | None = None,
    attack: Attack | None = None,
) -> dict[str, Any]:
    """Everything the report says, as JSON. `study` None: that of the run, or all that the ledgers hold.

    `attack`: the one-run audit (`xfed.common.auditor.empirical`), asked once per site whose epsilon is finite and above 0.

    Raises `ConfigError` without ledgers, without a delta, or for a study that no ledger knows.
    """
    if not evidence.sites:
        raise ConfigError("there is no ledger: a study without one claims nothing, and its epsilon is infinite")
    privacy = _section(evidence.config, "privacy")
    wanted = study or evidence.study
    given: Any = privacy.get("delta") if delta is None else delta
    known = {one.study for audit in evidence.sites.values() for one in audit.attempts}
    if study is not None and study not in known:
        raise ConfigError(f"no ledger knows the study {study:.80}: they hold {', '.join(sorted(known)) or 'none'}")
    if type(given) not in (int, float) or not 0 < given < 1:
        raise ConfigError(
            "delta is not known: there is no private study in config.yaml here. Give --delta, below 1 / patients"
        )
    own = wanted is not None and wanted == evidence.study
    overlap = privacy.get("overlap", 1) if own else 1
    budget = privacy.get("epsilon") if own else None
    sites = {}
    for name, audit in evidence.sites.items():
        trained = phases_read(evidence.report, name) if own else frozenset()
        scope = Scope(study=wanted, delta=float(given), overlap=overlap, trained=trained, budget=budget)
        sites[name] = {**site_facts(audit, scope), "empirical": None}
        if attack is not None and sites[name]["epsilon"]:
            events = tuple((one["q"], one["sigma"], one["steps"]) for one in sites[name]["mechanisms"])
            sites[name]["empirical"] = attack(events, float(given))
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "created": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "software": SOFTWARE,
        "name": evidence.config.get("name") if own else None,
        "study": wanted,
        "delta": float(given),
        "overlap": overlap,
        "budget": budget,
        "sites": sites,
        "maximum": _maximum({name: site["epsilon"] for name, site in sites.items()}),
        "artefacts": {
            artefact: _maximum({name: site["artefacts"][artefact]["epsilon"] for name, site in sites.items()})
            for artefact in ARTEFACTS
        },
        "other_studies": len(known - {wanted}) if wanted is not None else 0,
        "coordinator": evidence.coordinator,
        "notes": list(evidence.notes),
        "problems": [str(problem) for problem in evidence.problems],
    }
    facts["delta_check"], too_large = _delta_check(evidence, float(given) if own else None)
    facts["problems"] += [*too_large, *_claims(evidence, sites, budget, overlap, own), *_refuted(sites)]
    facts["verified"] = not facts["problems"]
    facts["consequence"] = consequence(facts["maximum"]["epsilon"], float(given))
    facts["points"] = points(facts, evidence.config if own else {})
    return facts


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _maximum(figures: Mapping[str, float | None]) -> dict[str, Any]:
    """The largest epsilon and whose it is; None (infinite) is larger than any."""
    site = max(figures, key=lambda name: math.inf if figures[name] is None else figures[name] or 0.0)
    return {"epsilon": figures[site], "site": site}


def _delta_check(evidence: Evidence, delta: float | None) -> tuple[str, list[str]]:
    """Delta against the sites' public numbers of patients, if the report tells them."""
    counts = {name: total for name in evidence.sites if (total := sum(_declared(evidence.report, name).values()))}
    if delta is None or not counts:
        return "The numbers of patients are not in what was audited: the rule could not be checked.", []
    most = max(counts, key=lambda name: counts[name])
    if delta >= 1 / counts[most]:
        return "The rule is broken.", [
            f"delta {delta:g} is not below 1 / {counts[most]:,} patients of {most}. To do: count on no claim; use a smaller delta"
        ]
    return (
        f"The largest site, {most}, has {counts[most]:,} patients: 1 / {counts[most]:,} is {1 / counts[most]:.2g}.",
        [],
    )


def _declared(report: Mapping[str, Any], site: str) -> dict[str, int]:
    """The public numbers of patients per class of a site, as far as the report tells them."""
    entry = _section(_section(_section(report, "privacy"), "sites"), site)
    return {name: n for name, n in _section(entry, "declared_patients").items() if type(n) is int and n > 0}


def _rates(evidence: Evidence, name: str, site: Mapping[str, Any]) -> list[str]:
    """Sampling rates of the ledger against those that the study's batches and the declared sizes give."""
    declared = _declared(evidence.report, name)
    found = []
    for part in site["parts"]:
        batch = _section(evidence.config, "gan" if part["phase"] == "generators" else "classifier").get("batch")
        size = sum(declared.values()) if part["class"] is None else declared.get(part["class"], 0)
        if part["sampling"] == "poisson" and size and type(batch) is int and abs(part["q"] * size / batch - 1) > 1e-9:
            found.append(
                f"ledgers/{name}.jsonl: {part['phase']}{' of ' + part['class'] if part['class'] else ''} sampled at q "
                f"{part['q']:.6g}, and {batch} of {size:,} declared patients are {batch / size:.6g}. To do: ask the site which "
                "patients it sampled from"
            )
    return found


def _claims(evidence: Evidence, sites: Mapping[str, Any], budget: float | None, overlap: int, own: bool) -> list[str]:
    """What the study's report or budget says against what the ledgers show."""
    if not own:
        return []
    found = []
    claimed = _section(_section(evidence.report, "privacy"), "sites")
    for name, site in sites.items():
        found += _rates(evidence, name, site)
        shown = site["epsilon"]
        said = _section(claimed, name).get("epsilon")
        if said is not None and (shown is None or shown > 1.01 * said):
            is_ = "infinite or unknown" if shown is None else f"{shown:.4g}"
            found.append(
                f"report.json: claims epsilon {said:.4g} for {name}, and its ledger shows {is_}. "
                "To do: count on the ledger's figure"
            )
        if budget is not None and shown is not None and shown > 1.01 * budget:
            found.append(
                f"ledgers/{name}.jsonl: epsilon {shown:.4g} is above the budget of {budget:g}"
                f"{f' (overlap {overlap})' if overlap > 1 else ''}. To do: ask the site why it did not refuse"
            )
    return found


def _refuted(sites: Mapping[str, Any]) -> list[str]:
    """Claims below the lower bound that an attack on the installed mechanism proved."""
    return [
        f"{name}: canaries prove epsilon at least {site['empirical']['epsilon_lower_bound']:.4g}, and its ledger shows "
        f"{site['epsilon']:.4g}. To do: release nothing; the installed software does not make the noise that it writes down"
        for name, site in sites.items()
        if site["empirical"] is not None and site["empirical"]["epsilon_lower_bound"] > site["epsilon"]
    ]


def render(facts: Mapping[str, Any]) -> str:
    """The report as one HTML file."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    template = environment.from_string(
        resources.files("xfed.common.auditor").joinpath("report.html.j2").read_text("utf-8")
    )
    curves = {
        name: curve_svg(site["curve"], site["delta"], site["epsilon"]) if site["epsilon"] else ""
        for name, site in facts["sites"].items()
    }
    return template.render(facts=facts, curves=curves, artefacts=ARTEFACTS)


def _figure(value: float | None) -> str:
    """An epsilon for people: rounded up to two decimals, so that no rounding makes it smaller."""
    if value is None:
        return "∞"
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def write_audit(facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write audit.json and audit.html into `folder`. Raises `StorageError`."""
    files = [folder / "audit.json", folder / "audit.html"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(files[0], facts)
    write_text(files[1], render(facts))
    return files
