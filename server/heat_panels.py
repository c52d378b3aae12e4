"""Heat maps of the images that the report shows, as pictures to be kept beside them.

::

    panels "synthetic" (and "real", where there are any) [C, k, S, S] + the judge's weights
        --grad_cam of each image's own class--> "cam_synthetic", "cam_real" [C, k, S, S], 255 = the image's hottest place
        --first_layer of each class's first image--> "first_synthetic", "first_real" [C, m, h, w], one scale per channel

Channels and scales are shared by real and synthetic, so the two can be compared. Black images (none of the class) stay black.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from xfed.common.config import Study
from xfed.common.devices import choose_device
from xfed.common.heat_maps import first_layer, grad_cam, strongest_channels
from xfed.common.registry import build_classifier
from xfed.common.weights import Weights, load_parameters

__all__ = ["KINDS", "heat_panels"]

KINDS = ("real", "synthetic")
MOST_IMAGES = 3
CHANNELS = 8

Panels = Mapping[str, npt.NDArray[np.uint8]]


def heat_panels(study: Study, weights: Weights, panels: Panels) -> dict[str, npt.NDArray[np.uint8]]:
    """The panels drawn above, for the kinds of images that `panels` has; uint8."""
    model, device = build_classifier(study), choose_device(study.runtime.device)
    load_parameters(model, weights)
    model = model.to(device)
    shown = {kind: panels[kind][:, :MOST_IMAGES] for kind in KINDS if kind in panels and panels[kind].shape[1]}
    result: dict[str, npt.NDArray[np.uint8]] = {}
    for kind, images in shown.items():
        classes, count, side = images.shape[:3]
        labels = np.repeat(np.arange(classes, dtype=np.int64), count)
        heat = grad_cam(model, images.reshape(-1, side, side), labels, device).reshape(images.shape)
        seen = images.max(axis=(2, 3), keepdims=True) > 0
        result[f"cam_{kind}"] = np.rint(255 * heat * seen).astype(np.uint8)
    activations = {kind: first_layer(model, images[:, 0], device) for kind, images in shown.items()}
    if not activations:
        return result
    channels = strongest_channels(list(activations.values()), CHANNELS)
    top = np.max([maps[:, channels].max(axis=(0, 2, 3)) for maps in activations.values()], axis=0)[:, None, None]
    for kind, maps in activations.items():
        seen = shown[kind][:, :1].max(axis=(2, 3), keepdims=True) > 0
        result[f"first_{kind}"] = np.rint(255 * seen * maps[:, channels] / np.maximum(top, 1e-30)).astype(np.uint8)
    return result
