"""One data set becomes several hospitals, each with a folder of its own, by patient.

::

    phantoms (drawn) ----------------------+
    folder --import--> data/store (pooled) -+--> images, labels, patients --assign_sites--> sites/<name>/ with its store
                                                                           + style shift     + splits by patient, per site
                                                                      sites/ready.json      <- written last: the commit

After this the simulation knows no pooled data: training and scoring go through the sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xfed.client.importing import import_folder
from xfed.client.site import SiteSettings, found_site
from xfed.client.splits import split_patients
from xfed.client.store import open_store, write_store
from xfed.common.config import Study
from xfed.common.durable import remove_tree, translate_os_errors, write_json
from xfed.common.errors import CheckpointError, ConfigError, DataError
from xfed.common.randomness import numpy_generator, seed_for
from xfed.simulations.partition import assign_sites
from xfed.simulations.phantom import apply_style, phantom_arrays, site_style

__all__ = ["build_hospitals", "site_folders"]

Progress = Callable[[int, int], None]


def site_folders(out: Path, study: Study) -> list[Path]:
    """The folders of the study's hospitals, in the order of their numbers."""
    return [out / "sites" / name for name in study.site_names()]


def build_hospitals(study: Study, out: Path, data: Path | None, progress: Progress | None = None) -> None:
    """Make all sites' folders unless they are there. Raises `DataError`, `ConfigError`, `StorageError`."""
    ready = out / "sites" / "ready.json"
    source = str(data.resolve()) if data is not None else "phantom"
    if ready.is_file():
        before = json.loads(ready.read_text())["source"]
        if before != source:
            raise CheckpointError(
                f"{out} was begun with images from {before}, not {source}. Give the same --data, or choose another --out."
            )
        for folder in site_folders(out, study):
            # only what changes speed can differ here: the run folder's digest was checked before
            write_json(folder / "study.json", study.resolved())
        return
    images, labels, patients = _pooled(study, out, data, progress)
    where = assign_sites(
        labels=labels,
        patients=patients,
        classes=study.classes,
        sites=study.sites,
        seed=seed_for(study.data_seed, "sites"),
    )
    with translate_os_errors(out):
        remove_tree(out / "sites")
    members: dict[str, str] = {}
    for index, folder in enumerate(site_folders(out, study)):
        rows = np.flatnonzero(where == index)
        if not len(rows):
            raise DataError(f"{folder.name} would get no image: use fewer sites (sites.count) or more images")
        members[folder.name] = _one_hospital(study, folder, index, images[rows], labels[rows], patients[rows])
    for folder in site_folders(out, study):
        write_json(folder / "members.json", members)
    write_json(ready, {"source": source, "images": len(labels), "left_out": int((where < 0).sum())})


def _pooled(
    study: Study, out: Path, data: Path | None, progress: Progress | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    if study.data.source == "phantom":
        phantom = study.data.phantom
        return phantom_arrays(
            classes=study.classes,
            patients=phantom.patients,
            images_per_patient=phantom.images_per_patient,
            size=study.image_size,
            seed=seed_for(study.data_seed, "phantoms"),
        )
    if data is None:
        raise ConfigError(f"study {study.name} reads images from a folder: say which with --data DIR")
    salt = seed_for(study.data_seed, "salt").to_bytes(8, "big")
    pooled = out / "data" / "store"
    import_folder(
        data,
        pooled,
        size=study.image_size,
        classes=study.classes,
        data=study.data,
        seed=study.data_seed,
        progress=progress,
        salt=salt,
    )
    store = open_store(pooled)
    missing = [name for label, name in enumerate(study.classes) if not (store.labels == label).any()]
    if missing:
        # nothing half-made stays behind: the next attempt imports the mended folder
        remove_tree(pooled.parent)
        raise DataError(
            f"{data} holds no image of {', '.join(missing)}. Map its label with data.label_map, "
            "or take the class out of `classes`."
        )
    return np.asarray(store.images), store.labels, store.patients


def _one_hospital(
    study: Study,
    folder: Path,
    index: int,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    patients: npt.NDArray[np.int64],
) -> str:
    style = site_style(seed_for(study.data_seed, "style"), index, study.sites.style_shift)
    styled = apply_style(images, style, numpy_generator(study.data_seed, "style", index))
    _, renumbered = np.unique(patients, return_inverse=True)
    splits = split_patients(
        labels=labels,
        patients=renumbered.astype(np.int64),
        splits=study.data.splits,
        seed=seed_for(study.data_seed, "splits", index),
        n_classes=len(study.classes),
    )
    write_store(
        folder / "store",
        classes=study.classes,
        images=styled,
        labels=labels,
        patients=renumbered.astype(np.int64),
        splits=splits,
    )
    shares = study.data.source == "phantom" or study.report.share_real_examples
    return found_site(folder, SiteSettings(name=folder.name, share_examples=shares), study)
