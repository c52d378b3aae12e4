"""The only place where our messages become Flower records, and back.

::

    dataclass --encode--> RecordDict { "facts": ConfigRecord (kind, strings, numbers), <field>: ArrayRecord per array field }

Arrays travel as Flower `Array`s (chunked and content-addressed on the wire), never as bytes in a ConfigRecord.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from xfed.common.errors import FederationError
from xfed.common.messages import REPLIES, REQUESTS, Reply, Request

__all__ = ["decode_reply", "decode_request", "encode", "payload_bytes"]

T = TypeVar("T", Request, Reply)
_SCALARS: Mapping[str, type[Any] | tuple[type[Any], ...]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
}


def encode(message: Request | Reply) -> RecordDict:
    """The message as Flower records."""
    facts: dict[str, Any] = {"kind": type(message).__name__}
    record = RecordDict()
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.type == "Arrays":
            arrays = {name: Array(np.asarray(array, order="C")) for name, array in value.items()}
            record[field.name] = ArrayRecord(array_dict=arrays)
        else:
            facts[field.name] = value
    record["facts"] = ConfigRecord(facts)
    return record


def decode_request(record: RecordDict) -> Request:
    """The inverse of `encode` for requests. Raises `FederationError` on anything else."""
    return _decode(record, REQUESTS)


def decode_reply(record: RecordDict) -> Reply:
    """The inverse of `encode` for replies. Raises `FederationError` on anything else."""
    return _decode(record, REPLIES)


def _decode(record: RecordDict, kinds: Mapping[str, type[T]]) -> T:
    facts = record.config_records.get("facts")
    kind = kinds.get(str(facts.get("kind"))) if facts is not None else None
    if facts is None or kind is None:
        name = None if facts is None else facts.get("kind")
        raise FederationError(f"not a message of this xfed: kind {name!r}. Do both sides run the same version?")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.type == "Arrays":
            arrays = record.array_records.get(field.name)
            if arrays is None:
                raise FederationError(f"{kind.__name__}: the arrays {field.name!r} are missing")
            try:
                values[field.name] = {name: array.numpy() for name, array in arrays.items()}
            except (ValueError, TypeError, OSError, EOFError) as error:
                raise FederationError(f"{kind.__name__}: the arrays {field.name!r} cannot be read ({error})") from error
        else:
            value = facts.get(field.name)
            expected = _SCALARS[str(field.type)]
            if field.type == "float" and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, expected) or (field.type == "int" and isinstance(value, bool)):
                raise FederationError(f"{kind.__name__}.{field.name} must be {field.type}, not {value!r:.60}")
            values[field.name] = value
    return kind(**values)


def payload_bytes(record: RecordDict) -> int:
    """Bytes of the arrays in a record: what a message weighs, headers apart."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())
