"""The private GAN round: by-hand equality, one release per step, and nothing but releases reaches G."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.conftest import tiny
from xfed.common import private_gan
from xfed.common.config import Gan
from xfed.common.dcgan import draw_latent
from xfed.common.errors import ConfigError
from xfed.common.gan import GanLosses, GanState, build_generator, new_gan_state
from xfed.common.mechanism import RecordingMechanism, ReplayingMechanism, SecretMechanism
from xfed.common.private_gan import (
    GRACE,
    RUNGS,
    Ladder,
    PrivateStep,
    check_rows,
    draw_rows_of_patients,
    train_private_gan_round,
)
from xfed.common.randomness import torch_generator
from xfed.common.weights import load_parameters, parameters_of

CPU = torch.device("cpu")
STEP = PrivateStep(q=0.3, sigma=1.0, clip=1.0, expected=6)


class Bare:
    """A mechanism without noise whose draws are given; keeps what it was asked to release."""

    def __init__(self, draws: Sequence[Sequence[int]]) -> None:
        self.draws = [np.array(draw, dtype=np.int64) for draw in draws]
        self.released: list[dict[str, Tensor]] = []
        self.asked: list[tuple[float, float]] = []

    def sample(self, patients: int, q: float) -> np.ndarray:
        return self.draws[len(self.released)]

    def pick(self, counts: np.ndarray) -> np.ndarray:
        return np.zeros(len(counts), dtype=np.int64)

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        self.asked.append((sensitivity, sigma))
        self.released.append({name: value.clone() for name, value in sums.items()})
        return dict(sums)


def _images(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, 32, 32), dtype=np.uint8)


def _rows(patients: int, images: int = 2) -> list[np.ndarray]:
    return [np.arange(images) + images * patient for patient in range(patients)]


def _settings(**changes: object) -> Gan:
    return tiny().gan.model_copy(update={"augment": "none", **changes})


def _state() -> GanState:
    study = tiny()
    state = new_gan_state(study, CPU, "d")
    load_parameters(state.generator, parameters_of(build_generator(study, ("g",))))
    return state


def _play(mechanism: object, rows_of: list[np.ndarray], settings: Gan, **changes: object) -> tuple[GanState, GanLosses]:
    state = _state()
    values = {"step": STEP, "engine": "plain", "ladder": Ladder(1), "rng": torch_generator(1, "round"), **changes}
    losses = train_private_gan_round(state, _images(), rows_of, settings, mechanism=mechanism, **values)  # type: ignore[arg-type]
    return state, losses


def _everything(state: GanState, losses: GanLosses, ladder: Ladder) -> dict[str, bytes]:
    arrays = {**parameters_of(state.generator), **state.arrays(), **ladder.as_arrays()}
    numbers = np.array([losses.discriminator, losses.generator])
    return {"losses": numbers.tobytes()} | {name: value.tobytes() for name, value in arrays.items()}


def _row_gradients(d: nn.Module, reals: Tensor, fakes: Tensor) -> list[list[Tensor]]:
    """Each row's gradient, written down once more: softplus(-D) for reals, softplus(D) for fakes."""
    losses = [softplus(-d(x[None])).sum() for x in reals] + [softplus(d(x[None])).sum() for x in fakes]
    return [list(torch.autograd.grad(loss, list(d.parameters()))) for loss in losses]


def _first_fakes(count: int) -> Tensor:
    state = _state()
    state.generator.train()
    with torch.no_grad():
        fakes: Tensor = state.generator(draw_latent(count, 128, torch_generator(1, "round")))
    return fakes


@pytest.mark.parametrize("engine", ["plain", "fast", "opacus"])
@pytest.mark.parametrize("draw", [[0, 3, 4], []])
def test_one_step_equals_a_computation_by_hand(engine: str, draw: list[int]) -> None:
    """Clip row by row, add, divide by the public 2 B, one step of an Adam that knows no fused kernels or layouts."""
    step = PrivateStep(q=0.3, sigma=1.0, clip=0.4, expected=6)
    rows_of = _rows(5)
    state, _ = _play(Bare([draw]), rows_of, _settings(steps_per_round=1), step=step, engine=engine)

    d = _state().discriminator.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        d.parameters(), _settings().learning_rate_d, betas=(0.5, 0.999), fused=False, foreach=False
    )
    reals = torch.from_numpy(_images()[[rows_of[p][0] for p in draw]]).float()[:, None] / 127.5 - 1
    gradients = _row_gradients(d, reals, _first_fakes(6))
    norms = [torch.sqrt(sum(g.square().sum() for g in row)) for row in gradients]
    assert min(norms) > 0.4, "otherwise nothing is clipped here"
    trained = dict(state.discriminator.named_parameters())
    for place, (name, parameter) in enumerate(d.named_parameters()):
        expected = sum(row[place] * 0.4 / norm for row, norm in zip(gradients, norms, strict=True)) / 12
        found = trained[name].grad
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, check_stride=False)
        parameter.grad = found.contiguous()  # Adam's first step magnifies rounding: it divides by the gradient's size
    optimizer.step()
    for name, value in parameters_of(d).items():
        np.testing.assert_allclose(parameters_of(state.discriminator)[name], value, atol=1e-6, err_msg=name)
    assert not np.array_equal(parameters_of(d)["logit.weight"], parameters_of(_state().discriminator)["logit.weight"])


def test_without_clipping_the_sum_is_the_gradient_of_the_plain_loss() -> None:
    mechanism, step = Bare([[1, 2]]), PrivateStep(q=0.3, sigma=1.0, clip=1e6, expected=6)
    rows_of = _rows(4)
    _play(mechanism, rows_of, _settings(steps_per_round=1), step=step, engine="fast")
    d = _state().discriminator
    reals = torch.from_numpy(_images()[[rows_of[1][0], rows_of[2][0]]]).float()[:, None] / 127.5 - 1
    (softplus(-d(reals)).sum() + softplus(d(_first_fakes(6))).sum()).backward()
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(mechanism.released[0][name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("patients", "q"), [(0, 0.5), (6, 1e-9), (6, 1.0), (15, 0.4)])
@pytest.mark.parametrize("ladder", ["adaptive", 3])
def test_there_are_as_many_releases_as_steps_whatever_is_drawn(patients: int, q: float, ladder: object) -> None:
    mechanism = RecordingMechanism()
    step = PrivateStep(q=q, sigma=1.0, clip=1.0, expected=6)
    state, losses = _play(
        mechanism,
        _rows(patients),
        _settings(steps_per_round=5, augment="full"),
        step=step,
        engine="fast",
        ladder=Ladder(ladder),  # type: ignore[arg-type]
    )
    assert len(mechanism.outputs) == 5
    assert np.isfinite([losses.discriminator, losses.generator]).all()
    assert all(parameter.requires_grad for parameter in state.discriminator.parameters())


def test_a_round_without_a_generator_step_leaves_the_generator_and_still_has_losses() -> None:
    state, losses = _play(SecretMechanism(), _rows(5), _settings(steps_per_round=2), engine="fast", ladder=Ladder(10))
    before, after = parameters_of(_state().generator), parameters_of(state.generator)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert losses.discriminator > 0
    assert losses.generator > 0


def test_sensitivity_and_sigma_reach_the_mechanism_as_claimed() -> None:
    mechanism, step = Bare([[0], [1, 2]]), PrivateStep(q=0.3, sigma=2.5, clip=0.7, expected=6)
    _play(mechanism, _rows(4), _settings(steps_per_round=2), step=step)
    assert mechanism.asked == [(0.7, 2.5)] * 2


def test_a_draw_larger_than_one_pass_is_released_once_and_sums_to_the_same() -> None:
    """Micro-batches: 18 reals and 6 fakes in passes of 6 rows, against one pass."""
    rows_of, draw = _rows(18), [list(range(18))]
    small, large = Bare(draw), Bare(draw)
    _play(small, rows_of, _settings(steps_per_round=1, batch=2), engine="fast")
    _play(large, rows_of, _settings(steps_per_round=1, batch=64), engine="fast")
    assert len(small.released) == len(large.released) == 1
    for name, value in large.released[0].items():
        torch.testing.assert_close(small.released[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patient", [0, 2, 3])
def test_one_patient_moves_the_sum_by_the_clip_at_most(patient: int) -> None:
    draw, step = [0, 1, 2, 3], PrivateStep(q=0.3, sigma=1.0, clip=0.4, expected=6)
    whole, without = Bare([draw]), Bare([[p for p in draw if p != patient]])
    for mechanism in (whole, without):
        _play(mechanism, _rows(5), _settings(steps_per_round=1), step=step, engine="fast")
    moved = sum((whole.released[0][name] - value).square().sum() for name, value in without.released[0].items())
    assert 0.39 < float(moved) ** 0.5 <= 0.4 * (1 + 1e-5)


def _replayed_pair(patient: int, seed: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A round on 12 patients, and the same on those without one, its releases replaced by those of the first."""
    rows_of, settings = _rows(12), _settings(steps_per_round=3, augment="translation")
    step = PrivateStep(q=0.5, sigma=1.0, clip=1.0, expected=6)
    recorder = RecordingMechanism()
    ladder = Ladder(2)
    full = _play(recorder, rows_of, settings, step=step, engine="fast", ladder=ladder, rng=torch_generator(seed))
    other = Ladder(2)
    less = [rows for number, rows in enumerate(rows_of) if number != patient]
    replayer = ReplayingMechanism(recorder.outputs)
    short = _play(replayer, less, settings, step=step, engine="fast", ladder=other, rng=torch_generator(seed))
    return _everything(*full, ladder), _everything(*short, other)


@pytest.mark.parametrize("pair", range(20))
def test_nothing_but_the_releases_tells_of_a_patient(pair: int) -> None:
    full, short = _replayed_pair(pair % 12, seed=pair)
    assert full == short


def test_the_replay_finds_a_shared_random_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: reals augmented from the public stream shift the latents of G."""
    shared: list[torch.Generator] = []
    ours = _settings(steps_per_round=3, augment="translation")

    def play(rows_of: list[np.ndarray], mechanism: SecretMechanism) -> dict[str, bytes]:
        shared.append(torch_generator(1))
        # q = 1: so that the two draws surely differ in length
        step, ladder = PrivateStep(q=1.0, sigma=1.0, clip=1.0, expected=6), Ladder(2)
        return _everything(
            *_play(mechanism, rows_of, ours, step=step, engine="fast", ladder=ladder, rng=shared[-1]), ladder
        )

    monkeypatch.setattr(private_gan, "secret_generator", lambda mechanism: shared[-1])
    recorder = RecordingMechanism()
    assert play(_rows(12), recorder) != play(_rows(11), ReplayingMechanism(recorder.outputs))


def test_an_interrupted_round_goes_on_with_the_same_bits() -> None:
    """State and ladder through arrays, against one that stays in memory; releases are recorded ones."""
    settings, recorder = _settings(steps_per_round=3, augment="translation"), RecordingMechanism()

    def play(mechanism: SecretMechanism, interrupt: bool) -> dict[str, bytes]:
        state, ladder = _state(), Ladder(2)
        for round in range(2):
            if interrupt and round == 1:
                saved, weights = {**state.arrays(), **ladder.as_arrays()}, parameters_of(state.generator)
                state, ladder = new_gan_state(tiny(), CPU, "other"), Ladder.from_arrays(2, saved)
                state.restore(saved)
                load_parameters(state.generator, weights)
            rng = torch_generator(5, round)
            losses = train_private_gan_round(state, _images(), _rows(9), settings, STEP, mechanism, rng, "fast", ladder)
        return _everything(state, losses, ladder)

    whole = play(recorder, False)
    assert play(ReplayingMechanism(recorder.outputs), True) == whole


def test_the_ladder_climbs_when_fakes_fool_d_and_only_after_the_grace() -> None:
    ladder = Ladder("adaptive")
    for g_step in range(1, GRACE):
        ladder.after_generator_step(0.0)
        assert ladder.d_steps == 1, g_step
    ladder.after_generator_step(0.0)
    assert ladder.d_steps == 2
    for _ in range(10 * GRACE * len(RUNGS)):
        ladder.after_generator_step(0.0)
    assert ladder.d_steps == RUNGS[-1]


def test_the_ladder_stays_where_d_tells_fakes_apart() -> None:
    ladder = Ladder("adaptive")
    for _ in range(5 * GRACE):
        ladder.after_generator_step(0.65)
    assert ladder.d_steps == 1


@pytest.mark.parametrize("d_steps", [1, 2, 7])
def test_a_fixed_ladder_gives_one_generator_step_in_k_across_rounds(d_steps: int) -> None:
    ladder, due = Ladder(d_steps), []
    for step in range(30):
        if step % 4 == 0:
            ladder = Ladder.from_arrays(d_steps, ladder.as_arrays())
        due.append(ladder.generator_is_due())
        ladder.after_generator_step(0.0)
    assert [step for step, yes in enumerate(due, 1) if yes] == list(range(d_steps, 31, d_steps))


def test_an_adaptive_ladder_survives_as_arrays_to_the_bit() -> None:
    whole, parts = Ladder("adaptive"), Ladder("adaptive")
    accuracies = np.random.default_rng(0).random(3000) * 0.9
    for accuracy in accuracies:
        whole.after_generator_step(accuracy)
        parts = Ladder.from_arrays("adaptive", parts.as_arrays())
        parts.after_generator_step(accuracy)
        assert np.array_equal(whole.as_arrays()["ladder/state"], parts.as_arrays()["ladder/state"])
    assert whole.d_steps > 1


@pytest.mark.parametrize("state", [[9, 0, 1, 0], [0.5, 0, 1, 0], [0, -1, 1, 0], [0, 0, 2, 0], [0, 0, np.nan, 0]])
def test_a_ladder_that_cannot_be_is_refused(state: list[float]) -> None:
    with pytest.raises(ValueError, match="ladder"):
        Ladder.from_arrays("adaptive", {"ladder/state": np.array(state, dtype=np.float32)})


@pytest.mark.parametrize("d_steps", [0, -1, 1.5, True, "many"])
def test_a_number_of_steps_that_is_none_is_refused(d_steps: object) -> None:
    with pytest.raises(ValueError, match="d_steps"):
        Ladder(d_steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"q": 0.0}, {"q": 1.1}, {"q": np.nan}, {"sigma": 0.0}, {"sigma": np.inf}, {"clip": -1.0}, {"clip": np.nan}),
        *({"expected": 0}, {"expected": 2.5}, {"expected": True}),
    ],
)
def test_a_step_outside_its_ranges_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PrivateStep(**{"q": 0.3, "sigma": 1.0, "clip": 1.0, "expected": 6, **wrong})  # type: ignore[arg-type]


def test_patients_without_images_or_sharing_one_are_refused() -> None:
    check_rows([np.array([0, 3]), np.array([1])])
    with pytest.raises(ValueError, match="without an image"):
        check_rows([np.array([0]), np.array([], dtype=np.int64)])
    for twice in ([np.array([0, 3]), np.array([3])], [np.array([2, 2])]):
        with pytest.raises(ValueError, match="two patients"):
            check_rows(twice)


def test_a_draw_holds_one_image_of_each_patient_drawn() -> None:
    rows_of = [np.array([7, 8, 9]), np.array([1]), np.array([4, 5])]
    mechanism, seen = SecretMechanism(), set()
    for _ in range(200):
        rows = draw_rows_of_patients(rows_of, 0.6, mechanism)
        owners = [next(p for p, own in enumerate(rows_of) if row in own) for row in rows]
        assert owners == sorted(set(owners))
        seen |= set(rows.tolist())
    assert seen == {1, 4, 5, 7, 8, 9}
    assert draw_rows_of_patients([], 0.5, mechanism).shape == (0,)


def test_a_discriminator_that_mixes_rows_is_refused() -> None:
    state = _state()
    state.discriminator.blocks[1] = nn.BatchNorm2d(4)
    with pytest.raises(ConfigError, match="BatchNorm"):
        train_private_gan_round(
            state, _images(), _rows(5), _settings(), STEP, SecretMechanism(), torch_generator(1), "fast", Ladder(1)
        )
