"""`xfed-sim run`: a whole study on one machine.

::

    study.yaml + --set --> Study --> runs/<name>/ (locked) --> config.yaml (or: is it the same study?) --> hospitals
      --> ServerApp + ClientApp over the local grid or Ray --> checkpoints, archive, models --> report.json, report.html

Running the same command again continues a killed study; a finished one only writes its report anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context

from xfed.client.app import make_client_app
from xfed.common.config import Study, load_study
from xfed.common.devices import choose_device
from xfed.common.durable import exclusive
from xfed.common.errors import ConfigError
from xfed.common.journal import Listener
from xfed.common.telemetry import silence
from xfed.server.app import make_server_app
from xfed.server.archive import adopt_archive
from xfed.server.archive_manifest import read_manifest
from xfed.server.run_folder import claim
from xfed.simulations.flower import run_local, run_ray
from xfed.simulations.hospitals import Progress, build_hospitals, site_folders
from xfed.simulations.warm_up import warm_up

__all__ = ["SiteFolders", "load_run_study", "run_study"]


@dataclass(frozen=True)
class SiteFolders:
    """From a simulated node to its site's folder; travels to Ray actors, so it is a plain value."""

    folders: tuple[Path, ...]

    def __call__(self, context: Context) -> Path:
        """The folder of the node's partition."""
        return self.folders[int(context.node_config["partition-id"])]


def load_run_study(
    config: Path,
    *,
    settings: Sequence[str],
    data: Path | None,
    backend: str | None = None,
    archive: Path | None = None,
) -> Study:
    """The study of a run: the file, --set, then --data (source: folder), --backend, --archive (reuse). Raises `ConfigError`."""
    extra = list(settings)
    if data is not None:
        extra.append("data.source=folder")
    if backend is not None:
        extra.append(f"runtime.backend={backend}")
    if archive is not None:
        extra.append(f"archive.reuse={read_manifest(archive)['root_sha256']}")
    study = load_study(config, extra)
    if study.data.source == "folder" and data is None:
        raise ConfigError(f"{config}: this study reads images from a folder: say which with --data DIR")
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: there is no such folder")
    return study


def run_study(
    study: Study,
    out: Path,
    data: Path | None = None,
    *,
    listener: Listener | None = None,
    progress: Progress | None = None,
    archive: Path | None = None,
    borrow: Callable[[Path], None] | None = None,
) -> Path:
    """Run or continue a study in `out`, on `archive` where it reuses one; returns the path of report.html. Raises `XfedError`.

    `borrow`: makes the hospitals' folders in the folder that it is given, instead of drawing or importing images.
    """
    silence()
    choose_device(study.runtime.device)
    with exclusive(out):
        claim(study, out)
        if archive is not None:
            adopt_archive(archive, out / "archive")
        if borrow is not None and not (out / "sites" / "ready.json").is_file():
            borrow(out / "sites")
        build_hospitals(study, out, data, progress)
        folders = tuple(folder.resolve() for folder in site_folders(out, study))
        members = json.loads((folders[0] / "members.json").read_text())
        server_app = make_server_app(study, out.resolve(), listener, members=members)
        client_app = make_client_app(SiteFolders(folders))
        if study.runtime.backend == "local":
            torch.set_num_threads(study.runtime.threads)
            warm_up(study)
        backend = run_ray if study.runtime.backend == "ray" else run_local
        backend(
            server_app,
            client_app,
            nodes=study.sites.count,
            workers=study.runtime.workers,
            threads=study.runtime.threads,
        )
    return out / "report.html"
