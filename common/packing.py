"""Our messages as a line of JSON and one run of bytes: the form in which they cross a wire, a pipe or a disk. Never pickle.

::

    dataclass --pack--> header {"kind", "facts": {scalars}, "arrays": {field: [[name, dtype, shape], ...]}}
                        + data (all arrays, in that order)
    header, data --unpack_request / unpack_reply--> dataclass whose arrays are read-only views of data

One block of bytes per message, however many parameters a model has: an exchange over Flower then costs a few
requests and not one per parameter. Nothing is allocated on the word of the header: arrays are views of bytes that came.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.messages import REPLIES, REQUESTS, Reply, Request

__all__ = ["digest_of", "digest_of_reply", "digest_of_request", "pack", "unpack_reply", "unpack_request"]

T = TypeVar("T", Request, Reply)
_SCALARS: Mapping[str, type[Any]] = {"str": str, "int": int, "float": float, "bool": bool}
_DTYPES = frozenset(
    np.dtype(kind).str for kind in ("f4", "f8", "i4", "i8", "u1", "u2", "u4", "u8", "?")
)  # little-endian, no objects
_BFLOAT16 = "bfloat16"
_HEADER_LIMIT = 16 * 2**20


def pack(message: Request | Reply) -> tuple[str, bytes]:
    """The message's header (JSON) and the bytes of its arrays."""
    facts: dict[str, Any] = {}
    arrays: dict[str, list[list[Any]]] = {}
    pieces: list[bytes | memoryview] = []
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.type != "Arrays":
            facts[field.name] = value
            continue
        arrays[field.name] = []
        for name, array in value.items():
            if getattr(message, "payload", "float32") == "bfloat16":
                arrays[field.name].append([name, _BFLOAT16, list(np.shape(array))])
                pieces.append(_upper_halves(name, array))
                continue
            plain = np.ascontiguousarray(array, dtype=np.asarray(array).dtype.newbyteorder("<")).reshape(
                np.shape(array)
            )
            arrays[field.name].append([name, plain.dtype.str, list(plain.shape)])
            pieces.append(plain.reshape(-1).view(np.uint8).data)
    header = {"kind": type(message).__name__, "facts": facts, "arrays": arrays}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")), b"".join(pieces)


def _upper_halves(name: str, array: npt.NDArray[Any]) -> memoryview:
    bits = np.ascontiguousarray(array, dtype="<f4").reshape(-1).view("<u4")
    if (bits & np.uint32(0xFFFF)).any():
        raise ValueError(f"{name} is not rounded to bfloat16: what arrives would differ from what was sent")
    return (bits >> np.uint32(16)).astype("<u2").view(np.uint8).data


def unpack_request(header: str, data: bytes | memoryview) -> Request:
    """The inverse of `pack` for requests. Raises `FederationError` on anything else."""
    return _unpack(header, data, REQUESTS)


def unpack_reply(header: str, data: bytes | memoryview) -> Reply:
    """The inverse of `pack` for replies. Raises `FederationError` on anything else."""
    return _unpack(header, data, REPLIES)


def _unpack(header: str, data: bytes | memoryview, kinds: Mapping[str, type[T]]) -> T:
    try:
        values = json.loads(header) if len(header) <= _HEADER_LIMIT else None
    except (ValueError, RecursionError):
        values = None
    kind = kinds.get(str(values.get("kind"))) if isinstance(values, dict) else None
    if not isinstance(values, dict) or kind is None:
        name = values.get("kind") if isinstance(values, dict) else None
        raise FederationError(f"not a message of this xfed: kind {name!r:.60}. Do both sides run the same version?")
    facts, arrays = values.get("facts"), values.get("arrays")
    if not isinstance(facts, dict) or not isinstance(arrays, dict):
        raise FederationError(f"{kind.__name__}: its facts or arrays are missing")
    view, start = memoryview(data), 0
    result: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.type == "Arrays":
            if field.name not in arrays:
                raise FederationError(f"{kind.__name__}: the arrays {field.name!r} are missing")
            result[field.name], start = _arrays(kind.__name__, arrays[field.name], view, start)
        else:
            result[field.name] = _scalar(kind.__name__, field, facts)
    if start != len(view):
        raise FederationError(f"{kind.__name__}: {len(view) - start} bytes are left over after its arrays")
    return kind(**result)


def _scalar(kind: str, field: dataclasses.Field[Any], facts: Mapping[str, Any]) -> Any:
    if field.name not in facts:
        raise FederationError(f"{kind}.{field.name} is missing")
    value, expected = facts[field.name], _SCALARS[str(field.type)]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise FederationError(f"{kind}.{field.name} must be {field.type}, not {value!r:.60}")
    return value


def _arrays(kind: str, specs: Any, view: memoryview, start: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
    found: dict[str, npt.NDArray[Any]] = {}
    if not isinstance(specs, list):
        raise FederationError(f"{kind}: its list of arrays is not a list")
    for spec in specs:
        match spec:
            case [str(name), str(dtype), list(shape)] if dtype in _DTYPES | {_BFLOAT16} and name not in found:
                pass
            case _:
                raise FederationError(f"{kind}: {spec!r:.80} does not describe an array")
        if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape):
            raise FederationError(f"{kind}: {shape!r:.80} is not a shape of {name!r:.60}")
        stored = np.dtype("<u2" if dtype == _BFLOAT16 else dtype)
        size = math.prod(shape) * stored.itemsize
        if len(shape) > 32 or start + size > len(view):
            raise FederationError(f"{kind}: the array {name!r:.60} is larger than the message")
        array = np.frombuffer(view[start : start + size], dtype=stored).reshape(shape)
        found[name] = (array.astype("<u4") << np.uint32(16)).view("<f4") if dtype == _BFLOAT16 else array
        start += size
    return found, start


def digest_of(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Hex SHA-256 over names, shapes, types and bytes, independent of the mapping's order."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name}\x1f{array.dtype.str}\x1f{array.shape}\x1f".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def digest_of_request(request: Request) -> str:
    """Hex SHA-256 of everything a request says, arrays included."""
    return _digest_of_message(request)


def digest_of_reply(reply: Reply) -> str:
    """Hex SHA-256 of everything a reply says, arrays included: what a ledger's release line names."""
    return _digest_of_message(reply)


def _digest_of_message(message: Request | Reply) -> str:
    total = hashlib.sha256(type(message).__name__.encode())
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        text = digest_of(value) if field.type == "Arrays" else str(value)
        total.update(f"\x1f{field.name}\x1f{text}".encode())
    return total.hexdigest()
