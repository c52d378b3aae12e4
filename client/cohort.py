"""Who takes part in a private study, and as what: one class and one split for each patient, from nobody else's data.

::

    store (images, labels, patients) + declared sizes --cohort--> Cohort: rows of each training and of each test patient, by class
    studies/<study>/declared.json   patients per class as declared to everybody: fixed at the first request, never changed

The claim is about adding or removing one patient. So what happens to a patient may hang on public figures and on the
patient's own images alone: were a split dealt out over all patients, one more patient could move others between training and
test. A patient's class is the rarest one they have an image of, by *declared* sizes, and only their images of that class are
used. Their split follows from a hash of their own pixels: test with the study's share of test patients, training otherwise
(a private study scores no round, so validation patients train).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xfed.client.store import Store
from xfed.common.config import Study
from xfed.common.durable import write_json
from xfed.common.errors import DataError

__all__ = ["Cohort", "cohort", "declared_sizes"]

ROUND_TO = 10
_SCALE = float(2**64)

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """`train[c]` and `test[c]`: one array of row numbers per patient of class position c. `declared[c]`: the public size."""

    declared: tuple[int, ...]
    train: tuple[tuple[Rows, ...], ...]
    test: tuple[tuple[Rows, ...], ...]

    @property
    def total(self) -> int:
        """Declared training patients of all classes."""
        return sum(self.declared)


def _rarity(sizes: Sequence[int]) -> list[int]:
    """Class positions, rarest first; ties in the study's order."""
    return sorted(range(len(sizes)), key=lambda label: (sizes[label], label))


def _classes_of(store: Store, order: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Patients [P] and the class position of each [P]: the first of `order` that they have an image of."""
    people, position = np.unique(store.patients, return_inverse=True)
    has = np.zeros((len(people), len(store.classes)), dtype=bool)
    has[position, store.labels] = True
    return people, np.asarray(order, dtype=np.int64)[np.argmax(has[:, list(order)], axis=1)]


def _is_tested(images: npt.NDArray[np.uint8], salt: str, share: float) -> bool:
    digest = hashlib.sha256(salt.encode())
    for image in images:
        digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "big") < share * _SCALE


def cohort(store: Store, study: Study, declared: Sequence[int]) -> Cohort:
    """The patients of `store` under `declared` sizes (training patients per class position; 0: the class takes no part)."""
    order = _rarity(declared)
    people, labels = _classes_of(store, order)
    train: list[list[Rows]] = [[] for _ in store.classes]
    test: list[list[Rows]] = [[] for _ in store.classes]
    by_patient = np.argsort(store.patients, kind="stable")
    starts = np.searchsorted(store.patients[by_patient], people)
    for number, label in enumerate(labels):
        end = starts[number + 1] if number + 1 < len(people) else len(by_patient)
        rows = by_patient[starts[number] : end]
        rows = np.sort(rows[store.labels[rows] == label]).astype(np.int64)
        tested = _is_tested(store.images[rows], study.digest, study.data.splits.test)
        (test if tested else train)[label].append(rows)
    for label, size in enumerate(declared):
        if not size:
            train[label] = []
    return Cohort(declared=tuple(declared), train=tuple(map(tuple, train)), test=tuple(map(tuple, test)))


def declared_sizes(path: Path, store: Store, study: Study, wished: Mapping[str, int] | None) -> tuple[int, ...]:
    """Training patients per class as this site declares them, public from now on; kept in `path` for the whole study.

    `wished` (`declared_patients` of the policy) where it names the class, otherwise the number it has, rounded to ten: that
    rounding is disclosed, not noised. Classes below `gan.minimum_images` are declared 0. Raises `DataError`, `StorageError`.
    """
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if list(kept) != list(study.classes):
            raise DataError(f"{path} names other classes than the study; it belongs to another study")
        return tuple(int(kept[name]) for name in study.classes)
    wishes = dict(wished or {})
    held = np.array([len(np.unique(store.patients[store.labels == c])) for c in range(len(store.classes))])
    first = [wishes.get(name, _rounded(int(held[label]))) for label, name in enumerate(study.classes)]
    _, labels = _classes_of(store, _rarity(first))
    share = 1 - study.data.splits.test
    own = np.bincount(labels, minlength=len(store.classes))
    sizes = [wishes.get(name, _rounded(round(share * int(own[label])))) for label, name in enumerate(study.classes)]
    sizes = [size if size >= study.gan.minimum_images else 0 for size in sizes]
    write_json(path, dict(zip(study.classes, sizes, strict=True)))
    return tuple(sizes)


def _rounded(count: int) -> int:
    return ROUND_TO * round(count / ROUND_TO)
