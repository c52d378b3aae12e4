"""The pathology classifier DCNN (Salehinejad et al. 2018, section 2.2 and Figure 2).

::

    images [B, 1, S, S] -> (5x5 convolution -> ReLU -> 2x2 max-pool) per doubling -> 4 x 4 x 256
        -> 4,096-vector -> dropout -> hidden layer, ReLU -> dropout -> logits [B, C]  (softmax is the
        caller's)

There is one block per doubling above 4 px: six at 256 px, four at 64 px, so the vector has 4,096 entries at
every size. Channels double from `width` up to 256, and the last block always has 256. Weights ~ normal,
biases 0.1 (section 3.2). There is no BatchNorm and there are no buffers: weights can be averaged over sites,
and clipped per patient.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["DCNN", "SeededDropout"]

BASE = 4
KERNEL = 5
TOP = 256
HIDDEN = 256
BIAS = 0.1


class SeededDropout(nn.Module):
    """Dropout whose masks come from `generator` (a CPU generator), or from torch's own stream when that is
    None.

    In evaluation mode, or with `probability` 0, it is the identity. The survivors are scaled by 1 / (1 -
    probability).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout must be in [0, 1), not {probability}")
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not self.training or self.probability == 0:
            return x
        kept = torch.rand(x.shape, generator=self.generator) >= self.probability
        return x * kept.to(x.device, x.dtype) / (1 - self.probability)


def _channels(size: int, width: int) -> list[int]:
    """Channels after each block."""
    blocks = int(math.log2(size / BASE)) if size >= BASE else 0
    if blocks < 1 or BASE * 2**blocks != size:
        raise ValueError(f"image size must be a power of two, 8 or more, not {size}")
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    return [min(TOP, width * 2**block) for block in range(blocks - 1)] + [TOP]


class DCNN(nn.Module):
    """Images float32 [B, 1, size, size], standardised alike in training and use, to logits [B, classes].

    `norm` puts a GroupNorm between each convolution and its ReLU; the paper has none.
    """

    def __init__(
        self,
        size: int,
        classes: int,
        width: int = 32,
        dropout: float = 0.5,
        generator: torch.Generator | None = None,
        *,
        hidden: int = HIDDEN,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        channels = [1, *_channels(size, width)]
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(channels):
            blocks.append(nn.Conv2d(narrow, wide, KERNEL, padding=KERNEL // 2))
            if norm:
                blocks.append(nn.GroupNorm(math.gcd(8, wide), wide))
            blocks.append(nn.ReLU())
            blocks.append(nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*blocks)
        self.drop_features = SeededDropout(dropout)
        self.hidden = nn.Linear(TOP * BASE * BASE, hidden)
        self.drop_hidden = SeededDropout(dropout)
        self.output = nn.Linear(hidden, classes)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    # the paper gives no deviation; variance 2 / fan-in keeps the scale through ReLU (He 2015)
                    fan_in = layer.weight[0].numel()
                    deviation = math.sqrt((1 if layer is self.output else 2) / fan_in)
                    layer.weight.normal_(0.0, deviation, generator=generator)
                    if layer.bias is not None:
                        layer.bias.fill_(BIAS)

    def features(self, images: Tensor) -> Tensor:
        """The 4,096-vector of each image, [B, 4096], each entry >= 0."""
        if images.ndim != 4 or images.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"images must be [B, 1, {self.size}, {self.size}], not {list(images.shape)}")
        features: Tensor = self.blocks(images).flatten(1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, classes]."""
        hidden = torch.relu(self.hidden(self.drop_features(self.features(images))))
        logits: Tensor = self.output(self.drop_hidden(hidden))
        return logits
