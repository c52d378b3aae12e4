"""A classifier taught a little, for benches that need eyes: the study's model, a fixed learning rate, plain float32 on one core.

::

    start (weights), draws (batches): two random streams --> images, labels --`steps` batches--> model, in training mode as made
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from xfed.common.classifier import train_round
from xfed.common.config import Study
from xfed.common.registry import build_classifier

__all__ = ["taught_classifier"]


def taught_classifier(
    study: Study,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    *,
    steps: int,
    start: torch.Generator,
    draws: torch.Generator,
) -> nn.Module:
    """`study`'s classifier after `steps` batches of `images` uint8 [n, S, S], `labels` int64 [n]. Raises as `train_round`."""
    model = build_classifier(study, start)
    train_round(
        model,
        images,
        labels,
        None,
        None,
        settings=study.classifier,
        learning_rate=1e-3,
        steps=steps,
        generator=draws,
        precision="float32",
        device=torch.device("cpu"),
    )
    return model
