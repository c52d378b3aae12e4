"""`python -m xfed.simulations.neighbours`: a site on data D, and on D without one patient, with the releases of the first frozen.

::

    seed --> phantoms = D --> OUT/<pair>/with/site/    store, ledger, work folder
    D minus one patient   --> OUT/<pair>/without/site/ (same key, same declared sizes: those are public)
    the same requests to both sites, in order; the second's releases are the first's (ReplayingMechanism)
        --> OUT/<pair>/with/wire.bin, OUT/<pair>/without/wire.bin: every reply as it would be sent

This is the audited software in a box: `xfed-audit replay` starts it and compares the bytes itself. A difference means that
something else than the noised sums tells of a patient. Times, and what is signed over them, are taken out of the ledger's lines.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from xfed.client.cohort import declared_sizes
from xfed.client.ledger import open_ledger
from xfed.client.policy import Policy
from xfed.client.private_site import PrivateSite
from xfed.client.site import SiteSettings, found_site
from xfed.client.store import open_store, write_store
from xfed.common import messages as m
from xfed.common.config import Study, parse_study
from xfed.common.console import run_app
from xfed.common.dp_events import Event
from xfed.common.gan import build_generator
from xfed.common.mechanism import Mechanism, RecordingMechanism, ReplayingMechanism
from xfed.common.packing import digest_of, pack
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.simulations.phantom import phantom_arrays

__all__ = ["main", "neighbour_study", "write_pair"]

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion")
PATIENTS = {"Cardiomegaly": 12, "Normal": 18, "Pleural Effusion": 12}
_TIMED = ("time", "hash", "prev", "sig")


def neighbour_study() -> Study:
    """The smallest study with every kind of private request."""
    return parse_study(
        {
            "name": "neighbours",
            "image_size": 32,
            "classes": list(CLASSES),
            "sites": {"count": 1},
            "federation": {"secure_aggregation": "off"},
            "privacy": {"epsilon": 10.0, "delta": 1e-3},
            "gan": {
                "method": "dp-merf+dcgan",
                "merf": {"features": 64},
                "width": 4,
                "rounds": 2,
                "steps_per_round": 2,
                "batch": 4,
                "minimum_images": 2,
            },
            "classifier": {"width": 4, "rounds": 1, "steps_per_round": 2, "batch": 8, "balance": "loss"},
        },
        "neighbours",
    )


def _found(folder: Path, study: Study, seed: int, leave_out: int | None) -> None:
    images, labels, patients = phantom_arrays(
        classes=study.classes, patients=PATIENTS, images_per_patient=1.5, size=study.image_size, seed=seed
    )
    kept = np.ones(len(labels), bool) if leave_out is None else patients != leave_out
    splits = np.zeros(int(kept.sum()), np.int8)
    write_store(
        folder / "store",
        classes=study.classes,
        images=images[kept],
        labels=labels[kept],
        patients=patients[kept],
        splits=splits,
    )
    found_site(folder, SiteSettings(name="site"), study)


def _requests(study: Study) -> Iterator[m.Request]:
    """Every kind of request, in a study's order; weights are drawn, not trained: what matters is that both get the same."""
    digest, gan = study.digest, study.gan
    yield m.Describe(study=digest)
    for name in study.classes:
        yield m.EmbedClass(study=digest, class_name=name, features=gan.merf.features)
    for number in range(1, gan.rounds + 1):
        for name in study.classes:
            weights = parameters_of(build_generator(study, ("neighbours", name, number)))
            yield m.TrainGan(study=digest, class_name=name, round=number, weights=weights)
    rng = numpy_generator(study.seed, "neighbours")
    side, each = study.image_size, 6
    shard: m.Arrays = {
        "images": rng.integers(0, 256, (each * len(study.classes), side, side), dtype=np.uint8),
        "labels": np.repeat(np.arange(len(study.classes), dtype=np.int64), each),
    }
    yield m.OfferArchive(study=digest, root="0" * 64, digests=digest_of(shard))
    yield m.KeepArchive(study=digest, shard=0, digest=digest_of(shard), arrays=shard)
    start = parameters_of(build_classifier(study, torch_generator(study.seed, "neighbours")))
    for arm in study.classifier.arms:
        yield m.TrainClassifier(study=digest, arm=arm, round=1, weights=start)
    for arm in study.classifier.arms:
        yield m.ScorePrivately(study=digest, arm=arm, weights=start)
    yield m.ShowLedger(study=digest, first=1)


def _site(folder: Path, study: Study, mechanism: Mechanism) -> PrivateSite:
    return PrivateSite(
        name="site",
        work=folder,
        study=study,
        policy=Policy.permissive(),
        store=lambda: open_store(folder / "store"),
        ledger=lambda: open_ledger(folder, "site"),
        mechanism=mechanism,
    )


def _answers(site: PrivateSite, study: Study) -> Iterator[m.Reply]:
    for request in _requests(study):
        match request:
            case m.Describe():
                yield site.describe()
            case m.ShowLedger():
                shown = site.show_ledger(request)
                yield dataclasses.replace(shown, lines=_timeless(shown.lines), head="")
            case m.OfferArchive():
                yield m.ArchiveWanted(site="site", missing=",".join(map(str, site.shards.offer(request))))
            case m.KeepArchive():
                site.shards.keep(request)
                yield m.ArchiveKept(site="site", digest=request.digest)
            case _:
                yield site.answer(request)


def _timeless(lines: str) -> str:
    kept = []
    for line in lines.splitlines():
        values = json.loads(line)
        kept.append(json.dumps({key: value for key, value in values.items() if key not in _TIMED}))
    return "\n".join(kept)


def _write_wire(folder: Path, site: PrivateSite, study: Study) -> None:
    with (folder / "wire.bin").open("wb") as wire:
        for reply in _answers(site, study):
            header, data = pack(reply)
            wire.write(f"{len(header)} {len(data)}\n".encode() + header.encode() + bytes(data))


def write_pair(folder: Path, seed: int) -> int:
    """Write with/wire.bin and without/wire.bin under `folder`; returns the patient who was left out."""
    study = neighbour_study()
    patient = int(numpy_generator(seed, "left out").integers(sum(PATIENTS.values())))
    first, second = folder / "with", folder / "without"
    _found(first, study, seed, None)
    _found(second, study, seed, patient)
    # public, hence the same for both: the hospital's key and what it declares
    shutil.copyfile(first / "key", second / "key")
    declared_sizes(first / "declared.json", open_store(first / "store"), study, None)
    shutil.copyfile(first / "declared.json", second / "declared.json")
    for name in ("ledger.key", "ledger.pub"):
        open_ledger(first, "site")
        shutil.copy2(first / name, second / name)
    recording = RecordingMechanism()
    _write_wire(first, _site(first, study, recording), study)
    _write_wire(second, _site(second, study, ReplayingMechanism(recording.outputs)), study)
    return patient


def events_of(folder: Path) -> list[Event]:
    """What one site of a pair spent, for whoever wants to see that something was released."""
    return [event for _, event in open_ledger(folder, "site").spent()]


app = typer.Typer(add_completion=False)


@app.command()
def neighbours(
    out: Annotated[Path, typer.Option("--out", help="An empty folder for the pairs.")],
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="How many.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of the first pair's images.")] = 0,
) -> None:
    """Write the wire of pairs of neighbouring hospitals."""
    torch.set_num_threads(1)
    for number in range(pairs):
        patient = write_pair(out / f"{number:04d}", seed + number)
        print(json.dumps({"pair": number, "left_out": patient}), flush=True)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
