"""Who takes part in a secure sum, which masks lie on whose numbers, and how the coordinator takes them off.

::

    site --advert (two public keys, a commitment, a signature)--> coordinator --all adverts--> roster_of --> Roster (both sides)
    mask of site u for one request (Bonawitz et al. 2017, section 4):
        PRG(b_u)  +  sum over v > u of PRG(s_uv)  -  sum over v < u of PRG(s_uv)          b_u own seed, s_uv agreed by u and v
    masked vectors --MaskedSums.add--> held until the site has answered every request, then folded into the sums and dropped
                   --partition--> survivors / dropped --> asked of the sites: `reveal` --> shares
                   --unmask--> b of survivors, s of dropped (each checked against the roster) --> masks off --> the sums
    On disk: nothing. A coordinator that is killed begins a new session.

Formal guarantees
    For every site at most one of b_u and s_u can be had: a share of either takes a site's word that u survived or
    dropped, a site gives its word once, and each secret takes t > n/2 sites. So a coordinator that tells sites different
    lists still cannot uncover one site's vector, even one that arrived after its s_u was revealed. Up to n - t =
    floor((n - 1)/2) sites may drop out: 1 of 3, 2 of 5.
    A site reveals only for a partition of the whole roster with at least t survivors, so an honest coordinator learns sums
    of t sites or more. One that tells sites different lists can narrow a sum down, but never below two sites: drops need
    t words each, n sites give n - t words each, and n(n - t)/t < n - 1.
    Sums come out exact in the ring. Each vector of sums carries one word more, to which every site adds 1: unless it comes
    out as the number of survivors, the masks did not cancel and nothing is returned.
Not covered
    Sites that pass what they know to the coordinator: with m of them a sum protects the others only among themselves.
    What the sum itself says, and what two sums say together: a coordinator that has a sum over A and asks for the same
    answers in a new session over A without one site learns that site's answer. Sessions know nothing of one another:
    it is for the caller to see that a site does not reveal one answer in two sums over different sites.
    A site that sends nonsense spoils the sum: its words cannot be checked one by one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.secure_primitives import (
    PRIVATE_BYTES,
    PUBLIC_BYTES,
    add_stream,
    agree_with_all,
    check_public_key,
    fields,
    public_key_of,
)
from xfed.common.secure_shares import join, share_bytes, share_index

__all__ = [
    "KEY_SHARE_BYTES",
    "SEED_BYTES",
    "SEED_SHARE_BYTES",
    "Advert",
    "MaskedSums",
    "Partition",
    "Roster",
    "Vectors",
    "Verify",
    "add_pair_mask",
    "add_self_mask",
    "commitment_to",
    "roster_of",
    "statement",
    "threshold",
]

SEED_BYTES = 32
KEY_SHARE_BYTES = share_bytes(PRIVATE_BYTES)
SEED_SHARE_BYTES = share_bytes(SEED_BYTES)
_ADVERT_BYTES = 2 * PUBLIC_BYTES + 32
_COMBINATIONS = 200
"""How many choices of t shares are tried before they are called inconsistent."""

Vectors = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]
Verify = Callable[[str, bytes, bytes], bool]
"""(site, signed bytes, signature) -> is it the signature of that site's registered key?"""


def threshold(sites: int) -> int:
    """How many shares give a secret back: ``sites // 2 + 1``, the least number that is more than half."""
    return sites // 2 + 1


@dataclass(frozen=True, kw_only=True)
class Advert:
    """What a site announces for one session: public keys for sealing and for masks (49 bytes each), SHA-256 over its seed."""

    cipher_key: bytes
    mask_key: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """130 bytes; on the wire a signature over `statement` follows."""
        return self.cipher_key + self.mask_key + self.commitment

    @staticmethod
    def from_bytes(data: bytes) -> Advert:
        """The inverse of `to_bytes`; anything after the 130 bytes is not looked at. Raises `ValueError` when there are fewer."""
        if len(data) < _ADVERT_BYTES:
            raise ValueError(f"an advert has at least {_ADVERT_BYTES} bytes, not {len(data)}")
        return Advert(
            cipher_key=data[:PUBLIC_BYTES],
            mask_key=data[PUBLIC_BYTES : 2 * PUBLIC_BYTES],
            commitment=data[2 * PUBLIC_BYTES : _ADVERT_BYTES],
        )


def commitment_to(session: str, site: str, seed: bytes) -> bytes:
    """SHA-256 that binds a site to its seed (32 random bytes) and says nothing about it."""
    return hashlib.sha256(fields("xfed secure sum seed v1", session, site, seed)).digest()


def statement(session: str, study: str, peers: Iterable[str], site: str, advert: Advert) -> bytes:
    """The bytes that `site` signs: its keys, for this session of this study among exactly these sites."""
    values = {
        "session": session,
        "study": study,
        "peers": sorted(peers),
        "site": site,
        "cipher_key": advert.cipher_key.hex(),
        "mask_key": advert.mask_key.hex(),
        "commitment": advert.commitment.hex(),
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return b"xfed secure sum keys v1\n" + text.encode()


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The public part of a session: its name, the study's digest, and the verified advert of every site."""

    session: str
    study: str
    adverts: Mapping[str, Advert]

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites of the session in the order of their names; a site's shares have its position, counted from 1."""
        return tuple(sorted(self.adverts))

    @property
    def threshold(self) -> int:
        """How many shares give a secret back."""
        return threshold(len(self.adverts))


def roster_of(session: str, study: str, peers: Collection[str], adverts: Mapping[str, bytes], verify: Verify) -> Roster:
    """Check every advert (130 bytes and a signature) and make the roster. Raises `FederationError` naming the site."""
    if set(peers) != adverts.keys():
        raise FederationError(
            f"secure sum {session}: keys must come from {sorted(peers)}, and came from {sorted(adverts)}. "
            "Start a new session with the sites that answer."
        )
    checked = {}
    for site, data in adverts.items():
        try:
            advert = Advert.from_bytes(data)
            check_public_key(advert.cipher_key)
            check_public_key(advert.mask_key)
        except ValueError as error:
            raise FederationError(f"secure sum {session}: the keys of {site} cannot be read: {error}") from error
        if not verify(site, statement(session, study, peers, site, advert), data[_ADVERT_BYTES:]):
            raise FederationError(
                f"secure sum {session}: the signature on the keys of {site} is not that site's for this session, study "
                "and list of sites. If it happens again, somebody alters messages: compare the plan's public keys."
            )
        checked[site] = advert
    return Roster(session=session, study=study, adverts=checked)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Who answered every request of the session, and who did not; each in the order of names."""

    survivors: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def add_self_mask(vectors: Vectors, seed: bytes, roster: Roster, site: str, context: bytes, sign: int) -> None:
    """Add (1) or take away (-1) the mask of a site's own seed, in place."""
    _add(vectors, seed, fields("xfed secure sum self mask v1", roster.session, roster.study, context, site), sign)


def add_pair_mask(
    vectors: Vectors, secret: bytes, roster: Roster, site: str, peer: str, context: bytes, sign: int
) -> None:
    """Add (1) or take away (-1), in place, what the `secret` of `site` and `peer` adds to the vectors of `site`.

    The lesser name adds the stream and the greater one subtracts it, so that it is gone from their sum.
    """
    low, high = sorted((site, peer))
    label = fields("xfed secure sum pair mask v1", roster.session, roster.study, context, low, high)
    _add(vectors, secret, label, sign if site == low else -sign)


def _add(vectors: Vectors, secret: bytes, label: bytes, sign: int) -> None:
    for words in vectors:
        add_stream(words, secret, label + words.dtype.str.encode(), sign)


class MaskedSums:
    """The coordinator's end of one session: sums of masked vectors, one pair per request (`context`).

    `sizes`: context (32 bytes, as given to `xfed.common.secure_sum.mask`) to the lengths of its two vectors, without
    the check word. A site counts only when it answered all of them; until then its vectors are held.
    """

    def __init__(self, roster: Roster, sizes: Mapping[bytes, tuple[int, int]]) -> None:
        if not sizes:
            raise ValueError("a session needs at least one request")
        self._roster = roster
        self._sizes = {context: (size32, size64 + 1) for context, (size32, size64) in sizes.items()}
        self._sums: dict[bytes, Vectors] = {}
        self._waiting: dict[str, dict[bytes, Vectors]] = {}
        self._complete: set[str] = set()
        self._partition: Partition | None = None

    def add(self, site: str, context: bytes, words32: npt.NDArray[np.uint32], words64: npt.NDArray[np.uint64]) -> None:
        """Take one site's masked vectors; they may be read-only and are not kept once folded. Raises `FederationError`."""
        where = f"secure sum {self._roster.session}"
        if site not in self._roster.adverts or context not in self._sizes:
            raise FederationError(f"{where}: an answer of {site} belongs to no site or request of this session")
        if self._partition is not None:
            raise FederationError(f"{where}: {site} answered after the session was closed; its answer is left out")
        if site in self._complete or context in self._waiting.get(site, {}):
            raise FederationError(f"{where}: {site} answered the same request twice; the first answer stands")
        vectors: tuple[npt.NDArray[Any], ...] = (words32, words64)
        for words, size, dtype in zip(vectors, self._sizes[context], ("uint32", "uint64"), strict=True):
            if words.shape != (size,) or words.dtype != dtype:
                raise FederationError(
                    f"{where}: {site} sent {words.dtype} {words.shape}, expected {dtype} ({size},); it is left out"
                )
        waiting = self._waiting.setdefault(site, {})
        waiting[context] = (words32, words64)
        if waiting.keys() == self._sizes.keys():
            for answered, vectors in self._waiting.pop(site).items():
                self._fold(answered, vectors)
            self._complete.add(site)

    def _fold(self, context: bytes, vectors: Vectors) -> None:
        if context not in self._sums:
            self._sums[context] = (vectors[0].copy(), vectors[1].copy())
            return
        total32, total64 = self._sums[context]
        np.add(total32, vectors[0], out=total32)
        np.add(total64, vectors[1], out=total64)

    def partition(self) -> Partition:
        """Close the session: who survived and who dropped out, the same at every call.

        Raises `FederationError` when fewer than the threshold answered every request; the session stays open then.
        """
        if self._partition is None:
            dropped = tuple(site for site in self._roster.sites if site not in self._complete)
            if len(self._complete) < self._roster.threshold:
                raise FederationError(
                    f"secure sum {self._roster.session}: {len(self._complete)} of {len(self._roster.sites)} sites answered "
                    f"everything and {self._roster.threshold} must; missing: {', '.join(dropped)}. Repeat the round in a "
                    "new session."
                )
            self._waiting.clear()
            self._partition = Partition(survivors=tuple(sorted(self._complete)), dropped=dropped)
        return self._partition

    def unmask(self, replies: Mapping[str, Mapping[str, bytes]]) -> dict[bytes, Vectors]:
        """The sums over the survivors, uint32 and uint64 per context; afterwards this object is empty.

        `replies`: per site that answered, its shares by name as `xfed.common.secure_sum.reveal` gives them. Raises
        `FederationError` naming the sites whose secrets lack shares, or whose shares contradict the roster; more replies
        may then be given in another call.
        """
        partition = self.partition()
        adverts = self._roster.adverts
        seeds = {
            site: self._secret(site, "seed", SEED_SHARE_BYTES, replies, partial(self._is_seed, site))
            for site in partition.survivors
        }
        keys = {
            site: self._secret(site, "mask key", KEY_SHARE_BYTES, replies, partial(self._is_key, site))
            for site in partition.dropped
        }
        there = {site: adverts[site].mask_key for site in partition.survivors}
        pairs = {
            (site, gone): secret for gone, key in keys.items() for site, secret in agree_with_all(key, there).items()
        }
        results: dict[bytes, Vectors] = {}
        while self._sums:
            context, vectors = self._sums.popitem()
            for site, seed in seeds.items():
                add_self_mask(vectors, seed, self._roster, site, context, -1)
            for (site, gone), secret in pairs.items():
                add_pair_mask(vectors, secret, self._roster, site, gone, context, -1)
            if vectors[1][-1] != len(partition.survivors):
                raise FederationError(
                    f"secure sum {self._roster.session}: the masks did not cancel; nothing can be read. Did every site "
                    "get the same request? Repeat the round in a new session."
                )
            results[context] = (vectors[0], vectors[1][:-1])
        return results

    def _is_seed(self, site: str, secret: bytes) -> bool:
        return commitment_to(self._roster.session, site, secret) == self._roster.adverts[site].commitment

    def _is_key(self, site: str, secret: bytes) -> bool:
        return public_key_of(secret) == self._roster.adverts[site].mask_key

    def _secret(
        self,
        site: str,
        kind: str,
        size: int,
        replies: Mapping[str, Mapping[str, bytes]],
        is_right: Callable[[bytes], bool],
    ) -> bytes:
        """The secret of `site` from the shares in `replies`, compared with what it announced."""
        needed = self._roster.threshold
        shares = {
            peer: replies[peer][site]
            for position, peer in enumerate(self._roster.sites, 1)
            if peer in replies and len(share := replies[peer].get(site, b"")) == size and share_index(share) == position
        }
        # all honest shares fit together, so that the first choice is right unless a site lies
        for chosen in itertools.islice(itertools.combinations(shares.values(), needed), _COMBINATIONS):
            try:
                secret = join(list(chosen))
                if is_right(secret):
                    return secret
            except ValueError:
                continue
        trouble = "they contradict what it announced" if len(shares) >= needed else f"{needed} are needed"
        raise FederationError(
            f"secure sum {self._roster.session}: the {kind} of {site} cannot be put together: {len(shares)} usable shares "
            f"came, from {', '.join(shares) or 'nobody'}; {trouble}. Wait for more sites, or repeat the round in a new session."
        )
