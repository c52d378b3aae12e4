"""The commands that run a study: `xfed-server plan | start | status`.

::

    plan STUDY     study + members --> what each site will be asked, digests; nothing starts
    start STUDY    --> xfed.server.deployment, with progress; exit code 0 only when the study succeeded
    status         control.json --> GET /status of the running coordinator --> table or --json
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from xfed.common.config import load_study
from xfed.common.errors import ConfigError, FederationError
from xfed.common.plan_words import asked_of_sites
from xfed.server.federation import load_federation
from xfed.server.federation_cli import Folder, Json

__all__ = ["plan", "start", "status"]

StudyFile = Annotated[Path, typer.Argument(help="Study file, for instance configs/demo.yaml.", metavar="STUDY.yaml")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a field: --set gan.rounds=3")]


def plan(
    study: StudyFile, setting: Settings = None, folder: Folder = Path("federation"), as_json: Json = False
) -> None:
    """Print the study's and the plan's digest and what each site will be asked. Nothing is sent."""
    from xfed.server.deployment import plan_for

    federation = load_federation(folder)
    read = load_study(study, setting or [])
    made = plan_for(federation, read, folder / "runs" / read.name)
    if as_json:
        values = {"plan_digest": made.digest, "study_digest": made.study.digest, "plan": made.values()}
        print(json.dumps({**values, "asked_of_sites": asked_of_sites(made)}, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(f"Plan  [bold]{made.digest}[/bold]   (sites approve this digest)", highlight=False, soft_wrap=True)
    console.print(f"Study {made.study.digest}", highlight=False, soft_wrap=True)
    for line in asked_of_sites(made):
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _address(text: str, option: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{option} {text!r}: write it as HOST:PORT, for instance 0.0.0.0:9092")
    return host.strip("[]"), int(port)


def start(
    study: StudyFile,
    setting: Settings = None,
    folder: Folder = Path("federation"),
    out: Annotated[Path | None, typer.Option(help="Run folder; default DIR/runs/<name of the study>.")] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT to listen on; default: all interfaces, the port of the address.")
    ] = None,
    control: Annotated[
        str, typer.Option(help="HOST:PORT of /status and /metrics, on this machine only.")
    ] = "127.0.0.1:0",
    join_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for sites to come and people to approve; default: federation.join_limit_s."),
    ] = None,
    page: Annotated[
        str | None, typer.Option(help="PORT or auto: also serve a live page of the study, on this machine only.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json at the end, nothing else on stdout.")
    ] = False,
) -> None:
    """Run or continue a study with the federation's sites. Ends with exit code 0 only if the study succeeded."""
    from xfed.server.deployment import Deployment, plan_for, run_deployment
    from xfed.server.display import StudyDisplay
    from xfed.server.live_page import page_port
    from xfed.server.report import terminal_table

    federation = load_federation(folder)
    read = load_study(study, setting or [])
    place = out or folder / "runs" / read.name
    made = plan_for(federation, read, place)
    console = Console(stderr=as_json)
    for warning in federation.warnings():
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False)
    host, port = _address(control, "--control")
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(f"--control {control!r}: status and metrics are for this machine; use 127.0.0.1:PORT")
    deployment = Deployment(
        federation=federation,
        plan=made,
        out=place,
        listen=_address(listen or f"0.0.0.0:{federation.address.rpartition(':')[2]}", "--listen"),
        control=("127.0.0.1" if host == "localhost" else host, port),
        join_limit_s=join_limit,
        page=page_port(page),
        announce=lambda url: console.print(f"Live page: {url}", highlight=False, soft_wrap=True),
    )
    console.print(
        f"[bold]{escape(made.study.name)}[/bold]: federation {escape(federation.name)}, {len(made.members)} sites, plan "
        f"{made.digest[:12]}, study {made.study.digest[:12]}, folder {escape(str(deployment.out))}",
        highlight=False,
        soft_wrap=True,
    )
    signal.signal(signal.SIGTERM, _interrupted)
    with StudyDisplay(console, sites=True) as display:
        path = run_deployment(deployment, display)
    text = (deployment.out / "report.json").read_text(encoding="utf-8")
    if as_json:
        print(text)
        return
    console.print(terminal_table(json.loads(text)))
    console.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def status(
    folder: Folder = Path("federation"),
    as_json: Json = False,
    watch: Annotated[bool, typer.Option(help="Keep the table up to date until Ctrl-C.")] = False,
) -> None:
    """Show the running study: phase, round, which site is online, problems."""
    facts = _ask(folder)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    elif not watch:
        Console().print(_table(facts))
    else:
        with Live(_table(facts), auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(_table(_ask(folder)), refresh=True)


def _ask(folder: Path) -> dict[str, Any]:
    import httpx

    load_federation(folder)
    path = folder / "control.json"
    try:
        address = str(json.loads(path.read_text(encoding="utf-8"))["control"])
        facts: dict[str, Any] = (
            httpx.get(f"http://{address}/status", timeout=10, trust_env=False).raise_for_status().json()
        )
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        raise FederationError(
            f"no coordinator is running from {folder} ({type(error).__name__}). "
            f"Start one: xfed-server start STUDY.yaml --dir {folder}"
        ) from error
    return facts


def _table(facts: dict[str, Any]) -> Table:
    title = f"{facts['study']}  plan {facts['plan_digest'][:12]}  {facts['phase']} {facts['round']}/{facts['rounds']}"
    table = Table(title=title, caption=f"running for {facts['running_s']:.0f} s", title_justify="left")
    for heading in ("site", "online", "said last", "sent MB", "received MB", "problems"):
        table.add_column(heading, justify="right" if heading.endswith(("MB", "problems")) else "left")
    for site, one in facts["sites"].items():
        table.add_row(
            site,
            "[green]yes[/green]" if one["online"] else "[red]no[/red]",
            escape(one["state"]),
            f"{one['bytes_sent_to'] / 1e6:.1f}",
            f"{one['bytes_received_from'] / 1e6:.1f}",
            str(one["problems"]),
        )
    for problem in facts["problems"][-5:]:
        table.add_row("", "", f"[yellow]{escape(problem['site'])}: {escape(problem['text'])}[/yellow]", "", "", "")
    return table
