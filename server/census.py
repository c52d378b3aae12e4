"""What the sites hold, as far as the coordinator may know: totals always, each site's own numbers only in an open study.

::

    open study:    Description of each site (counts) ----------------------> Census(totals, by site)
    secure study:  Description without counts; secure sum of the counts ---> Census(totals)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.messages import Description

__all__ = ["Census", "census_of"]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Census:
    """`counts` int64 [3, C]: images per split and class over all sites. `drawn` and `holders` int64 [C]: training images at the
    sites that train a generator of the class, and how many sites these are. `patients`: of all sites. `sites`: each
    site's own counts [3, C], empty in a secure study.
    """

    counts: Counts
    drawn: Counts
    holders: Counts
    patients: int
    sites: Mapping[str, Counts]

    def training(self, site: str | None = None) -> int:
        """Training images of one site, or of all."""
        return int((self.counts if site is None else self.sites[site])[0].sum())


def census_of(descriptions: Mapping[str, Description], classes: int, secure: bool) -> Census:
    """Add up what was described. Raises `FederationError` on counts that are none."""
    counts, drawn, holders = np.zeros((3, classes), np.int64), np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    patients = 0
    for site, description in descriptions.items():
        for name, total in (("counts", counts), ("drawn", drawn), ("holders", holders)):
            array = description.counts.get(name)
            if array is None or array.shape != total.shape or array.dtype != np.int64 or (array < 0).any():
                raise FederationError(
                    f"{site} described itself without whole numbers of images ({name}, {total.shape})"
                )
            total += array
        patients += description.patients
    sites = {} if secure else {site: each.counts["counts"] for site, each in descriptions.items()}
    return Census(counts=counts, drawn=drawn, holders=holders, patients=patients, sites=sites)
