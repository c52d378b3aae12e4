"""One site's share of one round of GAN training for one class, differentially private for every patient.

::

    patients --Mechanism.sample, pick--> one image each --+
    G(z), always B of them -------------------------------+--> clipped_sum --Mechanism.release, once--> / 2B --> Adam on D
                                                                                  (noise: from here on all is public)
    every k-th D step: z --> G --> D, frozen --> Adam on G            k from Ladder, which sees fakes only
    site's disk: D, both Adams, Ladder  <--- {**GanState.arrays(), **Ladder.as_arrays()} --->  stay at the site

The rules for D are measured ones (docs/experiments.md): fakes carry no patient, but they are clipped row by row like the reals,
or the clipped reals would be swamped; their number is a constant, never the length of the draw.

Two streams of random numbers: `rng` is public and gives latents and the augmentation of fakes, always the same amount; a second,
seeded by the mechanism's secret randomness once per round, augments the reals. Were they one stream, a draw longer by one
patient would shift every later latent, and the images that G is trained on would tell of that patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from xfed.common.config import Gan
from xfed.common.dcgan import draw_latent
from xfed.common.diffaugment import differentiable_augment
from xfed.common.gan import GanLosses, GanState
from xfed.common.mechanism import Mechanism
from xfed.common.per_patient import ClippedSum, check_private, clipped_sum

__all__ = [
    "Ladder",
    "PrivateStep",
    "check_rows",
    "draw_rows_of_patients",
    "private_update",
    "secret_generator",
    "train_private_gan_round",
]

Rows = npt.NDArray[np.int64]

RUNGS = (1, 2, 5, 10, 20, 50)
DECAY = 0.99
GRACE = 200
STRUGGLING = 0.6
PHYSICAL = (
    3  # rows of one pass, in units of the public batch: a Poisson draw of reals and as many fakes nearly always fit
)
SEED_RANGE = 2**62


@dataclass(frozen=True, kw_only=True)
class PrivateStep:
    """One noisy step: patients taken with probability `q`, noise of deviation ``sigma * clip``, a public batch `expected`.

    `expected` (B) sets the number of fakes and the divisor. It is declared, and never follows from the patients at hand. Raises
    `ValueError` where a value is outside its range.
    """

    q: float
    sigma: float
    clip: float
    expected: int

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise ValueError(f"the sampling rate q must be above 0 and at most 1, not {self.q}")
        for name in ("sigma", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, not {getattr(self, name)}")
        if type(self.expected) is not int or self.expected < 1:
            raise ValueError(f"the expected batch must be a whole number, 1 or more, not {self.expected!r}")


class Ladder:
    """How many D steps make one G step: a fixed number, or adaptive (Bie, Kamath, Zhang 2023).

    Adaptive: 1, 2, 5, 10, 20, 50. The next rung is taken when D's accuracy on fakes (moving average, decay 0.99 per G step)
    is 0.6 or less after 200 or more G steps at this one. Formal guarantee: nothing but fakes and the number of steps is
    ever given to it, so it is post-processing.
    """

    def __init__(self, d_steps: Literal["adaptive"] | int) -> None:
        if d_steps != "adaptive" and (type(d_steps) is not int or d_steps < 1):
            raise ValueError(f"d_steps must be adaptive or a whole number, 1 or more, not {d_steps!r}")
        self._fixed = None if d_steps == "adaptive" else int(d_steps)
        self._rung = 0
        self._g_steps = 0
        self._accuracy = 1.0
        self._waiting = 0

    @property
    def d_steps(self) -> int:
        """D steps per G step at present."""
        return RUNGS[self._rung] if self._fixed is None else self._fixed

    def generator_is_due(self) -> bool:
        """Count one D step; whether a G step follows it."""
        self._waiting += 1
        if self._waiting < self.d_steps:
            return False
        self._waiting = 0
        return True

    def after_generator_step(self, accuracy: float) -> None:
        """Note D's accuracy on the fakes of a G step, 0 to 1, and climb where it is time to."""
        # float32 throughout: a ladder read back from disk goes on with the same bits
        self._accuracy = float(np.float32(DECAY * self._accuracy + (1 - DECAY) * accuracy))
        self._g_steps = min(self._g_steps + 1, 2**24)
        if self._rung + 1 < len(RUNGS) and self._g_steps >= GRACE and self._accuracy <= STRUGGLING:
            self._rung, self._g_steps, self._accuracy = self._rung + 1, 0, 1.0

    def as_arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What must survive between rounds, as one array for the site's saved state."""
        values = (self._rung, self._g_steps, self._accuracy, self._waiting)
        return {"ladder/state": np.array(values, dtype=np.float32)}

    @classmethod
    def from_arrays(cls, d_steps: Literal["adaptive"] | int, saved: Mapping[str, npt.NDArray[Any]]) -> Ladder:
        """The inverse of `as_arrays`; a new ladder where `saved` has none. Raises `ValueError` on values that cannot be."""
        ladder = cls(d_steps)
        if "ladder/state" in saved:
            rung, g_steps, accuracy, waiting = (float(value) for value in saved["ladder/state"])
            if rung not in range(len(RUNGS)) or g_steps < 0 or waiting < 0 or not 0 <= accuracy <= 1:
                raise ValueError(f"the saved ladder {saved['ladder/state']} is not one")
            ladder._rung, ladder._g_steps, ladder._accuracy, ladder._waiting = (
                int(rung),
                int(g_steps),
                accuracy,
                int(waiting),
            )
        return ladder


def check_rows(rows_of: Sequence[Rows]) -> None:
    """Every patient has an image, and no image belongs to two patients. Raises `ValueError`."""
    if any(len(rows) == 0 for rows in rows_of):
        raise ValueError("a patient without an image was given: leave such patients out of rows_of")
    together = np.concatenate(rows_of) if rows_of else np.zeros(0, dtype=np.int64)
    if len(np.unique(together)) != len(together):
        raise ValueError("an image belongs to two patients, or to one twice: one of them could count twice in a step")


def draw_rows_of_patients(rows_of: Sequence[Rows], q: float, mechanism: Mechanism) -> Rows:
    """Rows int64 of one Poisson draw: each patient with probability `q`, one of their images at random; secret."""
    patients = mechanism.sample(len(rows_of), q)
    chosen = [rows_of[patient] for patient in patients]
    picks = mechanism.pick(np.array([len(rows) for rows in chosen], dtype=np.int64))
    return np.array([rows[pick] for rows, pick in zip(chosen, picks, strict=True)], dtype=np.int64)


def secret_generator(mechanism: Mechanism) -> torch.Generator:
    """A CPU generator for what is done to real images, seeded from the mechanism's secret randomness."""
    return torch.Generator().manual_seed(int(mechanism.pick(np.array([SEED_RANGE]))[0]))


def private_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    losses: Callable[[slice], Callable[[Tensor], Tensor]],
    *,
    step: PrivateStep,
    divisor: int,
    rows_at_once: int,
    mechanism: Mechanism,
    clip_and_sum: ClippedSum,
) -> None:
    """One noisy optimizer step on `inputs` [n, ...], n may be 0; ``losses(part)`` gives the losses of those rows' outputs.

    Formal guarantees: each row's gradient is clipped to ``step.clip``, however many passes the rows take; `mechanism.release` is
    called exactly once; the gradient is divided by the public `divisor`.
    """
    sums: dict[str, Tensor] = {}
    for start in range(0, max(1, len(inputs)), rows_at_once):
        part = slice(start, min(start + rows_at_once, len(inputs)))
        for name, value in clip_and_sum(model, inputs[part], losses(part), step.clip).items():
            sums[name] = sums[name] + value if name in sums else value
    released = mechanism.release(sums, sensitivity=step.clip, sigma=step.sigma)
    for name, parameter in model.named_parameters():
        # the layout of the parameter: fused Adam walks both in the order of memory
        gradient = torch.empty_like(parameter, memory_format=torch.preserve_format)
        parameter.grad = gradient.copy_(released[name]).div_(divisor)
    optimizer.step()


def train_private_gan_round(
    state: GanState,
    images: npt.NDArray[np.uint8],
    rows_of: Sequence[Rows],
    settings: Gan,
    step: PrivateStep,
    mechanism: Mechanism,
    rng: torch.Generator,
    engine: str,
    ladder: Ladder,
) -> GanLosses:
    """Train ``settings.steps_per_round`` noisy D steps, and the G steps that `ladder` asks for; both change in place.

    `images` uint8 [n, S, S]; ``rows_of[p]`` are the rows of patient p in this class; `engine` as `clipped_sum` takes it.

    Formal guarantees (unit: patient, add or remove; a patient is in the `rows_of` of one class only, which the caller keeps):
    - exactly ``settings.steps_per_round`` calls of `mechanism.release`, each a Gaussian mechanism on a Poisson sample
      (q, sigma, clip), also where no patient was drawn, or none is there;
    - G, D, both optimizers, `ladder` and the losses are functions of the released sums, `rng` and public settings only;
    - the losses are means over fakes of G steps (natural log units): D's on fakes and G's.
    Not covered: how long a step takes (a longer draw takes longer), and D's forward values on reals in this process's memory.
    Raises `ConfigError` for a D that mixes rows, `ValueError` for wrong rows, `FederationError` when a sum is not finite.
    """
    check_private(state.discriminator)
    check_rows(rows_of)
    clip_and_sum = clipped_sum(engine)
    device = next(state.generator.parameters()).device
    secret = secret_generator(mechanism)
    total_d, total_g, g_steps = torch.zeros((), device=device), torch.zeros((), device=device), 0
    state.generator.train()
    for _ in range(settings.steps_per_round):
        rows = draw_rows_of_patients(rows_of, step.q, mechanism)
        real = torch.from_numpy(images[rows]).to(device).unsqueeze(1).float().div_(127.5).sub_(1)
        if len(rows):
            real = differentiable_augment(real, secret, settings.augment)
        _discriminator_step(state, real, settings, step, mechanism, rng, clip_and_sum)
        if ladder.generator_is_due():
            loss_d, loss_g, accuracy = _generator_step(state, settings, rng)
            ladder.after_generator_step(accuracy)
            total_d, total_g, g_steps = total_d + loss_d, total_g + loss_g, g_steps + 1
    if g_steps == 0:
        total_d, total_g, _ = _generator_step(state, settings, rng, learn=False)
    return GanLosses(discriminator=float(total_d) / max(1, g_steps), generator=float(total_g) / max(1, g_steps))


def _discriminator_step(
    state: GanState,
    real: Tensor,
    settings: Gan,
    step: PrivateStep,
    mechanism: Mechanism,
    rng: torch.Generator,
    clip_and_sum: ClippedSum,
) -> None:
    """One noisy step of D on reals float32 [n, 1, S, S], n any number, and ``step.expected`` fakes."""
    with torch.no_grad():
        fake = state.generator(draw_latent(step.expected, settings.latent, rng).to(real.device)).float()
        fake = differentiable_augment(fake, rng, settings.augment)
    shown = torch.cat([real, fake])
    towards = torch.cat([-torch.ones(len(real)), torch.ones(len(fake))]).to(real.device)

    def losses(part: slice) -> Callable[[Tensor], Tensor]:
        return lambda logits: softplus(towards[part] * logits)

    private_update(
        state.discriminator,
        state.optimizer_d,
        shown,
        losses,
        step=step,
        divisor=2 * step.expected,
        rows_at_once=PHYSICAL * settings.batch,
        mechanism=mechanism,
        clip_and_sum=clip_and_sum,
    )


def _generator_step(
    state: GanState, settings: Gan, rng: torch.Generator, *, learn: bool = True
) -> tuple[Tensor, Tensor, float]:
    """One G step through a frozen D on ``settings.batch`` fakes: D's loss and G's loss on them, detached, and D's accuracy."""
    d, g = state.discriminator, state.generator
    device = next(g.parameters()).device
    d.requires_grad_(False)
    with torch.set_grad_enabled(learn):
        fake = g(draw_latent(settings.batch, settings.latent, rng).to(device))
        logits = d(differentiable_augment(fake, rng, settings.augment)).float()
        loss_g = softplus(-logits).mean()
    if learn:
        state.optimizer_g.zero_grad(set_to_none=True)
        loss_g.backward()  # type: ignore[no-untyped-call]
        state.optimizer_g.step()
    d.requires_grad_(True)
    logits = logits.detach()
    return softplus(logits).mean(), loss_g.detach(), float((logits < 0).float().mean())
