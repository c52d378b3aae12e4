"""The commands that take part in a study: `xfed-client start | approve | status`.

::

    start      --> xfed.client.agent until Ctrl-C or SIGTERM; events on the screen and in agent.jsonl
    approve    plans/ --> what the plan asks, what the policy says --> plans/<digest>.approved.json
    status     agent.jsonl, plans/, kit --> one table
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from xfed.client.home import SiteHome, load_home
from xfed.common.durable import exclusive
from xfed.common.errors import RefusedError
from xfed.common.journal import Journal
from xfed.common.stopping import StopFlag

__all__ = ["approve", "start", "status"]

Folder = Annotated[Path, typer.Option("--dir", help="The site's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


def start(
    folder: Folder = Path("site"),
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT to reach the coordinator at, instead of the kit's.")
    ] = None,
) -> None:
    """Take part: connect to the coordinator (outbound only), answer what plan and policy allow, until stopped."""
    from xfed.client.agent import run_agent

    home = load_home(folder)
    console = Console()
    for warning in home.warnings():
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False)
    journal = Journal(home.folder / "agent.jsonl")
    stop = StopFlag()
    stop.set_on(signal.SIGTERM, signal.SIGINT)

    def report(kind: str, facts: dict[str, Any]) -> None:
        journal.write(kind, **facts)
        now = datetime.now(UTC).strftime("%H:%M:%S")
        words = "  ".join(f"{name} {value}" for name, value in facts.items())
        console.print(f"{now}Z {kind}  {escape(words)}", highlight=False, soft_wrap=True)

    with exclusive(home.folder / "agent"):
        report("started", {"site": home.name, "federation": home.federation})
        try:
            run_agent(home, report, stop, address)
        finally:
            report("stopped", {})


def approve(
    digest: Annotated[
        str | None, typer.Argument(help="Beginning of the plan's digest; default: the newest plan.", metavar="DIGEST")
    ] = None,
    folder: Folder = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a received plan asks of this site, and approve it by its digest."""
    from xfed.client.policy import load_policy, violations
    from xfed.common.plan_words import asked_of_sites

    home = load_home(folder)
    plans = _plans(home)
    known = plans.all()
    if not known:
        raise RefusedError("no plan has been received yet: start the client (xfed-client start) and the coordinator")
    received = plans.find(digest) if digest is not None else known[-1]
    policy = load_policy(home.folder / "policy.yaml")
    console = Console(stderr=as_json)
    console.print(f"Plan [bold]{received.plan.digest}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"Federation {escape(home.federation)}, received {received.received}", highlight=False)
    for line in asked_of_sites(received.plan):
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    for problem in violations(policy, received.plan.study):
        console.print(f"[red]policy.yaml forbids: {escape(problem)}[/red]", highlight=False, soft_wrap=True)
    if received.approved is None:
        if not yes and not violations(policy, received.plan.study):
            if not sys.stdin.isatty():
                raise RefusedError("nobody is here to ask: read the plan above, then run the same command with --yes")
            if not typer.confirm("Approve this plan for this site?"):
                raise RefusedError("not approved; nothing was changed")
        received = plans.approve(received.plan.digest, policy)
    if as_json:
        print(json.dumps({"digest": received.plan.digest, "approved": received.approved}))
    else:
        console.print(f"approved {received.approved}", highlight=False)


def _plans(home: SiteHome) -> Any:
    from xfed.client.approval import Plans

    return Plans(home.folder, home.ca_pem, home.federation, home.name, home.public_key)


def status(folder: Folder = Path("site"), as_json: Json = False) -> None:
    """Show this site: membership, plans and their approval, the connection, what was done last."""
    home = load_home(folder, even_expired=True)
    events = list(Journal(home.folder / "agent.jsonl").read())
    connection = next(
        (e for e in reversed(events) if e["kind"] in ("connected", "disconnected", "started", "stopped")), None
    )
    answered = [event for event in events if event["kind"] == "answered"]
    facts: dict[str, Any] = {
        "site": home.name,
        "federation": home.federation,
        "address": home.address,
        "expires": home.expires.isoformat(timespec="seconds"),
        "connection": connection,
        "answers": len(answered),
        "last_answer": answered[-1] if answered else None,
        "plans": [
            {
                "digest": each.plan.digest,
                "study": each.plan.study.name,
                "received": each.received,
                "approved": each.approved,
            }
            for each in _plans(home).all()
        ],
        "warnings": home.warnings(),
    }
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(f"[bold]{escape(home.name)}[/bold] in {escape(home.federation)}, coordinator {escape(home.address)}")
    console.print(f"member until {home.expires:%Y-%m-%d}", highlight=False)
    state = "never started" if connection is None else f"{connection['kind']} {connection['time']}"
    console.print(f"connection: {state}; {len(answered)} answers given", highlight=False)
    for plan in facts["plans"]:
        mark = f"approved {plan['approved']}" if plan["approved"] else "[yellow]waits: xfed-client approve[/yellow]"
        console.print(f"plan {plan['digest'][:12]} {escape(plan['study'])}: {mark}", highlight=False)
    for warning in home.warnings():
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False)
