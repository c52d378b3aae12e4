"""Clipped sums: three engines agree, one row changes them by at most the clip, and models that mix rows are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from xfed.common import book_keeping
from xfed.common.dcgan import Discriminator, Generator
from xfed.common.dcnn import DCNN
from xfed.common.errors import ConfigError
from xfed.common.googlenet import GoogLeNet
from xfed.common.mechanism import MARGIN
from xfed.common.per_patient import check_private, clipped_sum

Sums = dict[str, Tensor]


SIZE = {"discriminator": 16, "googlenet": 32}


def _rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _discriminator(dropout: float = 0.0) -> nn.Module:
    return Discriminator(SIZE["discriminator"], 8, _rng())


MODELS = {
    "discriminator": _discriminator,
    "dcnn": lambda dropout=0.0: DCNN(16, 3, 8, dropout, _rng(), hidden=16),
    "dcnn with norms": lambda dropout=0.0: DCNN(16, 3, 8, dropout, _rng(), hidden=16, norm=True),
    "googlenet": lambda dropout=0.0: GoogLeNet(32, 3, 6, dropout, _rng()),
}


def _images(rows: int, size: int = 16, seed: int = 2) -> Tensor:
    return torch.randn(rows, 1, size, size, generator=_rng(seed))


def _losses(logits: Tensor) -> Tensor:
    """Half of the rows are real, the others fake; or the class is the row's number."""
    if logits.ndim == 1:
        return softplus(torch.where(torch.arange(len(logits)) % 2 == 0, -logits, logits))
    return cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1], reduction="none")


def _norm(sums: Sums) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in sums.values()))


def _apart(a: Sums, b: Sums) -> float:
    assert list(a) == list(b)
    return _norm({name: a[name] - b[name] for name in a})


def _one_by_one(model: nn.Module, inputs: Tensor, clip: float) -> Sums:
    """Micro-batches of one, with `.grad`: shares nothing with the engines."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(inputs)):
        model.zero_grad()
        logits = model(inputs[row : row + 1])
        if logits.ndim == 1:
            loss = softplus(-logits if row % 2 == 0 else logits).sum()
        else:
            loss = cross_entropy(logits, torch.tensor([row % logits.shape[1]]))
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad * min(1.0, clip / norm)
    model.zero_grad()
    return total


CASES = [(kind, 4, clip) for kind in MODELS for clip in (0.01, 1e9) if kind != "googlenet"]


@pytest.mark.parametrize(("kind", "rows", "clip"), [*CASES, ("discriminator", 1, 0.01), ("googlenet", 2, 0.01)])
def test_engines_agree_with_micro_batches_of_one_in_float64(kind: str, rows: int, clip: float) -> None:
    model, inputs = MODELS[kind]().double(), _images(rows, SIZE.get(kind, 16)).double()
    expected = _one_by_one(model, inputs, clip)
    for engine in ("plain", "fast", "opacus"):
        found = clipped_sum(engine)(model, inputs, _losses, clip)
        assert _apart(found, expected) <= 1e-12 * _norm(expected), engine


@pytest.mark.parametrize(("kind", "rows", "clip"), CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_engines_agree_in_float32_in_either_layout(
    kind: str, rows: int, clip: float, layout: torch.memory_format
) -> None:
    model, inputs = MODELS[kind](), _images(rows)
    standard = clipped_sum("plain")(model, inputs, _losses, clip)
    model, inputs = model.to(memory_format=layout), inputs.contiguous(memory_format=layout)
    # Opacus computes in the standard layout whatever comes in; other kernels round otherwise
    for engine, expected in (("fast", clipped_sum("plain")(model, inputs, _losses, clip)), ("opacus", standard)):
        assert _apart(clipped_sum(engine)(model, inputs, _losses, clip), expected) <= 1e-6 * _norm(expected), engine
    found = clipped_sum("fast")(model, inputs, _losses, clip)
    assert _apart(found, standard) <= 2e-5 * _norm(standard)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (4, 4), (5, 2)])
def test_ghost_norms_are_those_of_the_rows_gradients(stride, padding, kernel) -> None:
    layer = nn.Conv2d(3, 4, kernel, stride, padding).double()
    inputs = torch.randn(3, 3, 9, 8, generator=_rng()).double()
    slopes = torch.randn(layer(inputs).shape, generator=_rng(3)).double()
    rows = [book_keeping._weight_gradient(layer, inputs[b : b + 1], slopes[b : b + 1]) for b in range(3)]
    expected = torch.stack([row.square().sum() for row in rows])
    torch.testing.assert_close(book_keeping._ghost_norms(layer, inputs, slopes), expected, rtol=1e-12, atol=0)
    explicit = book_keeping._row_gradients(layer, inputs, slopes)
    torch.testing.assert_close(explicit, torch.stack(rows).flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ghost", [0.0, math.inf])
@pytest.mark.parametrize(
    "limits", [{}, {"_KEEP_BYTES": 0}, {"_PIECE_BYTES": 1, "_WORK_BYTES": 1}, {"_SMALL_PATCH": 10**9}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_way_through_a_convolution_gives_the_same(monkeypatch, ghost: float, limits, layout) -> None:
    model, inputs = DCNN(16, 3, 8, 0.0, _rng(), hidden=16, norm=True).double(), _images(5).double()
    expected = clipped_sum("plain")(model, inputs, _losses, 0.5)
    monkeypatch.setattr(book_keeping, "_GHOST_COST", ghost)
    for name, value in limits.items():
        monkeypatch.setattr(book_keeping, name, value)
    if "_WORK_BYTES" in limits:
        chunks = book_keeping._chunks
        monkeypatch.setattr(book_keeping, "_chunks", lambda rows, size, most=1: chunks(rows, size, 1))
    found = clipped_sum("fast")(model.to(memory_format=layout), inputs.contiguous(memory_format=layout), _losses, 0.5)
    assert _apart(found, expected) <= 1e-12 * _norm(expected)


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_dropout_masks_are_those_of_one_forward_pass(engine: str) -> None:
    model, inputs = MODELS["dcnn"](0.5).train(), _images(6)
    sums = []
    for name in ("plain", engine):
        for module in model.modules():
            if hasattr(module, "generator"):
                module.generator = _rng(9)
        sums.append(clipped_sum(name)(model, inputs, _losses, 0.1))
    assert _apart(*sums) <= 1e-6 * _norm(sums[0])


@pytest.mark.parametrize("engine", ["fast", "opacus", "plain"])
def test_an_empty_batch_gives_zeros_and_gradients_are_left_alone(engine: str) -> None:
    model = _discriminator().to(memory_format=torch.channels_last)
    marks = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name]
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    empty = clipped_sum(engine)(model, _images(0), _losses, 1.0)
    assert list(empty) == list(marks)
    assert _norm(empty) == 0
    some = clipped_sum(engine)(model, _images(3), _losses, 1.0)
    assert {value.dtype for value in some.values()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.grad is marks[name]
        assert float(parameter.grad.min()) == float(parameter.grad.max()) == 7.0
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.is_contiguous(memory_format=torch.channels_last) or parameter.ndim != 4
        assert not hasattr(parameter, "grad_sample")
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(hasattr(module, "activations") for module in model.modules())


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_frozen_parameters_have_no_part(engine: str) -> None:
    model, inputs = MODELS["dcnn"](), _images(4)
    model.blocks.requires_grad_(False)
    model.output.bias.requires_grad_(False)
    expected = clipped_sum("plain")(model, inputs, _losses, 0.1)
    assert list(expected) == ["hidden.weight", "hidden.bias", "output.weight"]
    assert _apart(clipped_sum(engine)(model, inputs, _losses, 0.1), expected) <= 1e-6 * _norm(expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 6), st.floats(0.01, 10), st.integers(0, 10**6), st.sampled_from(["fast", "opacus"]))
def test_one_more_row_changes_the_sum_by_the_clip_at_most(rows: int, clip: float, seed: int, engine: str) -> None:
    model = Discriminator(16, 4, _rng(seed))
    inputs = _images(rows + 1, 16, seed) * 3
    whole = clipped_sum(engine)(model, inputs, lambda out: softplus(-out), clip)
    without = clipped_sum(engine)(model, inputs[:rows], lambda out: softplus(-out), clip)
    assert _apart(whole, without) <= clip * (1 + MARGIN / 10)


def test_a_clipped_row_has_the_norm_of_the_clip_and_a_small_one_keeps_its_own() -> None:
    model, inputs = _discriminator(), _images(1)
    free = _norm(clipped_sum("fast")(model, inputs, _losses, 1e9))
    assert _norm(clipped_sum("fast")(model, inputs, _losses, free / 3)) == pytest.approx(free / 3, rel=1e-6)
    assert _norm(clipped_sum("fast")(model, inputs, _losses, free * 3)) == pytest.approx(free, rel=1e-6)


def test_autocast_outside_changes_nothing() -> None:
    model, inputs = _discriminator(), _images(4)
    expected = clipped_sum("fast")(model, inputs, _losses, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        found = clipped_sum("fast")(model, inputs, _losses, 0.1)
    assert _apart(found, expected) <= 1e-6 * _norm(expected)


def test_tf32_is_off_inside_and_as_before_afterwards() -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    with pytest.raises(KeyError), book_keeping.exact_float32():  # noqa: PT012
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        raise KeyError
    assert (conv.fp32_precision, matmul.fp32_precision) == before


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x))).sum(1)


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 4)).reshape(len(x), -1).sum(1)


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result = self.second(hidden.detach() if not hidden.requires_grad else hidden)
        with torch.no_grad():
            hidden.data.mul_(1)
            torch.autograd.graph.increment_version(hidden)
        return result.squeeze(1)


def test_what_only_shows_in_use_is_refused_with_its_reason() -> None:
    run = clipped_sum("fast")
    with pytest.raises(ConfigError, match="'layer' is used twice"):
        run(_Twice(), torch.randn(3, 4), lambda out: out, 1.0)
    with pytest.raises(ConfigError, match="6 to 6 rows in a batch of 3"):
        run(_Mixing(), torch.randn(3, 2, 4), lambda out: out, 1.0)
    with pytest.raises(ConfigError, match="linear layers of"):
        run(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 2, 4), lambda out: out.sum((1, 2)), 1.0)
    with pytest.raises((ConfigError, RuntimeError), match="in place"):
        run(_InPlace(), torch.randn(3, 4), lambda out: out, 1.0)


def test_hooks_are_gone_after_a_failure() -> None:
    for engine in ("fast", "opacus"):
        model = _discriminator()
        with pytest.raises(ValueError, match="one number per row"):
            clipped_sum(engine)(model, _images(3), lambda out: out.mean(), 1.0)
        assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_that_is_no_size_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        clipped_sum("fast")(_discriminator(), _images(2), _losses, clip)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="fast, opacus, plain"):
        clipped_sum("ghost")


def _shared_parameter() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _shared_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _with_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("average", torch.zeros(4))
    return model


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


REFUSED = {
    "normalises over the batch": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
    "'blocks.1' is a ReferenceNorm|'first_norm' is a ReferenceNorm": lambda: Generator(16, 4),
    "BatchNorm2d: it normalises over": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.Sequential(nn.SyncBatchNorm(4)),
    "'1' .InstanceNorm2d. has buffers": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)
    ),
    "'model' .Sequential. has buffers": _with_buffer,
    "'1' .ReLU. works in place": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "reparametrised": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "reparametrised|buffers": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "LayerNorm with parameters": lambda: nn.Sequential(nn.LayerNorm(4)),
    "ConvTranspose2d with parameters": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)),
    "PReLU with parameters": lambda: nn.Sequential(nn.PReLU()),
    "groups, dilation": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "there is no rule": lambda: nn.Conv2d(4, 4, 3, dilation=2),
    "padding that is not": lambda: nn.Conv2d(4, 4, 3, padding="same"),
    "number of zeros": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "'1.weight' and '0.weight' are one parameter": _shared_parameter,
    "'2' and '0' are one layer": _shared_layer,
    "_Unknown, which is not known to keep rows apart": lambda: nn.Sequential(nn.Linear(4, 4), _Unknown()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_private_are_refused_with_the_reason(reason: str) -> None:
    model = REFUSED[reason]()
    with pytest.raises(ConfigError, match=reason):
        check_private(model)
    for engine in ("fast", "opacus", "plain"):
        with pytest.raises(ConfigError, match=reason):
            clipped_sum(engine)(model, torch.zeros(0, 4), lambda out: out, 1.0)


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_the_studies_are_let_pass(kind: str) -> None:
    check_private(MODELS[kind](0.5))


def test_the_benchmark_takes_the_same_step_with_and_without_privacy() -> None:
    from xfed.simulations.benchmarks import private_step as bench

    load = bench.Load(size=8, width=4, batch=3)
    found = bench.measure(load, repeats=2, clock="cpu", memory=False)
    assert len(found.plain) == len(found.private) == len(found.noise) == len(found.ratios) == 2
    assert found.memory_ratio is None
    model, images = bench._made(load, "fast")
    assert images.shape == (6, 1, 8, 8)
    # without a clip the sum over rows is the plain step's gradient, before it is divided
    bench._losses(model(images)).sum().backward()
    sums = clipped_sum("fast")(model, images, bench._losses, 1e9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-4, atol=1e-6)
    cost = bench.Cost(
        load=load, plain=(2.0, 4.0), private=(3.0, 5.0), noise=(0.2, 0.2), added_mib={"fast": 2, "opacus": 8}
    )
    assert cost.ratios == (1.5, 1.25)
    assert cost.noise_shares == (0.1, 0.05)
    assert cost.memory_ratio == 0.25
