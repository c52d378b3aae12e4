"""`xfed-sim`: many hospitals on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from xfed.common.config import Phantom, Study
from xfed.common.console import EXIT_CODES, progress_bar, run_app
from xfed.common.devices import bfloat16_is_native, choose_device
from xfed.simulations.study_cli import study

__all__ = ["main"]

app = typer.Typer(
    name="xfed-sim",
    help="Run a federated study of several hospitals on this machine.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """Run a federated study of several hospitals on this machine."""


@app.command(epilog=EXIT_CODES)
def run(
    config: Annotated[Path, typer.Argument(help="study file, for instance configs/demo.yaml")],
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/<name of the study>")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of images and labels, instead of phantoms")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="override a field: --set gan.rounds=3")] = None,
    backend: Annotated[str | None, typer.Option(help="local or ray; default from the study file")] = None,
    archive: Annotated[Path | None, typer.Option(help="an archive that exists: no generators are trained")] = None,
    page: Annotated[str | None, typer.Option(help="PORT or auto: also serve a live page, on this machine only")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print report.json at the end, nothing else")] = False,
) -> None:
    """Run all three phases, or continue a run that was interrupted: generators, archive, classifiers, report."""
    from xfed.server.display import StudyDisplay
    from xfed.server.live_page import page_beside, page_port
    from xfed.server.report import terminal_table
    from xfed.simulations.run import load_run_study, run_study

    planned = load_run_study(config, settings=setting or [], data=data, backend=backend, archive=archive)
    folder = out or Path("runs") / planned.name
    console = Console(stderr=as_json)
    console.print(
        f"[bold]{planned.name}[/bold]: {planned.sites.count} hospitals, {len(planned.classes)} classes, {planned.image_size} px, "
        f"study {planned.digest[:12]}, folder {folder}",
        highlight=False,
    )
    if planned.precision == "bfloat16" and not bfloat16_is_native(choose_device(planned.runtime.device)):
        console.print(
            "[yellow]This processor only emulates bfloat16: the run is right but slow. "
            "--set precision=float32 is faster here (and gives other bits).[/yellow]"
        )
    live = page_beside(folder, page_port(page), lambda url: console.print(f"Live page: {url}", soft_wrap=True))
    with live, StudyDisplay(console) as display:
        path = run_study(planned, folder, data, listener=display, progress=display.images, archive=archive)
    text = (folder / "report.json").read_text(encoding="utf-8")
    if as_json:
        print(text)
        return
    import json

    console.print(terminal_table(json.loads(text)))
    console.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True)


app.command(epilog=EXIT_CODES)(study)


@app.command(epilog=EXIT_CODES)
def phantom(
    out: Annotated[Path, typer.Option(help="folder to write images/ and labels.csv into")],
    size: Annotated[int, typer.Option(help="side of the images in pixels", min=32, max=1024)] = 256,
    patients: Annotated[int, typer.Option(help="patients per class", min=1, max=100_000)] = 100,
    images_per_patient: Annotated[float, typer.Option(help="mean images of a patient", min=1, max=5)] = 1.3,
    seed: Annotated[int, typer.Option(min=0)] = 2018,
    kind: Annotated[str, typer.Option(help="chest, or luggage: bags with one of five contents")] = "chest",
) -> None:
    """Draw procedural chest X-rays of the five classes, or of luggage: for demonstrations and tests, never for diagnosis."""
    from xfed.simulations.phantom import write_phantom_folder

    if kind != "chest":
        from xfed.simulations.luggage import write_kind

        with progress_bar("Luggage") as advance:
            count = write_kind(kind, out, patients, images_per_patient, size, seed, advance)
        Console().print(f"{count} images and labels.csv in {out.resolve()}", highlight=False, soft_wrap=True)
        return
    classes = Study(name="phantom").classes
    settings = Phantom(patients=dict.fromkeys(classes, patients), images_per_patient=images_per_patient)
    with progress_bar("Phantoms") as advance:
        count = write_phantom_folder(
            out,
            classes=classes,
            patients=settings.patients,
            images_per_patient=settings.images_per_patient,
            size=size,
            seed=seed,
            progress=advance,
        )
    Console().print(f"{count} images and labels.csv in {out.resolve()}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of `xfed-sim`."""
    run_app(app)
