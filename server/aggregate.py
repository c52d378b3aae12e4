"""Averaging as a running sum: replies are folded in and dropped, so memory does not grow with the number of sites.

::

    weights_1, n_1 -> add -+
    weights_2, n_2 -> add -+--> sum(n_i * w_i) in float64 --mean--> float32 (McMahan et al. 2017, Algorithm 1)

A product of a float32 and a count below 2^29 is exact in float64, and the sum carries its rounding error
beside it (Knuth's two-sum, as in Ogita, Rump and Oishi 2005), so the float32 mean has the same bits in
whatever order sites answer, and the mean of one site is that site's weights exactly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.weights import Weights

__all__ = ["RunningMean", "check_update", "moving_average"]


class RunningMean:
    """The mean of float32 weights, each counted `weight` times."""

    def __init__(self) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._errors: dict[str, npt.NDArray[np.float64]] = {}
        self.total = 0
        self.count = 0

    def add(self, weights: Weights, weight: int) -> None:
        """Fold one site in; `weight` (a count of images) is at least 1. Raises `ValueError` on 0 or other names."""
        if weight < 1:
            raise ValueError(f"a site's weight must be at least 1, not {weight}")
        if self.count and self._sums.keys() != weights.keys():
            raise ValueError("weights to average must have the same names")
        for name, value in weights.items():
            term = value.astype(np.float64)
            term *= weight
            if not self.count:
                self._sums[name] = term
                self._errors[name] = np.zeros_like(term)
                continue
            before = self._sums[name]
            after = before + term
            rounded = after - before
            self._errors[name] += (before - (after - rounded)) + (term - rounded)
            self._sums[name] = after
        self.total += weight
        self.count += 1

    def mean(self) -> dict[str, npt.NDArray[np.float32]]:
        """The weighted mean, float32. Raises `ValueError` when nothing was added."""
        if not self.count:
            raise ValueError("nothing was added to this mean")
        return {
            name: ((value + self._errors[name]) / self.total).astype(np.float32) for name, value in self._sums.items()
        }


def check_update(weights: Weights, reference: Weights, site: str) -> None:
    """Refuse an update with other names, shapes or types than `reference`, or with NaN or infinity. Raises `FederationError`."""
    if weights.keys() != reference.keys():
        raise FederationError(f"{site} sent other parameters than it was asked for; its update is left out")
    for name, value in weights.items():
        expected = reference[name]
        if value.shape != expected.shape or value.dtype != np.float32:
            raise FederationError(
                f"{site} sent {name} as {value.dtype} {value.shape}, expected float32 {expected.shape}; its update is left out"
            )
        if not np.isfinite(value).all():
            raise FederationError(
                f"{site} sent NaN or infinity in {name}: its training diverged; its update is left out"
            )


def moving_average(average: Weights, new: Weights, decay: float) -> dict[str, npt.NDArray[np.float32]]:
    """``decay * average + (1 - decay) * new``, computed in float64, stored as float32."""
    return {
        name: (decay * average[name].astype(np.float64) + (1 - decay) * value.astype(np.float64)).astype(np.float32)
        for name, value in new.items()
    }
