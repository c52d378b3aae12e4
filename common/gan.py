"""One site's share of one round of GAN training for one class: a plain function on a model pair and pixels.

::

    global G weights ---> G --- steps x (D step on real + fake, G step through a frozen D) ---> G weights back to the coordinator
    site's disk: D, Adam moments of D and of G  <--- GanState.arrays / GanState.restore --->  stay at the site

The loss is the paper's minimax game (Salehinejad et al. 2018, equation 2) in its non-saturating form (Goodfellow et al. 2014,
section 3). What D sees is augmented differentiably (Zhao et al. 2020), real and fake alike, so that small classes do not let D
memorise. The fakes of the D step are reused for the G step: one G forward per step (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from xfed.common import pggan
from xfed.common.config import Gan, Study
from xfed.common.dcgan import Discriminator, Generator, draw_latent
from xfed.common.devices import autocast, memory_format
from xfed.common.diffaugment import differentiable_augment
from xfed.common.randomness import torch_generator
from xfed.common.weights import Weights, load_parameters, parameters_of, under

__all__ = [
    "AnyGenerator",
    "GanLosses",
    "GanState",
    "build_generator",
    "new_gan_state",
    "ready_generator",
    "render",
    "train_gan_round",
]

R1_EVERY = 16
AnyGenerator = Generator | pggan.Generator


@dataclass(frozen=True)
class GanLosses:
    """Means over a round: D's loss, G's loss (natural log units)."""

    discriminator: float
    generator: float


@dataclass(frozen=True)
class GanState:
    """Everything that one class keeps at one site between rounds. Mutable inside, saved by `arrays`."""

    generator: Generator
    discriminator: Discriminator
    optimizer_g: torch.optim.Adam
    optimizer_d: torch.optim.Adam

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """D's weights and both optimizers' moments, named; G's weights are not in it (they come with each round)."""
        saved = {f"d/{name}": value for name, value in parameters_of(self.discriminator).items()}
        for prefix, module, optimizer in self._optimized():
            for name, parameter in module.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    saved[f"{prefix}/{key}/{name}"] = (
                        value.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format).numpy().copy()
                    )
        return saved

    def restore(self, saved: dict[str, npt.NDArray[Any]]) -> None:
        """The inverse of `arrays`. Raises `CheckpointError` when shapes or names differ."""
        load_parameters(self.discriminator, under(saved, "d/"))
        for prefix, module, optimizer in self._optimized():
            for name, parameter in module.named_parameters():
                if f"{prefix}/step/{name}" not in saved:
                    continue
                step = torch.tensor(float(saved[f"{prefix}/step/{name}"]))
                optimizer.state[parameter] = {"step": step.to(parameter.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = torch.empty_like(parameter, memory_format=torch.preserve_format)
                    moment.copy_(torch.from_numpy(np.array(saved[f"{prefix}/{key}/{name}"])))
                    optimizer.state[parameter][key] = moment

    def _optimized(self) -> tuple[tuple[str, nn.Module, torch.optim.Adam], ...]:
        return (("adam_d", self.discriminator, self.optimizer_d), ("adam_g", self.generator, self.optimizer_g))


def build_generator(study: Study, seed_names: tuple[str | int, ...] | None = None) -> AnyGenerator:
    """The study's generator, of its family; its weights are drawn from the stream `seed_names`, or left to be loaded."""
    rng = torch_generator(study.seed, *seed_names) if seed_names else None
    if study.unlabelled:
        return pggan.Generator(study.image_size, study.gan.width, study.gan.latent, rng)
    return Generator(study.image_size, study.gan.width, study.gan.latent, rng)


def ready_generator(study: Study, weights: Weights) -> AnyGenerator:
    """The study's generator with `weights`, calibrated and ready to `render`."""
    generator = build_generator(study)
    load_parameters(generator, weights)
    return generator.calibrate()


def new_gan_state(study: Study, device: torch.device, *seed_names: str | int) -> GanState:
    """A fresh D and optimizers of a DCGAN for one class at one site; D is drawn from the stream `seed_names`."""
    settings = study.gan
    layout = memory_format(device)
    generator = Generator(study.image_size, settings.width, settings.latent)
    generator = generator.to(device, memory_format=layout)  # type: ignore[call-overload]
    discriminator = Discriminator(study.image_size, settings.width, torch_generator(study.seed, *seed_names))
    discriminator = discriminator.to(device, memory_format=layout)  # type: ignore[call-overload]
    betas = (settings.momentum, 0.999)
    return GanState(
        generator=generator,
        discriminator=discriminator,
        optimizer_g=torch.optim.Adam(generator.parameters(), settings.learning_rate_g, betas=betas, fused=True),
        optimizer_d=torch.optim.Adam(discriminator.parameters(), settings.learning_rate_d, betas=betas, fused=True),
    )


def _r1(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Mean squared gradient norm of D at the reals (Mescheder et al. 2018, equation 9, without gamma / 2)."""
    real = real.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


def train_gan_round(
    state: GanState,
    images: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    settings: Gan,
    rng: torch.Generator,
    precision: str = "float32",
) -> GanLosses:
    """Train `settings.steps_per_round` D + G steps on ``images[rows]`` (uint8 [n, S, S]); `state` changes in place."""
    device = next(state.generator.parameters()).device
    total_d = torch.zeros((), device=device)
    total_g = torch.zeros((), device=device)
    state.generator.train()
    for step in range(settings.steps_per_round):
        drawn = torch.randint(len(rows), (settings.batch,), generator=rng).numpy()
        real = torch.from_numpy(images[rows[drawn]]).to(device).unsqueeze(1).float().div_(127.5).sub_(1)
        z = draw_latent(settings.batch, settings.latent, rng).to(device)
        loss_d, loss_g = _gan_step(state, real, z, settings, rng, precision, penalise=step % R1_EVERY == 0)
        total_d += loss_d
        total_g += loss_g
    steps = settings.steps_per_round
    return GanLosses(discriminator=float(total_d) / steps, generator=float(total_g) / steps)


def _gan_step(
    state: GanState, real: Tensor, z: Tensor, settings: Gan, rng: torch.Generator, precision: str, *, penalise: bool
) -> tuple[Tensor, Tensor]:
    """One D step and one G step. `real` float32 [B, 1, S, S] in [-1, 1], `z` [B, latent]; returns both losses, detached."""

    def seen(batch: Tensor) -> Tensor:
        return differentiable_augment(batch, rng, settings.augment)

    d, g = state.discriminator, state.generator
    with autocast(real.device, precision):
        fake = g(z).float()
        logits = d(torch.cat([seen(real), seen(fake.detach())])).float()
    on_real, on_fake = logits.chunk(2)
    loss_d = softplus(-on_real).mean() + softplus(on_fake).mean()
    if settings.r1 > 0 and penalise:
        loss_d = loss_d + settings.r1 / 2 * R1_EVERY * _r1(d, seen(real))
    state.optimizer_d.zero_grad(set_to_none=True)
    loss_d.backward()  # type: ignore[no-untyped-call]
    state.optimizer_d.step()

    d.requires_grad_(False)
    with autocast(real.device, precision):
        loss_g = softplus(-d(seen(fake)).float()).mean()
    state.optimizer_g.zero_grad(set_to_none=True)
    loss_g.backward()  # type: ignore[no-untyped-call]
    state.optimizer_g.step()
    d.requires_grad_(True)
    return loss_d.detach(), loss_g.detach()


@torch.no_grad()
def render(generator: AnyGenerator, z: Tensor) -> npt.NDArray[np.uint8]:
    """Images uint8 [B, S, S] of latents float32 [B, latent], always in float32; the generator must be calibrated."""
    device = next(generator.parameters()).device
    images = generator(z.to(device)).squeeze(1)
    pixels: npt.NDArray[np.uint8] = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels
