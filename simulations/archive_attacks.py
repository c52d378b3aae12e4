"""Attacks on the archive and on the generators of a finished simulated study, with all patients in sight.

    python -m xfed.simulations.archive_attacks RUN [--patients 60] [--steps 150] [--starts 4] [--json FILE]

::

    RUN/sites/*/store --one image per patient--> training patients, held-out patients (at most `--patients` of each, per class)
    archive   --nearest image of the class----------------------------------> score     (what `archive.attacks` does at sites)
    generator --latents by gradient descent, `--starts` times `--steps`--> how near it comes to the image --> score
    scores of both groups --> area under the ROC with interval, share of members found at 5% false alarms

The second attack needs the generator itself (models/generator-<name>.safetensors), not its images alone: Chen et al. 2020, GAN-
Leaks, section 4.3 ("white-box": reconstruction by optimising the latent). It takes minutes, and is not part of a study.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from xfed.client.store import Store, open_store
from xfed.common import dcgan, pggan
from xfed.common.config import Study, load_study
from xfed.common.devices import choose_device
from xfed.common.durable import write_json
from xfed.common.errors import DataError
from xfed.common.gan import AnyGenerator
from xfed.common.intervals import auc_interval, wilson_interval
from xfed.common.latent_classes import project
from xfed.common.nearest import nearest
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import load_generator
from xfed.server.archive import read_archive

__all__ = ["attack_run", "figures_of", "reconstruction_errors", "sample_patients"]

LEARNING_RATE = 0.05
MOMENTUM = 0.9
BATCH = 64

Images = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float64]


def reconstruction_errors(
    generator: AnyGenerator,
    images: Images,
    latent: int,
    *,
    steps: int,
    starts: int,
    rng: torch.Generator,
    device: torch.device,
) -> Scores:
    """How near `generator` comes to each of `images` uint8 [n, S, S]: least mean squared error, pixels in -1..1, float64 [n].

    Adam on the latent, kept on its prior's support, `steps` steps from each of `starts` random points.
    """
    generator = generator.to(device).eval().requires_grad_(False)
    grown = isinstance(generator, pggan.Generator)
    draw = pggan.draw_latent if grown else dcgan.draw_latent
    errors = np.empty(len(images))
    for begin in range(0, len(images), BATCH):
        target = torch.from_numpy(np.array(images[begin : begin + BATCH])).to(device).float()[:, None] / 127.5 - 1
        best = torch.full((len(target),), torch.inf, device=device)
        for _ in range(starts):
            z = draw(len(target), latent, rng).to(device).requires_grad_(True)
            optimizer = torch.optim.Adam([z], lr=LEARNING_RATE, betas=(MOMENTUM, 0.999))
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                error = (generator(z) - target).pow(2).mean((1, 2, 3))
                error.sum().backward()
                optimizer.step()
                with torch.no_grad():
                    z.copy_(project(z, "sphere" if grown else "uniform"))
            with torch.no_grad():
                best = torch.minimum(best, (generator(z) - target).pow(2).mean((1, 2, 3)))
        errors[begin : begin + BATCH] = best.double().cpu().numpy()
    return errors


def figures_of(members: Scores, others: Scores) -> dict[str, Any]:
    """Area, interval and share of members found at 5% false alarms, from scores that are smaller for suspected members."""
    n, m = len(members), len(others)
    if not n or not m:
        return {"members": n, "held_out": m, "auc": None, "auc_interval": None, "tpr_at_5_percent_fpr": None}
    below = (members[:, None] < others[None]).mean() + (members[:, None] == others[None]).mean() / 2
    figures: dict[str, Any] = {"members": n, "held_out": m, "auc": float(below)}
    figures["auc_interval"] = list(auc_interval(float(below), n, m, 0.95))
    figures["tpr_at_5_percent_fpr"] = None
    if m >= 20:
        threshold = np.sort(others)[int(0.05 * m)]
        share = float((members < threshold).mean())
        figures["tpr_at_5_percent_fpr"] = share
        figures["tpr_at_5_percent_fpr_interval"] = list(wilson_interval(share, n, 0.95))
    return figures


def sample_patients(stores: Sequence[Store], label: int, held_out: bool, most: int, rng: np.random.Generator) -> Images:
    """One image each of at most `most` patients of a class, over all hospitals: uint8 [n, S, S]."""
    found = []
    for number, store in enumerate(stores):
        chosen = store.splits > 0 if held_out else store.splits == 0
        rows = np.flatnonzero((store.labels == label) & chosen)
        first = rows[np.unique(store.patients[rows], return_index=True)[1]]
        found += [(number, int(row)) for row in first]
    picked = sorted(rng.permutation(len(found))[:most].tolist())
    size = stores[0].size
    images = [np.asarray(stores[found[i][0]].images[found[i][1]]) for i in picked]
    return np.stack(images) if images else np.zeros((0, size, size), np.uint8)


def attack_run(
    run: Path, *, patients: int = 60, steps: int = 150, starts: int = 4
) -> dict[str, dict[str, dict[str, Any]]]:
    """{class: {"archive": figures, "generator": figures}} of the simulated study in folder `run`. Raises `DataError`."""
    study = load_study(run / "config.yaml")
    stores = [open_store(path / "store") for path in sorted((run / "sites").iterdir()) if path.is_dir()]
    if not stores or not (run / "archive" / "manifest.json").is_file():
        raise DataError(f"{run} is not the folder of a finished simulated study: it needs sites/ and archive/.")
    images, labels = read_archive(run / "archive", study.labels)
    return {
        name: _attack_class(study, run, stores, label, images[labels == label], patients, steps, starts)
        for label, name in enumerate(study.classes)
    }


def _attack_class(
    study: Study,
    run: Path,
    stores: Sequence[Store],
    label: int,
    synthetic: Images,
    patients: int,
    steps: int,
    starts: int,
) -> dict[str, dict[str, Any]]:
    name, device = study.classes[label], choose_device(study.runtime.device)
    groups = [
        sample_patients(stores, label, held, patients, numpy_generator(study.seed, "attacks", name, int(held)))
        for held in (False, True)
    ]
    together = np.concatenate(groups)
    near = nearest(together, synthetic, device=device).distance.astype(np.float64)
    own = study.generators[0] if study.unlabelled else name
    generator, facts = load_generator(run / "models" / f"generator-{own}.safetensors")
    errors = reconstruction_errors(
        generator,
        together,
        int(facts["latent"]),
        steps=steps,
        starts=starts,
        rng=torch_generator(study.seed, "attacks", name),
        device=device,
    )
    split = len(groups[0])
    return {
        "archive": figures_of(near[:split], near[split:]),
        "generator": figures_of(errors[:split], errors[split:]),
    }


def _table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    table = Table("class", "members", "held out", "archive: AUC", "generator: AUC", "generator: found at 5%")
    for name, attacks in found.items():
        areas = [_words(attacks[attack]["auc"], attacks[attack]["auc_interval"]) for attack in ("archive", "generator")]
        found_at = _words(
            attacks["generator"]["tpr_at_5_percent_fpr"], attacks["generator"].get("tpr_at_5_percent_fpr_interval")
        )
        table.add_row(name, str(attacks["archive"]["members"]), str(attacks["archive"]["held_out"]), *areas, found_at)
    return table


def _words(value: float | None, span: Sequence[float] | None) -> str:
    return "–" if value is None or span is None else f"{value:.2f} [{span[0]:.2f}, {span[1]:.2f}]"


def main() -> None:
    """Print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--patients", type=int, default=60, help="of each group and class, at the most")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = attack_run(options.run, patients=options.patients, steps=options.steps, starts=options.starts)
    Console().print(_table(found))
    if options.json:
        write_json(options.json, json.loads(json.dumps(found)))


if __name__ == "__main__":
    main()
