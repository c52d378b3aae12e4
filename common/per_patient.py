"""Sums of gradients, each clipped to one patient's share: three engines that agree, and the models they can take.

::

    model, inputs [B, ...] (one row per patient), losses --clipped_sum(engine)--> parameter name -> sum over rows of
                                                              min(1, clip / |gradient of the row|) * gradient of the row
    engine "fast"    one backward pass to the layers' outputs, norms layer by layer, one contraction (book_keeping.py)
           "opacus"  Opacus' hooks keep every row's gradient, which are then clipped and added: the reference
           "plain"   row by row with autograd: the oracle

Formal guarantees, for a model that `check_private` lets pass
- Adding or removing one row changes the result by at most `clip` (L2 over all parameters together), up to float32 rounding,
  which `xfed.common.mechanism.MARGIN` pays for. No row's gradient depends on another row: nothing normalises over
  the batch, no layer keeps statistics, and every loss is of its own row.
- The result of an empty batch is zero; `.grad` is neither read nor written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xfed.common.book_keeping import book_keeping_sum, exact_float32
from xfed.common.dcgan import ReferenceNorm
from xfed.common.dcnn import SeededDropout
from xfed.common.errors import ConfigError

__all__ = ["ClippedSum", "check_private", "clipped_sum"]

Losses = Callable[[Tensor], Tensor]
Sums = dict[str, Tensor]

_LEFT_BY_OPACUS = ("grad_sample", "_forward_counter", "_current_grad_sample", "activations", "max_batch_len")

# smaller than any norm that a clip would touch; keeps 0 / 0 out
_TINY = 1e-30

_WITH_RULES = (nn.Conv2d, nn.Linear, nn.GroupNorm)
_ROW_BY_ROW = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.Dropout,
    nn.ELU,
    nn.Flatten,
    nn.GELU,
    nn.Identity,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
    nn.ZeroPad2d,
    SeededDropout,
)


class ClippedSum(Protocol):
    """Sum over the rows of `inputs` of each row's gradient, clipped to L2 norm `clip`."""

    def __call__(self, model: nn.Module, inputs: Tensor, losses: Losses, clip: float) -> Sums:
        """Parameter names to sums, in the parameters' type; ``losses(model(inputs))`` is [B], entry b of row b alone.

        Raises `ConfigError` when the model is one that `check_private` refuses, `ValueError` when `clip` or the losses'
        shape is wrong.
        """
        ...


def _reason(name: str, layer: nn.Module) -> str | None:
    """Why a layer cannot be trained privately, or None."""
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | ReferenceNorm):
        return (
            f"{name!r} is a {kind}: it normalises over the batch, so each patient changes the gradients of all others. "
            "Use GroupNorm, or no norm."
        )
    if next(layer.buffers(recurse=False), None) is not None:
        return f"{name!r} ({kind}) has buffers: they would carry what patients put there out without noise. Leave them out."
    if getattr(layer, "inplace", False):
        return f"{name!r} ({kind}) works in place: it overwrites what gradients are computed from. Set inplace=False."
    if parametrize.is_parametrized(layer):
        return f"{name!r} ({kind}) is reparametrised (spectral norm or the like). Rescale its weights after the step instead."
    if type(layer) in _WITH_RULES:
        if layer._parameters.keys() - {"weight", "bias"}:
            return f"{name!r} ({kind}) has other parameters than weight and bias: {', '.join(layer._parameters)}."
        if isinstance(layer, nn.Conv2d) and (
            layer.groups != 1
            or layer.dilation != (1, 1)
            or layer.padding_mode != "zeros"
            or isinstance(layer.padding, str)
        ):
            return f"{name!r} is a convolution with groups, dilation, or padding that is not a number of zeros; there is no rule."
        return None
    if next(layer.parameters(recurse=False), None) is not None:
        return f"{name!r} is a {kind} with parameters, and there is no rule for their gradients per patient."
    if next(layer.children(), None) is None and type(layer) not in _ROW_BY_ROW and not _is_empty_container(layer):
        return (
            f"{name!r} is a {kind}, which is not known to keep rows apart. Known ones are in xfed.common.per_patient."
        )
    return None


def _is_empty_container(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def check_private(model: nn.Module) -> None:
    """Raise `ConfigError` with the reason when rows cannot be clipped one by one in `model`.

    Refused: norms over the batch, buffers, in-place activations, reparametrised layers, layers with parameters that have no
    rule, leaves that are not known to keep rows apart, and parameters or layers that stand in two places. What a module
    with children does in its own `forward` is not seen: it must not mix rows either.
    """
    places: dict[int, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        reason = _reason(name or "model", layer)
        if reason is None and id(layer) in places and next(layer.parameters(), None) is not None:
            reason = (
                f"{name!r} and {places[id(layer)]!r} are one layer in two places: its gradients would be clipped apart."
            )
        if reason is not None:
            raise ConfigError(f"this model cannot be trained privately: {reason}")
        places[id(layer)] = name
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            raise ConfigError(
                f"this model cannot be trained privately: {name!r} and {owners[id(parameter)]!r} are one parameter; "
                "its gradients would be clipped apart. Give each layer its own."
            )
        owners[id(parameter)] = name


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _factors(norms: Tensor, clip: float) -> Tensor:
    """What each row is multiplied with, [B] in (0, 1]: ``min(1, clip / norm)``."""
    return (clip / norms.clamp(min=_TINY)).clamp(max=1)


def _rows_checked(losses: Losses, rows: int) -> Losses:
    def checked(outputs: Tensor) -> Tensor:
        values = losses(outputs)
        if values.shape != (rows,):
            raise ValueError(f"losses must be one number per row, shape [{rows}], not {list(values.shape)}")
        return values

    return checked


def _plain(model: nn.Module, inputs: Tensor, losses: Losses, clip: float) -> Sums:
    """One backward pass per row."""
    parameters = _parameters(model)
    with torch.enable_grad():
        values = losses(model(inputs.detach()))
    sums: Sums = {}
    for value in values.unbind():
        found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients = {name: slope for name, slope in zip(parameters, found, strict=True) if slope is not None}
        norm = torch.stack([slope.square().sum() for slope in gradients.values()]).sum().sqrt()
        factor = _factors(norm, clip)
        for name, slope in gradients.items():
            sums[name] = slope * factor if name not in sums else sums[name].add_(slope * factor)
    return sums


def _fast(model: nn.Module, inputs: Tensor, losses: Losses, clip: float) -> Sums:
    """Book-keeping."""
    return book_keeping_sum(model, inputs, losses, lambda norms: _factors(norms, clip))


def _standard(value: Tensor) -> Tensor:
    """A copy with the strides of the standard layout; `contiguous` lets a size of one keep the others', which then spread."""
    return value.clone(memory_format=torch.contiguous_format)


@contextmanager
def _contiguous(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Parameters in the standard layout and without gradients, and afterwards as they were: Opacus misreads channels_last."""
    before = {name: (parameter.data, parameter.grad) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data, parameter.grad = _standard(parameter.data), None
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = before[name]


def _opacus(model: nn.Module, inputs: Tensor, losses: Losses, clip: float) -> Sums:
    """Opacus' hooks (functions of its own for every layer, no functorch)."""
    # imported here: it takes a second, and the fast engine does without
    from opacus.grad_sample import GradSampleModule

    parameters = _parameters(model)
    with _contiguous(parameters), warnings.catch_warnings():
        # the inputs carry no gradient, on purpose
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        hooked: Any = GradSampleModule(model, loss_reduction="sum", force_functorch=False)
        try:
            with torch.enable_grad():
                losses(hooked(_standard(inputs.detach()))).sum().backward()  # type: ignore[no-untyped-call]
            found = {name: getattr(parameter, "grad_sample", None) for name, parameter in parameters.items()}
            samples: Sums = {name: sample.detach() for name, sample in found.items() if sample is not None}
            norms = torch.stack([sample.flatten(1).square().sum(1) for sample in samples.values()]).sum(0).sqrt()
            factors = _factors(norms, clip)
            return {name: torch.tensordot(factors, sample, dims=1) for name, sample in samples.items()}
        finally:
            hooked.to_standard_module()
            for owner in (*parameters.values(), *model.modules()):
                for left in _LEFT_BY_OPACUS:
                    owner.__dict__.pop(left, None)


_ENGINES: dict[str, Callable[[nn.Module, Tensor, Losses, float], Sums]] = {
    "fast": _fast,
    "opacus": _opacus,
    "plain": _plain,
}


def clipped_sum(engine: str) -> ClippedSum:
    """The engine "fast", "opacus" or "plain". Raises `ConfigError` for another name."""
    if engine not in _ENGINES:
        raise ConfigError(f"privacy.engine is {engine!r}; known are {', '.join(_ENGINES)}")
    run = _ENGINES[engine]

    def summed(model: nn.Module, inputs: Tensor, losses: Losses, clip: float) -> Sums:
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be a finite number above 0, not {clip}")
        check_private(model)
        with exact_float32():
            found = run(model, inputs, _rows_checked(losses, len(inputs)), clip) if len(inputs) else {}
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in _parameters(model).items()}

    return summed
