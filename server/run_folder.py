"""A run's folder belongs to one study: claimed by config.yaml, kept apart from every other study by its digest."""

from __future__ import annotations

from pathlib import Path

import yaml

from xfed.common.config import Study, parse_study
from xfed.common.durable import translate_os_errors, write_text
from xfed.common.errors import CheckpointError, ConfigError
from xfed.common.plan import differences

__all__ = ["claim"]


def claim(study: Study, out: Path) -> None:
    """Write config.yaml, or check that the folder's one is this study; make the folders of a run. Raises `CheckpointError`."""
    path = out / "config.yaml"
    if path.is_file():
        try:
            before = parse_study(yaml.safe_load(path.read_text()), str(path))
        except (ConfigError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{path} cannot be read as this version's study: choose another folder ({error})"
            ) from error
        if before.digest != study.digest:
            raise CheckpointError(
                f"{out} holds another study: {'; '.join(differences(before.resolved(), study.resolved()))}. "
                "Choose another --out, or delete the folder to start again."
            )
    elif any(item.name != ".lock" for item in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no study (config.yaml). Choose another --out.")
    write_text(path, yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True))
    with translate_os_errors(out):
        for name in ("models", "checkpoints", "ledgers"):
            (out / name).mkdir(exist_ok=True)
