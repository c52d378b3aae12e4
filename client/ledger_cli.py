"""`xfed-client ledger`: what private studies have cost the patients of this site, from its own ledger.

::

    site/ledger.jsonl --Ledger (chain and signatures checked)--> spent, reserved --accounting--> epsilon per study and class

The ledger is signed with the site's key and only ever grows; nothing is written here. An independent figure comes from the
auditor (`xfed-audit report`), who needs this file's copy at the coordinator and no patient data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from xfed.common.console import print_result
from xfed.common.errors import ConfigError

__all__ = ["ledger"]


def ledger(
    folder: Annotated[Path, typer.Option("--dir", help="The site's folder, with ledger.jsonl in it.")] = Path("site"),
    delta: Annotated[float, typer.Option(min=1e-9, max=0.01, help="Delta that epsilon is said at.")] = 1e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Show what private studies have spent of the patients' privacy: epsilon per study and class, and of all studies together."""
    if not (folder / "ledger.jsonl").is_file():
        raise ConfigError(
            f"{folder / 'ledger.jsonl'}: there is no privacy ledger. Give the site's folder with --dir; a site that took part in "
            "no private study has none."
        )
    facts = _facts(folder, delta)
    print_result(as_json, facts, *_lines(facts))


def _facts(folder: Path, delta: float) -> dict[str, Any]:
    from xfed.client.ledger import open_ledger  # checks signatures and counts: not needed to answer --help

    try:
        name = str(json.loads((folder / "site.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not a site's folder ({error}). Give it with --dir.") from error
    book = open_ledger(folder, name)
    head = book.head()
    return {
        "site": head["site"],
        "delta": delta,
        "studies": {study: _study(book, study, delta) for study in book.studies()},
        "all": _study(book, None, delta),
        "head": {"seq": head["seq"], "hash": head["hash"]},
    }


def _study(book: Any, study: str | None, delta: float) -> dict[str, Any]:
    per_class = book.epsilon_by_class(study, delta)
    return {
        "epsilon": max(per_class.values(), default=0.0),
        "epsilon_per_class": {name: value for name, value in per_class.items() if name is not None},
        "spends": len(book.spent(study)),
        "standing": sum(one.study == study or study is None for one in book.standing()),
    }


def _lines(facts: dict[str, Any]) -> list[str | Table]:
    table = Table(header_style="bold")
    table.add_column("study")
    for name in ("epsilon", "spends", "standing reservations"):
        table.add_column(name, justify="right")
    for study, entry in [*facts["studies"].items(), ("all studies together", facts["all"])]:
        table.add_row(study[:20], f"{entry['epsilon']:.4g}", f"{entry['spends']:,}", f"{entry['standing']:,}")
    return [
        table,
        f"Epsilon at delta {facts['delta']:g}, of the patients of {escape(facts['site'])} who have lost most.",
        f"Ledger: {facts['head']['seq']:,} lines, untouched. Head: {facts['head']['seq']}:{facts['head']['hash']}",
    ]
