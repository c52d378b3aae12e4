"""Privacy noise: its size and shape, that it never comes twice, and that what leaves lies on a grid that data do not move."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from tests.conftest import ROOT
from xfed.common import noise
from xfed.common.errors import FederationError
from xfed.common.mechanism import MARGIN, RecordingMechanism, ReplayingMechanism, SecretMechanism
from xfed.common.noise import GRID_LOSS, add_gaussian, grid_for, secret_words

LARGE = 400_000
# one false alarm in a million runs
SURE = 1e-6


def _release(value: torch.Tensor, sigma: float = 1.0, sensitivity: float = 1.0) -> torch.Tensor:
    return SecretMechanism().release({"w": value}, sensitivity=sensitivity, sigma=sigma)["w"]


@pytest.mark.parametrize(("sigma", "sensitivity"), [(1.0, 1.0), (0.3, 7.0), (50.0, 0.01)])
def test_noise_is_normal_with_the_deviation_that_was_asked_for(sigma: float, sensitivity: float) -> None:
    found = _release(torch.full((LARGE,), 3.0), sigma, sensitivity).double().numpy() - 3
    wanted = sigma * sensitivity
    assert kstest(found, norm(0, wanted).cdf).pvalue > SURE
    for wrong in (2 / 3, 3 / 2):
        assert kstest(found, norm(0, wrong * wanted).cdf).pvalue < SURE
    # 5 standard errors
    assert abs(found.std() / wanted - 1) < 5 / math.sqrt(2 * LARGE)
    assert abs(found.mean() / wanted) < 5 / math.sqrt(LARGE)


def test_values_are_independent_within_and_between_pieces() -> None:
    found = _release(torch.zeros(LARGE)).numpy()
    half = noise._CHUNK // 2
    for lag in (1, 2, half, noise._CHUNK):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < 5 / math.sqrt(LARGE - lag), lag
        # Box-Muller gives pairs on a circle: their squares must not hang together either
        assert abs(np.corrcoef(found[:-lag] ** 2, found[lag:] ** 2)[0, 1]) < 5 / math.sqrt(LARGE - lag), lag


def test_tails_are_those_of_a_normal() -> None:
    found = np.abs(_release(torch.zeros(4 * LARGE)).numpy())
    for limit in (3.0, 4.0):
        expected = 2 * norm.sf(limit) * len(found)
        assert abs((found > limit).sum() - expected) < 5 * math.sqrt(expected)


def test_rare_uniforms_are_refined_to_what_more_digits_give(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        def fill(self, words: np.ndarray) -> None:
            words[:] = np.uint64(1) << np.uint64(63)

    last = (1 << 53) - 1
    whole = np.array([0, 5, last, last - 5, 1 << 52])
    logarithms = np.log((whole + 0.5) * 2.0**-53)
    before = logarithms.copy()
    noise._refine(Half(), whole, logarithms)  # type: ignore[arg-type]
    # the further digits are one half and half a unit of the last: as good as one half
    expected = [math.log(0.5) - 53 * math.log(2), math.log(5.5) - 53 * math.log(2), -0.5 * 2.0**-53, -5.5 * 2.0**-53]
    assert logarithms[:4] == pytest.approx(expected, rel=1e-14)
    assert logarithms[4] == before[4]


def test_results_lie_on_the_grid_whatever_the_sums_are() -> None:
    grid = 2.0**-10
    sums = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    found = add_gaussian(sums, deviation=1.0, grid=grid)
    assert (found / grid == np.rint(found / grid)).all()
    # and the whole grid is used: two of every four steps, not multiples of a coarser one
    assert len(np.unique(np.rint(found / grid).astype(np.int64) % 4)) == 4


def test_rounding_is_to_the_nearest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(stream: object, words: np.ndarray, normals: np.ndarray) -> None:
        words[:], normals[:] = 1 << (noise._DITHER_BITS - 1), 0

    monkeypatch.setattr(noise, "_normals", none)
    sums = np.array([0.0, 0.49, 0.51, -0.51, 7.0], dtype=np.float32)
    assert add_gaussian(sums, deviation=1.0, grid=1.0).tolist() == [0, 0, 1, -1, 7]


@given(st.floats(1e-6, 1e6), st.integers(1, 10**9))
def test_the_grid_is_the_largest_power_of_two_that_is_fine_enough(sensitivity: float, entries: int) -> None:
    grid = grid_for(sensitivity, entries)
    assert math.frexp(grid)[0] == 0.5
    assert math.sqrt(entries) * grid < GRID_LOSS * sensitivity <= 2 * math.sqrt(entries) * grid * (1 + 1e-9)
    assert GRID_LOSS < MARGIN


def test_the_margin_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "xfed.common.mechanism.add_gaussian", lambda v, *, deviation, grid: asked.append(deviation) or v
    )
    _release(torch.zeros(3), sigma=2.0, sensitivity=3.0)
    assert asked == [6.0 * (1 + MARGIN)]


def test_no_two_releases_share_a_block() -> None:
    blocks = [secret_words(64).tobytes() for _ in range(50)]
    parts = {block[at : at + 8] for block in blocks for at in range(0, len(block), 8)}
    assert len(parts) == 50 * 64


def test_two_pieces_of_one_release_differ() -> None:
    stream = noise._KeyStream()
    first, second = np.empty(100, np.uint64), np.empty(100, np.uint64)
    stream.fill(first)
    stream.fill(second)
    assert not set(first.tolist()) & set(second.tolist())


def test_a_stream_is_chacha20_of_its_key() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = noise._KeyStream()
    words = np.empty(40, np.uint64)
    stream.fill(words)
    stream.fill(words)
    nonce = bytes(8) + (1).to_bytes(8, "little")
    assert words.tobytes() == Cipher(algorithms.ChaCha20(stream._key, nonce), None).encryptor().update(bytes(320))


def test_a_forked_child_draws_other_numbers() -> None:
    code = (
        "import os, json, numpy as np\n"
        "from xfed.common.noise import secret_words, add_gaussian\n"
        "zeros = np.zeros(8, np.float32)\n"
        "draw = lambda: [secret_words(8).tolist(), add_gaussian(zeros, deviation=1.0, grid=2.0**-20).tolist()]\n"
        "draw()\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(write, json.dumps(draw()).encode()); os._exit(0)\n"
        "mine = draw(); os.wait(); child = json.loads(os.read(read, 65536))\n"
        "print(json.dumps([mine, child]))"
    )
    outputs = [
        json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    words = [tuple(one[0]) for pair in outputs for one in pair]
    noises = [tuple(one[1]) for pair in outputs for one in pair]
    assert len(set(words)) == len(set(noises)) == 4
    assert len({word for four in words for word in four}) == 32


def test_seeds_have_no_effect() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        found.append(_release(torch.zeros(16)))
    assert not torch.equal(*found)
    for made in (SecretMechanism, RecordingMechanism):
        with pytest.raises(TypeError):
            made(1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "made", [SecretMechanism, RecordingMechanism, lambda: ReplayingMechanism([]), noise._KeyStream]
)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_that_makes_noise_is_copied_or_pickled(made, way) -> None:
    with pytest.raises(TypeError, match="copied or pickled"):
        way(made())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_sums_that_are_not_finite_are_not_released(bad: float) -> None:
    value = torch.zeros(100_000)
    value[99_999] = bad
    with pytest.raises(FederationError, match="not finite"):
        _release(value)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_sigma_or_sensitivity_that_is_no_size_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        _release(torch.zeros(3), sigma=bad)
    with pytest.raises(ValueError, match="sensitivity"):
        _release(torch.zeros(3), sensitivity=bad)
    with pytest.raises(ValueError, match="deviation"):
        add_gaussian(np.zeros(3, np.float32), deviation=bad, grid=1.0)
    with pytest.raises(ValueError, match="2\\^52"):
        add_gaussian(np.zeros(3, np.float32), deviation=1e20, grid=1.0)


def test_shapes_names_and_layout_are_kept() -> None:
    sums = {
        "a": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "b": torch.zeros(()),
        "c": torch.zeros(0),
    }
    found = SecretMechanism().release({**sums, "d": torch.zeros(7, dtype=torch.float64)}, sensitivity=1e-6, sigma=1e-3)
    assert list(found) == ["a", "b", "c", "d"]
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert [tuple(value.shape) for value in found.values()] == [(4, 3, 5, 5), (), (0,), (7,)]
    assert torch.allclose(found["a"], sums["a"], atol=1e-7)


def test_poisson_samples_have_binomial_sizes_and_independent_patients() -> None:
    patients, q, times = 40, 0.3, 4000
    mechanism = SecretMechanism()
    taken = np.zeros((times, patients))
    for row in taken:
        row[mechanism.sample(patients, q)] = 1
    from scipy.stats import binom

    sizes = np.bincount(taken.sum(1).astype(int), minlength=patients + 1)
    expected = binom.pmf(np.arange(patients + 1), patients, q) * times
    usual = expected >= 5
    found, wanted = np.append(sizes[usual], sizes[~usual].sum()), np.append(expected[usual], expected[~usual].sum())
    assert chisquare(found, wanted).pvalue > SURE
    # a sampler of fixed size or of the wrong rate would be seen
    assert (
        chisquare(
            np.where(usual, times / usual.sum(), 0)[usual], expected[usual] * times / expected[usual].sum()
        ).pvalue
        < SURE
    )
    assert chisquare(taken.sum(0)).pvalue > SURE
    together = (taken[:, 0] * taken[:, 1]).mean()
    assert abs(together - q * q) < 5 * q / math.sqrt(times)


def test_sample_at_its_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = SecretMechanism()
    assert mechanism.sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert mechanism.sample(0, 0.5).dtype == np.int64
    assert len(mechanism.sample(0, 0.5)) == 0
    words = np.array([0, 1 << 62, (1 << 62) - 1, (1 << 64) - 1], dtype=np.uint64)
    monkeypatch.setattr("xfed.common.mechanism.secret_words", lambda count: words[:count])
    assert mechanism.sample(4, 0.25).tolist() == [0, 2]
    for q in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sampling rate"):
            mechanism.sample(3, q)
    with pytest.raises(ValueError, match="patients"):
        mechanism.sample(-1, 0.5)


def test_picks_are_uniform_for_each_count() -> None:
    mechanism = SecretMechanism()
    found = mechanism.pick(np.full(30_000, 3))
    assert chisquare(np.bincount(found, minlength=3)).pvalue > SURE
    assert mechanism.pick(np.ones(5, np.int64)).tolist() == [0] * 5
    assert len(mechanism.pick(np.zeros(0, np.int64))) == 0
    for bad in ([1, 0], [-2], [[1]]):
        with pytest.raises(ValueError, match="at least one image"):
            mechanism.pick(np.array(bad))


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), max_size=20))
def test_picks_are_in_range(counts: list[int]) -> None:
    found = SecretMechanism().pick(np.array(counts, dtype=np.int64))
    assert ((found >= 0) & (found < np.array(counts, dtype=np.int64))).all()


def test_a_replay_answers_with_what_was_recorded() -> None:
    recording = RecordingMechanism()
    first = recording.release({"w": torch.zeros(3)}, sensitivity=1.0, sigma=1.0)
    second = recording.release({"w": torch.ones(3)}, sensitivity=1.0, sigma=1.0)
    kept = first["w"].clone()
    first["w"].zero_()
    assert torch.equal(recording.outputs[0]["w"], kept)
    replay = ReplayingMechanism(recording.outputs)
    assert torch.equal(replay.release({"w": torch.full((3,), 9.0)}, sensitivity=1.0, sigma=1.0)["w"], kept)
    with pytest.raises(ValueError, match="names and shapes"):
        replay.release({"w": torch.zeros(4)}, sensitivity=1.0, sigma=1.0)
    replay = ReplayingMechanism(recording.outputs[1:])
    assert torch.equal(replay.release({"w": torch.zeros(3)}, sensitivity=1.0, sigma=1.0)["w"], second["w"])
    with pytest.raises(ValueError, match="more often"):
        replay.release({"w": torch.zeros(3)}, sensitivity=1.0, sigma=1.0)


def test_the_key_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(noise.os, "urandom", lambda count: asked.append(count) or real(count))
    _release(torch.zeros(3))
    secret_words(2)
    assert asked == [32, 32]
