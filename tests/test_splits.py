from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xfed.client.splits import allot, split_patients
from xfed.common.config import Splits
from xfed.common.errors import DataError

SHARES = (0.7, 0.15, 0.15)


def split(labels: list[int], patients: list[int], seed: int = 1, n_classes: int = 5, **shares: Any) -> np.ndarray:
    return split_patients(
        labels=np.array(labels, dtype=np.int64),
        patients=np.array(patients, dtype=np.int64),
        splits=Splits(**shares),
        seed=seed,
        n_classes=n_classes,
    )


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (0, [0, 0, 0]),
        (1, [1, 0, 0]),
        (2, [2, 0, 0]),
        (3, [1, 1, 1]),
        (7, [5, 1, 1]),
        (10, [7, 2, 1]),
        (100, [70, 15, 15]),
    ],
)
def test_largest_remainder_by_hand(count: int, parts: list[int]) -> None:
    assert allot(count, SHARES) == parts


@given(count=st.integers(0, 5000), train=st.floats(0.05, 0.9), rest=st.floats(0.05, 0.95))
def test_allotment_adds_up_and_is_close(count: int, train: float, rest: float) -> None:
    shares = (train, (1 - train) * rest, (1 - train) * (1 - rest))
    parts = allot(count, shares)
    assert sum(parts) == count
    assert min(parts) >= (1 if count >= 3 else 0)
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - count * share) < 1 + 1e-6 or min(count * s for s in shares) < 1


rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), max_size=200)


@given(pairs=rows, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=150, deadline=None)
def test_a_patient_is_in_one_split_whatever_the_rows(pairs: list[tuple[int, int]], seed: int) -> None:
    labels, patients = [p[0] for p in pairs], [p[1] for p in pairs]
    chosen = split(labels, patients, seed)
    assert chosen.dtype == np.int8
    assert len(chosen) == len(pairs)
    assert set(chosen.tolist()) <= {0, 1, 2}
    for patient in set(patients):
        assert len({int(s) for s, p in zip(chosen, patients, strict=True) if p == patient}) == 1
    turned = split(labels[::-1], patients[::-1], seed)
    assert np.array_equal(turned[::-1], chosen)


@given(sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_with_one_class_per_patient_each_class_is_allotted_exactly(sizes: list[int], seed: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    chosen = split(labels, list(range(len(labels))), seed, len(sizes))
    for label, size in enumerate(sizes):
        counts = np.bincount(chosen[np.array(labels, dtype=np.int64) == label], minlength=3).tolist()
        assert counts == allot(size, SHARES)


@given(pairs=rows, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_a_class_that_is_rarest_for_three_patients_is_in_every_split(pairs: list[tuple[int, int]], seed: int) -> None:
    labels, patients = [p[0] for p in pairs], [p[1] for p in pairs]
    chosen = split(labels, patients, seed)
    held = {p: {label for label, q in pairs if q == p} for p in set(patients)}
    totals = [sum(label in classes for classes in held.values()) for label in range(5)]
    rarest = [min(classes, key=lambda label: (totals[label], label)) for classes in held.values()]
    for label in range(5):
        if rarest.count(label) >= 3:
            assert {int(s) for s, own in zip(chosen, labels, strict=True) if own == label} == {0, 1, 2}


def test_a_class_only_beside_rarer_ones_is_repaired_into_every_split() -> None:
    # class 4 has 6 patients, each of whom has a rarer class too (0, 1, 2: two patients each, so all go to training)
    labels = [0, 0, 1, 1, 2, 2] + [4] * 6
    patients = [0, 1, 2, 3, 4, 5] * 2
    for seed in range(10):
        chosen = split(labels, patients, seed)
        assert set(chosen[6:].tolist()) == {0, 1, 2}


def test_seed_matters_and_same_seed_agrees() -> None:
    labels, patients = [i % 3 for i in range(300)], list(range(300))
    assert np.array_equal(split(labels, patients, 7), split(labels, patients, 7))
    assert not np.array_equal(split(labels, patients, 7), split(labels, patients, 8))


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(DataError, match="pair up"):
        split([0, 1], [0])
    for label in (-1, 5):
        with pytest.raises(DataError, match=r"0\.\.4"):
            split([label], [0])


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    folds=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_over_all_folds_each_patient_is_tested_once(sizes: list[int], folds: int, seed: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    if not labels:
        return
    patients = list(range(len(labels)))
    tested = np.zeros(len(labels), int)
    for fold in range(folds):
        chosen = split(labels, patients, seed, folds=folds, fold=fold)
        tested += chosen == 2
        for label, size in enumerate(sizes):
            of_class = int((chosen[np.array(labels) == label] == 2).sum())
            assert of_class in (size // folds, size // folds + 1)
    assert (tested == 1).all()


def test_folds_share_the_rest_as_the_study_says() -> None:
    chosen = split([0] * 100, list(range(100)), folds=5, fold=2, train=0.6, validation=0.2, test=0.2)
    assert np.bincount(chosen).tolist() == [60, 20, 20]
    first = split([0] * 100, list(range(100)), folds=5, fold=3, train=0.6, validation=0.2, test=0.2)
    assert not ((chosen == 2) & (first == 2)).any()
    assert ((chosen == 1) != (first == 1)).any()


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (3, 3), (0, 1)])
def test_a_fold_that_there_is_not_is_refused(folds: int, fold: int) -> None:
    with pytest.raises(ValueError, match="fold"):
        Splits(folds=folds, fold=fold)
