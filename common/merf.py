"""DP-MERF: a site releases one noisy sum of random features per class, and G is fitted to it (Harder et al. 2021).

::

    site:  patient's images --RandomFeatures--> mean of features, norm < 1 --sum over patients--> Mechanism.release, once
    coordinator:  noisy sums of all sites / declared patients --mean_embedding--> target --fit_generator--> weights of G

The release is the only thing that reads patients; all that follows is post-processing and costs nothing more. Neither side keeps
anything on disk here: the site stores its answer before it sends it, the coordinator the fitted weights.

Features are taken of the image at every resolution from 8 px up, averaged over blocks: the coarse ones hold the anatomy in few
directions, so that they stand out of the noise, the finest ones keep G from drawing a grid that nobody asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from xfed.common.config import Study
from xfed.common.dcgan import draw_latent
from xfed.common.errors import ConfigError, FederationError
from xfed.common.gan import build_generator
from xfed.common.mechanism import Mechanism
from xfed.common.randomness import torch_generator
from xfed.common.weights import Weights, load_parameters, parameters_of

__all__ = [
    "LENGTH_SCALES",
    "Fitted",
    "RandomFeatures",
    "default_levels",
    "distance",
    "embedding_sum",
    "features_of",
    "fit_generator",
    "mean_embedding",
]

# Median distance of two phantoms (all five classes), pixels in [-1, 1] averaged over blocks to this side; the size of the
# phantom itself changes it by less than 4%. Public: no patient is in it (docs/experiments.md).
LENGTH_SCALES: Mapping[int, float] = {8: 1.89, 16: 4.95, 32: 11.3, 64: 23.7, 128: 48.0, 256: 96.4}

SENSITIVITY = 1.0
SHRINK = 1 - 1e-3  # rounding a sum over N patients to float32 moves it by 2^-23 N at most (L2): room for 8,000 patients
ROWS = 256
LOSS_EVERY = 50


class RandomFeatures:
    """phi(x) = sqrt(2 / F) [cos(w x), sin(w x)]: random Fourier features of a Gaussian kernel (Rahimi and Recht 2007).

    `features` is F, even; w ~ N(0, 1 / length^2) with length = `length_scale` times the public scale of each level in
    `levels` (sides in pixels; F is split evenly, the remainder goes to the coarsest). The inner product of two images is the
    mean over the levels of exp(-|x - y|^2 / (2 length^2)).

    Formal guarantees: |phi(x)| < 1 for every image, whatever its pixels; w depends on `seed` alone. Raises `ConfigError`.
    """

    def __init__(
        self, size: int, features: int, length_scale: float, seed: int, levels: Sequence[int] | None = None
    ) -> None:
        self.size = size
        self.features = features
        self.levels = tuple(levels) if levels is not None else default_levels(size)
        odd = [level for level in self.levels if level not in LENGTH_SCALES or level > size]
        if odd or not self.levels or len(set(self.levels)) != len(self.levels):
            raise ConfigError(
                f"levels {self.levels} of {size} px images: name sides among {sorted(LENGTH_SCALES)} once"
            )
        if features % 2 or features < 2 * len(self.levels):
            raise ConfigError(f"gan.merf.features must be even and at least {2 * len(self.levels)}, not {features}")
        if not 0 < length_scale < math.inf:
            raise ConfigError(f"gan.merf.length_scale must be above 0 and finite, not {length_scale}")
        share, rest = divmod(features // 2, len(self.levels))
        self._frequencies: list[Tensor] = []
        for position, level in enumerate(self.levels):
            rng = torch_generator(seed, "merf frequencies", level)
            drawn = torch.randn(level * level, share + (rest if position == 0 else 0), generator=rng)
            self._frequencies.append(drawn / (LENGTH_SCALES[level] * length_scale))

    def to(self, device: torch.device) -> RandomFeatures:
        """The same features, computed on `device`; changes this object and returns it."""
        self._frequencies = [w.to(device) for w in self._frequencies]
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, F] of images float32 [B, 1, S, S] in [-1, 1]. Raises `ValueError` for another shape."""
        if images.ndim != 4 or images.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"images must be [B, 1, {self.size}, {self.size}], not {list(images.shape)}")
        parts = []
        for level, w in zip(self.levels, self._frequencies, strict=True):
            pooled = avg_pool2d(images, self.size // level) if level < self.size else images
            angle = pooled.flatten(1) @ w
            parts += [angle.cos(), angle.sin()]
        return torch.cat(parts, dim=1) * (SHRINK * math.sqrt(2 / self.features))


def default_levels(size: int) -> tuple[int, ...]:
    """The sides at which images of `size` px are looked at."""
    return tuple(level for level in LENGTH_SCALES if level <= size)


def features_of(study: Study) -> RandomFeatures:
    """The study's features: the same at every site, for every class and at the coordinator."""
    merf = study.gan.merf
    return RandomFeatures(study.image_size, merf.features, merf.length_scale, study.seed)


def _pixels(images: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(images)).to(device).unsqueeze(1).float().div_(127.5).sub_(1)


@torch.no_grad()
def embedding_sum(
    images: npt.NDArray[np.uint8],
    rows_of: Sequence[npt.NDArray[np.int64]],
    features: RandomFeatures,
    mechanism: Mechanism,
    sigma: float,
) -> npt.NDArray[np.float32]:
    """Noisy sum over patients of their mean features, float32 [F]; images uint8 [n, S, S], ``rows_of[p]`` those of patient p.

    Formal guarantees: the sum before noise changes by at most 1 (L2) when a patient is added or removed, however many images
    they have (`SHRINK`: up to 8,000 patients also after rounding to float32); noise of standard deviation `sigma` is added
    to every entry; `mechanism.release` is called exactly once, also without a patient. Not covered: the number of patients,
    which the caller must not let out. Raises `ValueError` for a patient without an image.
    """
    if any(len(rows) == 0 for rows in rows_of):
        raise ValueError("a patient without an image of this class was given: leave such patients out of rows_of")
    device = features._frequencies[0].device
    total = torch.zeros(features.features, dtype=torch.float64, device=device)
    if rows_of:
        rows = np.concatenate([np.asarray(own, dtype=np.int64) for own in rows_of])
        shares = np.concatenate([np.full(len(own), 1 / len(own)) for own in rows_of])
        for start in range(0, len(rows), ROWS):
            phi = features(_pixels(images[rows[start : start + ROWS]], device))
            total += torch.from_numpy(shares[start : start + ROWS]).to(device) @ phi.double()
    released = mechanism.release({"embedding": total.float()}, sensitivity=SENSITIVITY, sigma=sigma)
    noisy: npt.NDArray[np.float32] = released["embedding"].cpu().numpy()
    return noisy


def mean_embedding(sums: Sequence[npt.NDArray[np.float32]], declared: Sequence[int]) -> npt.NDArray[np.float32]:
    """Noisy sums of all sites, added and divided by the patients that they declared in all: float32 [F].

    The divisor is public: the declared figures, never counts. Raises `FederationError` when sums and figures do not fit.
    """
    if not sums or len(sums) != len(declared) or min(declared) < 1 or len({np.shape(one) for one in sums}) != 1:
        raise FederationError(
            f"{len(sums)} embeddings of shapes {[np.shape(one) for one in sums]} and declared sizes {list(declared)} do "
            "not fit together: all sites must run one study, and declare at least one patient each"
        )
    total: npt.NDArray[np.float64] = np.sum([np.asarray(one, dtype=np.float64) for one in sums], axis=0)
    if not np.isfinite(total).all():
        raise FederationError(
            "an embedding holds a number that is not finite. Ask the sites to answer the round again."
        )
    return (total / sum(declared)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Weights of the fitted generator, and the distance |target - mean features of G|^2 (up to a constant) every 50 steps."""

    weights: Weights
    losses: tuple[float, ...]


def distance(phi: Tensor, target: Tensor) -> Tensor:
    """|target - E phi|^2 - |target|^2, without bias by the number of images; phi [B, F] of B independent images, B >= 2.

    The plain |mean phi|^2 is too large by (|phi|^2 - |E phi|^2) / B, which would teach G to draw images that are all alike
    in order to make it small. Here the B own pairs are left out (Gretton et al. 2012, lemma 6).
    """
    count = len(phi)
    total = phi.sum(0)
    pairs = (total.square().sum() - phi.square().sum()) / (count * (count - 1))
    return pairs - 2 / count * (total @ target)


def fit_generator(
    study: Study, class_name: str, target: npt.NDArray[np.float32], start: Weights, device: torch.device | None = None
) -> Fitted:
    """Fit G to `target` (float32 [F], from `mean_embedding`) from the weights `start`: post-processing, at the coordinator.

    Steps, batch and learning rate (falling to zero along a cosine) are those of ``study.gan.merf``; latents come from the
    study's seed and the class's name, so the same study and target give the same weights. Raises `FederationError` when
    the target does not fit the study, or the fit no longer is finite.
    """
    device = device or torch.device("cpu")
    merf, features = study.gan.merf, features_of(study).to(device)
    if target.shape != (merf.features,) or not np.isfinite(target).all():
        raise FederationError(
            f"{class_name}: an embedding of {target.shape} numbers does not fit gan.merf.features {merf.features}, or is "
            "not finite. All sites must run the same study."
        )
    goal = torch.from_numpy(np.array(target, dtype=np.float32)).to(device)
    generator = build_generator(study).to(device)
    load_parameters(generator, start)
    generator.train()
    rng = torch_generator(study.seed, "merf fit", class_name)
    optimizer = torch.optim.Adam(
        generator.parameters(), merf.learning_rate, betas=(study.gan.momentum, 0.999), fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, merf.steps)
    losses, kept = torch.zeros((), device=device), []
    for step in range(1, merf.steps + 1):
        phi = features(generator(draw_latent(merf.batch, study.gan.latent, rng).to(device)))
        loss = distance(phi, goal)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses += loss.detach()
        if step % LOSS_EVERY == 0 or step == merf.steps:
            kept.append(float(losses) / ((step - 1) % LOSS_EVERY + 1))
            losses.zero_()
            if not math.isfinite(kept[-1]):
                raise FederationError(
                    f"{class_name}: the fit to the embedding is no longer finite at step {step} of {merf.steps}. "
                    "Lower gan.merf.learning_rate."
                )
    return Fitted(weights=parameters_of(generator), losses=tuple(kept))
