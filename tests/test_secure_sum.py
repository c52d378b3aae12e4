"""Secure sums: equal to plain sums, whole after drop-outs, blind to one site, closed to whoever meddles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from xfed.common.errors import CheckpointError, FederationError, RefusedError
from xfed.common.fixed_point import (
    WEIGHT_LIMIT,
    Layout,
    pack_sums,
    pack_weights,
    sums_layout,
    unpack_sums,
    unpack_weights,
    weights_layout,
)
from xfed.common.randomness import numpy_generator
from xfed.common.secure_masks import (
    Advert,
    MaskedSums,
    Partition,
    Roster,
    Vectors,
    add_pair_mask,
    add_self_mask,
    roster_of,
    statement,
    threshold,
)
from xfed.common.secure_primitives import (
    add_stream,
    agree,
    fields,
    new_private_key,
    public_key_of,
    seal,
    unseal,
)
from xfed.common.secure_shares import join, split
from xfed.common.secure_sum import Session, advertise, exchange, mask, new_session, reveal, session_from_bytes

STUDY = "5" * 64
CONTEXT = hashlib.sha256(b"a request").digest()
OTHER = hashlib.sha256(b"another request").digest()


# --- fixed point ------------------------------------------------------------------------------------------------------


def _weights_bound(sites: int, total: int, alive: int, mean: np.ndarray) -> np.ndarray:
    """The bound of the docstring: K * 2^-27 * (1 + 2^-19) * N/n, and half a float32 step."""
    step = np.spacing(np.abs(mean).astype(np.float32)).astype(np.float64)
    return sites * 2.0**-27 * (1 + 2.0**-19) * total / alive + step / 2


def _plain_mean(values: list[np.ndarray], counts: list[int]) -> np.ndarray:
    return sum(v.astype(np.float64) * n for v, n in zip(values, counts, strict=True)) / sum(counts)


@given(
    counts=st.lists(st.integers(1, 5000), min_size=1, max_size=7),
    absent=st.integers(0, 5000),
    size=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 0.05, 1.0, 31.0]),
    seed=st.integers(0, 2**32),
)
def test_weights_come_back_within_the_stated_bound(
    counts: list[int], absent: int, size: int, scale: float, seed: int
) -> None:
    rng = numpy_generator(seed, "weights")
    values = [(rng.uniform(-1, 1, size) * scale).astype(np.float32) for _ in counts]
    layout, total = weights_layout({"w": values[0]}), sum(counts) + absent
    words = np.zeros(size, np.uint32)
    for value, count in zip(values, counts, strict=True):
        words += pack_weights(layout, {"w": value}, count, total)
    mean, truth = unpack_weights(layout, words, sum(counts), total)["w"], _plain_mean(values, counts)
    assert mean.dtype == np.float32
    assert (np.abs(mean - truth) <= _weights_bound(len(counts), total, sum(counts), truth)).all()


def test_the_stated_bound_is_tight() -> None:
    """Half a step at each site: a bound of a third of the stated one would be broken."""
    sites = 5
    value = {"w": np.array([2.0**-27 * 0.98 * sites], np.float32)}  # a share of 0.49 steps, rounded to none
    layout = weights_layout(value)
    words = sum(pack_weights(layout, value, 1, sites) for _ in range(sites))
    error = abs(unpack_weights(layout, words, sites, sites)["w"][0] - value["w"][0])
    assert sites * 2.0**-27 * 0.9 < error <= sites * 2.0**-27


@pytest.mark.parametrize("sites", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("value", [WEIGHT_LIMIT, -WEIGHT_LIMIT])
def test_sums_at_the_limit_do_not_wrap_around(sites: int, value: float) -> None:
    weights = {"w": np.full(3, value, np.float32)}
    layout = weights_layout(weights)
    words = np.uint32(sites) * pack_weights(layout, weights, 7, 7 * sites)
    bound = _weights_bound(sites, 1, 1, np.full(3, value))
    assert (np.abs(unpack_weights(layout, words, 7 * sites, 7 * sites)["w"] - value) <= bound).all()


def test_shapes_names_and_blocks_come_back() -> None:
    rng = numpy_generator(4, "shapes")
    weights = {
        "b": rng.normal(size=(600, 700)).astype(np.float32),  # more than one block
        "a": np.asfortranarray(rng.normal(size=(3, 5))),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    layout = weights_layout(weights)
    assert layout == weights_layout(dict(reversed(weights.items())))
    means = unpack_weights(layout, pack_weights(layout, weights, 3, 3), 3, 3)
    assert {n: a.shape for n, a in means.items()} == {n: a.shape for n, a in weights.items()}
    for name, array in weights.items():
        np.testing.assert_allclose(means[name], array, rtol=2.0**-24, atol=2.0**-26)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.nextafter(np.float32(31), np.float32(32)), -32.0])
def test_weights_outside_the_range_are_refused_by_name(value: float) -> None:
    weights = {"good": np.zeros(3, np.float32), "layer.bad": np.array([0, value, 1], np.float32)}
    with pytest.raises(RefusedError, match=r"layer\.bad"):
        pack_weights(weights_layout(weights), weights, 1, 1)


def test_counts_and_arrays_that_do_not_fit_are_refused() -> None:
    weights = {"w": np.zeros((2, 2), np.float32)}
    layout = weights_layout(weights)
    for images, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(RefusedError, match="images"):
            pack_weights(layout, weights, images, total)
    for images in (0, 5):
        with pytest.raises(FederationError, match="images"):
            unpack_weights(layout, np.zeros(4, np.uint32), images, 4)
    for wrong in ({"v": weights["w"]}, {"w": np.zeros(4, np.float32)}, {"w": np.zeros((2, 2), np.int64)}, {}):
        with pytest.raises(RefusedError):
            pack_weights(layout, wrong, 1, 1)
    for words in (np.zeros(5, np.uint32), np.zeros(4, np.int32)):
        with pytest.raises(FederationError, match="vector"):
            unpack_weights(layout, words, 1, 1)
    with pytest.raises(ValueError, match="'w'"):
        weights_layout({"w": np.zeros(2, np.int64)})
    with pytest.raises(ValueError, match="'t'"):
        sums_layout({"t": np.array(["text"])})


@given(
    st.integers(1, 7).flatmap(
        lambda sites: st.lists(
            st.tuples(
                st.integers(-(2**62) // sites + 1, 2**62 // sites), st.floats(-(2.0**38) / sites, 2.0**38 / sites)
            ),
            min_size=sites,
            max_size=sites,
        )
    )
)
def test_integers_are_exact_and_floats_within_the_bound(values: list[tuple[int, float]]) -> None:
    sites = len(values)
    words: Any = np.zeros(2, np.uint64)
    layout = sums_layout({"n": np.array(0), "x": np.array(0.0)})
    for whole, fraction in values:
        words = words + pack_sums(layout, {"n": np.array(whole), "x": np.array(fraction)}, sites)
    sums = unpack_sums(layout, words)
    assert (sums["n"].dtype, sums["n"].shape) == (np.int64, ())
    assert int(sums["n"]) == sum(whole for whole, _ in values)
    truth = float(sum(Fraction(fraction) for _, fraction in values))
    assert sums["x"].dtype == np.float64
    assert abs(float(sums["x"]) - truth) <= sites * 2.0**-25 + np.spacing(abs(truth))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (np.array([2**62 // 3]), np.array([2**62 // 3 + 1])),
        (np.array([-(2**62 // 3)]), np.array([-(2**63)])),
        (np.array([2**62 // 3], np.uint64), np.array([2**64 - 1], np.uint64)),
        (np.array([2.0**38 / 3]), np.array([2.0**38])),
        (np.array([-1e9]), np.array([np.nan])),
        (np.array([0.0]), np.array([-np.inf])),
        (np.array([True]), np.array([0.5])),
    ],
)
def test_statistics_at_the_limit_pass_and_beyond_are_refused(good: np.ndarray, bad: np.ndarray) -> None:
    layout = sums_layout({"count": good})
    np.testing.assert_allclose(unpack_sums(layout, pack_sums(layout, {"count": good}, 3))["count"], good, atol=2.0**-25)
    with pytest.raises(RefusedError, match="count"):
        pack_sums(layout, {"count": bad}, 3)
    with pytest.raises(ValueError, match="at least one"):
        pack_sums(layout, {"count": good}, 0)


# --- the protocol -----------------------------------------------------------------------------------------------------


@functools.cache
def _registered(site: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _signer(site: str) -> Any:
    return lambda message: _registered(site).sign(message, ec.ECDSA(hashes.SHA384()))


def _verify(site: str, message: bytes, signature: bytes) -> bool:
    try:
        _registered(site).public_key().verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{number}" for number in range(1, count + 1))


@dataclasses.dataclass
class _Exchange:
    """All parties of one session in one place, keys exchanged."""

    sessions: dict[str, Session]
    adverts: dict[str, bytes]
    roster: Roster

    @staticmethod
    def begin(count: int, name: str = "round-1") -> _Exchange:
        names = _names(count)
        sessions = {site: new_session(name, STUDY, site, names) for site in names}
        adverts = {site: advertise(session, _signer(site)) for site, session in sessions.items()}
        sessions = {site: exchange(session, adverts, _verify) for site, session in sessions.items()}
        return _Exchange(sessions, adverts, roster_of(name, STUDY, names, adverts, _verify))

    def letters_to(self, site: str) -> dict[str, bytes]:
        return {peer: s.letters[site] for peer, s in self.sessions.items() if peer != site}

    def mask(self, site: str, context: bytes, words32: np.ndarray, words64: np.ndarray) -> Vectors:
        self.sessions[site], vectors = mask(self.sessions[site], context, words32.copy(), words64)
        return vectors

    def reveal(self, site: str, partition: Partition) -> dict[str, bytes]:
        self.sessions[site], shares = reveal(self.sessions[site], partition, self.letters_to(site))
        return shares


def _words(seed: int, site: str, size32: int = 50, size64: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = numpy_generator(seed, "words", site)
    return rng.integers(0, 2**32, size32, np.uint32), rng.integers(0, 2**64, size64, np.uint64)


def _plain_sum(seed: int, sites: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = [_words(seed, site) for site in sites]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)  # type: ignore[return-value]


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 900), min_size=2, max_size=7),
    rows=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_the_secure_sum_is_the_plain_sum(counts: list[int], rows: int, seed: int) -> None:
    sites, total = _names(len(counts)), sum(counts)
    rng = numpy_generator(seed, "protocol")
    weights = {site: {"w": rng.normal(0, 2, (rows, 3)).astype(np.float32)} for site in sites}
    facts = {
        site: {"images": np.array(n), "loss": np.array(n * rng.uniform(0, 9))}
        for site, n in zip(sites, counts, strict=True)
    }
    wide, narrow = weights_layout(weights[sites[0]]), sums_layout(facts[sites[0]])
    run = _Exchange.begin(len(counts))
    sums = MaskedSums(run.roster, {CONTEXT: (wide.size, narrow.size)})
    for site, count in zip(sites, counts, strict=True):
        words = pack_weights(wide, weights[site], count, total), pack_sums(narrow, facts[site], len(sites))
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *words))
    replies = {site: run.reveal(site, sums.partition()) for site in sites}
    words32, words64 = sums.unmask(replies)[CONTEXT]
    summed = unpack_sums(narrow, words64)
    assert int(summed["images"]) == total
    assert abs(summed["loss"] - sum(float(f["loss"]) for f in facts.values())) <= len(sites) * 2.0**-25 + 1e-9
    mean = unpack_weights(wide, words32, int(summed["images"]), total)["w"]
    truth = _plain_mean([weights[site]["w"] for site in sites], counts)
    assert (np.abs(mean - truth) <= _weights_bound(len(sites), total, total, truth)).all()


@pytest.mark.parametrize(
    ("count", "never_masked", "never_revealed"),
    [(2, 0, 0), (3, 1, 0), (3, 0, 1), (4, 1, 0), (5, 2, 0), (5, 0, 2), (5, 1, 1), (7, 3, 0), (7, 0, 3), (7, 2, 1)],
)
def test_the_sum_of_the_others_survives_drop_outs(count: int, never_masked: int, never_revealed: int) -> None:
    sites = _names(count)
    for turn in range(2):  # drop-outs at the front and at the back of the names: both signs of the pairwise masks
        order = sites if turn else sites[::-1]
        masking, revealing = order[never_masked:], order[never_masked + never_revealed :]
        run = _Exchange.begin(count)
        sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
        for site in masking:
            sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
        partition = sums.partition()
        assert partition == Partition(
            survivors=tuple(sorted(masking)), dropped=tuple(sorted(set(sites) - set(masking)))
        )
        replies = {site: run.reveal(site, partition) for site in revealing}
        result = sums.unmask(replies)[CONTEXT]
        for got, expected in zip(result, _plain_sum(1, masking), strict=True):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize(("count", "lost"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_too_many_drop_outs_are_refused_by_name(count: int, lost: int) -> None:
    run = _Exchange.begin(count)
    sites = _names(count)
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
    for site in sites[lost:]:
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
    with pytest.raises(FederationError, match=f"missing: {', '.join(sites[:lost])}"):
        sums.partition()
    for site in sites[:lost]:  # they come late, and the session is still open
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
    replies = {site: run.reveal(site, sums.partition()) for site in sites}
    few = {site: replies[site] for site in sites[lost:]}
    with pytest.raises(FederationError, match=rf"seed of site-1 .* {count - lost} usable shares"):
        sums.unmask(few)
    assert np.array_equal(sums.unmask(replies)[CONTEXT][0], _plain_sum(1, sites)[0])


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    run = _Exchange.begin(4)
    sites = _names(3)  # site-4 drops out
    masked = {site: run.mask(site, CONTEXT, *_words(2, site)) for site in sites}
    partition = Partition(survivors=sites, dropped=("site-4",))
    replies = {site: run.reveal(site, partition) for site in sites}
    results = set()
    for order in itertools.permutations(sites):
        sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
        for site in order:
            sums.add(site, CONTEXT, *masked[site])
        result = sums.unmask({site: replies[site] for site in order})[CONTEXT]
        results.add(result[0].tobytes() + result[1].tobytes())
    assert len(results) == 1


def test_a_site_counts_only_when_it_answered_every_request() -> None:
    run = _Exchange.begin(3)
    sites = _names(3)
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7), OTHER: (50, 7)})
    for site in sites:
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
    for site in sites[:2]:
        sums.add(site, OTHER, *run.mask(site, OTHER, *_words(2, site)))
    partition = sums.partition()
    assert partition.dropped == ("site-3",)
    with pytest.raises(FederationError, match="after the session was closed"):
        sums.add("site-3", OTHER, *run.mask("site-3", OTHER, *_words(2, "site-3")))
    with pytest.raises(RefusedError, match="called dropped"):
        run.reveal("site-3", partition)
    result = sums.unmask({site: run.reveal(site, partition) for site in sites[:2]})
    for context, seed in ((CONTEXT, 1), (OTHER, 2)):
        assert np.array_equal(result[context][0], _plain_sum(seed, sites[:2])[0])
        assert np.array_equal(result[context][1], _plain_sum(seed, sites[:2])[1])


def test_answers_that_do_not_belong_are_left_out() -> None:
    run = _Exchange.begin(2)
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
    vectors = run.mask("site-1", CONTEXT, *_words(1, "site-1"))
    for site, context, words32, words64, reason in (
        ("site-9", CONTEXT, *vectors, "no site or request"),
        ("site-1", OTHER, *vectors, "no site or request"),
        ("site-1", CONTEXT, vectors[0][:-1], vectors[1], r"expected uint32 \(50,\)"),
        ("site-1", CONTEXT, vectors[0], vectors[1][:-1], r"expected uint64 \(8,\)"),
        ("site-1", CONTEXT, vectors[0].view(np.int32), vectors[1], "int32"),
    ):
        with pytest.raises(FederationError, match=reason):
            sums.add(site, context, words32, words64)
    vectors[0].setflags(write=False)
    sums.add("site-1", CONTEXT, *vectors)
    with pytest.raises(FederationError, match="twice"):
        sums.add("site-1", CONTEXT, *vectors)
    with pytest.raises(ValueError, match="at least one request"):
        MaskedSums(run.roster, {})


def test_sites_that_were_asked_different_things_give_no_sum() -> None:
    """The check word: a coordinator that gives one site weights of its own reads nothing."""
    run = _Exchange.begin(3)
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
    for site, context in zip(_names(3), (CONTEXT, CONTEXT, OTHER), strict=True):
        sums.add(site, CONTEXT, *run.mask(site, context, *_words(1, site)))
    replies = {site: run.reveal(site, sums.partition()) for site in _names(3)}
    with pytest.raises(FederationError, match="did not cancel"):
        sums.unmask(replies)


def test_one_false_share_is_passed_over_and_false_ones_alone_are_refused() -> None:
    run = _Exchange.begin(5)
    sites = _names(5)
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
    for site in sites[:4]:
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
    replies = {site: run.reveal(site, sums.partition()) for site in sites[:4]}

    def spoiled(share: bytes) -> bytes:
        return share[:20] + bytes([share[20] ^ 1]) + share[21:]

    false = {"site-1": {name: spoiled(share) for name, share in replies["site-1"].items()}}
    three = {site: replies[site] for site in sites[1:3]}
    for name, kind in (("site-1", "seed"), ("site-5", "mask key")):  # a survivor's secret and a dropped site's
        with pytest.raises(FederationError, match=rf"{kind} of {name} .*contradict"):
            sums.unmask({**replies, **{s: {**replies[s], name: spoiled(replies[s][name])} for s in sites[:4]}})
    with pytest.raises(FederationError, match=r"seed of site-1 .*contradict"):
        sums.unmask({**false, **three})
    with pytest.raises(FederationError, match=r"2 usable shares came, from site-2, site-3; 3 are needed"):
        sums.unmask({**three, "site-4": {}, "site-9": replies["site-4"], "site-1": replies["site-2"]})
    cut = {name: share[:-16] for name, share in replies["site-4"].items()}
    with pytest.raises(FederationError, match=r"2 usable shares came, from site-2, site-3; 3 are needed"):
        sums.unmask({**three, "site-4": cut})
    result = sums.unmask({**replies, **false})[CONTEXT]
    assert np.array_equal(result[0], _plain_sum(1, sites[:4])[0])


# --- what the coordinator sees of one site ----------------------------------------------------------------------------

SESSIONS, SEEN = 24, 1500


@functools.cache
def _seen(update: str, how: str) -> bytes:
    """All that the coordinator sees of site-1's vectors, over many sessions, for one of two very different updates."""
    value = {"nothing": 0.0, "limit": WEIGHT_LIMIT}[update]
    layout = weights_layout({"w": np.zeros(SEEN, np.float32)})
    words = pack_weights(layout, {"w": np.full(SEEN, value, np.float32)}, 1, 3)
    counts = np.full(100, int(value), np.uint64)
    fixed = _Exchange.begin(3, "reused").sessions["site-1"]
    pieces = []
    for number in range(SESSIONS):
        if how == "off":
            vectors: Vectors = (words, counts)
        else:
            session = fixed if how == "reused" else _Exchange.begin(3, f"round-{number}").sessions["site-1"]
            vectors = mask(session, CONTEXT, words.copy(), counts)[1]
        pieces += [vectors[0].tobytes(), vectors[1].tobytes()]
    return b"".join(pieces)


def _histogram(data: bytes) -> np.ndarray:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256)


REJECT = 1e-7
"""A true null is rejected once in ten million runs; the controls are rejected by hundreds of orders of magnitude."""


@pytest.mark.parametrize("update", ["nothing", "limit"])
def test_what_is_seen_of_one_site_is_uniform(update: str) -> None:
    assert chisquare(_histogram(_seen(update, "on"))).pvalue > REJECT
    # the controls: this test must see masks that are off, and masks that come again
    for broken in ("off", "reused"):
        assert chisquare(_histogram(_seen(update, broken))).pvalue < REJECT, broken


def test_two_very_different_updates_look_the_same() -> None:
    def same(how: str) -> float:
        table = np.stack([_histogram(_seen("nothing", how)), _histogram(_seen("limit", how))])
        return float(chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)

    assert same("on") > REJECT
    assert same("off") < REJECT


def test_differences_between_answers_are_uniform_unless_masks_are_reused() -> None:
    """Two answers of one site to two requests, subtracted: the masks must not cancel."""
    session = _Exchange.begin(3).sessions["site-1"]
    zeros, ones = np.zeros(40_000, np.uint32), np.ones(40_000, np.uint32)
    none = np.zeros(0, np.uint64)

    def difference(context: bytes) -> float:
        first = mask(session, CONTEXT, zeros.copy(), none)[1][0]
        second = mask(session, context, ones.copy(), none)[1][0]  # the older session does not know of the first
        return float(chisquare(_histogram((second - first).tobytes())).pvalue)

    assert difference(OTHER) > REJECT
    assert difference(CONTEXT) < REJECT


def test_no_two_masks_are_alike_even_of_one_secret() -> None:
    """Session, study, request, site or pair, kind of mask and vector each have a stream of their own."""
    roster = _Exchange.begin(3).roster
    rosters = [roster, dataclasses.replace(roster, session="round-2"), dataclasses.replace(roster, study="6" * 64)]
    secret, streams = bytes(32), []
    for where, context, site in itertools.product(rosters, (CONTEXT, OTHER), _names(3)):
        vectors = np.zeros(8, np.uint32), np.zeros(4, np.uint64)
        add_self_mask(vectors, secret, where, site, context, 1)
        streams += [words.tobytes() for words in vectors]
        for peer in set(_names(3)) - {site}:
            vectors = np.zeros(8, np.uint32), np.zeros(4, np.uint64)
            add_pair_mask(vectors, secret, where, site, peer, context, 1)
            streams += [words.tobytes() for words in vectors]
            back = vectors[0].copy(), vectors[1].copy()
            add_pair_mask(back, secret, where, peer, site, context, 1)
            assert not back[0].any()  # what one of a pair adds, the other takes away
            assert not back[1].any()
    assert len(streams) == len(set(streams)) == 3 * 2 * 3 * (1 + 2) * 2


def test_a_site_whose_seed_is_known_is_still_masked_by_its_pairs() -> None:
    run = _Exchange.begin(3)
    partition = Partition(survivors=_names(3))
    masked = {site: run.mask(site, CONTEXT, *_words(1, site)) for site in _names(3)}
    replies = {site: run.reveal(site, partition) for site in _names(3)}
    seed = join([replies[site]["site-1"] for site in _names(2)])
    assert seed == run.sessions["site-1"].seed
    bare = masked["site-1"][0].copy()
    add_self_mask((bare, masked["site-1"][1].copy()), seed, run.roster, "site-1", CONTEXT, -1)
    assert not np.array_equal(bare, _words(1, "site-1")[0])  # the pairwise masks still lie on it


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """Against one call of the cipher over the whole length, across the blocks."""
    size = (1 << 20) + 40
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"label").derive(b"s" * 32)
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))
    for dtype in (np.uint32, np.uint64):
        words = np.zeros(size // np.dtype(dtype).itemsize, dtype)
        add_stream(words, b"s" * 32, b"label", 1)
        assert words.tobytes() == expected
        add_stream(words, b"s" * 32, b"label", -1)
        assert not words.any()
    for bad in (np.zeros(4, np.int32), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            add_stream(bad, b"s" * 32, b"label", 1)
    with pytest.raises(ValueError, match="sign"):
        add_stream(np.zeros(4, np.uint32), b"s" * 32, b"label", 2)


# --- meddling ---------------------------------------------------------------------------------------------------------


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("position", [1, 48, 50, 97, 98, 129, 134, -1])
def test_an_altered_advert_is_refused(position: int) -> None:
    """A flipped bit in either key, the commitment or the signature; at the site and at the coordinator."""
    run = _Exchange.begin(3)
    altered = dict(run.adverts)
    altered["site-2"] = _flipped(altered["site-2"], position % len(altered["site-2"]))
    session = dataclasses.replace(run.sessions["site-1"], roster=None)
    with pytest.raises(RefusedError, match="site-2"):
        exchange(session, altered, _verify)
    with pytest.raises(FederationError, match="site-2"):
        roster_of("round-1", STUDY, _names(3), altered, _verify)


def test_the_signed_statement_says_everything() -> None:
    advert = Advert(cipher_key=b"c" * 49, mask_key=b"m" * 49, commitment=b"h" * 32)
    base: dict[str, Any] = {"session": "s", "study": STUDY, "peers": ("a", "b"), "site": "a", "advert": advert}
    changes = [("session", "t"), ("study", "6" * 64), ("peers", ("a", "c")), ("peers", ("a", "b", "c")), ("site", "b")]
    changes += [("advert", dataclasses.replace(advert, **{f.name: b"x"})) for f in dataclasses.fields(advert)]
    said = {statement(**{**base, name: value}) for name, value in changes} | {statement(**base)}
    assert len(said) == 9
    assert statement(**{**base, "peers": ("b", "a")}) in said
    assert all(message.startswith(b"xfed secure sum keys v1\n{") for message in said)
    assert Advert.from_bytes(advert.to_bytes() + b"signature") == advert


def test_keys_of_another_session_study_site_or_list_are_refused() -> None:
    names = _names(3)
    sessions = {site: new_session("round-1", STUDY, site, names) for site in names}
    adverts = {site: advertise(session, _signer(site)) for site, session in sessions.items()}
    for other in (
        new_session("round-2", STUDY, "site-2", names),
        new_session("round-1", "6" * 64, "site-2", names),
        new_session("round-1", STUDY, "site-2", names[:2]),
        new_session("round-1", STUDY, "site-2", (*names, "site-4")),
    ):
        with pytest.raises(RefusedError, match="signature on the keys of site-2"):
            exchange(sessions["site-1"], {**adverts, "site-2": advertise(other, _signer("site-2"))}, _verify)
    for wrong, reason in (
        ({**adverts, "site-2": adverts["site-3"]}, "signature on the keys of site-2"),  # swapped
        ({**adverts, "site-2": advertise(sessions["site-2"], _signer("site-3"))}, "signature"),  # signed by another
        ({**adverts, "site-2": adverts["site-2"][:130]}, "signature"),
        ({**adverts, "site-2": b"short"}, "cannot be read"),
        ({site: adverts[site] for site in names[:2]}, "keys must come from"),
        ({**adverts, "site-4": adverts["site-3"]}, "keys must come from"),
        (
            {**adverts, "site-1": advertise(new_session("round-1", STUDY, "site-1", names), _signer("site-1"))},
            "not the",
        ),
    ):
        with pytest.raises(RefusedError, match=reason):
            exchange(sessions["site-1"], wrong, _verify)
    ready = exchange(sessions["site-1"], adverts, _verify)
    assert exchange(ready, adverts, _verify) is ready
    again = advertise(new_session("round-1", STUDY, "site-2", names), _signer("site-2"))
    with pytest.raises(RefusedError, match="accepted before"):
        exchange(ready, {**adverts, "site-2": again}, _verify)


def test_swapped_replayed_reflected_and_altered_letters_are_refused() -> None:
    run, earlier = _Exchange.begin(3), _Exchange.begin(3)
    letters = run.letters_to("site-1")
    swapped = {"site-2": letters["site-3"], "site-3": letters["site-2"]}
    for wrong in (
        swapped,
        {**letters, "site-2": run.sessions["site-2"].letters["site-3"]},  # for another receiver
        {**letters, "site-2": run.sessions["site-1"].letters["site-2"]},  # its own letter, sent back: the same key
        {**letters, "site-2": earlier.sessions["site-2"].letters["site-1"]},  # of another session
        {**letters, "site-2": letters["site-2"][:-1]},
        {**letters, "site-2": _flipped(letters["site-2"], 60)},
    ):
        with pytest.raises(RefusedError, match=r"from site-[23] to site-1 is not genuine"):
            reveal(run.sessions["site-1"], Partition(survivors=_names(3)), wrong)
    # a sealed letter of the right sender that holds the shares meant for another site
    sender = run.sessions["site-2"]
    secret = agree(sender.cipher_key, run.roster.adverts["site-1"].cipher_key)
    binding = fields("xfed secure sum letter v1", "round-1", STUDY, *_names(3), "site-2", "site-1")
    genuine = unseal(secret, letters["site-2"], binding)
    for content in (sender.kept, genuine[:-16], genuine[:68] + sender.kept[68:], b""):
        wrong = {**letters, "site-2": seal(secret, content, binding)}
        with pytest.raises(RefusedError, match=r"from site-2 .*other shares"):
            reveal(run.sessions["site-1"], Partition(survivors=_names(3)), wrong)
    for wrong in ({}, {**letters, "site-9": b""}, {"site-2": letters["site-2"]}):
        with pytest.raises(RefusedError, match="letters must come from"):
            reveal(run.sessions["site-1"], Partition(survivors=_names(3)), wrong)


def test_a_letter_opens_only_for_its_binding() -> None:
    first, second = new_private_key(), new_private_key()
    secret = agree(first, public_key_of(second))
    assert secret == agree(second, public_key_of(first))
    token = seal(secret, b"letter", b"here")
    assert unseal(secret, token, b"here") == b"letter"
    assert b"letter" not in token
    with pytest.raises(ValueError, match="another session"):
        unseal(secret, token, b"there")
    with pytest.raises(ValueError, match="another key"):
        unseal(agree(first, public_key_of(first)), token, b"here")
    for bad in (b"", bytes(49), b"\x02" + b"\xff" * 48):
        with pytest.raises(ValueError, match=r"."):
            agree(first, bad)
    with pytest.raises(ValueError, match="48 bytes"):
        public_key_of(b"short")


@pytest.mark.parametrize(("needed", "count"), [(2, 2), (2, 3), (3, 5), (4, 7)])
def test_any_threshold_of_shares_is_enough_and_one_less_says_nothing(needed: int, count: int) -> None:
    assert threshold(count) == needed
    secret = bytes(range(48))
    shares = split(secret, needed, count)
    for chosen in itertools.combinations(shares, needed):
        assert join(list(chosen)) == secret
    for chosen in itertools.combinations(shares, needed - 1):
        try:
            assert join(list(chosen)) != secret
        except ValueError:
            continue


def test_a_second_partition_and_impossible_ones_are_refused() -> None:
    run = _Exchange.begin(5)
    sites = _names(5)
    session, letters = run.sessions["site-1"], run.letters_to("site-1")
    for survivors, dropped, reason in (
        (sites[:4], sites[3:], "each once"),  # overlap
        (sites[:4], (), "each once"),  # one is missing
        (sites, ("site-9",), "each once"),  # unknown
        ((*sites, "site-1"), (), "each once"),  # twice
        (sites[1:], sites[:1], "called dropped"),
        (sites[:2], sites[2:], "3 is the least"),
    ):
        with pytest.raises(RefusedError, match=reason):
            reveal(session, Partition(survivors=survivors, dropped=dropped), letters)
    first = Partition(survivors=sites[:4], dropped=sites[4:])
    with pytest.raises(RefusedError, match="5 is the least"):
        reveal(session, first, letters, minimum=5)
    closed, shares = reveal(session, first, letters)
    assert closed.partition == first
    assert reveal(closed, Partition(survivors=sites[3::-1], dropped=sites[4:]), letters) == (closed, shares)
    for second in (Partition(survivors=sites), Partition(survivors=sites[:3], dropped=sites[3:])):
        with pytest.raises(RefusedError, match="nothing more is revealed"):
            reveal(closed, second, letters)
    with pytest.raises(RefusedError, match="closed"):
        mask(closed, CONTEXT, *_words(1, "site-1"))


def test_a_lie_about_drop_outs_gives_one_secret_of_a_site_at_most() -> None:
    for count in range(2, 40):
        needed = threshold(count)
        assert 2 * needed > count  # t words that a site survived and t that it dropped: more than there are sites
        assert count - needed == (count - 1) // 2  # drop-outs that are tolerated
        assert count * (count - needed) // needed <= count - 2  # "never below two sites"
    run = _Exchange.begin(5)
    sites = _names(5)
    as_survivor, as_dropped = Partition(survivors=sites), Partition(survivors=sites[1:], dropped=sites[:1])
    told = dict(zip(sites, (as_survivor, as_survivor, as_survivor, as_dropped, as_dropped), strict=True))
    with pytest.raises(RefusedError):
        run.reveal("site-1", as_dropped)
    shares = {site: run.reveal(site, partition)["site-1"] for site, partition in told.items()}
    assert join([shares[site] for site in sites[:3]]) == run.sessions["site-1"].seed
    with contextlib.suppress(ValueError):
        assert join([shares[site] for site in sites[3:]]) != run.sessions["site-1"].mask_key


@pytest.mark.parametrize(("count", "least"), [(3, 2), (4, 3), (5, 2)])
def test_a_coordinator_that_lies_to_every_site_still_has_a_sum_of_two_or_more(count: int, least: int) -> None:
    """Every way in which it can tell each site a list that the site accepts: how few sites can one sum be made of?"""
    needed, narrowest = threshold(count), count
    accepted = [
        [
            set(dropped)
            for size in range(count - needed + 1)
            for dropped in itertools.combinations([name for name in range(count) if name != own], size)
        ]
        for own in range(count)
    ]
    for told in itertools.product(*accepted):
        words = [sum(name in dropped for dropped in told) for name in range(count)]
        if all(drops >= needed or count - drops >= needed for drops in words):
            narrowest = min(narrowest, sum(drops < needed for drops in words))
    assert narrowest == least


def test_another_answer_to_the_same_request_is_refused() -> None:
    run = _Exchange.begin(3)
    first = run.mask("site-1", CONTEXT, *_words(1, "site-1"))
    again = run.mask("site-1", CONTEXT, *_words(1, "site-1"))
    assert [words.tobytes() for words in first] == [words.tobytes() for words in again]
    (same32, same64), (other32, other64) = _words(1, "site-1"), _words(2, "site-1")
    for other in ((other32, same64), (same32, other64)):
        with pytest.raises(RefusedError, match="another answer"):
            run.mask("site-1", CONTEXT, *other)
    run.mask("site-1", OTHER, *_words(2, "site-1"))
    with pytest.raises(ValueError, match="32 bytes"):
        run.mask("site-1", b"round 3", *_words(1, "site-1"))
    session = new_session("early", STUDY, "site-1", _names(3))
    with pytest.raises(RefusedError, match="not exchanged"):
        mask(session, CONTEXT, *_words(1, "site-1"))
    with pytest.raises(RefusedError, match="not exchanged"):
        reveal(session, Partition(survivors=_names(3)), {})


@pytest.mark.parametrize(
    ("name", "site", "peers"),
    [
        ("a/b", "site-1", _names(3)),
        ("", "site-1", _names(3)),
        ("x" * 201, "site-1", _names(3)),
        ("ok\n", "site-1", _names(3)),
        ("ok", "site-9", _names(3)),
        ("ok", "site-1", ("site-1",)),
        ("ok", "site-1", ("site-1", "site-1")),
        ("ok", "site-1", ("site-1", "site-2/..")),
        ("ok", "site-1", ("site-1", "Site-2")),
    ],
)
def test_sessions_with_bad_names_are_refused(name: str, site: str, peers: tuple[str, ...]) -> None:
    with pytest.raises(RefusedError, match="secure sum"):
        new_session(name, STUDY, site, peers)


# --- killed and restarted ---------------------------------------------------------------------------------------------


def test_a_site_killed_after_every_step_goes_on_with_the_same_keys() -> None:
    names = _names(3)

    def killed(session: Session) -> Session:
        restarted = session_from_bytes(session.to_bytes())
        assert restarted == session
        return restarted

    sessions = {site: killed(new_session("round-1", STUDY, site, names)) for site in names}
    adverts = {site: advertise(session, _signer(site)) for site, session in sessions.items()}
    sessions = {site: killed(exchange(session, adverts, _verify)) for site, session in sessions.items()}
    run = _Exchange(sessions, adverts, roster_of("round-1", STUDY, names, adverts, _verify))
    sums = MaskedSums(run.roster, {CONTEXT: (50, 7)})
    for site in names[:2]:
        sums.add(site, CONTEXT, *run.mask(site, CONTEXT, *_words(1, site)))
        run.sessions[site] = killed(run.sessions[site])
    replies = {}
    for site in names[:2]:
        replies[site] = run.reveal(site, sums.partition())
        run.sessions[site] = killed(run.sessions[site])
        assert run.reveal(site, sums.partition()) == replies[site]
        with pytest.raises(RefusedError, match="nothing more is revealed"):
            run.reveal(site, Partition(survivors=names))
    assert np.array_equal(sums.unmask(replies)[CONTEXT][0], _plain_sum(1, names[:2])[0])


def test_a_torn_session_file_is_named_and_secrets_are_not_shown() -> None:
    session = _Exchange.begin(2).sessions["site-1"]
    whole = session.to_bytes()
    for damaged in (b"", whole[:-1], whole[:300], b"[]", b"{}", b'{"schema": 1}', whole.replace(b'"seed"', b'"need"')):
        with pytest.raises(CheckpointError, match="Delete it"):
            session_from_bytes(damaged)
    shown = repr(session)
    for secret in (session.seed, session.mask_key, session.cipher_key, session.kept):
        assert secret.hex() in whole.decode()
        assert repr(secret) not in shown
        assert secret.hex() not in shown
    public = b"".join([advertise(session, _signer("site-1")), *session.letters.values()])
    assert not any(secret in public for secret in (session.seed, session.mask_key, session.cipher_key))


def test_what_pairs_agree_on_is_worked_out_once_kept_secret_and_forgotten_at_the_end() -> None:
    run = _Exchange.begin(3)
    names = _names(3)
    for site in names:
        run.mask(site, CONTEXT, *_words(1, site))
    first, second = run.sessions["site-1"], run.sessions["site-2"]
    assert first.pairs.keys() == {"site-2", "site-3"}
    assert first.pairs["site-2"] == second.pairs["site-1"] == agree(first.mask_key, second.advert.mask_key)
    assert not any(repr(secret) in repr(first) for secret in first.pairs.values())
    assert session_from_bytes(first.to_bytes()) == first
    run.mask("site-1", OTHER, *_words(1, "site-1"))
    assert run.sessions["site-1"].pairs is first.pairs
    run.reveal("site-1", Partition(survivors=names))
    assert not run.sessions["site-1"].pairs


# --- speed ------------------------------------------------------------------------------------------------------------


def _timed(parameters: int) -> Mapping[str, float]:
    """The whole exchange over three sites, one after the other, with one drop-out; seconds per step."""
    sites, counts = _names(3), [100, 250, 50]
    weights = [
        {"w": numpy_generator(n, "speed").standard_normal(parameters, np.float32) * np.float32(0.1)} for n in counts
    ]
    layout: Layout = weights_layout(weights[0])
    spent = dict.fromkeys(("keys", "pack", "mask", "fold", "reveal", "unmask", "unpack"), 0.0)

    def clocked(step: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        spent[step] += time.perf_counter() - began
        return result

    run = clocked("keys", lambda: _Exchange.begin(3))
    sums = MaskedSums(run.roster, {CONTEXT: (parameters, 1)})
    for site, update, count in zip(sites[:2], weights, counts, strict=False):
        words = clocked("pack", lambda update=update, count=count: pack_weights(layout, update, count, 400))
        session, vectors = clocked(
            "mask",
            lambda site=site, words=words: mask(run.sessions[site], CONTEXT, words, np.zeros(1, np.uint64)),
        )
        run.sessions[site] = session
        clocked("fold", lambda site=site, vectors=vectors: sums.add(site, CONTEXT, *vectors))
    spare = clocked("pack", lambda: pack_weights(layout, weights[2], counts[2], 400))
    clocked("mask", lambda: mask(run.sessions["site-3"], CONTEXT, spare, np.zeros(1, np.uint64)))
    replies = clocked("reveal", lambda: {site: run.reveal(site, sums.partition()) for site in sites[:2]})
    words32 = clocked("unmask", lambda: sums.unmask(replies)[CONTEXT][0])
    mean = clocked("unpack", lambda: unpack_weights(layout, words32, 350, 400)["w"])
    truth = _plain_mean([w["w"] for w in weights[:2]], counts[:2])
    assert (np.abs(mean - truth) <= _weights_bound(2, 400, 350, truth)).all()
    print(f"{parameters} parameters, 3 sites, {sum(spent.values()):.2f} s:", {k: round(v, 3) for k, v in spent.items()})
    return spent


def test_a_million_parameters_take_little_time() -> None:
    assert sum(_timed(1_000_000).values()) < 5


@pytest.mark.slow
def test_fourteen_million_parameters_take_seconds() -> None:
    assert sum(_timed(14_000_000).values()) < 15
