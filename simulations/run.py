"""`xfed-sim run`: a whole study on one machine.

::

    study.yaml + --set --> Study --> runs/<name>/ (locked) --> config.yaml (or: is it the same study?) --> hospitals
      --> ServerApp + ClientApp over the local grid or Ray --> checkpoints, archive, models --> report.json, report.html

Running the same command again continues a killed study; a finished one only writes its report anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context

from xfed.client.app import make_client_app
from xfed.common.config import Study, load_study, parse_study
from xfed.common.devices import choose_device
from xfed.common.durable import exclusive, translate_os_errors, write_text
from xfed.common.errors import CheckpointError, ConfigError
from xfed.common.journal import Listener
from xfed.server.app import make_server_app
from xfed.simulations.flower import run_local, run_ray, silence_flower
from xfed.simulations.hospitals import Progress, build_hospitals, site_folders

__all__ = ["SiteFolders", "load_run_study", "run_study"]


@dataclass(frozen=True)
class SiteFolders:
    """From a simulated node to its site's folder; travels to Ray actors, so it is a plain value."""

    folders: tuple[Path, ...]

    def __call__(self, context: Context) -> Path:
        """The folder of the node's partition."""
        return self.folders[int(context.node_config["partition-id"])]


def load_run_study(config: Path, *, settings: Sequence[str], data: Path | None, backend: str | None) -> Study:
    """The study of a run: the file, --set, then --data (source: folder) and --backend. Raises `ConfigError`."""
    extra = list(settings)
    if data is not None:
        extra.append("data.source=folder")
    if backend is not None:
        extra.append(f"runtime.backend={backend}")
    study = load_study(config, extra)
    if study.data.source == "folder" and data is None:
        raise ConfigError(f"{config}: this study reads images from a folder: say which with --data DIR")
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data}: there is no such folder")
    return study


def _claim(study: Study, out: Path) -> None:
    """Write config.yaml, or check that the folder's one is this study. Raises `CheckpointError`."""
    path = out / "config.yaml"
    if path.is_file():
        try:
            before = parse_study(yaml.safe_load(path.read_text()), str(path))
        except (ConfigError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{path} cannot be read as this version's study: choose another --out ({error})"
            ) from error
        if before.digest != study.digest:
            raise CheckpointError(
                f"{out} holds another study: {'; '.join(_differences(before.resolved(), study.resolved()))}. "
                "Choose another --out, or delete the folder to start again."
            )
    elif any(item.name != ".lock" for item in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no study (config.yaml). Choose another --out.")
    write_text(path, yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True))


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in {**before, **now}
            if key != "runtime"
            for line in _differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{where} was {before!r:.60}, is {now!r:.60}"]


def run_study(
    study: Study,
    out: Path,
    data: Path | None = None,
    *,
    listener: Listener | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run or continue a study in `out`; returns the path of report.html. Raises `XfedError`."""
    silence_flower()
    choose_device(study.runtime.device)
    with exclusive(out):
        _claim(study, out)
        build_hospitals(study, out, data, progress)
        with translate_os_errors(out):
            for name in ("models", "checkpoints", "ledgers"):
                (out / name).mkdir(exist_ok=True)
        folders = tuple(folder.resolve() for folder in site_folders(out, study))
        server_app = make_server_app(study, out.resolve(), listener)
        client_app = make_client_app(SiteFolders(folders))
        backend = run_ray if study.runtime.backend == "ray" else run_local
        backend(
            server_app,
            client_app,
            nodes=study.sites.count,
            workers=study.runtime.workers,
            threads=study.runtime.threads,
        )
    return out / "report.html"
