"""The private classifier round: by-hand equality, public amounts of synthetic images, and nothing but releases in the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.conftest import tiny
from tests.test_private_gan import Bare
from xfed.common import private_classifier
from xfed.common.classifier import prepare
from xfed.common.config import Classifier
from xfed.common.dcnn import DCNN, SeededDropout
from xfed.common.errors import ConfigError
from xfed.common.googlenet import GoogLeNet
from xfed.common.mechanism import RecordingMechanism, ReplayingMechanism
from xfed.common.private_classifier import synthetic_rows, synthetic_shares, train_private_round
from xfed.common.private_gan import PrivateStep
from xfed.common.randomness import torch_generator
from xfed.common.weights import load_parameters, parameters_of

CPU = torch.device("cpu")
SIZES = (10, 4, 2)
STEP = PrivateStep(q=0.4, sigma=1.0, clip=1.0, expected=6)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (32, 32, 32), dtype=np.uint8)
LABELS = np.repeat([0, 1, 2], [20, 8, 4])
ROWS = [np.array([2 * patient, 2 * patient + 1]) for patient in range(16)]
MADE = RNG.integers(0, 255, (15, 32, 32), dtype=np.uint8)
MADE_LABELS = np.repeat([0, 1, 2], 5)


def _settings(**changes: Any) -> Classifier:
    values = {"balance": "none", "augment": False, "dropout": 0.0, "weight_decay": 0.0, **changes}
    return tiny().classifier.model_copy(update=values)


def _model(dropout: float = 0.0) -> DCNN:
    return DCNN(32, 3, width=4, dropout=dropout, generator=torch.Generator().manual_seed(1), hidden=16)


def _train(
    mechanism: Any, model: torch.nn.Module, rows_of: list[np.ndarray] = ROWS, synthetic: bool = False, **changes: Any
) -> dict[str, np.ndarray]:
    values: dict[str, Any] = {
        "settings": _settings(),
        "learning_rate": 1e-3,
        "steps": 2,
        "step": STEP,
        "engine": "fast",
        "generator": changes.get("generator") or torch_generator(1, "public"),
        "class_sizes": SIZES,
        "device": CPU,
    }
    made = (MADE, MADE_LABELS) if synthetic else (None, None)
    train_private_round(model, IMAGES, LABELS, rows_of, *made, mechanism=mechanism, **{**values, **changes})
    return parameters_of(model)


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize("draw", [[1, 11, 14, 3], []])
def test_one_step_equals_a_computation_by_hand(engine: str, draw: list[int]) -> None:
    """Weighted, smoothed loss per row, clipped row by row, added, divided by the public batch, then Adam with weight decay."""
    settings = _settings(balance="loss", weight_decay=0.01)
    step = PrivateStep(q=0.4, sigma=1.0, clip=0.3, expected=6)
    model = _model()
    trained = _train(Bare([draw]), model, settings=settings, step=step, steps=1, engine=engine)

    twin = _model()
    optimizer = torch.optim.Adam(
        twin.parameters(), 1e-3, betas=(0.5, 0.999), weight_decay=0.01, fused=False, foreach=False
    )
    weights = torch.tensor([16 / (3 * 10), 16 / (3 * 4), 16 / (3 * 2)])
    total = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    for patient in draw:
        row = ROWS[patient][0]
        logits = twin(prepare(torch.from_numpy(IMAGES[[row]])))
        label = int(LABELS[row])
        target = torch.full((3,), 0.1 / 3)
        target[label] += 0.9
        loss = -(target * weights * logits[0].log_softmax(0)).sum()
        gradient = torch.autograd.grad(loss, list(twin.parameters()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradient))
        assert norm > 0.3
        total = [t + g * 0.3 / norm for t, g in zip(total, gradient, strict=True)]
    for (name, parameter), expected in zip(twin.named_parameters(), total, strict=True):
        found = dict(model.named_parameters())[name].grad
        assert found is not None
        torch.testing.assert_close(found, expected / 6, rtol=1e-4, atol=1e-6, check_stride=False)
        parameter.grad = found.contiguous()
    optimizer.step()
    for name, value in parameters_of(twin).items():
        np.testing.assert_allclose(trained[name], value, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(trained[name], value) for name, value in parameters_of(_model()).items())


def test_without_clipping_the_sum_is_the_gradient_of_the_plain_loss() -> None:
    mechanism, step = Bare([[0, 9, 15]]), PrivateStep(q=0.4, sigma=1.0, clip=1e6, expected=6)
    _train(mechanism, _model(), step=step, steps=1)
    twin, rows = _model(), [ROWS[patient][0] for patient in (0, 9, 15)]
    logits = twin(prepare(torch.from_numpy(IMAGES[rows])))
    cross_entropy(logits, torch.from_numpy(LABELS[rows]), label_smoothing=0.1, reduction="sum").backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(mechanism.released[0][name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patient", [0, 11, 14])
@pytest.mark.parametrize("balance", ["none", "loss"])
def test_one_patient_moves_the_sum_by_the_clip_at_most(patient: int, balance: str) -> None:
    """Also with class weights: a patient of the rarest class weighs more in the loss, and not more in the sum."""
    draw, step = [0, 3, 11, 14], PrivateStep(q=0.4, sigma=1.0, clip=0.3, expected=6)
    whole, without = Bare([draw]), Bare([[p for p in draw if p != patient]])
    for mechanism in (whole, without):
        _train(mechanism, _model(), settings=_settings(balance=balance), step=step, steps=1, synthetic=True)
    moved = sum((whole.released[0][name] - value).square().sum() for name, value in without.released[0].items())
    assert 0.29 < float(moved) ** 0.5 <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize(("patients", "q"), [(0, 0.5), (16, 1e-9), (16, 1.0)])
@pytest.mark.parametrize("synthetic", [False, True])
def test_there_are_as_many_releases_as_steps_whatever_is_drawn(patients: int, q: float, synthetic: bool) -> None:
    mechanism, step = RecordingMechanism(), PrivateStep(q=q, sigma=1.0, clip=1.0, expected=6)
    settings = _settings(augment=True, batch=4)
    after = _train(mechanism, _model(0.5), ROWS[:patients], synthetic, step=step, steps=3, settings=settings)
    assert len(mechanism.outputs) == 3
    assert all(np.isfinite(value).all() for value in after.values())


def _replayed_pair(patient: int, seed: int, q: float = 0.6) -> tuple[dict[str, bytes], dict[str, bytes]]:
    settings = _settings(balance="loss", augment=True, dropout=0.5)
    step, recorder = PrivateStep(q=q, sigma=1.0, clip=1.0, expected=6), RecordingMechanism()
    less = [rows for number, rows in enumerate(ROWS) if number != patient]

    def play(rows_of: list[np.ndarray], mechanism: Any) -> dict[str, bytes]:
        rng = torch_generator(seed)
        after = _train(mechanism, _model(0.5), rows_of, True, step=step, settings=settings, generator=rng)
        drawn = torch.rand(4, generator=rng).numpy()
        return {"what the public stream gives next": drawn.tobytes()} | {k: v.tobytes() for k, v in after.items()}

    return play(ROWS, recorder), play(less, ReplayingMechanism(recorder.outputs))


@pytest.mark.parametrize("pair", range(20))
def test_nothing_but_the_releases_tells_of_a_patient(pair: int) -> None:
    full, short = _replayed_pair(pair % 16, seed=pair)
    assert full == short


def test_the_replay_finds_a_shared_random_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: reals augmented from the public stream move it by a secret amount."""
    shared: list[torch.Generator] = []

    def public(seed: int, *names: str) -> torch.Generator:
        shared.append(torch.Generator().manual_seed(seed))
        return shared[-1]

    monkeypatch.setattr("tests.test_private_classifier.torch_generator", public)
    monkeypatch.setattr(private_classifier, "secret_generator", lambda mechanism: shared[-1])
    full, short = _replayed_pair(3, seed=1, q=1.0)  # so that the two draws surely differ in length
    assert full != short


def test_synthetic_rows_are_clipped_added_and_counted_in_the_divisor() -> None:
    """share 0.25 of an expected batch of 6: two synthetic rows, so the sum is divided by 8."""
    mechanism, model = Bare([[0]]), _model()
    _train(mechanism, model, synthetic=True, steps=1, step=PrivateStep(q=0.4, sigma=1.0, clip=0.2, expected=6))
    norm = sum(value.square().sum() for value in mechanism.released[0].values()) ** 0.5
    assert 0.2 < float(norm) <= 3 * 0.2 * (1 + 1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, mechanism.released[0][name] / 8, check_stride=False)


@pytest.mark.parametrize(
    ("share", "archive", "expected"), [(0.25, 100, 20), (0.5, 100, 60), (0.0, 100, 0), (None, 32, 120), (0.25, 0, 0)]
)
def test_the_number_of_synthetic_rows_is_public(share: float | None, archive: int, expected: int) -> None:
    assert synthetic_rows(_settings(synthetic_share=share), 60, archive, SIZES) == expected


def test_synthetic_rows_fill_up_the_rarest_classes_first() -> None:
    """Expected reals 30, 20, 10 of 60; 15 synthetic ones make the last two 22.5 each; 60 make all three 40."""
    few = synthetic_shares((30, 20, 10), (True, True, True), 60, 15)
    torch.testing.assert_close(few, torch.tensor([0, 2.5 / 15, 12.5 / 15], dtype=torch.float64))
    many = synthetic_shares((30, 20, 10), (True, True, True), 60, 60)
    torch.testing.assert_close(many, torch.tensor([10 / 60, 20 / 60, 30 / 60], dtype=torch.float64))
    lacking = synthetic_shares((30, 20, 10), (True, True, False), 60, 15)
    torch.testing.assert_close(lacking, torch.tensor([2.5 / 15, 12.5 / 15, 0], dtype=torch.float64))


def test_a_site_that_declares_a_class_it_lacks_in_the_archive_still_trains() -> None:
    after = _train(
        RecordingMechanism(), _model(), synthetic=True, class_sizes=(10, 4, 0), settings=_settings(balance="loss")
    )
    assert all(np.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize(
    ("changes", "reason"), [({"balance": "sampling"}, "q would not"), ({"synthetic_share": 1.0}, "below 1")]
)
def test_settings_that_void_the_claim_are_refused(changes: dict[str, Any], reason: str) -> None:
    mechanism = RecordingMechanism()
    with pytest.raises(ConfigError, match=reason):
        _train(mechanism, _model(), synthetic=True, settings=_settings(**changes))
    assert not mechanism.outputs


def test_a_model_that_mixes_rows_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match="BatchNorm"):
        _train(RecordingMechanism(), model)


def test_dropout_goes_back_to_no_generator_and_the_mode_stays() -> None:
    model = _model(0.5).eval()
    _train(RecordingMechanism(), model)
    assert not model.training
    assert [m.generator for m in model.modules() if isinstance(m, SeededDropout)] == [None, None]


def test_googlenet_can_be_trained_too() -> None:
    model = GoogLeNet(32, 3, width=8, dropout=0.0, generator=torch.Generator().manual_seed(1))
    before = parameters_of(model)
    after = _train(RecordingMechanism(), model, steps=1)
    assert any(not np.array_equal(after[name], value) for name, value in before.items())


def test_it_learns_where_the_noise_is_small() -> None:
    """Three kinds of image told apart after 40 steps with q = 1; the same model untrained does not."""
    images = np.full((30, 32, 32), 20, dtype=np.uint8)
    labels = np.arange(30) % 3
    for row, label in enumerate(labels):
        images[row, 8 * label : 8 * label + 8, 4:28] = 220 + row % 7
    model = _model()
    load_parameters(model, parameters_of(_model()))
    rows_of = [np.array([row]) for row in range(30)]
    train_private_round(
        model, images, labels, rows_of, None, None, settings=_settings(), learning_rate=1e-3, steps=40,
        step=PrivateStep(q=1.0, sigma=0.01, clip=1.0, expected=30), mechanism=RecordingMechanism(), engine="fast",
        generator=torch_generator(0), class_sizes=(10, 10, 10), device=CPU,
    )  # fmt: skip
    with torch.no_grad():
        found = model.eval()(prepare(torch.from_numpy(images))).argmax(1).numpy()
    assert (found == labels).mean() > 0.9
