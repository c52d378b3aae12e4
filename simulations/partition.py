"""How one data set becomes several hospitals: every patient goes to one site.

::

  labels, patients --> classes of a patient --rarest--> dealt evenly, or cut by Dirichlet shares --> its site
                                                              ^                                         |
                                 sites.missing: what a site may not hold            site of each image, or -1

Formal guarantees: all images of a patient that are kept are at one site; no image of a class is at a site
that lacks it; no site is without a patient; the same arguments give the same answer. Dirichlet shares per
class: Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xfed.common.config import Sites
from xfed.common.errors import ConfigError, DataError
from xfed.common.randomness import numpy_generator

__all__ = ["assign_sites"]

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def assign_sites(
    *,
    labels: Integers,
    patients: Integers,
    classes: Sequence[str],
    sites: Sites,
    seed: int,
) -> Integers:
    """Site of each image, int64 [n] in 0..sites.count-1, or -1 where the image must be left out.

    `labels` int64 [n] are positions in `classes`; `patients` int64 [n] are any numbers. A patient counts for
    the rarest of its classes (the one with the fewest patients). `even` deals the patients of each class in
    turn, so that two sites' numbers differ by at most one (as long as no class is missing anywhere);
    `dirichlet` draws each class's shares over the sites with concentration `sites.alpha`. A patient with a
    class that its site lacks is given another site; only when no site may hold all of its classes are the
    images of the others left out (-1).

    Raises `ConfigError` when no site may hold a class or a site would be empty, `DataError` when the arrays
    disagree.
    """
    if labels.shape != patients.shape or labels.ndim != 1:
        raise DataError(f"labels {labels.shape} and patients {patients.shape} must be two lists of the same length")
    if labels.size and not (labels.min() >= 0 and labels.max() < len(classes)):
        raise DataError(
            f"a label lies outside 0..{len(classes) - 1}: labels are positions in the {len(classes)} classes"
        )
    allowed = _allowed(classes, sites)
    _, rows = np.unique(patients, return_inverse=True)
    held = np.zeros((int(rows.max()) + 1 if rows.size else 0, len(classes)), dtype=np.bool_)
    held[rows, labels] = True
    if len(held) < sites.count:
        raise ConfigError(
            f"sites.count is {sites.count} but there are {len(held)} patients: every site needs one. "
            "Lower sites.count or give more patients."
        )
    common = held.sum(axis=0)
    rarest = np.argmin(np.where(held, common, len(held) + 1), axis=1)
    # where each patient may go: all its classes if anywhere, else wherever its rarest class may be
    fits = ~np.any(held[:, None, :] & ~allowed[None, :, :], axis=2)
    fits = np.where(fits.any(axis=1, keepdims=True), fits, allowed[:, rarest].T)
    home = np.full(len(held), -1, dtype=np.int64)
    turn = 0
    for label, name in enumerate(classes):
        members = np.flatnonzero(rarest == label)
        generator = numpy_generator(seed, "sites", sites.partition, name)
        generator.shuffle(members)
        if sites.partition == "even":
            home[members] = _deal(fits[members], turn)
            turn = (turn + len(members)) % sites.count
        else:
            home[members] = _share(fits[members], allowed[:, label], sites.alpha, generator)
    _fill_empty(home, fits, sites.count)
    answer = home[rows]
    return np.where(allowed[answer, labels], answer, -1)


def _allowed(classes: Sequence[str], sites: Sites) -> Flags:
    """Which site may hold which class, bool [sites, classes]."""
    allowed = np.ones((sites.count, len(classes)), dtype=np.bool_)
    for number, names in sites.missing.items():
        if not 1 <= number <= sites.count:
            raise ConfigError(f"sites.missing: there is no site {number} among 1..{sites.count}")
        for name in names:
            if name not in classes:
                raise ConfigError(
                    f"sites.missing.{number}: unknown class {name!r}; the classes are {', '.join(classes)}"
                )
            allowed[number - 1, classes.index(name)] = False
    for label, name in enumerate(classes):
        if not allowed[:, label].any():
            raise ConfigError(
                f"sites.missing: no site may hold {name}. Leave the class to one site at least, or drop it."
            )
    return allowed


def _deal(fits: Flags, turn: int) -> Integers:
    """Deal patients in order, each to the site that fits and has the fewest so far; ties from `turn` on."""
    count = fits.shape[1]
    order = (np.arange(count) - turn) % count
    dealt = np.zeros(count, dtype=np.int64)
    home = np.empty(len(fits), dtype=np.int64)
    for patient, possible in enumerate(fits):
        site = int(np.argmin(np.where(possible, dealt * count + order, np.iinfo(np.int64).max)))
        dealt[site] += 1
        home[patient] = site
    return home


def _share(fits: Flags, allowed: Flags, alpha: float, generator: np.random.Generator) -> Integers:
    """Cut patients by Dirichlet shares over the allowed sites; one that does not fit goes where it does."""
    open_sites = np.flatnonzero(allowed)
    shares = generator.dirichlet(np.full(len(open_sites), alpha))
    if not np.isfinite(shares).all():  # alpha so small that the draw underflows: its limit is one site alone
        shares = np.eye(len(open_sites))[generator.integers(len(open_sites))]
    cuts = np.rint(np.cumsum(shares)[:-1] * len(fits)).astype(np.int64)
    home = open_sites[np.searchsorted(cuts, np.arange(len(fits)), side="right")]
    for patient in np.flatnonzero(~fits[np.arange(len(fits)), home]):
        home[patient] = generator.choice(np.flatnonzero(fits[patient]))
    return home


def _fill_empty(home: Integers, fits: Flags, count: int) -> None:
    """Give every empty site one patient of the fullest site that can spare one, in place."""
    numbers = np.bincount(home, minlength=count)
    for site in np.flatnonzero(numbers == 0):
        movable = np.flatnonzero(fits[:, site] & (numbers[home] > 1))
        if not movable.size:
            raise ConfigError(
                f"sites: no patient is left for site {site + 1}, which would be empty. "
                "Lower sites.count, change sites.missing, or give more patients."
            )
        patient = movable[np.argmax(numbers[home[movable]])]
        numbers[home[patient]] -= 1
        numbers[site] += 1
        home[patient] = site
