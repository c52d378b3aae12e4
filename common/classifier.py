"""Training and use of a classifier on one site's images: plain functions on tensors.

::

    train_round:  real + synthetic -> rows drawn by class -> augment -> standardise -> model -> loss -> Adam
    predict:      images uint8 -> standardise -> model -> softmax -> probabilities [n, C]

Training and evaluation share `prepare`, so no scale can differ between them. Images may be memory maps: each
batch is copied when it is needed. With the same generator, weights are equal bit for bit on the same CPU,
thread count and precision.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xfed.common.augment import augment, standardise
from xfed.common.config import Classifier
from xfed.common.dcnn import SeededDropout
from xfed.common.devices import autocast, memory_format
from xfed.common.errors import DataError, FederationError

__all__ = ["draw_rows", "predict", "prepare", "sigmoid_decay", "train_round"]

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def sigmoid_decay(initial: float, round_number: int, rounds: int) -> float:
    """Learning rate of round 0..rounds-1: `initial` falling along a sigmoid to a twentieth (paper, section 3.2).

    ``initial * sigmoid(6 - 9 u)`` with u from 0 in the first round to 1 in the last: 0.998, 0.818 and 0.047 of
    `initial` at the start, the middle and the end. The paper gives no slope; with a fall to 0.002 (12 instead
    of 9) the last third of the rounds teaches little. Raises `ValueError` outside 0..rounds-1.
    """
    if not 0 <= round_number < rounds:
        raise ValueError(f"round {round_number} is not among 0..{rounds - 1}")
    progress = round_number / (rounds - 1) if rounds > 1 else 0.0
    return initial / (1 + math.exp(9 * progress - 6))


def prepare(images: Tensor) -> Tensor:
    """Images of any scale, [B, S, S] or [B, 1, S, S], to a classifier's input: standardised float32 [B, 1, S, S]."""
    return standardise(images if images.ndim == 4 else images.unsqueeze(1))


def _row_weights(real: Tensor, synthetic: Tensor, balance: str, synthetic_share: float | None) -> Tensor:
    """Probability of each row of real, then synthetic, float64 [n + m], adding up to 1."""
    classes = int(torch.cat([real, synthetic]).max()) + 1
    n, m = (torch.bincount(labels, minlength=classes).double() for labels in (real, synthetic))
    of_class = (n + m > 0).double() if balance == "sampling" else n + m
    share = m / (n + m).clamp(min=1) if synthetic_share is None else torch.full_like(n, synthetic_share)
    share = torch.where(m == 0, 0.0, torch.where(n == 0, 1.0, share))
    of_class = of_class / of_class.sum()
    per_real = of_class * (1 - share) / n.clamp(min=1)
    per_synthetic = of_class * share / m.clamp(min=1)
    return torch.cat([per_real[real], per_synthetic[synthetic]])


def draw_rows(
    real_labels: Labels,
    synthetic_labels: Labels | None,
    count: int,
    generator: torch.Generator,
    *,
    balance: str,
    synthetic_share: float | None = None,
) -> Labels:
    """`count` row numbers with replacement, int64 [count]: 0..n-1 are real rows, n..n+m-1 synthetic ones.

    `balance` "sampling": every class that has any image is equally likely; otherwise classes come in
    proportion to their images. Within a class a synthetic image is drawn with probability `synthetic_share`
    (null: in proportion to counts), always where the class has no real image, and never where it has no
    synthetic one. Raises `DataError` when there is no image at all.
    """
    real, synthetic = _tensors(real_labels, synthetic_labels)
    weights = _row_weights(real, synthetic, balance, synthetic_share)
    rows: Labels = torch.multinomial(weights, count, replacement=True, generator=generator).numpy()
    return rows


def _tensors(real_labels: Labels, synthetic_labels: Labels | None) -> tuple[Tensor, Tensor]:
    real = torch.from_numpy(np.asarray(real_labels, dtype=np.int64))
    none = np.zeros(0, dtype=np.int64)
    synthetic = torch.from_numpy(np.asarray(none if synthetic_labels is None else synthetic_labels, dtype=np.int64))
    if len(real) + len(synthetic) == 0:
        raise DataError("this site has no training image of any class. Leave it out of the study, or import images.")
    return real, synthetic


def _loss_weights(labels: Tensor, classes: int) -> Tensor:
    """Weight of each class in the loss, inverse to its images, float32 [C]; an absent class weighs 0."""
    counts = torch.bincount(labels, minlength=classes).float()
    return torch.where(counts > 0, counts.sum() / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)


def _set_dropout(model: nn.Module, generator: torch.Generator | None) -> None:
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.generator = generator


def train_round(
    model: nn.Module,
    real_images: Pixels,
    real_labels: Labels,
    synthetic_images: Pixels | None,
    synthetic_labels: Labels | None,
    *,
    settings: Classifier,
    learning_rate: float,
    steps: int,
    generator: torch.Generator,
    precision: str,
    device: torch.device,
) -> float:
    """Train `model` in place for `steps` batches with a fresh Adam; the mean loss over the steps.

    Images are uint8 [n, S, S], labels int64 [n] in 0..C-1. `settings` gives batch, momentum (Adam's beta1),
    weight decay (L2), label smoothing, balance, augmentation and the synthetic share (see `draw_rows`). Raises
    `DataError` without images, `FederationError` when the loss is no longer finite.
    """
    real, synthetic = _tensors(real_labels, synthetic_labels)
    labels = torch.cat([real, synthetic])
    draw_weights = _row_weights(real, synthetic, settings.balance, settings.synthetic_share)
    model = model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=learning_rate,
        betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    was_training = model.training
    model.train()
    _set_dropout(model, generator)
    total = 0.0
    try:
        for step in range(steps):
            rows = torch.multinomial(draw_weights, settings.batch, replacement=True, generator=generator)
            images = _gather(real_images, synthetic_images, rows.numpy()).to(device)
            targets = labels[rows].to(device)
            if settings.augment:
                images = augment(images.float()[:, None] / 255, generator)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                logits = model(prepare(images).contiguous(memory_format=memory_format(device)))
            weights = _loss_weights(labels, logits.shape[1]).to(device) if settings.balance == "loss" else None
            loss = cross_entropy(logits.float(), targets, weight=weights, label_smoothing=settings.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FederationError(
                    f"the classifier's loss became {value} at step {step + 1} of {steps} (learning rate "
                    f"{learning_rate:g}). Lower classifier.learning_rate, or set precision to float32."
                )
            total += value
    finally:
        _set_dropout(model, None)
        model.train(was_training)
    return total / max(1, steps)


def _gather(real: Pixels, synthetic: Pixels | None, rows: Labels) -> Tensor:
    """Copy the chosen rows out of the two stores, uint8 [B, S, S], in the order of `rows`."""
    from_real = rows < len(real)
    images = np.empty((len(rows), *real.shape[1:]), dtype=np.uint8)
    images[from_real] = real[rows[from_real]]
    if synthetic is not None:
        images[~from_real] = synthetic[rows[~from_real] - len(real)]
    return torch.from_numpy(images)


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Pixels,
    *,
    device: torch.device,
    precision: str,
    batch: int = 512,
) -> npt.NDArray[np.float32]:
    """Class probabilities of images uint8 [n, S, S]: float32 [n, C], each row adding up to 1. The model's
    mode is left as it was.
    """
    was_training = model.training
    model = model.to(device, memory_format=memory_format(device)).eval()  # type: ignore[call-overload]
    parts = []
    try:
        for start in range(0, max(len(images), 1), batch):
            pixels = torch.from_numpy(np.array(images[start : start + batch])).to(device)
            with autocast(device, precision):
                logits = model(prepare(pixels).contiguous(memory_format=memory_format(device)))
            parts.append(logits.float().softmax(dim=1).cpu().numpy())
    finally:
        model.train(was_training)
    return np.concatenate(parts)
