"""GoogLeNet, inception v1 (Szegedy et al. 2015, Table 1), for grey images of 32 to 256 px.

::

    [B, 1, S, S] -> stem (7x7, 1x1, 3x3) -> inception 3a 3b -> pool -> 4a..4e -> pool -> 5a 5b
        -> mean over the map -> dropout -> logits [B, C]

At width 64 every inception block has the paper's channels; other widths scale them all. Below 128 px the
first convolution has stride 1 and the first pool is left out below 64 px, so that the last map is at least 4
x 4. GroupNorm stands after each convolution (the paper predates BatchNorm's general use; a network this deep
needs one of them), so there are no buffers. The auxiliary heads are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xfed.common.dcnn import SeededDropout

__all__ = ["GoogLeNet"]

PAPER_WIDTH = 64

# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection: Table 1
INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _convolution(narrow: int, wide: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(narrow, wide, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.GroupNorm(math.gcd(8, wide), wide),
        nn.ReLU(),
    )


class Inception(nn.Module):
    """Four parallel branches of one map [B, narrow, s, s], joined along the channels."""

    def __init__(self, narrow: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = sizes
        self.one = _convolution(narrow, one, 1)
        self.three = nn.Sequential(_convolution(narrow, reduce3, 1), _convolution(reduce3, three, 3))
        self.five = nn.Sequential(_convolution(narrow, reduce5, 1), _convolution(reduce5, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(narrow, pool, 1))
        self.channels = one + three + five + pool

    def forward(self, x: Tensor) -> Tensor:
        """[B, narrow, s, s] to [B, channels, s, s]."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class GoogLeNet(nn.Module):
    """Images float32 [B, 1, size, size], standardised alike in training and use, to logits [B, classes]."""

    def __init__(
        self,
        size: int,
        classes: int,
        width: int = PAPER_WIDTH,
        dropout: float = 0.4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if size < 32 or size & (size - 1):
            raise ValueError(f"image size must be 32, 64, 128 or 256, not {size}")
        if width < 4:
            raise ValueError(f"width must be at least 4, not {width}")

        def scaled(channels: int) -> int:
            return max(2, round(channels * width / PAPER_WIDTH))

        self.size = size
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        stem: list[nn.Module] = [_convolution(1, scaled(64), 7, stride=1 if size < 128 else 2)]
        if size > 32:
            stem.append(pool)
        stem += [_convolution(scaled(64), scaled(64), 1), _convolution(scaled(64), scaled(192), 3), pool]
        self.stem = nn.Sequential(*stem)
        channels = scaled(192)
        blocks: dict[str, nn.Module] = {}
        for name, sizes in INCEPTION.items():
            if name in ("4a", "5a"):
                blocks[f"before_{name}"] = nn.MaxPool2d(3, stride=2, padding=1)
            block = Inception(channels, tuple(scaled(value) for value in sizes))
            blocks[f"inception_{name}"] = block
            channels = block.channels
        self.blocks = nn.ModuleDict(blocks)
        self.dropout = SeededDropout(dropout)
        self.output = nn.Linear(channels, classes)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Convolutions ~ N(0, 2 / fan-in), GroupNorm the identity (He et al. 2015)."""
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    gain = 1 if layer is self.output else 2
                    layer.weight.normal_(0.0, math.sqrt(gain / layer.weight[0].numel()), generator=generator)
                    if layer.bias is not None:
                        layer.bias.zero_()

    def features(self, images: Tensor) -> Tensor:
        """The mean of the last map, [B, 1024] at width 64, each entry >= 0."""
        if images.ndim != 4 or images.shape[1:] != (1, self.size, self.size):
            raise ValueError(f"images must be [B, 1, {self.size}, {self.size}], not {list(images.shape)}")
        x = self.stem(images)
        for block in self.blocks.values():
            x = block(x)
        features: Tensor = x.mean(dim=(2, 3))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, classes]."""
        logits: Tensor = self.output(self.dropout(self.features(images)))
        return logits
