"""`xfed-client`: what a hospital runs.

::

    enroll                  --> key, request to the coordinator, kit from it   (xfed.client.enrolment_cli)
    check                   --> is everything ready, and what to do where it is not    (xfed.client.check_cli)
    approve, start, status                                                     (xfed.client.operations_cli)
    audit                   --> what was asked, what left, untouched or not    (xfed.client.audit_cli)
    ledger                  --> what private studies have cost the patients    (xfed.client.ledger_cli)
    reader                  --> real or synthetic? a blinded test for radiologists  (xfed.client.reader_cli)
    score ARCHIVE           --> how like the hospital's own images it is, in any network's eyes  (xfed.client.score_cli)
    review ARCHIVE          --> accept or reject each image of an archive that was sent  (xfed.client.review_cli)
    import SOURCE           --> image store + readiness report
    evaluate MODEL --images --> one arm's scores on the hospital's own folder; nothing is stored, nothing leaves

Each command parses its options into frozen values and calls one function; errors and exit codes are `run_app`'s. What takes
seconds to load (torch, pydicom) is loaded by the commands that need it, so the others answer at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from xfed.client.audit_cli import audit
from xfed.client.check_cli import check
from xfed.client.enrolment_cli import enroll
from xfed.client.ledger_cli import ledger
from xfed.client.operations_cli import approve, start, status
from xfed.client.reader_cli import reader
from xfed.client.review_cli import review
from xfed.client.score_cli import score
from xfed.common.config import Study
from xfed.common.console import EXIT_CODES, progress_bar, run_app
from xfed.common.errors import ConfigError

__all__ = ["app", "main"]

Labels = Annotated[
    Path | None,
    typer.Option(help="Label CSV; default: found in the folder by name (labels.csv, Data_Entry_2017.csv)."),
]
Layout = Annotated[str, typer.Option(help="auto, nih, folders or csv.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column with the image's file name.")]
PatientColumn = Annotated[str | None, typer.Option(help="Column with the patient's id.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the label.")]
LabelMap = Annotated[
    list[str] | None, typer.Option("--map", help='"their label=Our Class"; may be given several times.')
]

app = typer.Typer(
    name="xfed-client",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=EXIT_CODES,
)


@app.callback()
def _client() -> None:
    """What a hospital runs: real images never leave the machine that runs this."""


for command in (enroll, check, approve, start, status, audit, ledger, review, score):
    app.command(epilog=EXIT_CODES)(command)
app.add_typer(reader, name="reader")


@app.command("import", epilog=EXIT_CODES)
def import_command(
    source: Annotated[Path, typer.Argument(help="Folder of PNG, JPEG or DICOM files.")],
    store: Annotated[Path, typer.Option(help="Where the image store goes; an empty or new folder outside SOURCE.")],
    labels: Labels = None,
    size: Annotated[int, typer.Option(help="Side of the stored images in pixels: 32, 64, 128 or 256.")] = 64,
    classes: Annotated[
        str | None, typer.Option(help='Class names, "A,B,..."; default: the five classes of the study default.')
    ] = None,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    patient_column: PatientColumn = None,
    label_column: LabelColumn = None,
    label_map: LabelMap = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="Layout folders: regular expression with one group, the patient in a file name.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split by patient.")] = 2018,
    train: Annotated[float, typer.Option(help="Share of patients to train on.")] = 0.7,
    validation: Annotated[float, typer.Option(help="Share of patients to choose by.")] = 0.15,
    test: Annotated[float, typer.Option(help="Share of patients to judge by.")] = 0.15,
    workers: Annotated[int, typer.Option(min=0, help="Decoding threads; 0 = one per core.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what the store holds and begin again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Import a folder of X-rays into an image store, with a readiness report. Run it again to go on after a stop."""
    from xfed.client.importing import import_folder
    from xfed.client.readiness_table import print_readiness

    names = None if classes is None else [name.strip() for name in classes.split(",")]
    study = _settings(
        size=size,
        classes=names,
        seed=seed,
        data={
            **_labelling(layout, image_column, patient_column, label_column, label_map),
            "splits": {"train": train, "validation": validation, "test": test},
        },
    )
    with progress_bar("Importing") as progress:
        report = import_folder(
            source,
            store,
            size=study.image_size,
            classes=study.classes,
            data=study.data,
            seed=study.seed,
            labels=labels,
            progress=progress,
            workers=workers,
            restart=restart,
            patient_pattern=patient_pattern,
        )
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=True))
    else:
        print_readiness(report, Console())


@app.command(epilog=EXIT_CODES)
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A released classifier, for instance models/classifier-DS3.safetensors.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of PNG, JPEG or DICOM files.")],
    labels: Labels = None,
    layout: Layout = "auto",
    image_column: ImageColumn = None,
    patient_column: PatientColumn = None,
    label_column: LabelColumn = None,
    label_map: LabelMap = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
) -> None:
    """Score a released classifier on a folder of labelled X-rays. Nothing is stored and nothing leaves this machine."""
    from xfed.client.evaluate import evaluate_folder
    from xfed.client.scores_table import print_scores
    from xfed.common.registry import load_classifier

    classes = load_classifier(model).classes
    study = _settings(
        size=64,
        classes=list(classes),
        seed=0,
        data=_labelling(layout, image_column, patient_column, label_column, label_map),
    )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device!r} is not one of auto, cpu, cuda")
    with progress_bar("Reading images") as progress:
        scores = evaluate_folder(model, images, labels=labels, data=study.data, device=device, progress=progress)
    if as_json:
        typer.echo(json.dumps(scores, indent=2, ensure_ascii=True))
    else:
        print_scores(scores, Console())


def _labelling(
    layout: str, image_column: str | None, patient_column: str | None, label_column: str | None, pairs: list[str] | None
) -> dict[str, Any]:
    """How labels are read, as fields of a study's `data`. Raises `ConfigError`."""
    return {
        "layout": layout,
        "image_column": image_column,
        "patient_column": patient_column,
        "label_column": label_column,
        "label_map": _label_map(pairs or ()),
    }


def _label_map(pairs: Sequence[str]) -> dict[str, str]:
    """``their label=Our Class`` pairs; the last ``=`` divides. Raises `ConfigError`."""
    mapping = {}
    for pair in pairs:
        theirs, separator, ours = pair.rpartition("=")
        if not separator or not theirs.strip() or not ours.strip():
            raise ConfigError(f"--map {pair!r}: write it as 'their label=Our Class'")
        mapping[theirs.strip()] = ours.strip()
    return mapping


_OPTIONS = {"image_size": "--size", "classes": "--classes", "seed": "--seed", "data.layout": "--layout"}


def _settings(*, size: int, classes: list[str] | None, seed: int, data: dict[str, Any]) -> Study:
    """Check options by the rules of a study file. Raises `ConfigError` naming the option."""
    values: dict[str, Any] = {"name": "import", "image_size": size, "seed": seed, "data": data}
    if classes is not None:
        values["classes"] = tuple(classes)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            option = _OPTIONS.get(where) or f"--{where.rpartition('.')[2]}"
            if where == "data.splits":
                option = "--train, --validation, --test"
            elif not where or where == "data.label_map":
                option = "--map"
            lines.append(f"{option}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(lines)) from error


def main() -> NoReturn:
    """Entry point of `xfed-client`."""
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # its remarks on each file would hide the progress bar
    run_app(app)
