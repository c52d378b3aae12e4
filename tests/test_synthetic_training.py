"""A classifier taught by synthetic images alone: it learns, repeats bit for bit, and uses exactly its steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import tiny
from xfed.common import synthetic_training
from xfed.common.classifier import predict
from xfed.common.errors import DataError
from xfed.common.registry import build_classifier
from xfed.common.synthetic_training import train_on_synthetic
from xfed.common.weights import load_parameters
from xfed.simulations.phantom import phantom_arrays

CPU = torch.device("cpu")


def _drawn(seed: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    study = tiny()
    images, labels, _ = phantom_arrays(
        classes=study.classes,
        patients=dict.fromkeys(study.classes, each),
        images_per_patient=1.0,
        size=study.image_size,
        seed=seed,
    )
    return images, labels


def test_it_learns_from_the_archive_alone_also_where_the_study_weighs_the_loss():
    study = tiny(classifier={"width": 8, "balance": "loss", "augment": False, "learning_rate": 2e-3})
    images, labels = _drawn(1, 80)
    # few images of the last class: only equal draws teach it
    kept = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1), np.flatnonzero(labels == 2)[:15]])
    weights = train_on_synthetic(study, images[kept], labels[kept], steps=200, purpose="test", device=CPU)
    model = build_classifier(study)
    load_parameters(model, weights)
    others, truth = _drawn(2, 40)
    found = predict(model, others, device=CPU, precision="float32").argmax(1)
    recalls = [float(np.mean(found[truth == label] == label)) for label in range(3)]
    assert np.mean(recalls) > 0.7, recalls
    assert min(recalls) > 0.4, recalls


def test_it_repeats_bit_for_bit_and_another_purpose_differs():
    study, (images, labels) = tiny(), _drawn(3, 12)
    once, again, other = (
        train_on_synthetic(study, images, labels, steps=7, purpose=purpose, device=CPU)
        for purpose in ("TSTR", "TSTR", "another")
    )
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert any(not np.array_equal(once[name], other[name]) for name in once)


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_exactly_the_steps_that_were_asked_for_at_a_falling_rate(monkeypatch, steps):
    calls = []
    monkeypatch.setattr(synthetic_training, "train_round", lambda *a, **settings: calls.append(settings))
    images, labels = _drawn(3, 4)
    study = tiny(classifier={"balance": "loss"})
    train_on_synthetic(study, images, labels, steps=steps, purpose="test", device=CPU)
    assert sum(call["steps"] for call in calls) == steps
    rates = [call["learning_rate"] for call in calls]
    assert rates == sorted(rates, reverse=True)
    assert all(call["settings"].balance == "sampling" for call in calls)


def test_images_that_do_not_fit_are_refused():
    images, labels = _drawn(3, 4)
    for x, y, reason in (
        (images[:, :16], labels, "expected"),
        (images[:0], labels[:0], "at least 1"),
        (images, labels + 1, "classes 0..2"),
    ):
        with pytest.raises(DataError, match=reason):
            train_on_synthetic(tiny(), x, y, steps=1, purpose="test", device=CPU)
