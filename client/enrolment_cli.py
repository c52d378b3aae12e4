"""`xfed-client enroll`: a hospital joins, renews its key, or installs the kit it was sent.

::

    --name SITE   --> folder and key, request.json           --rotate --> key.new, request.json
    --kit FILE    --> kit.json, ca.pem: enrolled

A plain function; `xfed.client.cli` registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from xfed.client.home import Request, SiteHome, ask_to_enrol, ask_to_rotate, found_home, install_kit
from xfed.common.console import print_result
from xfed.common.errors import ConfigError
from xfed.common.identity import format_time

__all__ = ["enroll"]


def enroll(
    name: Annotated[
        str | None, typer.Option(help="Name of this site in the federation: lower-case letters, digits, hyphens.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="This site's folder.")] = Path("site"),
    rotate: Annotated[bool, typer.Option("--rotate", help="Ask to replace this site's key by a new one.")] = False,
    kit: Annotated[Path | None, typer.Option(help="Install the kit that the coordinator sent.")] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Although this site is enrolled: ask anew, or take another federation's kit."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")] = False,
) -> None:
    """Join a federation. First --name, which writes the request to send; then --kit with the answer. The key stays here."""
    if sum((name is not None, rotate, kit is not None)) != 1:
        raise ConfigError(
            "give one of --name SITE (join), --rotate (new key), --kit FILE (install the coordinator's answer)"
        )
    if rotate and again:
        raise ConfigError("--again goes with --name or --kit, not with --rotate")
    if kit is not None:
        _enrolled(install_kit(folder, kit, again=again), as_json)
    elif rotate:
        _asked(ask_to_rotate(folder), as_json)
    elif name is not None:
        found_home(folder, name)
        _asked(ask_to_enrol(folder, again=again), as_json)


def _asked(request: Request, as_json: bool) -> None:
    values = {
        "state": "requested",
        "site": request.site,
        "kind": request.kind,
        "request": str(request.path),
        "fingerprint": request.fingerprint,
    }
    use = "" if request.kind == "enrol" else " Until the coordinator approves it, the present key stays in use."
    print_result(
        as_json,
        values,
        f"Send {escape(str(request.path))} to the coordinator; nothing in it is secret.{use}",
        f"Tell the coordinator this fingerprint by telephone:\n  {request.fingerprint}",
        "Then install the kit that comes back: xfed-client enroll --kit FILE",
    )


def _enrolled(home: SiteHome, as_json: bool) -> None:
    values = {
        "state": "enrolled",
        "site": home.name,
        "federation": home.federation,
        "address": home.address,
        "expires": format_time(home.expires),
        "ca_fingerprint": home.ca_fingerprint,
        "warnings": home.warnings(),
    }
    print_result(
        as_json,
        values,
        f"{home.name} is enrolled in [bold]{escape(home.federation)}[/bold] ({escape(home.address)}) "
        f"until {home.expires:%Y-%m-%d}",
        f"Compare with the coordinator by telephone, before anything else:\n  {home.ca_fingerprint}",
        f"If it differs, delete {escape(str(home.folder / 'kit.json'))}: somebody else wrote the kit.",
        f"Next: read {escape(str(home.folder / 'policy.yaml'))}, which says what the coordinator may ask for",
        *(f"[yellow]{escape(line)}[/yellow]" for line in home.warnings()),
    )
