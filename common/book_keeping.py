"""Per-patient clipping from one backward pass: norms layer by layer, and only then the weighted sum.

::

    forward    each layer's input is kept (autograd keeps it anyway)
    backward   to the layers' outputs alone, no parameter's gradient; at each layer, as soon as its output gradient is there:
                 few places or many channels   norm from Gram matrices ("ghost"); input and output gradient are kept
                 many places, small kernel     the rows' own gradients are kept; input and output gradient are dropped
    norms [B] --clip--> factors [B] --one contraction per layer--> sums

Ghost norms: Goodfellow 2015 for linear layers, Bu et al. 2022 (section 3) for convolutions; book-keeping: Bu et al. 2023
(algorithm 1). For a convolution with unfolded input A [L, K] and output gradient G [L, C] of one row, the gradient is G'A and
its squared norm the sum of ``(AA') * (GG')``, which costs about L^2 (K + C) operations instead of L K C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from xfed.common.errors import ConfigError

__all__ = ["book_keeping_sum", "exact_float32"]

# how many times the operations of a contraction the Gram matrices may cost; measured on one core, float32
_GHOST_COST = 0.7
_SMALL_PATCH = 32
_KEEP_BYTES = 512 << 20
_WORK_BYTES = 64 << 20
# the C library hands pieces above 32 MiB back at once, and every new page costs more than what is written there
_PIECE_BYTES = 16 << 20


@contextmanager
def exact_float32() -> Iterator[None]:
    """No autocast and no TF32 inside: a norm in fewer bits lets a row exceed its clip."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul = torch.backends.cuda.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        conv.fp32_precision = matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            conv.fp32_precision, matmul.fp32_precision = before


@dataclass(kw_only=True)
class _Kept:
    """What one layer leaves behind: its input until backward, then squared norms [B] and how to weigh the rows."""

    layer: nn.Module
    inputs: Tensor | None
    version: int
    norms: list[Tensor] = field(default_factory=list)
    weigh: Callable[[Tensor], dict[str, Tensor]] | None = None


def _weight_gradient(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> Tensor:
    """The convolution's weight gradient, added up over the rows."""
    found = torch.ops.aten.convolution_backward(
        slopes,
        inputs,
        layer.weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0, 0],
        layer.groups,
        [False, True, False],
    )
    gradient: Tensor = found[1]
    return gradient


def _row_gradients(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Each row's weight gradient, flat, [B, weights]; the order of a row's entries is that of the weight in memory."""
    patch = layer.weight[0].numel()
    if inputs.device.type != "cpu" or patch <= _SMALL_PATCH:
        parts = []
        for some in _chunks(len(inputs), 2 * patch * slopes[0, 0].numel() * inputs.element_size()):
            patches = unfold(inputs[some], layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
            found = torch.bmm(slopes[some].flatten(2), patches.transpose(1, 2)).view(-1, *layer.weight.shape)
            parts.append(_in_memory_order(found, layer.weight))
        return torch.cat(parts)
    # on a CPU unfolding costs more than one call per row
    rows = inputs.new_empty(len(inputs), layer.weight.numel())
    for row in range(len(inputs)):
        found = _weight_gradient(layer, inputs[row : row + 1], slopes[row : row + 1])
        rows[row] = _in_memory_order(found[None], layer.weight)[0]
    return rows


def _channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, *weight.shape] as [B, weights] in the order in which `weight` lies in memory: a copy less in channels_last."""
    return rows.permute(0, 1, 3, 4, 2).flatten(1) if _channels_last(weight) else rows.flatten(1)


def _in_shape(flat: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_in_memory_order` for one row."""
    wide, channels, height, width = weight.shape
    if _channels_last(weight):
        return flat.view(wide, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(weight.shape)


def _chunks(rows: int, bytes_per_row: int, most: int = _WORK_BYTES) -> Iterator[slice]:
    step = max(1, min(rows, most // max(1, bytes_per_row)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _squares(rows: Tensor) -> Tensor:
    """Squared norm of each row [B]."""
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return norms.square_()


def _gram(rows: Tensor) -> Tensor:
    """Products of every two places of maps [B, channels, H, W], summed over the channels: [B, H, W, H, W]."""
    places = rows.flatten(2)
    height, width = rows.shape[2:]
    return torch.bmm(places.transpose(1, 2), places).view(-1, height, width, height, width)


def _reach(offset: int, step: int, length: int, count: int) -> tuple[slice, slice]:
    """Outputs whose place ``step * output + offset`` lies in 0..length-1, and those places."""
    first = max(0, -(offset // step))
    last = min(count - 1, (length - 1 - offset) // step)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * step + offset, last * step + offset + 1, step)


def _ghost_norms(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Squared norm of each row's weight gradient, [B], from Gram matrices over the places.

    AA' of the unfolded input is a sum of pieces of the Gram matrix of the input itself, one for each place under the kernel: so
    nothing is unfolded, and the products are as many times fewer as the kernel has places.
    """
    (height, width), (high, wide) = inputs.shape[2:], slopes.shape[2:]
    (down, right), (top, left) = layer.stride, (int(side) for side in layer.padding)
    parts = []
    for some in _chunks(len(inputs), ((height * width) ** 2 + 2 * (high * wide) ** 2) * inputs.element_size()):
        products, weights = _gram(inputs[some]), _gram(slopes[some])
        total = torch.zeros_like(weights)
        for i in range(layer.kernel_size[0]):
            rows, from_rows = _reach(i - top, down, height, high)
            for j in range(layer.kernel_size[1]):
                columns, from_columns = _reach(j - left, right, width, wide)
                total[:, rows, columns, rows, columns] += products[:, from_rows, from_columns, from_rows, from_columns]
        # rounding may leave a tiny negative
        parts.append(torch.linalg.vecdot(total.flatten(1), weights.flatten(1)).clamp_(min=0))
    return torch.cat(parts)


def _prefers_ghost(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> bool:
    """Whether Gram matrices are cheaper than gradients row by row."""
    before, places = inputs[0, 0].numel(), slopes[0, 0].numel()
    gram = before**2 * layer.in_channels + places**2 * (layer.out_channels + 8 * layer.weight[0, 0].numel())
    return gram <= _GHOST_COST * places * layer.weight.numel()


def _convolution(kept: _Kept, inputs: Tensor, slopes: Tensor) -> None:
    layer = kept.layer
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(type(layer))
    ghost = _prefers_ghost(layer, inputs, slopes)
    row_bytes = layer.weight.numel() * inputs.element_size()
    bias = slopes.sum((2, 3)) if layer.bias is not None and layer.bias.requires_grad else None

    def finish(weight: Callable[[Tensor], Tensor] | None) -> None:
        def weigh(factors: Tensor) -> dict[str, Tensor]:
            sums = {} if weight is None else {"weight": weight(factors)}
            return sums if bias is None else {**sums, "bias": factors @ bias}

        kept.weigh = weigh

    if bias is not None:
        kept.norms.append(_squares(bias))
    if not layer.weight.requires_grad:
        finish(None)
    elif not ghost and row_bytes * len(inputs) <= _KEEP_BYTES:
        pieces = list(_chunks(len(inputs), row_bytes, _PIECE_BYTES))
        rows = [_row_gradients(layer, inputs[some], slopes[some]) for some in pieces]
        kept.norms.append(torch.cat([_squares(piece) for piece in rows]))

        def weighted(factors: Tensor) -> Tensor:
            total = factors[pieces[0]] @ rows[0]
            for some, piece in zip(pieces[1:], rows[1:], strict=True):
                total.addmv_(piece.T, factors[some])
            return _in_shape(total, layer.weight)

        finish(weighted)
    else:
        if ghost:
            kept.norms.append(_ghost_norms(layer, inputs, slopes))
        else:
            parts = [_squares(_row_gradients(layer, inputs[s], slopes[s])) for s in _chunks(len(inputs), row_bytes)]
            kept.norms.append(torch.cat(parts))
        # slopes may belong to autograd, which may hand the same tensor to two branches: not in place
        finish(lambda factors: _weight_gradient(layer, inputs, slopes * factors.view(-1, 1, 1, 1)))


def _linear(kept: _Kept, inputs: Tensor, slopes: Tensor) -> None:
    layer = kept.layer
    if inputs.ndim != 2:
        raise ConfigError(
            f"a linear layer saw an input of shape {list(inputs.shape)}, and the fast engine clips patients at linear "
            "layers of [rows, features] alone. Flatten before it, or set privacy.engine to opacus."
        )
    size = _squares(slopes)
    weight, bias = layer.weight.requires_grad, layer.bias is not None and layer.bias.requires_grad
    if weight:
        kept.norms.append(_squares(inputs) * size)
    if bias:
        kept.norms.append(size)

    def weigh(factors: Tensor) -> dict[str, Tensor]:
        sums = {"weight": (slopes * factors[:, None]).T @ inputs} if weight else {}
        return {**sums, "bias": factors @ slopes} if bias else sums

    kept.weigh = weigh


def _group_norm(kept: _Kept, inputs: Tensor, slopes: Tensor) -> None:
    layer = kept.layer
    if not isinstance(layer, nn.GroupNorm):
        raise TypeError(type(layer))
    normal = nn.functional.group_norm(inputs, layer.num_groups, eps=layer.eps)
    rows = {"weight": (slopes * normal).flatten(2).sum(2), "bias": slopes.flatten(2).sum(2)}
    rows = {name: value for name, value in rows.items() if getattr(layer, name).requires_grad}
    kept.norms += [_squares(value) for value in rows.values()]
    kept.weigh = lambda factors: {name: factors @ value for name, value in rows.items()}


_RULES: dict[type[nn.Module], Callable[[_Kept, Tensor, Tensor], None]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
}


def _keep(
    name: str, kept: dict[str, _Kept], roots: list[Tensor], rows: int
) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that keeps a layer's input, and hangs its rule on the gradient of its output."""

    def seen(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = arguments[0]
        if name in kept:
            raise ConfigError(
                f"layer {name!r} is used twice in one pass: its gradients would be clipped apart. Give each use a layer of "
                "its own, or set privacy.engine to opacus."
            )
        if len(inputs) != rows or len(output) != rows:
            raise ConfigError(
                f"layer {name!r} maps {len(inputs)} to {len(output)} rows in a batch of {rows}: patients cannot be told "
                "apart there, so this model cannot be trained privately."
            )
        if not output.requires_grad:
            return
        entry = _Kept(layer=layer, inputs=inputs.detach(), version=inputs._version)
        kept[name] = entry
        if not inputs.requires_grad:
            roots.append(output)

        def arrived(slopes: Tensor) -> None:
            values, entry.inputs = entry.inputs, None
            if values is None or values._version != entry.version:
                raise ConfigError(
                    f"the input of layer {name!r} was changed in place after the layer had read it. Use operations that are "
                    "not in place (inplace=False, no add_, no relu_)."
                )
            with torch.no_grad():
                _RULES[type(layer)](entry, values, slopes)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    return seen


def book_keeping_sum(
    model: nn.Module, inputs: Tensor, losses: Callable[[Tensor], Tensor], clip_factors: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum over rows of factor * gradient; ``clip_factors`` maps norms [B] to factors [B]. Parameters that had no part are absent.

    `model`: layers with parameters are Conv2d (groups 1, dilation 1), Linear and GroupNorm. Raises `ConfigError` where a layer is
    used twice, mixes rows, or an input was changed in place.
    """
    kept: dict[str, _Kept] = {}
    roots: list[Tensor] = []
    handles = []
    try:
        for name, layer in model.named_modules():
            if type(layer) in _RULES and any(parameter.requires_grad for parameter in layer.parameters()):
                handles.append(layer.register_forward_hook(_keep(name, kept, roots, len(inputs))))
        with torch.enable_grad():
            total = losses(model(inputs.detach())).sum()
    finally:
        for handle in handles:
            handle.remove()
    if not roots:
        return {}
    # what leads to the first layers' outputs passes every other layer's output on its way
    torch.autograd.grad(total, roots, allow_unused=True)
    done = {name: entry for name, entry in kept.items() if entry.weigh is not None}
    with torch.no_grad():
        squares = [norm for entry in done.values() for norm in entry.norms]
        factors = clip_factors(torch.stack(squares).sum(0).sqrt()) if squares else inputs.new_ones(len(inputs))
        sums = {}
        for name, entry in done.items():
            if entry.weigh is not None:
                for part, value in entry.weigh(factors).items():
                    sums[f"{name}.{part}" if name else part] = value
                entry.weigh = None
    return sums
