"""The overhead benchmark measures what it says: whole rounds of real processes, less the longest training in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.simulations.benchmarks.overhead import LIMITS_S, WIDTHS, Overhead, Round, measure, rounds_of, study_of


def _event(kind: str, second: float, **facts: object) -> dict[str, object]:
    return {"kind": kind, "time": f"2026-01-01T00:00:{second:06.3f}+00:00", **facts}


def test_a_round_is_from_end_to_end_and_the_first_one_is_left_out() -> None:
    events = [
        _event("round", 1, phase="gan", round=1),
        _event("phase", 2, phase="classifier", round=0),
        _event("round", 9, phase="classifier", round=1),
        _event("exchange", 10, phase="classifier", round=2),
        _event("round", 11.5, phase="classifier", round=2),
        _event("round", 15, phase="classifier", round=3),
    ]
    found = rounds_of(events, {1: 5.0, 2: 0.5, 3: 1.0})
    assert found == (Round(round=2, round_s=2.5, training_s=0.5), Round(round=3, round_s=3.5, training_s=1.0))
    assert [one.outside_s for one in found] == [2.0, 2.5]
    assert Overhead(model_mb=1, sites=2, secure=False, rounds=found).median_s == 2.25


def test_a_round_without_its_training_is_no_result() -> None:
    events = [_event("round", second, phase="classifier", round=second) for second in (1, 2)]
    with pytest.raises(KeyError):
        rounds_of(events, {1: 0.1})


@pytest.mark.parametrize("megabytes", sorted(WIDTHS))
def test_the_models_are_as_large_as_they_are_called(megabytes: int) -> None:
    study = study_of(WIDTHS[megabytes])
    size = sum(array.nbytes for array in parameters_of(build_classifier(study)).values())
    assert megabytes * 10**6 <= size < 1.2 * megabytes * 10**6
    narrower = study_of(WIDTHS[megabytes] - 1)
    assert sum(array.nbytes for array in parameters_of(build_classifier(narrower)).values()) < megabytes * 10**6
    assert megabytes in LIMITS_S


@pytest.mark.slow
def test_real_processes_are_measured(tmp_path: Path) -> None:
    found = measure(WIDTHS[1], tmp_path / "overhead", rounds=2, secure=True)
    assert [one.round for one in found.rounds] == [2, 3]
    for one in found.rounds:
        assert 0 < one.training_s < one.round_s < 60
    assert found.secure
