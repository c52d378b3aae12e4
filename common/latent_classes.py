"""Labels for a generator that knows none: latents moved, or picked, until a classifier sees what is wanted in the image.

::

    z0 of the prior --> G --> image --> classifier --> log p(target) --gradient on z--> Adam, back to the prior --> ...
                                                        p >= threshold: accepted       steps used up: rejected
    z  of the prior --> G --> image --> classifier --> p >= threshold: accepted, else rejected      (the baseline: no gradient)
    both --> Sampled: latents, accepted, probability, steps, time, yield

Latent class optimisation is of Segal et al. 2021 (arXiv 2010.03975): one generator of all images, labels afterwards, several
findings at once. Left alone, the ascent ends where the classifier is fooled and the image is none of the prior any more: so each
latent is held near its start and on its prior.

What stays to be judged: the classifier that steers cannot say how good its own result is. Ask another one, which was trained
apart. A steering classifier that has seen patients without privacy puts them into the archive's labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xfed.common.errors import DataError

__all__ = [
    "Sampled",
    "Steering",
    "as_pixels",
    "gather_accepted",
    "join_sampled",
    "log_probability",
    "optimise_latents",
    "project",
    "reject_latents",
    "target_row",
]

Network = Callable[[Tensor], Tensor]
Head = Literal["softmax", "sigmoid"]
Prior = Literal["sphere", "normal", "uniform"]
BETAS = (0.9, 0.999)
EPSILON = 1e-8
SHELL = 1.5  # a normal vector's length leaves sqrt(L) +- 1.5 with a probability of about 3 %


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How latents are moved and when they are accepted.

    `threshold`: accepted at this probability of the whole target; a classifier trained with label smoothing never says 1, which
    bounds it. `steps`: most moves of one latent. `rate`: Adam's. `proximity`: weight of |z - z0|^2, summed over
    the latent's numbers; more keeps it nearer to its start, and accepts fewer (docs/experiments.md). `prior`: what `project`
    returns to. `batch`: latents at once. Raises `ValueError` where a value is outside its range.
    """

    threshold: float = 0.9
    steps: int = 100
    rate: float = 0.05
    proximity: float = 0.01
    prior: Prior = "sphere"
    head: Head = "softmax"
    batch: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be above 0 and below 1, not {self.threshold}")
        if self.steps < 0 or self.batch < 1:
            raise ValueError(f"steps must be 0 or more and batch 1 or more, not {self.steps} and {self.batch}")
        if not 0 < self.rate < math.inf or not 0 <= self.proximity < math.inf:
            raise ValueError(
                f"rate must be above 0 and proximity 0 or more, finite, not {self.rate} and {self.proximity}"
            )
        if self.prior not in ("sphere", "normal", "uniform") or self.head not in ("softmax", "sigmoid"):
            raise ValueError(f"there is no prior {self.prior!r}, or no head {self.head!r}")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What became of N latents: all of them, in their order, whichever way they were sought.

    `latents` float32 [N, L]; `accepted` bool [N]; `probability` float32 [N] of the whole target, as the classifier last saw it;
    `steps` int64 [N], moves made; `drift` float32 [N], root mean square of z - z0; `seconds` of wall clock; `looks`: images
    that were drawn and classified.
    """

    latents: Tensor
    accepted: Tensor
    probability: Tensor
    steps: Tensor
    drift: Tensor
    seconds: float
    looks: int

    @property
    def share(self) -> float:
        """Yield: accepted latents per latent tried, 0..1 (0 where none was tried)."""
        return float(self.accepted.float().mean()) if len(self.accepted) else 0.0

    @property
    def seconds_each(self) -> float:
        """Wall-clock seconds per accepted latent; infinite where there is none."""
        return self.seconds / count if (count := int(self.accepted.sum())) else math.inf

    def facts(self) -> dict[str, Any]:
        """Plain values for an archive's metadata."""
        count = int(self.accepted.sum())
        kept = self.accepted if count else torch.zeros_like(self.accepted)
        return {
            "tried": len(self.accepted),
            "seconds": self.seconds,
            "accepted": count,
            "rejected_share": 1 - self.share,
            "looks_per_accepted": self.looks / count if count else None,
            "seconds_per_accepted": self.seconds_each if count else None,
            "mean_steps": float(self.steps[kept].float().mean()) if count else None,
            "mean_drift": float(self.drift[kept].mean()) if count else None,
        }


def target_row(classes: Sequence[str], wanted: Mapping[str, bool]) -> Tensor:
    """What is wanted, float32 [C]: 1 for a finding that shall be there, 0 for one that shall not, NaN where it does not matter.

    Raises `ValueError` for a name that is not a class, or when nothing is wanted.
    """
    odd = [name for name in wanted if name not in classes]
    if odd or not wanted:
        raise ValueError(f"name findings among {', '.join(classes)}, at least one; {odd} are not among them")
    return torch.tensor([float(wanted[name]) if name in wanted else math.nan for name in classes])


def log_probability(logits: Tensor, target: Tensor, head: Head) -> Tensor:
    """log p(target) of each row, float32 [B], natural log; `logits` [B, C], `target` [C] or [B, C] as of `target_row`.

    "sigmoid": findings are independent given the image, as such a head was trained: the sum of their logs.

    "softmax": classes exclude each other. With one finding wanted it is the class's probability, exactly; what is not wanted is
    against it, whether named or not. With several it is an approximation, and no probability that the head was trained for: each
    wanted class against all classes that are not wanted (one against the rest, the other wanted ones left out, which would
    otherwise hold each other at a half), multiplied as if independent. Raises `ValueError` where nothing, or all, is wanted.
    """
    logits = logits.float()
    target = target.to(logits.device).expand_as(logits)
    wanted = target == 1
    if head == "sigmoid":
        signed = torch.where(wanted, logits, -logits)
        return torch.where(target.isnan(), 0.0, logsigmoid(signed)).sum(dim=1)
    if not bool(wanted.any(dim=1).all()) or bool(wanted.all(dim=1).any()):
        raise ValueError("with a softmax head, at least one class must be wanted, and at least one not")
    against = logits.masked_fill(wanted, -math.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(wanted, logsigmoid(logits - against), 0.0).sum(dim=1)


def project(z: Tensor, prior: Prior) -> Tensor:
    """The point of the prior's support that is nearest to each row of `z` [B, L].

    "sphere": length sqrt(L). "normal": length within sqrt(L) +- 1.5, where nearly all the mass is. "uniform": clamped to [-1, 1].
    """
    if prior == "uniform":
        return z.clamp(-1, 1)
    radius = math.sqrt(z.shape[1])
    length: Tensor = z.square().sum(dim=1, keepdim=True).sqrt().clamp(min=EPSILON)
    slack = 0.0 if prior == "sphere" else SHELL
    return z * (length.clamp(radius - slack, radius + slack) / length)


def as_pixels(images: Tensor) -> Tensor:
    """Images in about [-1, 1] as 8 bits would keep them; gradients pass through unchanged (straight-through).

    So the classifier looks at the very picture that the archive will hold.
    """
    kept = images.detach().add(1).mul(127.5).round().clamp(0, 255).div(127.5).sub(1)
    return images + (kept - images.detach())


@dataclass
class _Search:
    """The state of all latents of one search, row by row, so that any rows can be worked on together."""

    start: Tensor
    target: Tensor
    settings: Steering

    def __post_init__(self) -> None:
        count = len(self.start)
        device = self.start.device
        self.z = self.start.clone()
        self.first, self.second = torch.zeros_like(self.z), torch.zeros_like(self.z)
        self.accepted = torch.zeros(count, dtype=torch.bool, device=device)
        self.open = torch.ones(count, dtype=torch.bool, device=device)
        self.probability = torch.zeros(count, device=device)
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        self.looks = 0
        self.began = time.perf_counter()

    def next_rows(self) -> Tensor:
        return self.open.nonzero().squeeze(1)[: self.settings.batch]

    def judge(self, rows: Tensor, log_p: Tensor) -> Tensor:
        """Note what the classifier saw; returns which of `rows`, bool, may still move."""
        if not bool(log_p.isfinite().all()):
            raise DataError("the steering classifier's answer is not a finite number: the generator or it has diverged")
        self.looks += len(rows)
        self.probability[rows] = log_p.detach().exp()
        self.accepted[rows] = self.probability[rows] >= self.settings.threshold
        moving = ~self.accepted[rows] & (self.steps[rows] < self.settings.steps)
        self.open[rows] = moving
        return moving

    def move(self, rows: Tensor, slope: Tensor) -> None:
        """One Adam step of each row against `slope` [rows, L] and the pull to its start, then back to the prior."""
        slope = slope + 2 * self.settings.proximity * (self.z[rows] - self.start[rows])
        self.steps[rows] += 1
        age = self.steps[rows].unsqueeze(1)
        self.first[rows] = BETAS[0] * self.first[rows] + (1 - BETAS[0]) * slope
        self.second[rows] = BETAS[1] * self.second[rows] + (1 - BETAS[1]) * slope.square()
        mean = self.first[rows] / (1 - BETAS[0] ** age)
        spread = (self.second[rows] / (1 - BETAS[1] ** age)).sqrt()
        self.z[rows] = project(self.z[rows] - self.settings.rate * mean / (spread + EPSILON), self.settings.prior)

    def result(self) -> Sampled:
        return Sampled(
            latents=self.z.cpu(),
            accepted=self.accepted.cpu(),
            probability=self.probability.cpu(),
            steps=self.steps.cpu(),
            drift=(self.z - self.start).square().mean(dim=1).sqrt().cpu(),
            seconds=time.perf_counter() - self.began,
            looks=self.looks,
        )


def _search(z: Tensor, target: Tensor, settings: Steering) -> _Search:
    if z.ndim != 2 or target.ndim not in (1, 2) or (target.ndim == 2 and len(target) != len(z)):
        raise ValueError(
            f"latents must be [N, L] and the target [C] or [N, C], not {list(z.shape)} and {list(target.shape)}"
        )
    return _Search(z.detach().float(), target.expand(len(z), target.shape[-1]).to(z.device), settings)


def optimise_latents(
    generator_fn: Network, classifier_fn: Network, z0: Tensor, target: Tensor, settings: Steering | None = None
) -> Sampled:
    """Move each of the latents `z0` float32 [N, L] until the classifier sees `target` in its image, or its steps are used up.

    `generator_fn` maps latents to images, `classifier_fn` images to logits [B, C]; both must treat rows apart and be
    differentiable. `target` is [C], or [N, C] for a target of each latent's own. Runs on the device of `z0`. Raises `DataError`
    when the classifier's answer is not finite.

    Guarantees: a latent that is accepted at once is not moved; each row's way does not depend on the other rows; every latent
    returned that was moved is on the prior's support; at most ``settings.steps + 1`` images are drawn of one latent.
    """
    settings = settings or Steering()
    search = _search(z0, target, settings)
    while len(rows := search.next_rows()):
        z = search.z[rows].requires_grad_(True)
        with torch.enable_grad():
            log_p = log_probability(classifier_fn(generator_fn(z)), search.target[rows], settings.head)
        moving = search.judge(rows, log_p)
        if bool(moving.any()):
            (slope,) = torch.autograd.grad(-log_p[moving].sum(), z)
            search.move(rows[moving], slope[moving])
    return search.result()


@torch.no_grad()
def reject_latents(
    generator_fn: Network, classifier_fn: Network, z: Tensor, target: Tensor, settings: Steering | None = None
) -> Sampled:
    """The baseline: look at each latent once and accept those in whose image the classifier sees `target`.

    Arguments and errors as of `optimise_latents`; only threshold, head and batch of `settings` are used.
    """
    settings = settings or Steering()
    search = _search(z, target, settings)
    while len(rows := search.next_rows()):
        log_p = log_probability(classifier_fn(generator_fn(search.z[rows])), search.target[rows], settings.head)
        search.judge(rows, log_p)
        search.open[rows] = False
    return search.result()


def gather_accepted(
    sample: Callable[[Tensor], Sampled], draw: Callable[[int], Tensor], *, count: int, limit: int, block: int = 256
) -> Sampled:
    """Blocks of new latents from ``draw(n)`` through `sample` until `count` are accepted or `limit` were tried, joined.

    There may be a few more than `count`, and there are fewer where `limit` came first: look at `accepted`.
    """
    parts: list[Sampled] = []
    tried = found = 0
    while (found < count or not parts) and tried < limit:
        part = sample(draw(min(block, limit - tried)))
        tried, found = tried + len(part.accepted), found + int(part.accepted.sum())
        parts.append(part)
    if not parts:
        raise ValueError(f"count and limit must be 1 or more, not {count} and {limit}")
    return join_sampled(parts)


def join_sampled(parts: Sequence[Sampled]) -> Sampled:
    """What became of several blocks of latents, one after the other, as of one. Raises `ValueError` where there is none."""
    if not parts:
        raise ValueError("there is nothing to join")

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Sampled(
        latents=joined("latents"),
        accepted=joined("accepted"),
        probability=joined("probability"),
        steps=joined("steps"),
        drift=joined("drift"),
        seconds=sum(part.seconds for part in parts),
        looks=sum(part.looks for part in parts),
    )
