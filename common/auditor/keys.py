"""Signatures as the auditor checks them: Ed25519 of ledgers, heads and reports; P-384 of the sites that vouch for a ledger's key.

::

    base64 + bytes + Ed25519 key --ed25519_signed--> bool
    ECDSA signature + bytes --(public-key recovery)--> two P-384 keys --fingerprint == the endorsed one?--> p384_signed: bool
    file bytes --read_json--> object | ValueError: also where the same values are spelled in another way

The endorsement names its signer by fingerprint alone. A fingerprint is a hash of a key, and an ECDSA signature tells its key
but for a sign (SEC 1 v2, section 4.1.6): so the signature can be checked, to the strength of SHA-256, without the key at hand.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["canonical", "ed25519_fingerprint", "ed25519_signed", "p384_signed", "plain_base64", "read_json"]

_CURVE = ec.SECP384R1()
_P = 2**384 - 2**128 - 2**96 + 2**32 - 1
_B = 0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF
_N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
_Point = tuple[int, int]


def canonical(values: Any) -> bytes:
    """JSON with sorted keys and no spaces, UTF-8: what heads, endorsements and reports are signed as."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def read_json(data: bytes) -> dict[str, Any]:
    """The object of a small file. Raises `ValueError` unless its bytes are one of the usual spellings of what they say.

    Otherwise 1e5 could become 1E5, or a key be there twice, and no signature over the values would notice.
    """
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        spelled = any(data in (text, text + b"\n") for text in _spellings(values))
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not spelled:
        raise ValueError("it is not spelled as it was written: somebody edited it")
    return values


def plain_base64(text: object) -> bytes | None:
    """The bytes of base64 text, or None: several texts stand for the same bytes, and only the plain one passes."""
    if not isinstance(text, str):
        return None
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def _spellings(values: Any) -> Iterator[bytes]:
    """How programs write JSON: indented, in one line with and without spaces, and sorted; in ASCII or not."""
    layouts: tuple[dict[str, Any], ...] = ({"indent": 2}, {"separators": (",", ":")}, {})
    for ascii_only in (False, True):
        for layout in layouts:
            yield json.dumps(values, ensure_ascii=ascii_only, allow_nan=False, **layout).encode()
    yield canonical(values)


def _refuse(word: str) -> None:
    raise ValueError(f"it holds {word}, which is not JSON")


@lru_cache(maxsize=65_536)
def ed25519_signed(public: bytes, data: bytes, signature: str) -> bool:
    """Whether the Ed25519 key of these 32 bytes signed `data`; `signature` is base64."""
    raw = plain_base64(signature)
    if raw is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(raw, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def ed25519_fingerprint(public: bytes) -> str:
    """``SHA256:...`` of an Ed25519 key, as ``ssh-keygen -lf`` prints it. Raises `ValueError` if it is none."""
    return _fingerprint(Ed25519PublicKey.from_public_bytes(public))


def _fingerprint(key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> str:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@lru_cache(maxsize=4096)
def p384_signed(fingerprint: str, data: bytes, signature: str) -> bool:
    """Whether the P-384 key with that fingerprint signed `data` (ECDSA, SHA-384, DER in base64)."""
    raw = plain_base64(signature)
    if raw is None:
        return False
    for key in _signers(raw, data):
        if _fingerprint(key) == fingerprint:
            try:
                key.verify(raw, data, ec.ECDSA(hashes.SHA384()))
            except InvalidSignature:
                continue
            return True
    return False


def _signers(signature: bytes, data: bytes) -> Iterator[ec.EllipticCurvePublicKey]:
    """The keys under which `signature` is one of `data`: Q = (s R - e G) / r, for both points R whose x is r."""
    try:
        r, s = utils.decode_dss_signature(signature)
        if not (0 < r < _N and 0 < s < _N) or utils.encode_dss_signature(r, s) != signature:
            return
        e = int.from_bytes(hashlib.sha384(data).digest(), "big") % _N
        inverse = pow(r, -1, _N)
        # a Diffie-Hellman exchange is a product of a point and a number, without its sign
        point = ec.EllipticCurvePublicNumbers(r, _height(r), _CURVE).public_key()
        x = int.from_bytes(_private(s * inverse).exchange(ec.ECDH(), point), "big")
        base = _private(-e * inverse).public_key().public_numbers()
        for y in (_height(x), _P - _height(x)):
            found = _sum((x, y), (base.x, base.y))
            yield ec.EllipticCurvePublicNumbers(*found, _CURVE).public_key()
    except ValueError:  # not a signature, or a point that is not on the curve
        return


def _private(number: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(number % _N, _CURVE)


def _height(x: int) -> int:
    """A y with (x, y) on the curve, if there is one (the prime is 3 modulo 4)."""
    return pow((x**3 - 3 * x + _B) % _P, (_P + 1) // 4, _P)


def _sum(a: _Point, b: _Point) -> _Point:
    """The sum of two points with different x. Raises `ValueError` otherwise: it does not happen to honest signatures."""
    slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, _P) % _P
    x = (slope * slope - a[0] - b[0]) % _P
    return x, (slope * (a[0] - x) - a[1]) % _P
