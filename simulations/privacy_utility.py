"""`python -m xfed.simulations.privacy_utility STUDY.yaml --out DIR`: what privacy costs: utility beside epsilon, per method.

::

    for "none", and each method and epsilon: run_study --> OUT/<method>-<epsilon>/ (a finished one is not run again)
        report.json           --> epsilon that its ledgers add up to; the classifiers' balanced accuracy, with noise and interval
        sites' test patients  --> the same without noise (this machine simulates all sites, so it may look)
        archive               --> how often the DS1 classifier of "none" calls a synthetic image by its class
      --> OUT/utility.json (a row as soon as it is known), OUT/utility.html: figure and table

"none" is the same study without differential privacy. Each row is a whole federated run with its own ledgers. The figures without
noise and the judge are a researcher's, on images of one's own; a deployed study releases neither. One seed per row: rows of one
epsilon differ by their noise, too.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from xfed.client.cohort import cohort
from xfed.client.store import open_store
from xfed.common.classifier import predict
from xfed.common.config import Study
from xfed.common.console import run_app
from xfed.common.durable import write_json, write_text
from xfed.common.registry import load_classifier
from xfed.server.archive import read_archive
from xfed.simulations.hospitals import site_folders
from xfed.simulations.run import load_run_study, run_study

__all__ = ["main", "utility_page"]

NONE = ["privacy.epsilon=null", "privacy.delta=null", "gan.method=dcgan", "classifier.balance=sampling"]
CPU = torch.device("cpu")
COLOURS = {"dp-merf": "#0b6e6e", "dcgan": "#b35c00", "dp-merf+dcgan": "#5b4b8a"}

app = typer.Typer(add_completion=False)


def _recognised(judge: Path, study: Study, run: Path) -> dict[str, float]:
    """Share of each class's synthetic images that the classifier file `judge` calls by it."""
    images, labels = read_archive(run / "archive", study.classes)
    predicted = predict(load_classifier(judge).model, images, device=CPU, precision="float32").argmax(1)
    return {name: float(np.mean(predicted[labels == c] == c)) for c, name in enumerate(study.classes)}


def _exact(study: Study, run: Path, arm: str) -> float:
    """Balanced accuracy of an arm over all test patients of a private study's sites, one image each, without noise."""
    model = load_classifier(run / "models" / f"classifier-{arm}.safetensors").model
    hits: list[list[bool]] = [[] for _ in study.classes]
    for folder in site_folders(run, study):
        declared = json.loads(next(folder.rglob("declared.json")).read_text(encoding="utf-8"))
        store = open_store(folder / "store")
        tested = cohort(store, study, [declared[name] for name in study.classes]).test
        for label, patients in enumerate(tested):
            rows = np.array([own[0] for own in patients], np.int64)
            if len(rows):
                predicted = predict(model, store.images[rows], device=CPU, precision="float32").argmax(1)
                hits[label] += (predicted == label).tolist()
    return float(np.mean([np.mean(of_class) for of_class in hits if of_class]))


def _row(study: Study, run: Path, method: str, asked: str, judge: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    found = _recognised(judge, study, run)
    arms = {
        name: {
            "balanced_accuracy": arm["balanced_accuracy"],
            "interval": arm["balanced_accuracy_interval"],
            "without_noise": _exact(study, run, name) if study.private else arm["balanced_accuracy"],
        }
        for name, arm in report["arms"].items()
    }
    return {
        "method": method,
        "asked": asked,
        "epsilon": report["privacy"].get("epsilon") if study.private else None,
        "delta": study.privacy.delta,
        "recognised": found,
        "recognised_balanced": float(np.mean(list(found.values()))),
        "arms": arms,
    }


@app.command()
def privacy_utility(
    config: Annotated[Path, typer.Argument(help="A private study, for instance configs/private.yaml.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs, utility.json and utility.html.")],
    epsilons: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "10,3,1",
    methods: Annotated[str, typer.Option(help="Values of gan.method, separated by commas.")] = "dp-merf,dcgan",
    data: Annotated[Path | None, typer.Option(help="Folder of real images, for studies that read one.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Override a field in every run.")] = None,
    open_setting: Annotated[
        list[str] | None, typer.Option("--set-none", help="Override a field in the run without privacy.")
    ] = None,
) -> None:
    """Run the study without privacy, and per method and epsilon; write and print utility beside epsilon."""
    torch.set_num_threads(1)
    plans = [("none", "dcgan", [*NONE, *(open_setting or [])])]
    plans += [
        (epsilon, method, [f"privacy.epsilon={epsilon}", f"gan.method={method}"])
        for method in methods.split(",")
        for epsilon in epsilons.split(",")
    ]
    judge = out / "dcgan-none" / "models" / "classifier-DS1.safetensors"
    rows: list[dict[str, Any]] = []
    study = None
    for epsilon, method, settings in plans:
        study = load_run_study(config, settings=[*(setting or []), *settings], data=data, backend=None)
        run = out / f"{method}-{epsilon}"
        if not (run / "report.json").is_file():
            run_study(study, run, data)
        rows.append(_row(study, run, method, epsilon, judge))
        write_json(out / "utility.json", {"study": study.name, "classes": list(study.classes), "rows": rows})
        write_text(out / "utility.html", utility_page(study.name, rows, len(study.classes)))
        Console().print(_table(rows))


def _figures(row: dict[str, Any]) -> list[str]:
    cells = [row["method"], "infinite" if row["epsilon"] is None else f"{row['epsilon']:.3g}"]
    cells.append(f"{row['recognised_balanced']:.2f}")
    for arm in row["arms"].values():
        low, high = arm["interval"]
        cells += [f"{arm['balanced_accuracy']:.2f} [{low:.2f}, {high:.2f}]", f"{arm['without_noise']:.2f}"]
    return cells


def _heads(rows: Sequence[dict[str, Any]]) -> list[str]:
    arms = [text for name in rows[0]["arms"] for text in (f"{name}, as released", f"{name}, without noise")]
    return ["method", "epsilon", "synthetic images recognised", *arms]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*_heads(rows), header_style="bold")
    for row in rows:
        table.add_row(*_figures(row))
    return table


def _figure(rows: Sequence[dict[str, Any]], classes: int) -> str:
    """Balanced accuracy of DS3 and recognition against epsilon, SVG as a data URI."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, 2, sharey=True)
    arm = list(rows[0]["arms"])[-1]
    panels = [
        (axes[0], "Synthetic images recognised", [row["recognised_balanced"] for row in rows]),
        (axes[1], f"{arm} on unseen patients, balanced accuracy", [row["arms"][arm]["without_noise"] for row in rows]),
    ]
    for place, title, values in panels:
        place.set_title(title, loc="left", fontsize=10)
        place.axhline(1 / classes, color="#9aa5b1", linestyle=":", linewidth=1.2)
        place.annotate(
            "guessing", (0.99, 1 / classes), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        if rows[0]["epsilon"] is None:
            place.axhline(values[0], color="#52606d", linestyle="--", linewidth=1.2)
            place.annotate(
                "not private", (0.01, values[0]), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
            )
        for method in dict.fromkeys(row["method"] for row in rows if row["epsilon"] is not None):
            own = [(row["epsilon"], y) for row, y in zip(rows, values, strict=True) if row["method"] == method]
            points = sorted(point for point in own if point[0] is not None)
            place.plot(*zip(*points, strict=True), "o-", color=COLOURS.get(method, "#333333"), label=method)
        place.set_xscale("log")
        place.set_xlabel("epsilon, every patient, whole study")
        place.set_ylim(0, 1)
        place.spines[["top", "right"]].set_visible(False)
    if len(rows) > 1:
        axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()


def utility_page(name: str, rows: Sequence[dict[str, Any]], classes: int) -> str:
    """One HTML file that loads nothing: figure and table of `rows` (those of utility.json, at least one)."""
    head = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in _heads(rows))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in _figures(row)) + "</tr>" for row in rows
    )
    title = f"{html.escape(name)}: utility beside epsilon"
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;color:#1f2933;max-width:62rem;margin:2.5rem auto;padding:0 1rem}}
h1{{font-size:1.5rem}}table{{border-collapse:collapse;font-size:.9rem}}th,td{{padding:.35rem .8rem;text-align:left;
border-bottom:1px solid #e4e7eb;font-variant-numeric:tabular-nums}}img{{max-width:100%}}p{{color:#52606d}}</style>
<h1>{title}</h1>
<img src="{_figure(rows, classes)}" alt="Utility against epsilon per method; the table below holds the figures">
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>Each row is one federated run with one seed. Epsilon is what its ledgers add up to for every patient, the worst site and class,
over the whole study. "As released" is what a deployed study would tell, with noise inside the interval; "without noise" is the
same, computed on this machine. Guessing gives {1 / classes:.2f}.</p></html>
"""


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
