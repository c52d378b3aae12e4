"""`xfed-client score ARCHIVE`: measure an archive against the hospital's own images, in the features of any network.

::

    ARCHIVE + STORE + network --xfed.client.archive_score--> a table (or JSON) here; with --sums a file to be sent by hand
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["score"]


def score(
    folder: Annotated[Path, typer.Argument(help="The folder with manifest.json and images/", metavar="ARCHIVE")],
    store: Annotated[Path, typer.Option(help="The hospital's image store (of xfed-client import).")],
    features: Annotated[
        Path,
        typer.Option(
            help="Network that looks: a classifier-*.safetensors of xfed, torchvision's inception_v3 as .safetensors, or "
            "a TorchScript .pt (needs --sha256)."
        ),
    ],
    sha256: Annotated[str | None, typer.Option(help="The digest that the network's file must have.")] = None,
    sums: Annotated[
        Path | None,
        typer.Option(help="Write sums of features here, for the coordinator to pool; they leave by your hand alone."),
    ] = None,
    hospitals: Annotated[int, typer.Option(min=1, help="How many hospitals' sums will be pooled.")] = 1,
    policy: Annotated[
        Path | None, typer.Option(help="The site's policy.yaml, which --sums obeys; default: the strictest one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure an archive: FID, KID, precision, recall, density, coverage, variety. Nothing leaves this machine."""
    from rich.console import Console

    from xfed.client.archive_score import score_archive, write_sums
    from xfed.client.policy import Policy, load_policy
    from xfed.common.archive_table import print_figures
    from xfed.common.extractors import load_extractor

    extractor = load_extractor(features, sha256=sha256)
    scored = score_archive(folder, store, extractor, hospitals)
    if sums is not None:
        write_sums(sums, scored, folder, load_policy(policy) if policy else Policy())
    if as_json:
        shown = {name: scored[name] for name in ("quality", "features", "extractor")}
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=True))
        return
    console = Console()
    print_figures(scored["quality"], extractor.name, extractor.digest, console)
    if sums is not None:
        console.print(f"Sums written to {sums}: per class and half count, sums and products of 64 features; no image.")
