"""`xfed-client check`: is this site ready to take part, and what to do where it is not.

::

    xfed.client.check.preflight --> findings, as they are made --> table (or --json) --> exit code of what failed

A plain function; `xfed.client.cli` registers it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xfed.client.finding import Finding, exit_code
from xfed.common.errors import ConfigError, IdentityError
from xfed.common.identity import parse_address

__all__ = ["check"]

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def check(
    folder: Annotated[Path, typer.Option("--dir", help="The site's folder.")] = Path("site"),
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT to reach the coordinator at, instead of the kit's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")] = False,
) -> None:
    """See whether this site is ready: folder, network, certificate, clock, plan, policy, store, disk, device, audit log.

    Ends with 0 when nothing failed; there may be warnings. Else with the code of what failed, and of several things with the
    first of: 9 identity, 3 store, 5 device, 6 disk, 4 audit log, 2 policy file, 1 versions, 7 network or coordinator, 8 policy.
    """
    from xfed.client.check import preflight

    if address is not None:
        try:
            parse_address(address)
        except IdentityError as error:
            raise ConfigError(f"--address: {error}") from error
    screen = Console(stderr=True)
    with screen.status("") as line:
        findings = preflight(folder, address, lambda name: line.update(f"checking: {name}"))
    code = exit_code(findings)
    if as_json:
        values = {"ok": code == 0, "exit_code": code, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(values, indent=2))
    else:
        Console(highlight=False).print(_table(findings))
    if code:
        raise typer.Exit(code)


def _table(findings: list[Finding]) -> Table:
    table = Table("", "check", "what was found, and what to do")
    table.columns[2].overflow = "fold"
    for finding in findings:
        colour = _COLOURS[finding.status]
        words = Text(_printable(finding.what))
        if finding.remedy:
            words.append(f"\n-> {_printable(finding.remedy)}", style="bold")
        table.add_row(Text(finding.status, style=colour), finding.name, words)
    return table


def _printable(text: str) -> str:
    """What came from outside must not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
