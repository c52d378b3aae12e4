"""`xfed-client audit`: what was asked of this site and what left it, as a table, and whether the log is untouched.

::

    site/audit.jsonl --read_audit--> table of the last N events (or --json)
                     --verify_audit--> "untouched", or each change and exit code 4

Nothing is written. What came from outside is printed without control characters: a name cannot repaint the terminal.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xfed.client.audit import Head, head, read_audit, verify_audit
from xfed.common.errors import CheckpointError, ConfigError

__all__ = ["audit"]

_SHOWN = 160
_NAMED = frozenset({"seq", "time", "kind", "prev", "hash", "who", "bytes", "study"})


def audit(
    folder: Annotated[Path, typer.Option("--dir", help="The site's folder, with audit.jsonl in it.")] = Path("site"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every line; exit code 0 when untouched, 4 when damaged.")
    ] = False,
    noted: Annotated[
        str | None,
        typer.Option(
            "--head", help="With --verify: NUMBER:HASH of a line noted before; finds lines cut off at the end."
        ),
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="How many of the last events to show; 0 = all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print events and result as JSON on stdout.")] = False,
) -> None:
    """Show who asked this site for what and what left it; with --verify, whether anybody changed the log."""
    path = folder / "audit.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no audit log. Give the site's folder with --dir; a site that never ran has none."
        )
    known = None if noted is None else _head(noted)
    if known is not None and not verify:
        raise ConfigError("--head is compared by --verify: give both")
    events: deque[dict[str, Any]] = deque(maxlen=last or None)
    total = 0
    for event in read_audit(path):
        events.append(event)
        total += 1
    problems = verify_audit(path, known) if verify else None
    if as_json:
        result: dict[str, Any] = {"events": list(events), "total": total}
        if problems is not None:
            result["verify"] = {"untouched": not problems, "problems": problems, "head": _end(path, problems)}
        typer.echo(json.dumps(result, indent=2, ensure_ascii=True))
    else:
        console = Console()
        console.print(_table(events))
        console.print(Text(f"{len(events):,} of {total:,} events in {_printable(str(path))}"))
        if problems is not None:
            _print_result(console, path, total, problems)
    if problems:
        raise typer.Exit(CheckpointError.exit_code)


def _head(text: str) -> Head:
    """NUMBER:HASH as `--verify` prints it. Raises `ConfigError`."""
    number, _, digest = text.partition(":")
    if not number.isdecimal() or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ConfigError(
            f"--head {text!r:.100}: write it as --verify prints it, NUMBER:HASH with 64 hexadecimal digits"
        )
    return int(number), digest


def _end(path: Path, problems: list[str]) -> str | None:
    """The head to note down, or None where the log is damaged."""
    if problems:
        return None
    number, digest = head(path)
    return f"{number}:{digest}"


def _print_result(console: Console, path: Path, total: int, problems: list[str]) -> None:
    if not problems:
        console.print(f"[green]Untouched:[/] all {total:,} lines are as they were written.", highlight=False)
        console.print(
            f"Lines cut off at the end can only be found against a head noted elsewhere. Today's: {_end(path, problems)}",
            highlight=False,
            soft_wrap=True,
        )
        return
    console.print(f"[bold red]Damaged:[/] {len(problems):,} findings.", highlight=False)
    for problem in problems:
        console.print(Text(f"  {_printable(problem)}"), soft_wrap=True)


def _table(events: deque[dict[str, Any]]) -> Table:
    table = Table(header_style="bold")
    for name in ("line", "time (UTC)", "who", "what"):
        table.add_column(name, overflow="fold")
    table.add_column("came in", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    for event in events:
        kind = event["kind"]
        size = _bytes(event.get("bytes"))
        style = {"refused": "yellow", "unreadable": "bold red", "torn": "bold red"}.get(kind, "")
        table.add_row(
            str(event.get("seq", event.get("line", ""))),
            str(event.get("time", ""))[:19].replace("T", " "),
            Text(_who(event.get("who"))),
            Text(_what(event), style=style),
            size if kind == "asked" else "",
            size if kind == "left" else "",
        )
    return table


def _who(who: Any) -> str:
    if not isinstance(who, Mapping):
        return _printable(str(who or ""))
    return _printable(" ".join(str(who[name]) for name in ("coordinator", "run") if name in who))[:_SHOWN]


def _what(event: Mapping[str, Any]) -> str:
    match event["kind"]:
        case "asked":
            text = f"asked {event.get('key')}"
        case "left":
            text = f"left {event.get('reply')} ({event.get('key')})"
        case "refused":
            text = f"refused {event.get('key') or 'what could not be read'}: {event.get('reason')}"
        case "unreadable":
            text = "changed or torn: see --verify"
        case kind:
            facts = ", ".join(f"{name} {value}" for name, value in event.items() if name not in _NAMED)
            text = f"{kind} {facts}"
    return _printable(text)[:_SHOWN]


def _bytes(count: Any) -> str:
    if not isinstance(count, int):
        return ""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
