"""Asking so that only the sum over sites can be read.

::

    AdvertiseKeys --> all sites --> ShareKeys (everybody's keys) --> sealed letters, kept here unread
    request 1, 2, ... (one per class or arm) --> every site --> Masked --> MaskedSums: one running sum per request
    Unmask (who delivered all, who did not; letters) --> shares --> masks off the sums --> one answer per request: fold

Protocol and guarantees: `xfed.common.secure_sum`. All requests go to all sites; a site that holds none of a class adds
zeros. A site that is lost before it gave keys is left out by starting again without it; one that is lost later is a drop-
out, which the sums survive while more than half of the sites remain. The coordinator can check form and number of sites,
not a single site's update: there is none to check.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common import messages as m
from xfed.common.errors import FederationError
from xfed.common.packing import digest_of_request
from xfed.common.secure_masks import MaskedSums, Partition, roster_of
from xfed.common.summable import from_vectors, layouts
from xfed.server.exchange import Answer

__all__ = ["SecureRound", "sum_over_sites"]

KEY_TRIES = 3
Ask = Callable[[Sequence[tuple[str, m.Request]], Callable[[Answer], None]], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecureRound:
    """What a secure round gave: an answer per request, and the sites in them."""

    replies: Sequence[tuple[m.Request, m.Reply]]
    partition: Partition


def sum_over_sites(
    ask: Ask, sites: Sequence[str], requests: Sequence[m.Request], classes: int, least: int
) -> SecureRound:
    """Sum the answers of `sites` to each of `requests`; at least `least` sites must deliver. Raises `FederationError`.

    `ask` sends requests and hands over every answer that is not a problem (problems are its business: it records them).
    """
    peers, session, adverts, letters = _agree(ask, sites, requests[0].study, least)
    joined = ",".join(peers)
    bound = [dataclasses.replace(request, session=session, peers=joined) for request in requests]
    contexts = {bytes.fromhex(digest_of_request(request)): request for request in bound}
    sizes = {context: _sizes(request, classes) for context, request in contexts.items()}
    # signatures are checked by the sites, whose keys they are: here a forged one would only spoil the sum
    roster = roster_of(session, requests[0].study, peers, adverts, lambda site, statement, signature: True)
    sums = MaskedSums(roster, sizes)
    by_request = {id(request): context for context, request in contexts.items()}

    def fold(answer: Answer) -> None:
        reply = answer.reply
        if not isinstance(reply, m.Masked) or reply.arrays.keys() != {"weights", "statistics"}:
            raise FederationError(f"{answer.site} answered {type(reply).__name__} to a request for a masked answer")
        sums.add(answer.site, by_request[id(answer.request)], reply.arrays["weights"], reply.arrays["statistics"])

    ask([(site, request) for site in peers for request in bound], fold)
    partition = sums.partition()
    if len(partition.survivors) < least:
        raise FederationError(f"{len(partition.survivors)} of {len(sites)} sites answered everything, {least} must")
    words = sums.unmask(_shares(ask, session, partition, letters, requests[0].study))
    return SecureRound(
        replies=[(request, from_vectors(request, words[context], classes)) for context, request in contexts.items()],
        partition=partition,
    )


def _sizes(request: m.Request, classes: int) -> tuple[int, int]:
    weights, statistics = layouts(request, classes)
    return weights.size, statistics.size


Letters = Mapping[str, Mapping[str, npt.NDArray[Any]]]


def _agree(
    ask: Ask, sites: Sequence[str], study: str, least: int
) -> tuple[tuple[str, ...], str, dict[str, bytes], Letters]:
    """Keys and sealed letters of the sites that are there, in one session that all of them accept."""
    peers = tuple(sorted(sites))
    for _ in range(KEY_TRIES):
        if len(peers) < max(2, least):
            break
        session = secrets.token_hex(16)
        adverts: dict[str, npt.NDArray[Any]] = {}
        letters: dict[str, Mapping[str, npt.NDArray[Any]]] = {}
        advertise = m.AdvertiseKeys(study=study, session=session, peers=",".join(peers))
        ask([(site, advertise) for site in peers], lambda answer, kept=adverts: _advert(answer, kept))  # type: ignore[misc]
        if len(adverts) == len(peers):
            share = m.ShareKeys(study=study, session=session, arrays=adverts)
            ask([(site, share) for site in peers], lambda answer, kept=letters: _letters(answer, kept))  # type: ignore[misc]
            if len(letters) == len(peers):
                return peers, session, {site: array.tobytes() for site, array in adverts.items()}, letters
        there = letters.keys() if len(adverts) == len(peers) else adverts.keys()
        peers = tuple(sorted(there))
    raise FederationError(
        f"a secure sum needs {max(2, least)} sites that agree on keys; {len(peers)} of {len(sites)} did"
    )


def _advert(answer: Answer, kept: dict[str, npt.NDArray[Any]]) -> None:
    if not isinstance(answer.reply, m.SessionKeys) or answer.reply.arrays.keys() != {"advert"}:
        raise FederationError(f"{answer.site} answered {type(answer.reply).__name__} to AdvertiseKeys")
    kept[answer.site] = answer.reply.arrays["advert"]


def _letters(answer: Answer, kept: dict[str, Mapping[str, npt.NDArray[Any]]]) -> None:
    if not isinstance(answer.reply, m.SessionShares):
        raise FederationError(f"{answer.site} answered {type(answer.reply).__name__} to ShareKeys")
    kept[answer.site] = answer.reply.arrays


def _shares(ask: Ask, session: str, partition: Partition, letters: Letters, study: str) -> dict[str, dict[str, bytes]]:
    empty = np.zeros(0, np.uint8)
    requests: list[tuple[str, m.Request]] = []
    for site in partition.survivors:
        mine = {sender: sent.get(site, empty) for sender, sent in letters.items() if sender != site}
        unmask = m.Unmask(
            study=study,
            session=session,
            survivors=",".join(partition.survivors),
            dropped=",".join(partition.dropped),
            arrays=mine,
        )
        requests.append((site, unmask))
    found: dict[str, dict[str, bytes]] = {}

    def fold(answer: Answer) -> None:
        if not isinstance(answer.reply, m.UnmaskShares):
            raise FederationError(f"{answer.site} answered {type(answer.reply).__name__} to Unmask")
        found[answer.site] = {name: array.tobytes() for name, array in answer.reply.arrays.items()}

    ask(requests, fold)
    return found
