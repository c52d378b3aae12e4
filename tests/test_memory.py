"""The coordinator's memory does not grow with the number of hospitals, and the measurement would show it if it did."""

from __future__ import annotations

import pytest

from xfed.simulations.benchmarks.memory import Footprint, measure

FLAT = 1.15


def _least(sites: int, grid: str, rounds: int = 3) -> Footprint:
    """The smaller of two peaks: what the allocator and the cycle collector add by chance only ever adds."""
    return min((measure(sites, grid=grid, rounds=rounds) for _ in range(2)), key=lambda footprint: footprint.added_mib)


@pytest.fixture(scope="module")
def many() -> Footprint:
    return _least(32, "remote")


def test_peak_is_flat_in_the_number_of_sites(many: Footprint) -> None:
    few = _least(2, "remote")
    assert few.added_mib > few.model_mib, "the baseline was taken too late: the rounds must add at least a model"
    assert many.added_mib <= FLAT * few.added_mib, (few, many)


def test_keeping_all_replies_would_be_seen(many: Footprint) -> None:
    collected = measure(32, grid="remote", rounds=1, collect=True)
    assert collected.added_mib > many.added_mib + 0.7 * 32 * many.model_mib
    assert collected.peak_mib > FLAT * many.peak_mib


def test_simulated_sites_are_flat_once_the_pipeline_is_full() -> None:
    some, more = (_least(sites, "local", rounds=2) for sites in (8, 32))
    assert more.added_mib <= FLAT * some.added_mib, (some, more)
    assert more.peak_mib <= FLAT * some.peak_mib, (some, more)
