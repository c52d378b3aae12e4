"""One site's share of one round of PGGAN training: a plain function on a model pair and pixels, as `xfed.common.gan` has it.

::

    global G weights --> G --- steps x (D step on real + fake + penalty, G step through a frozen D) ---> G weights back
    round, steps per round --step0--> Schedule.at(step0 + i) --> the same size and fade at every site, whatever its data
    site's disk: D, Adam moments of D and of G  <--- GanState.arrays / GanState.restore --->  stay at the site

The loss is the Wasserstein one with a gradient penalty (Gulrajani et al. 2017, equation 3) and a small drift term (Karras et al.
2018, appendix A). Reals are shrunk and faded like the fakes. G's moving average is the coordinator's.

Why there is no private path
----------------------------
DP-SGD needs a bound on what one patient changes: one gradient per patient, clipped. Here a patient reaches the others' gradients
through the batch deviation, so clipping rows bounds nothing; and the penalty is a gradient inside the loss, at points mixed of
a real image and a fake: per-patient gradients of it need second derivatives row by row, for which no engine here has a rule.
Without both it would no longer be this method. So a private study refuses the family (`WHY_NOT_PRIVATE`), and
`xfed.common.per_patient.check_private` refuses this discriminator with or without the deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from xfed.common.config_family import WHY_NOT_PRIVATE
from xfed.common.devices import autocast, memory_format
from xfed.common.diffaugment import POLICIES, differentiable_augment
from xfed.common.errors import FederationError
from xfed.common.gan import GanLosses, GanState
from xfed.common.growing import Place, Schedule
from xfed.common.pggan import LATENT, WIDTH, Discriminator, Generator, draw_latent, faded

__all__ = ["WHY_NOT_PRIVATE", "PgganSettings", "gradient_penalty", "new_pggan_state", "train_pggan_round"]

AUGMENTED_FROM = 8  # px; below, a shift by one pixel is no small change


@dataclass(frozen=True, kw_only=True)
class PgganSettings:
    """What a round needs. The defaults are the papers': Adam (0, 0.99) at 1e-3, penalty 10, drift 1e-3, one D step per G step.

    Raises `ValueError` where a value is outside its range.
    """

    schedule: Schedule
    steps_per_round: int
    batch: int = 16
    width: int = WIDTH
    latent: int = LATENT
    learning_rate_g: float = 1e-3
    learning_rate_d: float = 1e-3
    penalty: float = 10.0
    drift: float = 1e-3
    augment: str = "none"

    def __post_init__(self) -> None:
        for name, least in (("steps_per_round", 1), ("batch", 2), ("width", 1), ("latent", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("learning_rate_g", "learning_rate_d"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        for name in ("penalty", "drift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more, not {getattr(self, name)}")
        if self.augment not in POLICIES:
            raise ValueError(f"augment must be one of {', '.join(POLICIES)}, not {self.augment!r}")


def new_pggan_state(settings: PgganSettings, device: torch.device, rng: torch.Generator) -> GanState:
    """A fresh D drawn from `rng`, an empty G to load weights into, and both optimizers."""
    size, layout = settings.schedule.size, memory_format(device)
    generator = Generator(size, settings.width, settings.latent, torch.Generator().manual_seed(0))
    discriminator = Discriminator(size, settings.width, rng)
    g = generator.to(device, memory_format=layout)  # type: ignore[call-overload]
    d = discriminator.to(device, memory_format=layout)  # type: ignore[call-overload]
    betas = (0.0, 0.99)
    return GanState(
        generator=cast(Any, g),
        discriminator=cast(Any, d),
        optimizer_g=torch.optim.Adam(g.parameters(), settings.learning_rate_g, betas=betas, fused=True),
        optimizer_d=torch.optim.Adam(d.parameters(), settings.learning_rate_d, betas=betas, fused=True),
    )


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, place: Place) -> Tensor:
    """Mean of (|gradient of D| - 1)^2 at ``real + mix * (fake - real)`` (Gulrajani et al. 2017, equation 3, without lambda).

    `real`, `fake` float32 [B, 1, S, S]; `mix` [B, 1, 1, 1] in 0..1. Always in float32.
    """
    points = torch.lerp(real, fake.detach(), mix).requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(points, place).sum(), points, create_graph=True)
    penalty: Tensor = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return penalty


def train_pggan_round(
    state: GanState,
    images: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    settings: PgganSettings,
    rng: torch.Generator,
    precision: str = "float32",
    step0: int = 0,
) -> GanLosses:
    """Train `settings.steps_per_round` D + G steps on ``images[rows]`` (uint8 [n, S, S]); `state` changes in place.

    `step0` is the global number of the round's first step: ``(round - 1) * steps_per_round``. The losses are means in the units
    of D's score: D's with penalty and drift, G's. Raises `FederationError` when a loss is no longer finite.

    Guarantees: size and fade depend on `step0` and the schedule alone; layers of later stages are left as they are.
    """
    device = next(state.generator.parameters()).device
    total_d, total_g = torch.zeros((), device=device), torch.zeros((), device=device)
    state.generator.train()
    for step in range(settings.steps_per_round):
        place = settings.schedule.at(step0 + step)
        drawn = torch.randint(len(rows), (settings.batch,), generator=rng).numpy()
        real = torch.from_numpy(images[rows[drawn]]).to(device).unsqueeze(1).float().div_(127.5).sub_(1)
        z = draw_latent(settings.batch, settings.latent, rng).to(device)
        loss_d, loss_g = _step(state, faded(real, place), z, settings, rng, precision, place)
        total_d += loss_d
        total_g += loss_g
    losses = GanLosses(
        discriminator=float(total_d) / settings.steps_per_round, generator=float(total_g) / settings.steps_per_round
    )
    if not math.isfinite(losses.discriminator) or not math.isfinite(losses.generator):
        raise FederationError(
            f"PGGAN's losses became {losses.discriminator} and {losses.generator} after step {step0}. Lower the learning "
            "rates, or set precision to float32."
        )
    return losses


def _step(
    state: GanState,
    real: Tensor,
    z: Tensor,
    settings: PgganSettings,
    rng: torch.Generator,
    precision: str,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """One D step and one G step at `place`; `real` already has its size. Returns both losses, detached."""
    d, g = state.discriminator, state.generator
    augment = settings.augment if place.size >= AUGMENTED_FROM else "none"
    with autocast(real.device, precision):
        fake = g(z, place).float()
    shown_real = differentiable_augment(real, rng, augment)
    shown_fake = differentiable_augment(fake.detach(), rng, augment)
    with autocast(real.device, precision):
        on_real, on_fake = d(shown_real, place).float(), d(shown_fake, place).float()
    mix = torch.rand(len(real), 1, 1, 1, generator=rng).to(real.device)
    loss_d = on_fake.mean() - on_real.mean() + settings.drift * on_real.square().mean()
    loss_d = loss_d + settings.penalty * gradient_penalty(d, shown_real, shown_fake, mix, place)
    state.optimizer_d.zero_grad(set_to_none=True)
    loss_d.backward()
    state.optimizer_d.step()

    d.requires_grad_(False)
    with autocast(real.device, precision):
        loss_g = -d(differentiable_augment(fake, rng, augment), place).float().mean()
    state.optimizer_g.zero_grad(set_to_none=True)
    loss_g.backward()
    state.optimizer_g.step()
    d.requires_grad_(True)
    return loss_d.detach(), loss_g.detach()
