"""Training of a classifier at one site, differentially private for every patient.

::

    patients --Mechanism.sample, pick--> one image each --augment--+
                                                                   +--> clipped_sum --Mechanism.release, once--> Adam
    archive --a fixed number of synthetic images--> augment -------+

As `xfed.common.classifier.train_round`, with three differences: rows come by patient, never by class (a weighted draw would give
patients of rare classes another sampling rate than the claim says); balance comes from weights in the loss and from synthetic
images, both by public class sizes; and no loss is returned. Nothing is kept on disk here.

Synthetic images carry no patient that was not paid for already, but are clipped row by row all the same: unclipped they would
swamp the clipped reals. What is done to rows at random (augmentation of reals, dropout) comes from a generator seeded by the
mechanism's secret randomness; the public generator is used a fixed number of times per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xfed.common.augment import augment
from xfed.common.classifier import prepare
from xfed.common.config import Classifier
from xfed.common.dcnn import SeededDropout
from xfed.common.devices import memory_format
from xfed.common.errors import ConfigError
from xfed.common.mechanism import Mechanism
from xfed.common.per_patient import check_private, clipped_sum
from xfed.common.private_gan import (
    PHYSICAL,
    PrivateStep,
    check_rows,
    draw_rows_of_patients,
    private_update,
    secret_generator,
)

__all__ = ["synthetic_rows", "synthetic_shares", "train_private_round"]

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def synthetic_rows(settings: Classifier, expected: int, synthetic: int, class_sizes: Sequence[int]) -> int:
    """How many synthetic images each step takes: a public number, from ``settings.synthetic_share`` of the whole batch.

    null: in proportion to `synthetic`, the size of the archive, and the declared patients. Raises `ConfigError` for a share of 1.
    """
    if synthetic == 0:
        return 0
    share = settings.synthetic_share
    if share is None:
        return round(expected * synthetic / max(1, sum(class_sizes)))
    if share >= 1:
        raise ConfigError(
            "classifier.synthetic_share 1 leaves no place for patients: in a private study it must be below 1"
        )
    return round(share / (1 - share) * expected)


def synthetic_shares(class_sizes: Sequence[int], available: Sequence[bool], expected: int, rows: int) -> Tensor:
    """Share of each class among the `rows` synthetic images of a step, float64 [C], adding up to 1.

    They fill up the rarest classes first, until the expected batch of reals (in proportion to the public `class_sizes`) and
    synthetic ones is as even as it can be; a class that is not `available` in the archive gets none.
    """
    real = torch.tensor(class_sizes, dtype=torch.float64)
    real = real / real.sum().clamp(min=1) * expected
    there = torch.tensor(available)
    low, high = 0.0, float(real.max()) + rows
    for _ in range(100):  # the level to which `rows` fill the classes up
        level = (low + high) / 2
        poured = ((level - real).clamp(min=0) * there).sum()
        low, high = (level, high) if poured < rows else (low, level)
    filled = (high - real).clamp(min=0) * there
    shares: Tensor = filled / filled.sum()
    return shares


def _loss_weights(balance: str, rows_per_class: Tensor) -> Tensor | None:
    """Weight of each class in the loss, inverse to its public, expected rows, float32 [C]; None without balance."""
    if balance == "none":
        return None
    if balance != "loss":
        raise ConfigError(
            f"classifier.balance {balance} draws patients of rare classes more often, so q would not be theirs: "
            "use loss or none in a private study"
        )
    present = rows_per_class > 0
    weights = rows_per_class.sum() / (present.sum() * rows_per_class.clamp(min=1e-9))
    return torch.where(present, weights, 0.0).float()


def _gather(
    images: Pixels, rows: Labels, generator: torch.Generator, settings: Classifier, device: torch.device
) -> Tensor:
    """Standardised float32 [n, 1, S, S] of uint8 rows, augmented where the study wants it; n may be 0."""
    batch = torch.from_numpy(np.array(images[rows])).to(device)
    if settings.augment and len(rows):
        return prepare(augment(batch.float()[:, None] / 255, generator))
    return prepare(batch)


def train_private_round(
    model: nn.Module,
    images: Pixels,
    labels: Labels,
    rows_of: Sequence[Labels],
    synthetic_images: Pixels | None,
    synthetic_labels: Labels | None,
    *,
    settings: Classifier,
    learning_rate: float,
    steps: int,
    step: PrivateStep,
    mechanism: Mechanism,
    engine: str,
    generator: torch.Generator,
    class_sizes: Sequence[int],
    device: torch.device,
) -> None:
    """Train `model` in place for exactly `steps` noisy steps with a fresh Adam. It returns nothing: a loss would be of patients.

    `images` uint8 [n, S, S], `labels` int64 [n] in 0..C-1, ``rows_of[p]`` the rows of patient p (all of one class);
    `class_sizes`: patients per class as declared in public, [C]; `generator`: public, for synthetic images alone.

    Formal guarantees (unit: patient, add or remove):
    - exactly `steps` calls of `mechanism.release`, each a Gaussian mechanism on a Poisson sample (q, sigma, clip) of patients of
      all classes, also where no patient was drawn;
    - the weights of `model` are a function of the released sums, `generator` and public settings only.
    Not covered: time, as in `train_private_gan_round`. Raises `ConfigError` for a model that mixes rows, for `balance`
    "sampling" and for a synthetic share of 1; `ValueError` for wrong rows; `FederationError` when a sum is not finite.
    """
    check_private(model)
    check_rows(rows_of)
    clip_and_sum = clipped_sum(engine)
    made = (
        0 if synthetic_labels is None else synthetic_rows(settings, step.expected, len(synthetic_labels), class_sizes)
    )
    expected_rows = torch.tensor(class_sizes, dtype=torch.float64)
    expected_rows = expected_rows / expected_rows.sum().clamp(min=1) * step.expected
    per_image = torch.zeros(0, dtype=torch.float64)
    if made and synthetic_labels is not None:
        of_class = torch.bincount(torch.from_numpy(synthetic_labels), minlength=len(class_sizes))
        shares = synthetic_shares(class_sizes, (of_class > 0).tolist(), step.expected, made)
        per_image = (shares / of_class.clamp(min=1))[torch.from_numpy(synthetic_labels)]
        expected_rows = expected_rows + shares * made
    weights = _loss_weights(settings.balance, expected_rows)
    weights = None if weights is None else weights.to(device)

    layout = memory_format(device)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=learning_rate,
        betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    secret = secret_generator(mechanism)
    dropouts = [module for module in model.modules() if isinstance(module, SeededDropout)]
    was_training = model.training
    model.train()
    for dropout in dropouts:
        dropout.generator = secret
    try:
        for _ in range(steps):
            rows = draw_rows_of_patients(rows_of, step.q, mechanism)
            inputs, targets = (
                _gather(images, rows, secret, settings, device),
                torch.from_numpy(np.asarray(labels[rows], dtype=np.int64)),
            )
            if made and synthetic_images is not None and synthetic_labels is not None:
                drawn = torch.multinomial(per_image, made, replacement=True, generator=generator).numpy()
                inputs = torch.cat([inputs, _gather(synthetic_images, drawn, generator, settings, device)])
                targets = torch.cat([targets, torch.from_numpy(synthetic_labels[drawn])])
            private_update(
                model,
                optimizer,
                inputs.contiguous(memory_format=layout),
                _losses(targets.to(device), weights, settings.label_smoothing),
                step=step,
                divisor=step.expected + made,
                rows_at_once=PHYSICAL * settings.batch,
                mechanism=mechanism,
                clip_and_sum=clip_and_sum,
            )
    finally:
        for dropout in dropouts:
            dropout.generator = None
        model.train(was_training)


def _losses(targets: Tensor, weights: Tensor | None, smoothing: float) -> Callable[[slice], Callable[[Tensor], Tensor]]:
    """For a part of the rows, the function from their logits [n, C] to their losses [n]."""

    def of_part(part: slice) -> Callable[[Tensor], Tensor]:
        return lambda logits: cross_entropy(
            logits, targets[part], weight=weights, label_smoothing=smoothing, reduction="none"
        )

    return of_part
