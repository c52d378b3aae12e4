"""`python -m xfed.simulations.compare_families A.yaml B.yaml --out DIR`: two studies run, and their generators side by side.

::

    A.yaml --run_study--> DIR/<name of A>/ --+
    B.yaml --run_study--> DIR/<name of B>/ --+--side_by_side--> DIR/comparison.json, .html, and both reports (signed anew)

Give both the same seed, data, sites and classifier: then both archives are judged by the same DS1, to the last bit, and the
table says so if not. A finished study is not run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from xfed.common.console import EXIT_CODES, print_result, run_app
from xfed.common.errors import ConfigError, DataError
from xfed.server.siblings import add_sibling, side_by_side, write_comparison
from xfed.simulations.run import load_run_study, run_study

__all__ = ["compare"]

app = typer.Typer(add_completion=False)


def compare(
    configs: tuple[Path, Path], out: Path, data: Path | None = None, settings: list[str] | None = None
) -> dict[str, Any]:
    """Run both studies (or go on with them), write the comparison into `out` and both reports; returns the table.

    `settings` (``a.b=c``) hold for both. Raises `XfedError`.
    """
    studies = [load_run_study(config, settings=settings or [], data=data) for config in configs]
    if studies[0].name == studies[1].name:
        raise ConfigError(f"both studies are called {studies[0].name}: their folders would be the same. Rename one.")
    folders = [out / study.name for study in studies]
    for study, folder in zip(studies, folders, strict=True):
        run_study(study, folder, data)
    reports = [_report(folder) for folder in folders]
    table = side_by_side(reports)
    write_comparison(out, table)
    for folder, report in zip(folders, reports, strict=True):
        add_sibling(folder, report, table)
    return table


def _report(folder: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no readable report ({error}). Run the same command again.") from error
    return report


def _shown(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else f"{value:.{digits}f}"


@app.command(epilog=EXIT_CODES)
def families(
    one: Annotated[Path, typer.Argument(help="study file")],
    other: Annotated[Path, typer.Argument(help="study file with the same data and another family")],
    out: Annotated[Path, typer.Option(help="folder for both runs and the comparison")],
    data: Annotated[Path | None, typer.Option(help="folder of images and labels, instead of phantoms")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="override a field of both")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
) -> None:
    """Run two studies and put their generators side by side: quality, variety, what they teach, what they cost."""
    table = compare((one, other), out, data, setting)
    told = Table("figure", *table["names"], "unit")
    for row in table["rows"]:
        told.add_row(row["title"], *(_shown(value, row["digits"]) for value in row["values"]), row["unit"])
    print_result(as_json, table, told, *table["notes"])


if __name__ == "__main__":
    run_app(app)
