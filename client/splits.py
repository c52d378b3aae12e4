"""Which patients train, which choose, which judge.

::

    labels, patients --> each patient's rarest class --> seeded order within that class --> shares (largest remainder)
                                                                                            or the fold's part for the test
                                                                                     --> repair: no class without a patient

A patient is in one split only, so an image of someone the model has trained on never judges it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xfed.client.store import SPLITS
from xfed.common.config import Splits
from xfed.common.errors import DataError
from xfed.common.randomness import numpy_generator

__all__ = ["allot", "split_patients"]


def allot(count: int, shares: tuple[float, ...]) -> list[int]:
    """Divide `count` things by `shares` (summing to 1): largest remainder; none empty when count >= len(shares).

    Ties go to the earlier share. Without the last rule, each part differs from count * share by less than 1.
    """
    ideal = [count * share for share in shares]
    parts = [int(x + 1e-9) for x in ideal]
    order = sorted(range(len(shares)), key=lambda i: (-round(ideal[i] - parts[i], 9), i))
    for i in order[: count - sum(parts)]:
        parts[i] += 1
    if count >= len(shares):
        while 0 in parts:
            parts[parts.index(max(parts))] -= 1
            parts[parts.index(0)] += 1
    return parts


def split_patients(
    *,
    labels: npt.NDArray[np.int64],
    patients: npt.NDArray[np.int64],
    splits: Splits,
    seed: int,
    n_classes: int,
) -> npt.NDArray[np.int8]:
    """Split of each image, int8 [n]: 0 train, 1 validation, 2 test. Raises `DataError` on arrays that do not fit.

    `labels` [n] in 0..n_classes-1; `patients` [n] any integers.

    Formal guarantees
    -----------------
    All images of a patient are in one split. The same arguments give the same answer, whatever the order of the rows.
    A class that is the rarest class (fewest patients) of at least 3 patients has a patient in each split. So has any
    class of at least 3 patients when each patient has one class; when patients share classes that may be impossible,
    and then a greedy repair gets as many classes into each split as it can. With ``splits.folds`` = K the test splits of
    folds 0..K-1 are disjoint and hold every patient; the repair leaves them alone, so with fewer than K patients of a
    class a fold may test none of it.
    """
    if len(labels) != len(patients):
        raise DataError(f"{len(labels)} labels but {len(patients)} patients; they must pair up")
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        raise DataError(f"a label lies outside 0..{n_classes - 1}")
    people, position = np.unique(patients, return_inverse=True)
    has = np.zeros((len(people), n_classes), dtype=bool)
    has[position, labels] = True
    per_class = has.sum(axis=0)
    rarity = np.lexsort((np.arange(n_classes), per_class))  # class positions, rarest first
    rarest = rarity[np.argmax(has[:, rarity], axis=1)]
    chosen = np.zeros(len(people), dtype=np.int8)
    for label in range(n_classes):
        group = np.flatnonzero(rarest == label)
        group = group[numpy_generator(seed, "split", label).permutation(len(group))]
        group, parts = _rotated(group, splits)
        chosen[group] = np.repeat(np.arange(len(SPLITS), dtype=np.int8), parts)
    _repair(chosen, has, [int(label) for label in rarity if per_class[label] >= len(SPLITS)], bool(splits.folds))
    return chosen[position]


def _rotated(group: npt.NDArray[np.int64], splits: Splits) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The patients of a class in the order train, validation, test, and how many go to each."""
    if not splits.folds:
        return group, allot(len(group), (splits.train, splits.validation, splits.test))
    first, end = (fold * len(group) // splits.folds for fold in (splits.fold, splits.fold + 1))
    rest = splits.train + splits.validation
    taught = allot(len(group) - (end - first), (splits.train / rest, splits.validation / rest))
    return np.roll(group, -end), [*taught, end - first]


def _repair(
    chosen: npt.NDArray[np.int8], has: npt.NDArray[np.bool_], wanted: list[int], keep_test: bool = False
) -> None:
    """Move single patients, in place, while a class misses a split and no other class pays with its last patient.

    `keep_test`: nobody enters or leaves the test split.
    """
    for label in wanted:
        for target in range(len(SPLITS) - keep_test):
            counts = np.stack([has[chosen == s].sum(axis=0) for s in range(len(SPLITS))])
            if counts[target, label]:
                continue
            donors = np.flatnonzero(has[:, label] & ~(keep_test & (chosen == len(SPLITS) - 1)))
            donors = donors[np.argsort(-counts[chosen[donors], label], kind="stable")]
            for donor in donors:
                others = [c for c in wanted if has[donor, c]]
                if all(counts[chosen[donor], c] > 1 or (counts[target, c] == 0 and c != label) for c in others):
                    chosen[donor] = target
                    break
