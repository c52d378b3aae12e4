"""A site's part in a secure sum: the coordinator learns the sum over sites and nothing else about any of them.

::

    site                                             what leaves                             coordinator
    new_session   two key pairs, a seed
    advertise     --------------------------------> public keys, commitment, signature ----> all adverts back to all
    exchange      every signature checked; shares -> one sealed letter per peer ------------> keeps the letters
    mask          weights and sums in fixed point -> masked words, uniform on their own ----> MaskedSums (secure_masks)
    reveal        its letters opened -------------> per site ONE share: seed of survivors, mask key of the dropped ---> sums

    After every step the caller writes `Session.to_bytes()` to disk (private, mode 0600) BEFORE its result leaves, and
    deletes it with the session. A masked answer is itself stored before the session that knows of it: then a site that
    is killed anywhere sends the stored answer again, or makes its first one.

Bonawitz, Ivanov, Kreuter et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017: double
masking with recovery of drop-outs, against a coordinator that may also lie; site keys are registered beforehand (the
plan's members), which is the paper's PKI. The paper's round of signatures on the list of survivors is left out: what
that costs is in `xfed.common.secure_masks` ("below two sites"). Every request of a session goes to all its sites; one
that holds nothing of what is asked adds zeros. Requests to some of the sites would not do: whoever chooses them could
surround one site with sites that it declares dropped elsewhere.

Formal guarantees
    One masked vector cannot be told from uniform words, whatever numbers are in it, by whoever lacks the site's seed, or
    the secret of one of its pairs. Masks depend on session, study, request (`context`) and the pair. They never serve two
    requests, nor two answers to one request: a second, different answer is refused. After `reveal` nothing is masked.
    Sites that were sent different requests (other weights, say) have different masks, and their sum cannot be read: the
    coordinator cannot give one site weights of its own (Pasquini et al. 2022). So `context` must be the digest of all
    that determines the answer.
    A letter opens only for its receiver, in its session, as from its sender. A site reveals for one partition only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import CheckpointError, FederationError, RefusedError
from xfed.common.secure_masks import (
    KEY_SHARE_BYTES,
    SEED_BYTES,
    SEED_SHARE_BYTES,
    Advert,
    Partition,
    Roster,
    Vectors,
    Verify,
    add_pair_mask,
    add_self_mask,
    commitment_to,
    roster_of,
    statement,
    threshold,
)
from xfed.common.secure_primitives import agree_with_all, fields, new_private_key, public_key_of, seal, unseal
from xfed.common.secure_shares import share_index, split

__all__ = ["CONTEXT_BYTES", "Session", "advertise", "exchange", "mask", "new_session", "reveal", "session_from_bytes"]

CONTEXT_BYTES = 32
_SESSION = re.compile(r"[A-Za-z0-9._-]{1,200}")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Session:
    """All that a site knows of one session. Secret: it is never sent, and its repr shows no key.

    `masked`: per request answered (hex context), a keyed digest of the answer. `pairs`: per peer what the mask key agrees
    on with its key, worked out once for all requests. `partition`: what was revealed for.
    """

    session: str
    study: str
    site: str
    peers: tuple[str, ...]
    cipher_key: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    roster: Roster | None = None
    kept: bytes = field(default=b"", repr=False)
    letters: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    masked: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    partition: Partition | None = None

    @property
    def advert(self) -> Advert:
        """The public part of the keys."""
        return Advert(
            cipher_key=public_key_of(self.cipher_key),
            mask_key=public_key_of(self.mask_key),
            commitment=commitment_to(self.session, self.site, self.seed),
        )

    def to_bytes(self) -> bytes:
        """The session as JSON, secrets included: for the site's own disk only."""
        values: dict[str, Any] = {
            "schema": 2,
            "session": self.session,
            "study": self.study,
            "site": self.site,
            "peers": list(self.peers),
            "cipher_key": self.cipher_key.hex(),
            "mask_key": self.mask_key.hex(),
            "seed": self.seed.hex(),
            "roster": None
            if self.roster is None
            else _hexed({n: a.to_bytes() for n, a in self.roster.adverts.items()}),
            "kept": self.kept.hex(),
            "letters": _hexed(self.letters),
            "masked": dict(self.masked),
            "pairs": _hexed(self.pairs),
            "partition": None if self.partition is None else dataclasses.asdict(self.partition),
        }
        return json.dumps(values).encode()


def _hexed(values: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}


def _unhexed(values: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in values.items()}


def session_from_bytes(data: bytes) -> Session:
    """The inverse of `Session.to_bytes`. Raises `CheckpointError` when the bytes are not a whole session."""
    try:
        values = json.loads(data)
        if values.pop("schema") != 2:
            raise ValueError("it was written by another version")
        roster, partition = values.pop("roster"), values.pop("partition")
        adverts = None if roster is None else {n: Advert.from_bytes(a) for n, a in _unhexed(roster).items()}
        return Session(
            session=values["session"],
            study=values["study"],
            site=values["site"],
            peers=tuple(values["peers"]),
            cipher_key=bytes.fromhex(values["cipher_key"]),
            mask_key=bytes.fromhex(values["mask_key"]),
            seed=bytes.fromhex(values["seed"]),
            roster=None
            if adverts is None
            else Roster(session=values["session"], study=values["study"], adverts=adverts),
            kept=bytes.fromhex(values["kept"]),
            letters=_unhexed(values["letters"]),
            masked=dict(values["masked"]),
            pairs=_unhexed(values["pairs"]),
            partition=None if partition is None else Partition(**{k: tuple(v) for k, v in partition.items()}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"this is not a whole secure sum session ({type(error).__name__}: {error}). Delete it: the site counts as "
            "dropped out of that session and takes part in the next."
        ) from error


def new_session(session: str, study: str, site: str, peers: Collection[str]) -> Session:
    """Fresh keys of `site` for a sum over `peers` (at least two site names, its own among them).

    `session`: 1..200 characters of A-Z a-z 0-9 . _ -, never used before; `study`: the study's digest. Secrets come from
    the operating system's generator. Raises `RefusedError` on bad names.
    """
    bad = [name for name in peers if not _SITE.fullmatch(name)]
    if not _SESSION.fullmatch(session) or bad:
        raise RefusedError(f"secure sum: {session!r:.80} among {bad[:3]} is no name of a session or of sites")
    if len(set(peers)) != len(peers) or len(peers) < 2 or site not in peers:
        raise RefusedError(
            f"secure sum {session}: the sites {sorted(peers)} must be two or more, each once, and {site} among them. "
            "A sum over one site hides nothing."
        )
    return Session(
        session=session,
        study=study,
        site=site,
        peers=tuple(sorted(peers)),
        cipher_key=new_private_key(),
        mask_key=new_private_key(),
        seed=os.urandom(SEED_BYTES),
    )


def advertise(session: Session, sign: Callable[[bytes], bytes]) -> bytes:
    """The site's advert: 130 public bytes, then ``sign(statement)`` by its registered key."""
    advert = session.advert
    return advert.to_bytes() + sign(statement(session.session, session.study, session.peers, session.site, advert))


def exchange(session: Session, adverts: Mapping[str, bytes], verify: Verify) -> Session:
    """Accept everybody's adverts, share out the secrets: the result's `letters` hold one sealed letter per other site.

    Called again with the same adverts it gives the same session. Raises `RefusedError`: an advert is missing, altered,
    signed by nobody known, or differs from what was accepted before.
    """
    try:
        roster = roster_of(session.session, session.study, session.peers, adverts, verify)
    except FederationError as error:
        raise RefusedError(str(error)) from error
    if roster.adverts[session.site] != session.advert or session.roster not in (None, roster):
        raise RefusedError(
            f"secure sum {session.session}: these are not the keys that {session.site} announced, or accepted before. "
            "Start a new session."
        )
    if session.roster is not None:
        return session
    count = len(roster.sites)
    keys = split(session.mask_key, roster.threshold, count)
    seeds = split(session.seed, roster.threshold, count)
    secrets = agree_with_all(
        session.cipher_key, {peer: roster.adverts[peer].cipher_key for peer in _others(session, roster)}
    )
    kept, letters = b"", {}
    for peer, key, seed in zip(roster.sites, keys, seeds, strict=True):
        if peer == session.site:
            kept = key + seed
        else:
            letters[peer] = seal(secrets[peer], key + seed, _binding(session, session.site, peer))
    return dataclasses.replace(session, roster=roster, kept=kept, letters=letters)


def _others(session: Session, roster: Roster) -> list[str]:
    return [peer for peer in roster.sites if peer != session.site]


def _binding(session: Session, sender: str, receiver: str) -> bytes:
    return fields("xfed secure sum letter v1", session.session, session.study, *session.peers, sender, receiver)


def mask(
    session: Session, context: bytes, words32: npt.NDArray[np.uint32], words64: npt.NDArray[np.uint64]
) -> tuple[Session, Vectors]:
    """The site's answer to one request under its masks, and the session that knows of it.

    `context`: SHA-256 digest (32 bytes) of all that determines the request, equal at every site. `words32` uint32 [n] is
    overwritten (and is the first result); the second is uint64 [m + 1], `words64` and the check word. Raises
    `RefusedError` when keys were not exchanged, another answer to this request was masked before, or the session is
    closed by `reveal`; `ValueError` when `context` is no digest.
    """
    if len(context) != CONTEXT_BYTES:
        raise ValueError(f"context must be a digest of {CONTEXT_BYTES} bytes, not {len(context)} bytes")
    roster = _roster(session)
    if session.partition is not None:
        raise RefusedError(f"secure sum {session.session}: the session is closed. Ask again in a new session.")
    answer = hashlib.sha256(fields(session.seed, words64.tobytes()))
    answer.update(np.ascontiguousarray(words32).data)
    if session.masked.get(context.hex(), answer.hexdigest()) != answer.hexdigest():
        raise RefusedError(
            f"secure sum {session.session}: another answer to this request was masked before, and the difference of the "
            "two would be bare. Send the stored answer, or ask again in a new session."
        )
    vectors = (words32, np.append(words64, np.uint64(1)))
    add_self_mask(vectors, session.seed, roster, session.site, context, 1)
    pairs = session.pairs or agree_with_all(
        session.mask_key, {peer: roster.adverts[peer].mask_key for peer in _others(session, roster)}
    )
    for peer in _others(session, roster):
        add_pair_mask(vectors, pairs[peer], roster, session.site, peer, context, 1)
    masked = {**session.masked, context.hex(): answer.hexdigest()}
    return dataclasses.replace(session, masked=masked, pairs=pairs), vectors


def reveal(
    session: Session, partition: Partition, letters: Mapping[str, bytes], *, minimum: int = 2
) -> tuple[Session, dict[str, bytes]]:
    """One share per site: of the seed where it survived, of the mask key where it dropped; and the session, closed.

    `letters`: from every other site, its letter to this one. `minimum`: least number of survivors that this site's policy
    allows; the threshold holds besides. Raises `RefusedError` when the lists overlap, miss or invent a site, call this
    site dropped, leave too few survivors, differ from what was revealed for before, or when a letter is not genuine.
    """
    roster = _roster(session)
    where = f"secure sum {session.session}"
    partition = Partition(survivors=tuple(sorted(partition.survivors)), dropped=tuple(sorted(partition.dropped)))
    if tuple(sorted(partition.survivors + partition.dropped)) != roster.sites:
        raise RefusedError(
            f"{where}: survivors {partition.survivors} and dropped {partition.dropped} must together be the session's "
            f"sites, each once: {roster.sites}"
        )
    if session.site in partition.dropped:
        raise RefusedError(f"{where}: {session.site} is called dropped, but it is here and reveals nothing")
    least = max(threshold(len(roster.sites)), minimum)
    if len(partition.survivors) < least:
        raise RefusedError(
            f"{where}: a sum over {len(partition.survivors)} sites; {least} is the least. Repeat the round in a new session."
        )
    if session.partition not in (None, partition):
        raise RefusedError(
            f"{where}: shares were revealed for other lists before ({session.partition}). Two different lists would "
            "uncover a single site; nothing more is revealed in this session."
        )
    if letters.keys() != set(roster.sites) - {session.site}:
        raise RefusedError(f"{where}: letters must come from all other sites, and came from {sorted(letters)}")
    secrets = agree_with_all(session.cipher_key, {peer: roster.adverts[peer].cipher_key for peer in letters})
    shares = {}
    for peer in roster.sites:
        letter = session.kept if peer == session.site else _open(session, roster, peer, letters[peer], secrets[peer])
        shares[peer] = letter[:KEY_SHARE_BYTES] if peer in partition.dropped else letter[KEY_SHARE_BYTES:]
    return dataclasses.replace(session, pairs={}, partition=partition), shares


def _open(session: Session, roster: Roster, sender: str, letter: bytes, secret: bytes) -> bytes:
    try:
        opened = unseal(secret, letter, _binding(session, sender, session.site))
        indices = {share_index(opened), share_index(opened[KEY_SHARE_BYTES:])}
        if len(opened) != KEY_SHARE_BYTES + SEED_SHARE_BYTES or indices != {roster.sites.index(session.site) + 1}:
            raise ValueError("it holds other shares than it should")
    except ValueError as error:
        raise RefusedError(
            f"secure sum {session.session}: the letter from {sender} to {session.site} is not genuine: {error}. "
            "Repeat the round in a new session."
        ) from error
    return opened


def _roster(session: Session) -> Roster:
    if session.roster is None:
        raise RefusedError(f"secure sum {session.session}: keys were not exchanged yet. Ask for that first.")
    return session.roster
