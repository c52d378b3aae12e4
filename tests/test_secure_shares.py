"""Shamir's shares: the same as Flower's on the wire, in both directions; any threshold of them, and fewer say nothing."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from xfed.common.secure_shares import join, share_bytes, share_index, split


@given(st.binary(max_size=70), st.integers(1, 12), st.integers(0, 8), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_flower_joins_our_shares_and_we_join_flowers(
    secret: bytes, needed: int, more: int, chance: random.Random
) -> None:
    for made, joined in ((split, combine_shares), (create_shares, join), (split, join)):
        shares = made(secret, needed, needed + more)
        assert [share_index(share) for share in shares] == list(range(1, needed + more + 1))
        assert {len(share) for share in shares} == {share_bytes(len(secret))}
        assert joined(chance.sample(shares, needed)) == secret


def test_many_sites_have_indices_of_more_than_a_byte() -> None:
    secret = bytes(range(48))
    shares = split(secret, 150, 300)
    assert join(shares[150:]) == secret == combine_shares(shares[-150:])


def test_two_shares_of_three_needed_are_uniform_and_so_is_what_they_differ_by() -> None:
    def chance(seen: list[bytes]) -> float:
        bytes_seen = np.frombuffer(b"".join(seen), np.uint8)
        return float(chisquare(np.bincount(bytes_seen, minlength=256)).pvalue)

    for secret in (bytes(32), os.urandom(32)):
        pairs = [[share[4:] for share in split(secret, 3, 3)[:2]] for _ in range(500)]
        assert chance([first for first, _ in pairs]) > 1e-6
        assert chance([second for _, second in pairs]) > 1e-6
        assert chance([bytes(a ^ b for a, b in zip(*pair, strict=True)) for pair in pairs]) > 1e-6
    # the statistic sees what is not uniform: with a threshold of 1 every share is the secret itself
    assert chance([share[4:] for _ in range(500) for share in split(bytes(range(32)), 1, 2)]) < 1e-6


@pytest.mark.parametrize("needed", [0, -1, 4])
def test_impossible_thresholds_are_refused(needed: int) -> None:
    with pytest.raises(ValueError, match="of 3 shares"):
        split(b"secret", needed, 3)


def test_shares_that_do_not_belong_together_are_refused() -> None:
    one, two, three = split(b"a secret of two blocks", 3, 3)
    for wrong in ([], [one, two[:-16], three], [one[:4]], [one[:10]]):
        with pytest.raises(ValueError, match="lengths differ"):
            join(wrong)
    for wrong in ([one, one, two], [one, two, bytes(4) + three[4:]]):
        with pytest.raises(ValueError, match="each once"):
            join(wrong)
