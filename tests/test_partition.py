"""Guarantees of xfed.simulations.partition: one test or property for each sentence of its docstring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xfed.common.config import Sites
from xfed.common.errors import ConfigError, DataError
from xfed.simulations.partition import assign_sites

CLASSES = ("A", "B", "C")


def cohort(counts: dict[str, int], images: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """`images` images of each of the given numbers of patients, one class per patient, in mixed order."""
    labels = np.repeat([CLASSES.index(name) for name, n in counts.items() for _ in range(n)], images)
    patients = np.repeat(np.arange(sum(counts.values())) * 7 + 3, images)
    order = np.random.default_rng(0).permutation(len(labels))
    return labels[order].astype(np.int64), patients[order].astype(np.int64)


def assign(labels: np.ndarray, patients: np.ndarray, seed: int = 1, **fields: Any) -> np.ndarray:
    return assign_sites(labels=labels, patients=patients, classes=CLASSES, sites=Sites(**fields), seed=seed)


def patients_per_site(home: np.ndarray, labels: np.ndarray, patients: np.ndarray, sites: int) -> np.ndarray:
    table = np.zeros((sites, len(CLASSES)), dtype=int)
    for site in range(sites):
        for label in range(len(CLASSES)):
            table[site, label] = len(np.unique(patients[(home == site) & (labels == label)]))
    return table


@pytest.mark.parametrize("sites", [1, 2, 3, 7])
def test_even_numbers_differ_by_at_most_one(sites: int) -> None:
    labels, patients = cohort({"A": 31, "B": 8, "C": 13})
    home = assign(labels, patients, count=sites)
    table = patients_per_site(home, labels, patients, sites)
    assert table.sum(axis=0).tolist() == [31, 8, 13]
    assert (np.ptp(table, axis=0) <= 1).all()
    assert np.ptp(table.sum(axis=1)) <= 1  # the turn goes on from class to class, so totals are even too


def test_even_shuffles_by_seed() -> None:
    labels, patients = cohort({"A": 40, "B": 40})
    first, again, other = (assign(labels, patients, seed=s, count=4) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.corrcoef(first, patients)[0, 1] ** 2 < 0.1  # not dealt in the order of their numbers


def test_patient_with_two_classes_counts_for_the_rarer_one() -> None:
    # 12 patients of A; 4 of them also have an image of the rare B: those four are dealt one to each site
    labels = np.array([0] * 12 + [1] * 4)
    patients = np.array([*range(12), *range(4)])
    home = assign(labels, patients, count=4)
    assert sorted(home[12:].tolist()) == [0, 1, 2, 3]
    assert np.array_equal(home[:4], home[12:])


def test_missing_class_is_missing_and_its_patients_are_elsewhere() -> None:
    labels, patients = cohort({"A": 30, "B": 12, "C": 9})
    for partition in ("even", "dirichlet"):
        home = assign(labels, patients, count=3, partition=partition, missing={2: ("B", "C")})
        table = patients_per_site(home, labels, patients, 3)
        assert table[1, 1:].tolist() == [0, 0]
        assert table.sum(axis=0).tolist() == [30, 12, 9]
        assert (home >= 0).all()
    even = patients_per_site(assign(labels, patients, count=3, missing={2: ("B",)}), labels, patients, 3)
    assert even[:, 1].tolist() == [6, 0, 6]


def test_patient_of_two_classes_goes_where_both_may_be() -> None:
    # ten patients with A and B, twenty with A, twenty with B; only site 3 may hold both classes
    labels = np.array([0, 1] * 10 + [0] * 20 + [1] * 20)
    patients = np.array([k for k in range(10) for _ in range(2)] + list(range(10, 50)))
    for partition in ("even", "dirichlet"):
        for seed in range(10):
            home = assign(labels, patients, seed, count=3, partition=partition, missing={1: ("A",), 2: ("B",)})
            assert (home[:20] == 2).all()
            assert (home >= 0).all()
            assert not (home[labels == 0] == 0).any()
            assert not (home[labels == 1] == 1).any()


def test_images_are_left_out_only_when_no_site_may_hold_all_classes() -> None:
    labels = np.array([0, 1, 0, 0, 1, 1])  # patient 0 has A and B, and no site may hold both
    patients = np.array([0, 0, 1, 2, 3, 4])
    home = assign(labels, patients, count=2, missing={1: ("A",), 2: ("B",)})
    assert (home[2:] == [1, 1, 0, 0]).all()
    assert sorted((home[:2] >= 0).tolist()) == [False, True]


def test_dirichlet_shares_have_the_variance_of_a_dirichlet() -> None:
    # Var(share) = (1/S)(1 - 1/S) / (S alpha + 1); alpha = 1 and 0.5 must be told apart
    labels, patients = cohort({"A": 200, "B": 200}, images=1)
    for alpha, wrong in ((1.0, 0.5), (0.5, 1.0)):
        shares = [
            np.bincount(
                assign(labels, patients, s, count=3, partition="dirichlet", alpha=alpha)[labels == 0], minlength=3
            )
            / 200
            for s in range(150)
        ]
        spread = float(np.square(np.array(shares) - 1 / 3).mean())
        expected, refused = ((2 / 9) / (3 * a + 1) for a in (alpha, wrong))
        assert spread == pytest.approx(expected, rel=0.2)
        assert spread != pytest.approx(refused, rel=0.2)


def test_smaller_alpha_is_more_skewed() -> None:
    labels, patients = cohort({"A": 60, "B": 60, "C": 60}, images=1)

    def skew(alpha: float) -> float:
        tables = [
            patients_per_site(
                assign(labels, patients, s, count=4, partition="dirichlet", alpha=alpha), labels, patients, 4
            )
            for s in range(20)
        ]
        return float(np.mean([t.std(axis=0).mean() for t in tables]))

    assert skew(0.05) > 1.3 * skew(1.0) > 1.3 * 1.3 * skew(100.0)


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e-3, 0.05])
def test_no_site_is_empty_even_at_tiny_alpha(alpha: float) -> None:
    labels, patients = cohort({"A": 5, "B": 5, "C": 5})
    for seed in range(10):
        home = assign(labels, patients, seed, count=9, partition="dirichlet", alpha=alpha)
        assert set(home.tolist()) == set(range(9))


def test_impossible_demands_are_refused_with_what_to_do() -> None:
    labels, patients = cohort({"A": 3, "B": 3})
    with pytest.raises(ConfigError, match="no site may hold B"):
        assign(labels, patients, count=2, missing={1: ("B",), 2: ("B",)})
    with pytest.raises(ConfigError, match=r"sites\.count is 7 but there are 6 patients"):
        assign(labels, patients, count=7)
    with pytest.raises(ConfigError, match="site 1, which would be empty"):
        assign(labels, patients, count=2, missing={1: ("A", "B", "C")})
    with pytest.raises(ConfigError, match="there is no site 3"):
        assign(labels, patients, count=2, missing={3: ("A",)})
    with pytest.raises(ConfigError, match="unknown class 'Z'"):
        assign(labels, patients, count=2, missing={1: ("Z",)})
    with pytest.raises(DataError, match="same length"):
        assign(labels[1:], patients, count=2)
    with pytest.raises(DataError, match=r"outside 0\.\.2"):
        assign(labels + 3, patients, count=2)
    with pytest.raises(ConfigError, match="0 patients"):
        assign(labels[:0], patients[:0], count=1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Sites, int]:
    n = draw(st.integers(1, 60))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    patients = draw(st.lists(st.integers(-3, 25), min_size=n, max_size=n))
    count = draw(st.integers(1, 5))
    missing = draw(
        st.dictionaries(
            st.integers(1, count),
            st.lists(st.sampled_from(CLASSES), unique=True, max_size=2).map(tuple),
            max_size=count,
        )
    )
    sites = Sites(
        count=count,
        partition=draw(st.sampled_from(["even", "dirichlet"])),
        alpha=draw(st.sampled_from([0.01, 0.5, 50.0])),
        missing=missing,
    )
    return np.array(labels), np.array(patients), sites, draw(st.integers(0, 2**31 - 1))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_guarantees_hold_for_any_cohort(case: tuple[np.ndarray, np.ndarray, Sites, int]) -> None:
    labels, patients, sites, seed = case

    def once(names: np.ndarray) -> np.ndarray:
        return assign_sites(labels=labels, patients=names, classes=CLASSES, sites=sites, seed=seed)

    try:
        home = once(patients)
    except ConfigError:
        assert sites.missing or len(np.unique(patients)) < sites.count
        return
    assert home.dtype == np.int64
    assert home.shape == labels.shape
    assert home.min() >= -1
    assert set(range(sites.count)) <= set(home.tolist())  # no site is empty
    lacks = {(number - 1, CLASSES.index(name)) for number, names in sites.missing.items() for name in names}
    assert not lacks & set(zip(home.tolist(), labels.tolist(), strict=True))
    for patient in np.unique(patients):
        mine = patients == patient
        assert len(set(home[mine].tolist()) - {-1}) == 1  # one site, and never wholly dropped
        somewhere = any(all((s, k) not in lacks for k in labels[mine].tolist()) for s in range(sites.count))
        assert (home[mine] >= 0).all() or not somewhere
    assert np.array_equal(home, once(patients))
    assert np.array_equal(home, once(patients * 3 + 11))  # names of patients do not matter, only their order
