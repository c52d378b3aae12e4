"""`xfed-client reader`: can a radiologist of this hospital tell the archive's images from real ones?

::

    reader --archive DIR --reader NAME    --> the page for one reader (xfed.client.reader_page), until Ctrl-C; goes on later
    reader result                         --> figures of those who have finished, as a table or --json; reader-study.json
    reader export --out FILE              --> the aggregate that may leave, if policy and privacy allow it

All of a study lies in SITE/reader/<first 16 of the archive's root digest>/ and nothing of it leaves but what `export` writes.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xfed.common.console import EXIT_CODES
from xfed.common.durable import sha256_file, write_json
from xfed.common.errors import ConfigError, DataError

__all__ = ["reader"]

IMAGES = 60

reader = typer.Typer(invoke_without_command=True, epilog=EXIT_CODES)

Folder = Annotated[Path, typer.Option("--dir", help="The site's folder.")]
Which = Annotated[
    str | None, typer.Option("--study", help="Beginning of the archive's root digest, where there are several studies.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


@reader.callback()
def start(
    context: typer.Context,
    folder: Folder = Path("site"),
    archive: Annotated[Path | None, typer.Option(help="The archive's folder, with manifest.json in it.")] = None,
    name: Annotated[str | None, typer.Option("--reader", help="Who reads; a name of their own for each.")] = None,
    images: Annotated[
        int | None,
        typer.Option(min=2, help=f"How many to show, half of them real; default {IMAGES}. Fixed by the first reader."),
    ] = None,
    confidence: Annotated[
        bool, typer.Option(help="Ask how sure the reader is, 1 to 3. Fixed by the first reader.")
    ] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 = a free one.")] = 0,
) -> None:
    """Show real and synthetic images, blinded, to a reader of this hospital. The same command goes on after a stop."""
    if context.invoked_subcommand is not None:
        return
    if archive is None or name is None:
        raise ConfigError("say which archive and who reads: xfed-client reader --archive DIR --reader NAME")
    from xfed.client.reader_design import draw_design, open_synthetic, pictures, write_design
    from xfed.client.reader_page import reader_page
    from xfed.client.reader_study import load_study
    from xfed.client.store import open_store
    from xfed.common.pages import serve_page

    store, synthetic = open_store(folder / "store"), open_synthetic(archive)
    place = folder / "reader" / synthetic.root[:16]
    console = Console()
    if not (place / "design.json").is_file():
        step = 2 * len(store.classes)
        wanted = images if images is not None else max(step, IMAGES - IMAGES % step)
        design = draw_design(store, synthetic, images=wanted, confidence=confidence, seed=secrets.randbits(62))
        write_design(place, design)
    elif images is not None and images != (known := len(load_study(place))):
        raise ConfigError(
            f"--images {images}: this study was begun with {known}, and every reader sees the same. Leave it out."
        )
    study = load_study(place)
    make = reader_page(study, name, pictures(study.design, store, synthetic))
    for note in study.design.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False)
    others = [f"{other} {count}" for other, count in study.readers().items() if other != name]
    console.print(
        f"{escape(name)}: {len(study.answers(name))} of {len(study)} answered"
        + (f"; other readers: {escape(', '.join(others))}" if others else ""),
        highlight=False,
    )
    serve_page(make, port=port, announce=lambda url: console.print(f"Open {url}", highlight=False, soft_wrap=True))


def _place(folder: Path, which: str | None) -> Path:
    found = sorted(path.parent for path in (folder / "reader").glob("*/design.json"))
    chosen = [path for path in found if path.name.startswith((which or "")[:16])]
    if len(chosen) != 1:
        known = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{len(chosen)} reader studies in {folder / 'reader'} fit; there: {known}. Name one with --study."
        )
    return chosen[0]


@reader.command(epilog=EXIT_CODES)
def result(folder: Folder = Path("site"), which: Which = None, as_json: Json = False) -> None:
    """Show the figures of the readers who have finished, and write reader-study.json. Nothing leaves."""
    from xfed.client.reader_result import in_words
    from xfed.client.reader_study import load_study

    study = load_study(_place(folder, which))
    figures = study.figures()
    path = study.folder / "reader-study.json"
    write_json(path, figures)
    if as_json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(_table(figures))
    for sentence in in_words(figures["pooled"]):
        console.print(escape(sentence), highlight=False)
    agreement = figures["agreement"]
    if agreement["kappa"] is not None:
        console.print(
            f"Agreement: kappa {_span(agreement, 'kappa', '{:.2f}')} ({agreement['method']}, {agreement['readers']} readers)",
            highlight=False,
        )
    for note in figures["notes"]:
        console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False)
    console.print(f"Figures: {path}", highlight=False, soft_wrap=True)


def _span(facts: dict[str, Any], name: str, form: str) -> str:
    if facts[name] is None:
        return "–"
    interval = facts[f"{name}_interval"]
    return form.format(facts[name]) + (f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else "")


def _table(figures: dict[str, Any]) -> Table:
    table = Table(
        header_style="bold",
        caption="95% intervals; sensitivity: synthetic images called synthetic",
        caption_justify="left",
    )
    table.add_column("reader")
    for heading in ("right", "accuracy", "p", "sensitivity", "specificity", "d'", "AUC"):
        table.add_column(heading, justify="right")
    rows = {**figures["readers"], "all": figures["pooled"]} if len(figures["readers"]) > 1 else figures["readers"]
    for name, facts in rows.items():
        table.add_row(
            escape(name),
            f"{facts['correct']}/{facts['n']}",
            _span(facts, "accuracy", "{:.0%}"),
            f"{facts['p_value']:.2g}",
            _span(facts, "sensitivity", "{:.0%}"),
            _span(facts, "specificity", "{:.0%}"),
            _span(facts, "d_prime", "{:.2f}"),
            _span(facts, "auc", "{:.2f}"),
        )
    return table


@reader.command(epilog=EXIT_CODES)
def export(
    out: Annotated[Path, typer.Option(help="File to write the aggregate into (JSON).")],
    folder: Folder = Path("site"),
    which: Which = None,
) -> None:
    """Write the aggregate that may leave: counts per class and pseudonymous reader. Refused where policy or privacy forbid it."""
    from xfed.client.reader_result import aggregate
    from xfed.client.reader_study import load_study
    from xfed.common.journal import Journal

    study = load_study(_place(folder, which))
    values = aggregate(study, folder)
    Journal(study.folder / "exports.jsonl").write("export", images=values["images"], classes=values["classes"])
    write_json(out, values)
    console = Console()
    for name in values["classes_left_out"]:
        console.print(
            f"[yellow]{escape(name)} is left out: too few patients (smallest_count)[/yellow]", highlight=False
        )
    console.print(f"{out}  SHA-256 {sha256_file(out)}", highlight=False, soft_wrap=True)
