"""The commands about membership: `xfed-server init | approve | revoke | renew | members`.

::

    options --> one call of xfed.server.federation --> words for people on stdout, or --json
    approve: read the request, show name and fingerprint, ask (or --yes), admit, say where the kit is

Plain functions; `xfed.server.cli` registers them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xfed.common.console import print_result
from xfed.common.errors import ConfigError, IdentityError
from xfed.common.identity import certificate_fingerprint, format_time, utc_now
from xfed.common.plan import read_request
from xfed.server.federation import Federation, found_federation, load_federation

__all__ = ["approve", "init", "members", "renew", "revoke"]

Folder = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


def init(
    name: Annotated[str, typer.Option(help="Name of the federation; sites see it.")],
    address: Annotated[str, typer.Option(help="Where sites will reach the coordinator.", metavar="HOST:PORT")],
    also: Annotated[
        list[str] | None, typer.Option(help="Another host name or IP address for the certificate; may be repeated.")
    ] = None,
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Found a federation: its keys and certificates, in a new folder that only its owner can read."""
    federation = found_federation(folder, name=name, address=address, also=tuple(also or ()))
    values = {"folder": str(folder), **_described(federation)}
    print_result(
        as_json,
        values,
        f"[bold]{escape(federation.name)}[/bold] founded in {escape(str(folder))} for {', '.join(federation.names)}",
        f"Fingerprint of its certificate, for sites to compare by telephone:\n  {values['ca_fingerprint']}",
        f"Keep a backup of {escape(str(folder / 'ca.key'))} where nobody else can read it: whoever has it is the federation.",
        "Next: each site runs xfed-client enroll --name SITE and sends its request.json; then xfed-server approve REQUEST",
    )


def approve(
    request: Annotated[Path, typer.Argument(help="The request.json of a site.", metavar="REQUEST")],
    days: Annotated[int, typer.Option(min=1, max=1095, help="Length of the membership.")] = 365,
    expected: Annotated[
        str | None, typer.Option("--fingerprint", help="What the site told you (SHA256:...); any other key is refused.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the fingerprint has been compared.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Admit a site that was revoked.")] = False,
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Admit a site, or its new key, and write the kit to send back. Compare the fingerprint by telephone first."""
    federation, asked = load_federation(folder), read_request(request)
    known = federation.members().get(asked.site)
    screen = Console(stderr=True, soft_wrap=True, highlight=False)
    screen.print(f"{asked.site} asks to {'replace its key' if asked.kind == 'rotate' else 'join'}, with the key")
    screen.print(f"  {asked.fingerprint}")
    if known is not None and known.revoked is not None:
        same = " It is the key that was revoked." if known.public_key == asked.public_key else ""
        screen.print(f"[yellow]It was revoked on {known.revoked:%Y-%m-%d}: {escape(known.reason)}.{same}[/yellow]")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"nobody is there to say whether {asked.fingerprint} is the key of {asked.site}: compare it by telephone, "
                "then run this again with --yes (and best with --fingerprint)"
            )
        if not typer.confirm(f"Did {asked.site} tell you this fingerprint by telephone?", err=True):
            raise IdentityError(f"{asked.site} was not admitted")
    member, kit = federation.approve(asked, days=days, expected=expected, again=again)
    print_result(
        as_json,
        {
            **_listed(federation)[member.site],
            "kit": str(kit),
            "ca_fingerprint": certificate_fingerprint(federation.ca_pem),
        },
        f"{member.site} is a member until {member.expires:%Y-%m-%d}",
        f"Send it {escape(str(kit))}; nothing in it is secret. There: xfed-client enroll --kit FILE",
    )


def revoke(
    site: Annotated[str, typer.Argument(help="Name of the member.", metavar="SITE")],
    reason: Annotated[str, typer.Option(help="Why, in one line; it is kept.")],
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """End a site's membership at once; a running coordinator refuses its next request."""
    federation = load_federation(folder)
    member = federation.revoke(site, reason)
    when = "" if member.revoked is None else format_time(member.revoked)
    print_result(as_json, _listed(federation)[site], f"{site} is revoked since {when} ({escape(member.reason)})")


def renew(
    also: Annotated[list[str] | None, typer.Option(help="One more host name or IP address; may be repeated.")] = None,
    fresh: Annotated[bool, typer.Option("--new-key", help="Replace the key of the certificate, too.")] = False,
    folder: Folder = Path("federation"),
    as_json: Json = False,
) -> None:
    """Renew the coordinator's TLS certificate. Sites need nothing new; a running coordinator must be restarted."""
    end = load_federation(folder).renew(also=tuple(also or ()), fresh=fresh)
    federation = load_federation(folder)
    print_result(
        as_json,
        {**_described(federation), "expires": format_time(end)},
        f"The coordinator's certificate for {', '.join(federation.names)} is good until {end:%Y-%m-%d}; restart the coordinator",
    )


def members(folder: Folder = Path("federation"), as_json: Json = False) -> None:
    """List who is, was, or is no longer a member, and what is about to expire."""
    federation = load_federation(folder)
    listed, warnings = _listed(federation), federation.warnings()
    table = Table("site", "state", "expires", "fingerprint", "reason")
    for column in table.columns:
        column.overflow = "fold"
    for site, values in listed.items():
        cells = (values["state"], values["expires"][:10], values["fingerprint"], values["reason"])
        table.add_row(site, *map(escape, cells))
    print_result(
        as_json,
        {**_described(federation), "members": list(listed.values()), "warnings": warnings},
        table if listed else "no members yet: xfed-server approve REQUEST",
        f"certificate of {escape(federation.name)}: {certificate_fingerprint(federation.ca_pem)}",
        *(f"[yellow]{escape(line)}[/yellow]" for line in warnings),
    )


def _described(federation: Federation) -> dict[str, Any]:
    return {
        "federation": federation.name,
        "address": federation.address,
        "names": list(federation.names),
        "ca_fingerprint": certificate_fingerprint(federation.ca_pem),
    }


def _listed(federation: Federation) -> dict[str, dict[str, Any]]:
    now = utc_now()
    return {site: {**member.values(), "state": member.state(now)} for site, member in federation.members().items()}
