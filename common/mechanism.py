"""The only door through which anything computed from patients becomes public.

::

    private step: sample(patients, q) -> pick(images of each) -> clipped sum --release(sensitivity, sigma)--> optimizer, messages
                        secret                 secret               secret               public from here on

    SecretMechanism        what sites run
    RecordingMechanism     the same; keeps what it released, for xfed-audit replay
    ReplayingMechanism     answers release with what another run released: whatever still differs between two runs, leaks

Formal guarantees
- Every patient is taken with probability q (to 2^-53), independently of all others and of every earlier step (Poisson sampling).
- `release` adds normal noise of standard deviation ``sigma * sensitivity * (1 + MARGIN)`` to every entry, as `xfed.common.noise`
  does: one Gaussian mechanism over all entries of all names together. When the whole of the sums changes by at most
  `sensitivity` (L2) between neighbours, this is one `Event` with that q and sigma.
- No seed, no state: nothing can be restored, copied or sent that would repeat noise or a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xfed.common.noise import add_gaussian, grid_for, secret_words

__all__ = ["MARGIN", "Mechanism", "RecordingMechanism", "ReplayingMechanism", "SecretMechanism"]

MARGIN = 1e-4
"""Part by which the noise is larger than asked for.

It pays for the grid (1e-6), and for float32: one row more makes the others' gradients round otherwise. Measured, that is 8e-6
of the clip with 128 rows of a discriminator at 64 px, 4e-6 with 65 of a classifier.
"""

Rows = npt.NDArray[np.int64]


class Mechanism(Protocol):
    """Sampling of patients and release of noised sums."""

    def sample(self, patients: int, q: float) -> Rows:
        """Positions among 0..patients-1, ascending, each there with probability `q`; secret."""
        ...

    def pick(self, counts: Rows) -> Rows:
        """For each entry of `counts` (>= 1) a uniform number in 0..count-1; secret."""
        ...

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        """`sums` plus noise: same names, shapes and device, float32; public."""
        ...


class SecretMechanism:
    """The mechanism that sites run. It takes no seed and keeps nothing; threads may share it."""

    def sample(self, patients: int, q: float) -> Rows:
        """Positions among 0..patients-1, int64, ascending, each with probability `q`. Raises `ValueError` outside 0 < q <= 1."""
        if patients < 0:
            raise ValueError(f"patients must be 0 or more, not {patients}")
        if not 0 < q <= 1:
            raise ValueError(f"the sampling rate must be above 0 and at most 1, not {q}")
        # both sides are exact: 53-bit integers against q moved by a power of two
        uniforms = (secret_words(patients) >> np.uint64(11)).astype(np.float64)
        return np.flatnonzero(uniforms < math.ldexp(q, 53)).astype(np.int64)

    def pick(self, counts: Rows) -> Rows:
        """A number in 0..count-1 for each entry, int64, uniform to count / 2^64. Raises `ValueError` on a count below 1."""
        counts = np.asarray(counts, dtype=np.int64)
        if counts.ndim != 1 or (counts < 1).any():
            raise ValueError("every sampled patient must have at least one image")
        return (secret_words(len(counts)) % counts.astype(np.uint64)).astype(np.int64)

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        """`sums` plus normal noise of deviation ``sigma * sensitivity``; names, shapes and device stay, float32.

        `sensitivity`: what one patient changes in all sums together (L2). Raises `ValueError` when it or `sigma` is not a
        finite number above 0, `FederationError` when a sum is not finite.
        """
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a finite number above 0, not {sigma}")
        grid = grid_for(sensitivity, sum(value.numel() for value in sums.values()))
        deviation = sigma * sensitivity * (1 + MARGIN)
        noised = {}
        for name, value in sums.items():
            flat = value.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)
            result = torch.from_numpy(add_gaussian(flat, deviation=deviation, grid=grid))
            noised[name] = result.view(value.shape).to(value.device)
        return noised

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: make a new one where it is needed")


class RecordingMechanism(SecretMechanism):
    """Keeps what `release` returned, in order, in `outputs`."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        """As `SecretMechanism.release`."""
        noised = super().release(sums, sensitivity=sensitivity, sigma=sigma)
        self.outputs.append({name: value.clone() for name, value in noised.items()})
        return noised


class ReplayingMechanism(SecretMechanism):
    """Samples afresh, but `release` returns `outputs` in order, whatever the sums are."""

    def __init__(self, outputs: Iterable[Mapping[str, Tensor]]) -> None:
        self._left = iter(list(outputs))

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        """The next recorded output. Raises `ValueError` when there is none left, or when names or shapes are others."""
        recorded = next(self._left, None)
        if recorded is None:
            raise ValueError(
                "this run releases more often than the recorded one: the number of releases depends on data"
            )
        wanted = {name: value.shape for name, value in sums.items()}
        if wanted != {name: value.shape for name, value in recorded.items()}:
            raise ValueError("this run releases other sums than the recorded one: names and shapes depend on data")
        return {name: value.clone().to(sums[name].device) for name, value in recorded.items()}
