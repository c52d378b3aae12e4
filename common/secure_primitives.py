"""The ciphers of the secure sum: key agreement, sealed letters, and streams of mask words. Shamir's shares: `secure_shares`.

::

    private P-384 key + peer's public key --agree--> 32 secret bytes (the same at both ends)
    secret, letter, binding --seal--> token --coordinator carries it--> unseal --> letter, or ValueError
    secret, label --HKDF-SHA256--> AES-256 key --CTR--> words, added to or taken from a vector in place

Pure functions; nothing is on disk. Agreement and sealing (Fernet: AES-128-CBC with HMAC-SHA256) are Flower's
(`flwr.common.secure_aggregation`), which are thin layers over `cryptography`. Flower's mask generator
`pseudo_rand_gen` is not used: it seeds NumPy's Mersenne Twister with 32 bits of the secret, so a mask is found by trying
2^32 seeds, and 624 words of it foretell all others. Here a mask is AES-256 in counter mode, as the proof of Bonawitz et
al. 2017 (section 3.3) demands of its PRG, under a key that no other stream ever has; hence the constant nonce.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key

__all__ = [
    "PRIVATE_BYTES",
    "PUBLIC_BYTES",
    "add_stream",
    "agree",
    "agree_with_all",
    "check_public_key",
    "fields",
    "new_private_key",
    "public_key_of",
    "seal",
    "unseal",
]

PRIVATE_BYTES = 48
PUBLIC_BYTES = 49
_CURVE = ec.SECP384R1()
_BLOCK = 1 << 20

Words = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]


def fields(*parts: bytes | str) -> bytes:
    """The parts behind one another, each after its length: no two lists of parts give the same bytes."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


def new_private_key() -> bytes:
    """A fresh P-384 private key: its scalar, 48 bytes, from the operating system's generator."""
    return ec.generate_private_key(_CURVE).private_numbers().private_value.to_bytes(PRIVATE_BYTES, "big")


def public_key_of(private: bytes) -> bytes:
    """The public key, 49 bytes (compressed point). Raises `ValueError` when `private` is no P-384 key."""
    return _private(private).public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def check_public_key(public: bytes) -> None:
    """Raise `ValueError` unless `public` is a compressed point of P-384 (49 bytes)."""
    _public(public)


def agree(private: bytes, public: bytes) -> bytes:
    """32 secret bytes, the same for (a, B) and (b, A): ECDH and HKDF-SHA256. Raises `ValueError` on keys not of P-384."""
    return agree_with_all(private, {"peer": public})["peer"]


def agree_with_all(private: bytes, publics: Mapping[str, bytes]) -> dict[str, bytes]:
    """By name what `agree` gives with each of `publics`; the private key is worked out once, which is half of the work."""
    key = _private(private)
    shared = {name: generate_shared_key(key, _public(public)) for name, public in publics.items()}
    return {name: base64.urlsafe_b64decode(secret) for name, secret in shared.items()}


def _private(private: bytes) -> ec.EllipticCurvePrivateKey:
    if len(private) != PRIVATE_BYTES:
        raise ValueError(f"a private key has {PRIVATE_BYTES} bytes, not {len(private)}")
    return ec.derive_private_key(int.from_bytes(private, "big"), _CURVE)


def _public(public: bytes) -> ec.EllipticCurvePublicKey:
    if len(public) != PUBLIC_BYTES:
        raise ValueError(f"a public key has {PUBLIC_BYTES} bytes, not {len(public)}")
    return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public)


def seal(secret: bytes, letter: bytes, binding: bytes) -> bytes:
    """Encrypt and authenticate `letter`; it opens only with the same `secret` (32 bytes) and the same `binding`."""
    token: bytes = encrypt(base64.urlsafe_b64encode(secret), hashlib.sha256(binding).digest() + letter)
    return token


def unseal(secret: bytes, token: bytes, binding: bytes) -> bytes:
    """The letter of a token of `seal`. Raises `ValueError` when it was altered, or sealed under another key or binding."""
    try:
        opened: bytes = decrypt(base64.urlsafe_b64encode(secret), token)
    except InvalidToken:
        raise ValueError("it was altered, or sealed with another key") from None
    # Fernet has no associated data, and one key serves both directions: the letter itself says where it belongs
    if not hmac.compare_digest(opened[:32], hashlib.sha256(binding).digest()):
        raise ValueError("it belongs to another session, sender or receiver")
    return opened[32:]


def add_stream(words: Words, secret: bytes, label: bytes, sign: int) -> None:
    """Add (`sign` 1) or take away (-1) the stream of `secret` and `label` to `words`, in place, mod 2^32 or 2^64.

    `words`: uint32 or uint64 [n], contiguous. One MiB at a time, so that nothing else of its size is allocated.
    The same secret and label give the same stream: a label may serve one vector only.
    """
    if words.dtype not in (np.dtype("<u4"), np.dtype("<u8")) or words.ndim != 1 or not words.flags.c_contiguous:
        raise ValueError(f"masks are for contiguous uint32 or uint64 vectors, not {words.dtype} {words.shape}")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, not {sign}")
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=label).derive(secret)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = memoryview(bytes(min(_BLOCK, words.nbytes))), np.empty(_BLOCK + 15, np.uint8)
    combine: Any = np.add if sign == 1 else np.subtract
    for start in range(0, words.nbytes, _BLOCK):
        size = min(_BLOCK, words.nbytes - start)
        stream.update_into(zeros[:size], buffer.data)
        part = words[start // words.itemsize : (start + size) // words.itemsize]
        combine(part, buffer[:size].view(words.dtype), out=part)
