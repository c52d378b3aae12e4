"""Networks whose features an archive can be measured in: a released classifier, Inception, or any TorchScript module.

::

    classifier-DS1.safetensors (of xfed)     --> its own features, at its own image size
    inception.safetensors (state dict of torchvision's inception_v3, as safetensors) --> 2,048 numbers behind the last pooling
    module.pt (TorchScript, with the SHA-256 that you were told) --> what it makes of [B, 1, S, S] in 0..1
                                                       --> project: 64 numbers per image, as everywhere in xfed

Figures of two extractors are not comparable: everything made with one carries its digest. Never a pickle: torch.export's
archives (.pt2) hold some, and are refused. A TorchScript file is a program: it runs when it is read, so it is read only if its
SHA-256 is the one you name. Inception's weights are not shipped; torchvision's are not those of the original FID.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from xfed.common.classifier import prepare
from xfed.common.durable import sha256_file
from xfed.common.errors import CheckpointError, ConfigError, DataError
from xfed.common.features import project
from xfed.common.registry import load_classifier

__all__ = ["Extractor", "load_extractor"]

BATCH = 64
INCEPTION_KEY = "Mixed_7c.branch_pool.conv.weight"
INCEPTION_SIDE = 299
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Extractor:
    """A network ready to look: its `name`, the SHA-256 of its file, and its features of a batch of images uint8 [B, S, S]."""

    name: str
    digest: str
    raw: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def features(self, images: Pixels) -> npt.NDArray[np.float64]:
        """Projected features float64 [n, 64] of images uint8 [n, S, S]. Raises `DataError` when the network gives none."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.array(images[start : start + BATCH]))
            try:
                found = self.raw(batch)
            except (RuntimeError, ValueError) as error:
                raise DataError(f"{self.name} cannot look at images of {images.shape[-1]} px: {error}") from error
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(batch):
                raise DataError(f"{self.name} must give one row of features per image, [{len(batch)}, F]")
            parts.append(found.float())
        if not parts:
            return np.zeros((0, project(torch.zeros(1, 1)).shape[1]))
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            raise DataError(
                f"{self.name} gives features that are not finite: is the file whole, and are images 0..1 expected?"
            )
        return project(features)


def load_extractor(path: Path, *, sha256: str | None = None) -> Extractor:
    """The network in `path`. With `sha256` the file must have this digest; a TorchScript file is not read without it.

    Raises `DataError` (absent, another file), `CheckpointError` (damaged, or nothing that is known), `ConfigError` (a TorchScript
    file without its digest, a .pt2, torchvision missing).
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of a feature extractor")
    digest = sha256_file(path)
    if sha256 is not None and sha256.lower() != digest:
        raise DataError(
            f"{path} has the SHA-256 {digest}, not {sha256}: it is not the file you were told of. It was not read."
        )
    match path.suffix:
        case ".safetensors":
            return _from_safetensors(path, digest)
        case ".pt" | ".torchscript":
            if sha256 is None:
                raise ConfigError(
                    f"{path} is a program that runs when it is read. If you trust whoever made it, name it by its digest: "
                    f"--sha256 {digest}"
                )
            return _from_torchscript(path, digest)
    raise ConfigError(
        f"{path}: features come from .safetensors (a classifier of xfed, or torchvision's inception_v3) or a TorchScript .pt. "
        "torch.export's .pt2 and other files hold pickles, which can run anything, and are not read."
    )


def _from_safetensors(path: Path, digest: str) -> Extractor:
    try:
        with safe_open(path, framework="pt") as file:
            inception = INCEPTION_KEY in file.keys()  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    if inception:
        return Extractor("Inception v3", digest, _inception(path))
    released = load_classifier(path)
    model: Any = released.model

    def raw(batch: Tensor) -> Tensor:
        found: Tensor = model.features(prepare(batch))
        return found

    return Extractor(f"{type(model).__name__.lower()} of {path.name}", digest, raw)


def _inception(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        from torchvision.models import inception_v3  # type: ignore[import-untyped]
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with the latter
        raise ConfigError(
            f"{path} holds Inception's weights, whose network comes with torchvision, which does not load here ({error}). "
            "Install the torchvision that belongs to this torch."
        ) from error
    weights = load_file(path)
    auxiliary = any(name.startswith("AuxLogits.") for name in weights)
    model = inception_v3(weights=None, aux_logits=auxiliary, transform_input=False, init_weights=False)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a state dict of torchvision's inception_v3: {error}") from error
    model.fc = torch.nn.Identity()
    model.eval()
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))

    def raw(batch: Tensor) -> Tensor:
        grey = (batch.float() / 255)[:, None]
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        large = interpolate(grey, size=size, mode="bilinear", align_corners=False, antialias=True)
        found: Tensor = model((large.expand(-1, 3, -1, -1) - mean) / deviation)
        return found

    return raw


def _from_torchscript(path: Path, digest: str) -> Extractor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a TorchScript module ({str(error).splitlines()[0]})") from error

    def raw(batch: Tensor) -> Tensor:
        found: Tensor = module((batch.float() / 255)[:, None])
        return found

    return Extractor(f"TorchScript {path.name}", digest, raw)
