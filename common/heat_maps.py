"""Where a classifier looks: its first layer's activations, and Grad-CAM of a class.

::

    images uint8 [n, S, S] --prepare--> first convolution, activation function --> [n, channels, h, w]          `first_layer`
    images, classes --> last maps A_k, gradient of the class's logit --> relu(sum_k mean(gradient_k) A_k) --> [n, S, S]
                                                                                                                `grad_cam`

Grad-CAM is Selvaraju et al. 2017, equations 1 and 2. Only the classifier's weights and the images are read. A heat map says
what moved the score, not that the place is the finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from xfed.common.classifier import prepare
from xfed.common.dcnn import DCNN
from xfed.common.errors import DataError
from xfed.common.googlenet import GoogLeNet

__all__ = ["first_layer", "grad_cam", "strongest_channels"]

BATCH = 64

Pixels = npt.NDArray[np.uint8]
Maps = npt.NDArray[np.float32]


def _layers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs are the first activations and the last maps. Raises `DataError` on an unknown model."""
    match model:
        case DCNN():
            first = next(layer for layer in model.blocks if isinstance(layer, nn.ReLU))
            return first, model.blocks[-2]
        case GoogLeNet():
            return model.stem[0], model.blocks["inception_5b"]
    raise DataError(f"heat maps are known for dcnn and googlenet, not for {type(model).__name__}")


@contextmanager
def _caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of `layer` while the model runs, in evaluation mode or not."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _batches(images: Pixels, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        yield part, prepare(torch.from_numpy(np.array(images[part])).to(device))


@torch.no_grad()
def first_layer(model: nn.Module, images: Pixels, device: torch.device) -> Maps:
    """Activations after the first convolution, float32 [n, channels, h, w], each at least 0; the model's mode is kept."""
    layer, training = _layers(model)[0], model.training
    model.eval()
    parts = []
    try:
        for _, batch in _batches(images, device):
            with _caught(layer) as outputs:
                model(batch)
            parts.append(outputs[0].float().cpu())
    finally:
        model.train(training)
    if not parts:
        raise DataError("no image to look at: give at least one")
    maps: Maps = torch.cat(parts).numpy()
    return maps


def strongest_channels(maps: Sequence[Maps], count: int) -> npt.NDArray[np.int64]:
    """The `count` channels that vary most within images, over all of `maps` [n, channels, h, w], strongest first."""
    deviation = np.mean([group.std(axis=(2, 3)).mean(axis=0) for group in maps if len(group)], axis=0)
    chosen: npt.NDArray[np.int64] = np.argsort(-deviation, kind="stable")[:count]
    return chosen


def grad_cam(model: nn.Module, images: Pixels, labels: npt.NDArray[np.int64], device: torch.device) -> Maps:
    """What speaks for class `labels[i]` in image i: float32 [n, S, S] in 0..1, each image's maximum 1 (all 0: nothing does).

    Bilinear from the last maps (8 x 8 of the dcnn) to the image's size. Float32, whatever the study's precision.
    """
    layer, training = _layers(model)[1], model.training
    model.eval()
    heat = np.zeros(images.shape, np.float32)
    try:
        for part, batch in _batches(images, device):
            with torch.enable_grad(), _caught(layer) as outputs:
                logits = model(batch)
                chosen = logits.gather(1, torch.from_numpy(np.asarray(labels[part])).to(device)[:, None]).sum()
                (gradient,) = torch.autograd.grad(chosen, outputs[0])
            maps = (gradient.mean(dim=(2, 3), keepdim=True) * outputs[0]).sum(dim=1, keepdim=True).relu().detach()
            large = interpolate(maps, size=images.shape[1:], mode="bilinear", align_corners=False)[:, 0]
            top = large.amax(dim=(1, 2), keepdim=True)
            heat[part] = torch.where(top > 0, large / top.clamp(min=torch.finfo(torch.float32).tiny), 0.0).cpu().numpy()
    finally:
        model.train(training)
    return heat
