"""Weights as named float32 arrays, and as safetensors files that say how to load them. Never pickle.

::

    module --parameters_of--> {name: float32 array} --codec--> the other side --load_parameters--> module
    module + facts --save_model--> classifier-DS3.safetensors (metadata: model, size, classes, preprocessing, study digest)

Only parameters travel. The models have no buffers (no BatchNorm), which `parameters_of` checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xfed.common.durable import write_bytes
from xfed.common.errors import CheckpointError, DataError
from xfed.common.packing import digest_of

__all__ = ["Weights", "digest_of", "load_arrays", "load_parameters", "parameters_of", "rounded", "save_arrays", "under"]

Weights = Mapping[str, npt.NDArray[np.float32]]


def parameters_of(module: torch.nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """A copy of every parameter, on the CPU, in the module's order. Raises `ValueError` if the module has buffers."""
    if next(module.buffers(), None) is not None:
        raise ValueError(f"{type(module).__name__} has buffers: only parameters may travel (PRIVACY: no BatchNorm)")
    return {
        name: parameter.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format).numpy().copy()
        for name, parameter in module.named_parameters()
    }


def load_parameters(module: torch.nn.Module, weights: Weights) -> None:
    """Copy `weights` into `module` in place. Raises `CheckpointError` when names or shapes differ."""
    own = dict(module.named_parameters())
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise CheckpointError(
            f"weights do not fit {type(module).__name__}: these names are on one side only: {odd[:5]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            value = weights[name]
            if tuple(value.shape) != tuple(parameter.shape):
                raise CheckpointError(
                    f"weights do not fit {type(module).__name__}: {name} is {tuple(value.shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
            parameter.copy_(torch.from_numpy(np.array(value, dtype=np.float32)))


def rounded(weights: Weights, payload: str) -> Weights:
    """The weights as `payload` can carry them: themselves, or rounded to bfloat16 (to nearest, ties to even; still float32).

    The relative error of a normal number is at most 2^-8. NaN stays NaN.
    """
    if payload == "float32":
        return weights
    result = {}
    for name, value in weights.items():
        bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        even = np.where(np.isnan(value), bits | np.uint32(0x400000), even) & np.uint32(0xFFFF0000)
        result[name] = even.view(np.float32).reshape(np.shape(value))
    return result


def under(arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays whose names begin with `prefix`, without it: how several groups share one file or message."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write arrays and JSON metadata as one safetensors file, atomically. Raises `StorageError`."""
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    header["arrays_sha256"] = digest_of(contiguous)
    write_bytes(path, save(contiguous, metadata=header))


def load_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read a file of `save_arrays` and check its digest. Raises `DataError` (absent) or `CheckpointError` (damaged)."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such weights file")
    try:
        with safe_open(path, framework="numpy") as file:
            header = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}). Delete it and run again.") from error
    expected = header.pop("arrays_sha256", None)
    if expected is not None and expected != digest_of(arrays):
        raise CheckpointError(f"{path}: the weights do not match their digest: the file was changed or is damaged")
    metadata: dict[str, Any] = {}
    for key, value in header.items():
        try:
            metadata[key] = json.loads(value)
        except ValueError:
            metadata[key] = value
    return arrays, metadata
