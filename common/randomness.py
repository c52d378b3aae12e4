"""Randomness as an argument: every stream is named, none is global.

A stream's seed is the SHA-256 of the study's seed and the stream's name, for instance
``(2018, "gan", "site-1", "Normal", 7)``. So round 7 of one class at one site draws the same numbers whether the run was
unbroken, resumed, or ran in another order. Never use these for privacy noise (that must not be reproducible).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["numpy_generator", "seed_for", "torch_generator"]


def seed_for(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the stream `names` of a study with `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU torch generator for the stream `names`."""
    return torch.Generator().manual_seed(seed_for(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (PCG64) for the stream `names`."""
    return np.random.default_rng(seed_for(seed, *names))
