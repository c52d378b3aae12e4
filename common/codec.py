"""The only place where our messages become Flower records, and back.

::

    dataclass --pack--> header, data --encode--> RecordDict { "message": ConfigRecord {"header"},
                                                              "data": ArrayRecord {"data": one Array} }

The array's bytes are `xfed.common.packing`'s, which Flower cuts into content-addressed chunks of 5 MB on the wire. Bytes
in a ConfigRecord would not be chunked, which is right for a few: up to 64 KiB lie beside the header, and the message is three
objects on the wire instead of six, each of which costs a request.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from xfed.common.errors import FederationError
from xfed.common.messages import Reply, Request
from xfed.common.packing import pack, unpack_reply, unpack_request

__all__ = ["decode_reply", "decode_request", "encode", "packed", "payload_bytes", "unwrap"]

_PACKED = "xfed.packed"
SMALL_BYTES = 2**16


def encode(message: Request | Reply) -> RecordDict:
    """The message as Flower records."""
    return packed(*pack(message))


def packed(header: str, data: bytes) -> RecordDict:
    """A message that is packed already, as Flower records."""
    record = RecordDict()
    if len(data) <= SMALL_BYTES:
        record["message"] = ConfigRecord({"header": header, "data": bytes(data)})
    else:
        record["message"] = ConfigRecord({"header": header})
        array = Array(dtype="uint8", shape=(len(data),), stype=_PACKED, data=data)
        record["data"] = ArrayRecord(array_dict={"data": array})
    return record


def decode_request(record: RecordDict) -> Request:
    """The inverse of `encode` for requests. Raises `FederationError` on anything else."""
    return unpack_request(*unwrap(record))


def decode_reply(record: RecordDict) -> Reply:
    """The inverse of `encode` for replies. Raises `FederationError` on anything else."""
    return unpack_reply(*unwrap(record))


def unwrap(record: RecordDict) -> tuple[str, bytes]:
    """Header and bytes of a message, unread. Raises `FederationError` when the records are not ours."""
    config = record.config_records.get("message")
    header = config.get("header") if config is not None else None
    if not isinstance(header, str):
        raise FederationError("not a message of this xfed: it has no header. Do both sides run the same version?")
    arrays = record.array_records.get("data")
    array = arrays.get("data") if arrays is not None else None
    if array is None:
        small = config.get("data") if config is not None else None
        if not isinstance(small, bytes):
            raise FederationError("not a message of this xfed: it has no data. Do both sides run the same version?")
        return header, small
    if array.stype != _PACKED or not isinstance(array.data, bytes):
        raise FederationError(
            "not a message of this xfed: its arrays are not packed. Do both sides run the same version?"
        )
    return header, array.data


def payload_bytes(record: RecordDict) -> int:
    """Bytes of the arrays in a record: what a message weighs, headers apart."""
    large = sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())
    small = [config.get("data", b"") for config in record.config_records.values()]
    return large + sum(len(data) for data in small if isinstance(data, bytes))
