"""`python -m xfed.simulations.benchmarks.privacy_utility`: what privacy costs, on phantoms: utility beside epsilon, per method.

::

    for each method and epsilon: run_study (generators; the classifier is cut short) --> archive
    public phantoms of another seed --> judge: a DCNN that saw no patient of any study --> recognised per class
        --> OUT/utility.json (a row as soon as it is known), table

"none" is the same study without differential privacy. Each row is a whole federated run with its own ledgers; the epsilon of a
row is what its ledgers add up to, for the whole study. One seed: rows of one epsilon differ by noise, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from xfed.common.classifier import predict, train_round
from xfed.common.config import Study, load_study
from xfed.common.console import run_app
from xfed.common.durable import write_json
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.server.archive import read_archive
from xfed.simulations.phantom import phantom_arrays
from xfed.simulations.run import run_study

__all__ = ["main"]

JUDGE_SEED = 1896
SHORT = [
    "classifier.rounds=1",
    "classifier.steps_per_round=1",
    "privacy.shares.classifier=0.05",
    "privacy.shares.scores=0.05",
]
NOT_PRIVATE = ["privacy.epsilon=null", "privacy.delta=null", "gan.method=dcgan"]

app = typer.Typer(add_completion=False)


def _judge(study: Study) -> torch.nn.Module:
    """A classifier trained on phantoms that no study has: 200 patients per class."""
    images, labels, _ = phantom_arrays(
        classes=study.classes,
        patients=dict.fromkeys(study.classes, 200),
        images_per_patient=1.0,
        size=study.image_size,
        seed=JUDGE_SEED,
    )
    model = build_classifier(study, torch_generator(JUDGE_SEED, "judge"))
    for _ in range(10):
        train_round(
            model,
            images,
            labels,
            None,
            None,
            settings=study.classifier,
            learning_rate=1e-3,
            steps=20,
            generator=torch_generator(JUDGE_SEED, "train"),
            precision="float32",
            device=torch.device("cpu"),
        )
    return model


def _recognised(model: torch.nn.Module, study: Study, run: Path) -> dict[str, float]:
    images, labels = read_archive(run / "archive", study.classes)
    predicted = predict(model, images, device=torch.device("cpu"), precision="float32").argmax(1)
    return {name: float(np.mean(predicted[labels == c] == c)) for c, name in enumerate(study.classes)}


@app.command()
def privacy_utility(
    config: Annotated[Path, typer.Argument(help="A private study, for instance configs/private.yaml.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and utility.json.")],
    epsilons: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "10,3,1",
    methods: Annotated[str, typer.Option(help="Values of gan.method, separated by commas.")] = "dp-merf,dcgan",
) -> None:
    """Run the study per method and epsilon, and without privacy; print how well the synthetic images are recognised."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    plans = [("none", "dcgan", NOT_PRIVATE)]
    plans += [
        (epsilon, method, [f"privacy.epsilon={epsilon}", f"gan.method={method}"])
        for method in methods.split(",")
        for epsilon in epsilons.split(",")
    ]
    judge = _judge(load_study(config))
    for epsilon, method, settings in plans:
        study = load_study(config, [*SHORT, *settings])
        run = out / f"{method}-{epsilon}"
        run_study(study, run)
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        found = _recognised(judge, study, run)
        rows.append(
            {
                "method": method,
                "epsilon": report["privacy"].get("epsilon"),
                "asked": epsilon,
                "recognised": found,
                "balanced": float(np.mean(list(found.values()))),
            }
        )
        write_json(out / "utility.json", {"rows": rows})
        _print(rows, study.classes)


def _print(rows: list[dict[str, Any]], classes: tuple[str, ...]) -> None:
    table = Table(header_style="bold")
    for name in ("method", "epsilon", "recognised", *classes):
        table.add_column(name)
    for row in rows:
        epsilon = "infinite" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
        figures = [f"{row['recognised'][name]:.2f}" for name in classes]
        table.add_row(row["method"], epsilon, f"{row['balanced']:.2f}", *figures)
    Console().print(table)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
