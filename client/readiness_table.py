"""The readiness report at the terminal: counts per class and split, what was not used, what to do about it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xfed.client.importing import ImportReport
from xfed.client.store import SPLITS

__all__ = ["print_readiness"]


def print_readiness(report: ImportReport, console: Console) -> None:
    """Print an import's report for a person."""
    ready = report.readiness
    state = "imported" if report.fresh else "already imported, nothing to do"
    console.print(
        f"[bold]{ready.total_images:,} images of {ready.total_patients:,} patients[/] at {ready.size} x {ready.size} "
        f"{state}: {escape(_printable(str(report.store)))}"
    )
    table = Table("class", *(f"{split}" for split in SPLITS), "all", title="images (patients)", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ready.classes:
        cells = [f"{ready.images[name][s]:,} ({ready.patients[name][s]:,})" for s in SPLITS]
        images, patients = sum(ready.images[name].values()), sum(ready.patients[name].values())
        table.add_row(escape(name), *cells, f"{images:,} ({patients:,})")
    console.print(table)
    if ready.balance is not None:
        console.print(f"balance: the largest class has {ready.balance:.1f} times the images of the smallest")
    console.print(f"duplicates: {ready.duplicates['images']:,} images repeat another one pixel by pixel")
    suspects = ", ".join(f"{count:,} {name}" for name, count in ready.suspects.items())
    console.print(f"suspects: {suspects}")
    sizes = ", ".join(f"{size} ({count:,})" for size, count in ready.original_sizes.items())
    console.print(f"original sizes: {sizes}")
    for title, counts in (("left out", ready.left_out), ("quarantined", ready.quarantined)):
        for reason, count in counts.items():
            console.print(f"{title}: {count:,} ({escape(reason)})")
    if report.quarantine is not None:
        console.print(
            f"faults are listed in {escape(_printable(str(report.quarantine)))}; it names files: it stays at this site"
        )
    for note in report.notes:
        console.print(f"note: {escape(_printable(note))}", highlight=False)
    for warning in ready.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if not ready.warnings:
        console.print("[green]ready: nothing to look at[/]")


def _printable(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()
