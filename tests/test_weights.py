"""Weights on disk and on the wire: whole, exact, and never pickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from xfed.common.codec import decode_reply, decode_request, encode, packed, payload_bytes
from xfed.common.errors import CheckpointError, DataError, FederationError
from xfed.common.messages import REPLIES, REQUESTS, GanUpdate, Refusal, TrainGan
from xfed.common.packing import digest_of, pack, unpack_reply, unpack_request
from xfed.common.weights import load_arrays, load_parameters, parameters_of, rounded, save_arrays


def test_round_trip_with_metadata(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "step": np.array(3.0, np.float32),
        "u": np.zeros(0, np.uint8),
    }
    save_arrays(tmp_path / "x.safetensors", arrays, {"name": "n", "facts": {"round": 3, "of": [1, 2]}})
    loaded, facts = load_arrays(tmp_path / "x.safetensors")
    assert facts == {"name": "n", "facts": {"round": 3, "of": [1, 2]}}
    assert all(np.array_equal(loaded[k], arrays[k]) and loaded[k].shape == arrays[k].shape for k in arrays)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_arrays(path, {"a": np.arange(40, dtype=np.float32)}, {"k": "v"})
    whole = path.read_bytes()
    start = len(whole) - 160  # the tensor's bytes
    for position in [start, start + 77, len(whole) - 1]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match="digest"):
            load_arrays(path)
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            load_arrays(path)


def test_absent_file_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        load_arrays(tmp_path / "none.safetensors")
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="weight"):
        load_parameters(layer, {"weight": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="one side only"):
        load_parameters(layer, {"weight": np.zeros((2, 3), np.float32)})


def test_buffers_do_not_travel() -> None:
    with pytest.raises(ValueError, match="buffers"):
        parameters_of(torch.nn.BatchNorm2d(3))


def test_the_digest_sees_names_shapes_types_and_bytes() -> None:
    base = {"a": np.zeros(4, np.float32)}
    others = [
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.array([0, 0, 0, 1], np.float32)},
        {},
    ]
    assert len({digest_of(arrays) for arrays in [base, *others]}) == 6


@given(
    st.text(max_size=20),
    st.integers(0, 2**40),
    st.dictionaries(st.text(min_size=1, max_size=9), st.integers(0, 5), max_size=3),
)
def test_messages_survive_the_codec(name: str, round: int, shapes: dict[str, int]) -> None:
    arrays = {key: np.arange(size, dtype=np.float32) for key, size in shapes.items()}
    sent = TrainGan(study="s", class_name=name, round=round, weights=arrays)
    record = encode(sent)
    got = decode_request(record)
    assert isinstance(got, TrainGan)
    assert (got.class_name, got.round) == (name, round)
    assert got.weights.keys() == arrays.keys()
    assert all(np.array_equal(got.weights[k], arrays[k]) for k in arrays)
    assert payload_bytes(record) >= sum(a.nbytes for a in arrays.values())


def _changed(update: GanUpdate, change: Callable[[dict[str, Any]], None], data: bytes | None = None) -> RecordDict:
    header, whole = pack(update)
    values = json.loads(header)
    change(values)
    return packed(json.dumps(values), whole if data is None else data)


def test_malformed_messages_are_refused() -> None:
    update = GanUpdate(site="a", images=3, loss_g=1.0, loss_d=1.0, seconds=0.1, weights={"w": np.zeros(2, np.float32)})
    with pytest.raises(FederationError, match="kind"):
        decode_request(encode(update))
    for field, value in (("images", "3"), ("images", True), ("loss_g", "x"), ("site", 4)):
        with pytest.raises(FederationError, match=field):
            decode_reply(_changed(update, lambda v, f=field, x=value: v["facts"].update({f: x})))  # type: ignore[misc]
    for change, told in (
        (lambda v: v["facts"].pop("site"), "site is missing"),
        (lambda v: v["arrays"].pop("weights"), "arrays 'weights' are missing"),
        (lambda v: v.pop("facts"), "facts or arrays"),
        (lambda v: v["arrays"]["weights"][0].__setitem__(2, [10**15]), "larger than the message"),
        (lambda v: v["arrays"]["weights"][0].__setitem__(2, [-1]), "is not a shape"),
        (lambda v: v["arrays"]["weights"][0].__setitem__(1, "|O"), "does not describe an array"),
        (lambda v: v["arrays"]["weights"].append(["w", "<f4", [0]]), "does not describe an array"),
        (lambda v: v["arrays"].update(weights={"w": 1}), "not a list"),
        (lambda v: v["arrays"]["weights"].clear(), "left over"),
    ):
        with pytest.raises(FederationError, match=told):
            decode_reply(_changed(update, change))
    with pytest.raises(FederationError, match="larger"):
        decode_reply(_changed(update, lambda v: None, b"1234567"))
    for record in (RecordDict(), packed("no JSON", b""), packed("[" * 10_000, b"")):
        with pytest.raises(FederationError, match="not a message"):
            decode_reply(record)


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_torchs(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = rounded({"w": array}, "bfloat16")["w"]
    theirs = torch.from_numpy(array).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert rounded({"w": array}, "float32")["w"] is array


def test_a_bfloat16_payload_has_half_the_bytes_and_loses_nothing_that_was_rounded() -> None:
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(5, 7)).astype(np.float32), "b": np.zeros(0, np.float32)}
    half = rounded(weights, "bfloat16")
    assert (np.abs(half["w"] / weights["w"] - 1) <= 2**-8).all()
    request = TrainGan(study="s", class_name="c", round=1, payload="bfloat16", weights=half)
    header, data = pack(request)
    assert len(data) == 2 * 35
    got = unpack_request(header, data)
    assert isinstance(got, TrainGan)
    assert got.weights["w"].dtype == np.float32
    assert digest_of(got.weights) == digest_of(half)
    with pytest.raises(ValueError, match="not rounded"):
        pack(TrainGan(study="s", class_name="c", round=1, payload="bfloat16", weights=weights))


def test_unpacked_arrays_are_views_that_cannot_be_written() -> None:
    update = GanUpdate(site="a", images=3, loss_g=1.0, loss_d=1.0, seconds=0.1, weights={"w": np.ones(2, np.float32)})
    got = unpack_reply(*pack(update))
    assert isinstance(got, GanUpdate)
    with pytest.raises(ValueError, match="read-only"):
        got.weights["w"][0] = 2


def test_only_listed_fields_can_leave_a_site() -> None:
    """The list of what travels is `messages.py`; a field that sounds like more must not slip in."""
    words = ("discriminator", "optimizer", "patient_id", "path", "file", "pixels")
    for kind in (*REPLIES.values(), *REQUESTS.values()):
        for field in kind.__dataclass_fields__:
            assert not any(word in field.lower() for word in words), (kind, field)
    assert "reason" in Refusal.__dataclass_fields__
