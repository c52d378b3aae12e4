"""`xfed-audit`: check a study's privacy ledgers and recompute its claims, with no patient data, no network and no GPU.

::

    verify LEDGER...   untouched and complete? exit code 0, or every finding and exit code 4
    report LEDGER...   --> epsilon per site and artefact, by two accountants: table, --json, or OUT/audit.html
    replay             --> the site software on data with and without one patient: differing bytes on the wire
    empirical          --> the mechanism against canaries: a lower bound of epsilon beside the claim
    plan STUDY.yaml    --> before training: which classes are feasible with so many patients, at what noise

LEDGER is RUN/ledgers/SITE.jsonl or the folder RUN. `verify` and `plan` write nothing. Commands of other modules are registered
at the end of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from xfed.common.auditor.accountants import Mechanisms
from xfed.common.auditor.empirical import empirical as run_empirical
from xfed.common.auditor.evidence import COORDINATOR, Evidence, gather
from xfed.common.auditor.plan import parse_patients, plan_facts
from xfed.common.auditor.replay import replay as run_replay
from xfed.common.console import EXIT_CODES, print_result, run_app
from xfed.common.errors import CheckpointError, ConfigError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Audit the privacy of an xfed study from its ledgers: no patient data, no network.",
)

Ledgers = Annotated[
    list[Path] | None, typer.Argument(help="RUN/ledgers/SITE.jsonl, or the run folder.", metavar="LEDGER...")
]
Run = Annotated[
    Path | None, typer.Option("--run", help="The coordinator's run folder; default: that of the first ledger.")
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        help=f"NAME=SHA256:..., the fingerprint of a site's key (or of {COORDINATOR}'s) as you know it from elsewhere.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.callback()
def _audit() -> None:
    """Audit the privacy of an xfed study from its ledgers."""


def verify(ledgers: Ledgers = None, run: Run = None, key: Keys = None, as_json: Json = False) -> None:
    """Say whether ledgers, heads, keys and report are untouched and complete; ends with 0 only if all are (4 otherwise)."""
    evidence = _evidence(ledgers, run, key)
    values: dict[str, Any] = {
        "untouched": evidence.verified,
        "problems": [
            {"file": one.file, "line": one.line, "what": one.what, "remedy": one.remedy} for one in evidence.problems
        ],
        "notes": list(evidence.notes),
        "sites": {
            name: {
                "untouched": audit.verified,
                "lines": len(audit.lines),
                "head": {"seq": audit.head[0], "hash": audit.head[1]},
                "endorsed_by": audit.endorsed_by,
            }
            for name, audit in evidence.sites.items()
        },
        "coordinator": evidence.coordinator,
    }
    print_result(as_json, values, *_verdict(evidence))
    if not evidence.verified:
        raise typer.Exit(CheckpointError.exit_code)


def report(
    ledgers: Ledgers = None,
    run: Run = None,
    key: Keys = None,
    study: Annotated[
        str | None, typer.Option(help="Digest of the study; default: that of the run, else all together.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Default: that of the run's config.yaml.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for audit.html and audit.json.")] = None,
    attack: Annotated[
        bool, typer.Option("--empirical", help="Attack the installed mechanism with canaries, too (seconds per site).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Recompute epsilon from the ledgers by two accountants; ends with 4 when something does not verify."""
    from xfed.common.auditor.report import audit_facts, write_audit

    evidence = _evidence(ledgers, run, key)
    facts = audit_facts(evidence, study=study, delta=delta, attack=_attack if attack else None)
    files = write_audit(facts, out) if out is not None else []
    print_result(as_json, facts, *_table(facts), *(escape(_printable(str(path))) for path in files))
    if not facts["verified"]:
        raise typer.Exit(CheckpointError.exit_code)


def plan(
    study: Annotated[Path, typer.Argument(help="Study file.", metavar="STUDY.yaml")],
    patients: Annotated[
        str, typer.Option(help='Training patients per class at the site: "Class=number,...".', show_default=False)
    ],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field: --set privacy.epsilon=3")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say before training which classes a budget allows at a site, with what noise. Nothing is read but the study."""
    facts = plan_facts(study, parse_patients(patients), setting or [])
    print_result(as_json, facts, *_plan_lines(facts))


def _evidence(ledgers: list[Path] | None, run: Path | None, keys: list[str] | None) -> Evidence:
    known: dict[str, str] = {}
    for text in keys or []:
        name, separator, fingerprint = text.partition("=")
        if not separator or not name or not fingerprint.startswith("SHA256:"):
            raise ConfigError(f"--key {text!r:.100}: write it as NAME=SHA256:..., as ssh-keygen -lf prints it")
        if known.setdefault(name, fingerprint) != fingerprint:
            raise ConfigError(f"--key gives two fingerprints for {name!r:.80}")
    if not ledgers and run is None:
        raise ConfigError("name the ledgers (RUN/ledgers/SITE.jsonl), or the run folder")
    return gather(ledgers or [], run, known)


def _verdict(evidence: Evidence) -> list[str]:
    lines = [f"[red]{escape(_printable(str(problem)))}[/]" for problem in evidence.problems]
    lines += [f"Note: {escape(_printable(note))}" for note in evidence.notes]
    for name, audit in evidence.sites.items():
        state = "[green]untouched[/]" if audit.verified else "[bold red]not untouched[/]"
        signer = escape(_printable(audit.endorsed_by or "unknown"))
        lines.append(f"{escape(_printable(name))}: {state}, {len(audit.lines):,} lines, key {signer}")
    if evidence.coordinator is not None:
        lines.append(f"report: signed by {escape(evidence.coordinator)}")
    if evidence.verified:
        lines.append(
            "[green]Untouched.[/] Files cannot vouch for keys: compare these fingerprints with the owners' (--key)."
        )
    else:
        lines.append(f"[bold red]Not untouched:[/] {len(evidence.problems):,} findings.")
    return lines


def _table(facts: dict[str, Any]) -> list[str | Table]:
    table = Table(header_style="bold")
    for name in ("site", "verified"):
        table.add_column(name)
    for name in (
        "epsilon",
        *(one for one in facts["artefacts"] if one != "everything released"),
        "releases",
        "with standing",
    ):
        table.add_column(name, justify="right")
    for name, site in facts["sites"].items():
        table.add_row(
            escape(_printable(name)),
            "yes" if site["verified"] else "[bold red]no[/]",
            _figure(site["epsilon"]),
            *(_figure(one["epsilon"]) for key, one in site["artefacts"].items() if key != "everything released"),
            f"{site['releases']:,}",
            _figure(site["epsilon_with_standing"]),
        )
    most = facts["maximum"]
    lines: list[str | Table] = [table]
    lines.append(
        f"Epsilon at delta {facts['delta']:g}: at most {_figure(most['epsilon'])} ({escape(_printable(most['site']))})."
    )
    lines.append(escape(facts["consequence"]))
    lines += [f"[red]{escape(_printable(problem))}[/]" for problem in facts["problems"]]
    return lines


def _plan_lines(facts: dict[str, Any]) -> list[str | Table]:
    table = Table(header_style="bold")
    for name in ("class", "patients", "feasible", "part", "q", "sigma", "steps", "alone", "class in all"):
        table.add_column(name, justify="left" if name in ("class", "feasible", "part") else "right")
    for name, entry in facts["classes"].items():
        first = [escape(name), f"{entry['patients']:,}", "yes" if entry["feasible"] else "[bold red]no[/]"]
        for part in entry["parts"] or [None]:
            row = ["–"] * 5
            if part is not None:
                figures = (part["q"], part["sigma"], part["steps"], part["epsilon_alone"])
                row = [part["part"], *(f"{value:,.4g}" if value < 1e4 else f"{value:,}" for value in figures)]
            table.add_row(*first, *row, _figure(entry["epsilon"]) if first[0] and entry["parts"] else "")
            first = ["", "", ""]
    lines: list[str | Table] = [table]
    for name, entry in facts["classes"].items():
        lines += [f"[red]{escape(name)}:[/] {escape(reason)}" for reason in entry["reasons"]]
    lines += [f"[yellow]Warning:[/] {escape(warning)}" for warning in facts["warnings"]]
    lines.append(
        f"Epsilon {facts['epsilon']:.4g} of {facts['budget']:g} at delta {facts['delta']:g} for this site, the worst class."
    )
    return lines


def _figure(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def replay(
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Neighbouring hospitals to compare.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the first pair.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the site software on data with and without one patient, mechanism outputs frozen: its bytes must be equal (else 4)."""
    facts = run_replay(pairs, seed)
    lines = [
        f"{facts['pairs']} pairs, {facts['bytes']:,} bytes on the wire of each side: {facts['differing_bytes']:,} bytes differ"
        + (
            "."
            if not facts["differing_bytes"]
            else ": [bold red]something besides the noised sums tells of a patient[/]."
        ),
        *[
            f"pair {one['pair']}: {one['differing']:,} bytes, the first at {one['first_at']:,}"
            for one in facts["different"]
        ],
    ]
    print_result(as_json, facts, *lines)
    if facts["differing_bytes"]:
        raise typer.Exit(CheckpointError.exit_code)


def empirical(
    ledgers: Ledgers = None,
    run: Run = None,
    delta: Annotated[float | None, typer.Option(help="Default: that of the run's config.yaml, else 1e-5.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Without ledgers: the claim to be attacked.")] = None,
    sigma: Annotated[
        float | None, typer.Option(min=0.01, help="Without ledgers: the claimed noise multiplier.")
    ] = None,
    q: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Without ledgers: the claimed sampling rate.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Without ledgers: how many releases.")] = 1,
    as_json: Json = False,
) -> None:
    """Attack the installed mechanism with canaries: a lower bound of epsilon; above the claim, the claim is wrong (4).

    With ledgers: the mechanism does all that patients of the worst class were exposed to, and the claim is the ledger's.
    """
    if ledgers or run is not None:
        facts = _attacked_sites(_evidence(ledgers, run, None), delta)
    elif epsilon is not None and sigma is not None:
        found = run_empirical(((q, sigma, steps),), delta=1e-5 if delta is None else delta)
        facts = {"(claim)": {**found, "epsilon_claimed": epsilon}}
    else:
        raise ConfigError("name ledgers or a run folder, or give --epsilon and --sigma of a claim")
    lines = []
    for name, one in facts.items():
        one["contradicted"] = one["epsilon_lower_bound"] > one["epsilon_claimed"]
        lines.append(
            f"{escape(_printable(name))}: {one['right']} of {one['guesses']} guesses were right: epsilon is at least "
            f"{one['epsilon_lower_bound']:.3g} ({one['confidence']:.0%} confidence); claimed {one['epsilon_claimed']:.3g}: "
            + ("[bold red]the claim is wrong[/]." if one["contradicted"] else "not contradicted.")
        )
    print_result(as_json, {"sites": facts}, *lines)
    if any(one["contradicted"] for one in facts.values()):
        raise typer.Exit(CheckpointError.exit_code)


def _attack(events: Mechanisms, delta: float) -> dict[str, Any]:
    return run_empirical(events, delta=delta)


def _attacked_sites(evidence: Evidence, delta: float | None) -> dict[str, dict[str, Any]]:
    """Per site the bound beside the ledger's claim. Raises `CheckpointError` where there is nothing to contradict."""
    from xfed.common.auditor.report import audit_facts

    facts = audit_facts(evidence, delta=delta, attack=_attack)
    found = {}
    for name, site in facts["sites"].items():
        if site["empirical"] is None:
            raise CheckpointError(
                f"the ledger of {name} claims epsilon {'0' if site['epsilon'] == 0 else 'infinite'}: nothing can contradict it"
            )
        found[name] = {**site["empirical"], "class": site["worst_class"], "epsilon_claimed": site["epsilon"]}
    return found


for command in (verify, report, plan, replay, empirical):
    app.command(epilog=EXIT_CODES)(command)


def main() -> None:
    """Entry point of `xfed-audit`."""
    run_app(app)
