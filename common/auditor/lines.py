"""One line of a privacy ledger as the auditor reads it: its own reading, from the written contract alone.

::

    bytes of a line, newline included --read_line--> Line | ValueError: what is wrong with it

Format, as docs/auditor.md has it: a JSON object without spaces, its keys in the order of `KEYS`, UTF-8, one newline. `hash` is
the SHA-256 of the line without hash and sig; `sig` the Ed25519 signature over ``b"xfed ledger-line v1\\n"`` and the hash in hex.
Nothing is read from disk here, and no key is known: who signed is asked in `xfed.common.auditor.chain`.

Formal guarantees
    Of all byte strings that mean the same values, one is accepted: no edit of a byte leaves a line readable with its old hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KEYS", "START", "Event", "Line", "is_hash", "read_line"]

KEYS = (
    "seq",
    "time",
    "site",
    "study",
    "phase",
    "class",
    "round",
    "attempt",
    "kind",
    "event",
    "software",
    "prev",
    "hash",
    "sig",
)
START = "0" * 64
LONGEST_LINE = 16_384
_KINDS = ("reserve", "spend", "release", "refuse", "resume")
_PHASES = ("generators", "classifier", "scores")
_EVENT_KEYS = {"mechanism", "unit", "sampling", "q", "sigma", "steps", "clip"}
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A Gaussian mechanism on Poisson samples of patients (probability `q` in (0, 1]; 1 = no sampling), run `steps` times.

    Noise of standard deviation ``sigma * clip`` is added to a sum that one patient changes by at most `clip` (L2).
    """

    q: float
    sigma: float
    clip: float
    steps: int

    @property
    def mechanism(self) -> tuple[float, float, float]:
        """What is run, however often: q, sigma, clip."""
        return self.q, self.sigma, self.clip


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line whose hash is right. `event` is set for reserve and spend; `details` is the event as written."""

    seq: int
    time: str
    site: str
    study: str | None
    phase: str | None
    class_name: str | None
    round: int | None
    attempt: int | None
    kind: str
    event: Event | None
    details: Mapping[str, Any]
    software: str
    prev: str
    hash: str
    sig: str

    @property
    def torn(self) -> bool:
        """Whether it only tells of a line that a power cut tore."""
        return self.kind == "resume" and self.study is None


def is_hash(value: object) -> bool:
    """Whether it is a SHA-256 in lower-case hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX


def read_line(data: bytes) -> Line:
    """The line of these bytes, newline included. Raises `ValueError` saying what is wrong."""
    if len(data) > LONGEST_LINE:
        raise ValueError(f"it is longer than {LONGEST_LINE:,} bytes")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        whole = isinstance(values, dict) and tuple(values) == KEYS and _compact(values) + b"\n" == data
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not a line of JSON") from error
    if not whole:
        raise ValueError("it is not spelled as a ledger's line")
    signed = {key: values[key] for key in KEYS if key not in ("hash", "sig")}
    if values["hash"] != hashlib.sha256(_compact(signed)).hexdigest():
        raise ValueError("its hash does not fit its content")
    for key in ("time", "site", "software", "prev", "hash", "sig"):
        if not isinstance(values[key], str):
            raise ValueError(f"{key} is not text")
    if type(values["seq"]) is not int or not is_hash(values["prev"]) or not isinstance(values["event"], dict):
        raise ValueError("seq, prev or event is not what it should be")
    return Line(
        **{key: values[key] for key in ("seq", "time", "site", "study", "phase", "round", "attempt", "kind")},
        class_name=values["class"],
        event=_content(values),
        details=values["event"],
        **{key: values[key] for key in ("software", "prev", "hash", "sig")},
    )


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _compact(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _content(values: Mapping[str, Any]) -> Event | None:
    """Check what the line says; the event of a reserve or spend. Raises `ValueError`."""
    kind, event = values["kind"], values["event"]
    if kind not in _KINDS:
        raise ValueError(f"kind {kind!r:.40} is not known: this auditor cannot say what it costs")
    about = [values[key] for key in ("study", "phase", "class", "round", "attempt")]
    if kind == "resume" and event.keys() == {"reason", "bytes", "sha256"}:
        if about != [None] * 5:
            raise ValueError("a torn line belongs to no study, phase, class, round or attempt")
        return None
    study, phase, class_name, number, attempt = about
    if not isinstance(study, str) or not study or phase not in _PHASES:
        raise ValueError(f"study {study!r:.40} or phase {phase!r:.40} is not one")
    if class_name is not None and (not isinstance(class_name, str) or not class_name):
        raise ValueError("class is neither a name nor null")
    if type(number) is not int or number < 0 or type(attempt) is not int or attempt < 1:
        raise ValueError(f"round {number!r:.40} or attempt {attempt!r:.40} is not a whole number from 0 and 1")
    if kind in ("reserve", "spend"):
        return _event(event)
    if kind == "release" and not (event.keys() == {"sha256"} and is_hash(event["sha256"])):
        raise ValueError("a release must hold the sha256 of what left, and nothing else")
    if kind in ("refuse", "resume") and not (event.keys() == {"reason"} and isinstance(event["reason"], str)):
        raise ValueError(f"a {kind} must hold its reason, and nothing else")
    return None


def _event(values: Mapping[str, Any]) -> Event:
    """Raises `ValueError` on anything that this auditor could not account for: nothing is skipped."""
    if values.keys() != _EVENT_KEYS or values["mechanism"] != "gaussian" or values["unit"] != "patient":
        raise ValueError("only a gaussian mechanism whose unit is a patient can be accounted for")
    q, sigma, clip, steps = (values[key] for key in ("q", "sigma", "clip", "steps"))
    for value in (q, sigma, clip):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"q, sigma or clip is {value!r:.40}: not a finite number above 0")
    if type(steps) is not int or steps < 1 or q > 1:
        raise ValueError(f"steps {steps!r:.40} or q {q!r:.40} is out of range")
    if values["sampling"] != ("none" if q == 1 else "poisson"):
        raise ValueError(f"sampling {values['sampling']!r:.40} with q {q!r:.40} is not known")
    return Event(q=float(q), sigma=float(sigma), clip=float(clip), steps=steps)
