"""The scale benchmark's figures add up, say what they are called, and a hundred hospitals finish a study."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xfed.client.open_training import OpenTraining
from xfed.common.errors import ConfigError
from xfed.common.journal import Journal
from xfed.simulations.benchmarks import scale as bench
from xfed.simulations.benchmarks.scale import (
    PHASES,
    Cost,
    Scale,
    costs_of,
    growth,
    measure_here,
    plain,
    study_of,
)
from xfed.simulations.benchmarks.scale_figure import draw


def _event(kind: str, second: float, phase: str, round: int, **facts: Any) -> dict[str, Any]:
    clocks = {"wall": second, "processor": 2 * second, "parts": {"training": second / 2}}
    return {"kind": kind, "phase": phase, "round": round, **clocks, **facts}


def _exchange(phase: str, round: int, each: int) -> dict[str, Any]:
    traffic = {site: {"sent": each, "received": 2 * each, "messages": {}} for site in ("site-01", "site-02")}
    return _event("exchange", 0, phase, round, traffic=traffic)


def test_a_cost_is_that_of_the_last_round_alone() -> None:
    events = []
    for phase, exchanges in PHASES.items():
        events.append(_event("phase", 10, phase, 0))
        for round, end in ((1, 13), (2, 17)):
            events += [_exchange(exchange, round, 100 * round) for exchange in (*exchanges, "vote")]
            events.append(_event("round", end, phase, round))
    costs = costs_of(events, 2)
    for phase, cost in costs.items():
        assert (cost.wall_s, cost.processor_s, cost.parts["training"], cost.outside_s) == (4, 8, 2, 6)
        assert cost.bytes_in_all == len(PHASES[phase]) * 2 * 600
        assert cost.bytes_per_site == cost.bytes_in_all / 2
    with pytest.raises(ValueError, match="no round of phase gan"):
        costs_of([event for event in events if event["phase"] != "gan"], 2)


def _scale(sites: int, outside: float) -> Scale:
    parts = {"training": 1.0, "keys": outside}
    cost = Cost(wall_s=1, processor_s=outside + 1, parts=parts, bytes_in_all=10 * sites, bytes_per_site=10)
    return Scale(
        sites=sites,
        secure=True,
        series="hospital",
        backend="local",
        images=1,
        phases={"gan": cost, "classifier": cost},
        stages={"all": (1.0, 2.0)},
        bytes_in_all=1,
        baseline_mib=1.0,
        peak_mib=2.0,
        digest="",
        load=0.0,
    )


def test_growth_with_the_square_is_two_and_the_figure_is_drawn() -> None:
    few, many = _scale(10, 0.5), _scale(30, 4.5)
    assert growth(few, many, lambda one: one.phases["gan"].outside_s) == pytest.approx(2)
    assert growth(few, many, lambda one: one.phases["gan"].bytes_in_all) == pytest.approx(1)
    drawn = draw([plain(few), plain(many)])
    assert drawn == draw([plain(few), plain(many)])
    for words in ("hospitals", "secure, as many images at each", "with the square", ">30<"):
        assert words in drawn


def test_one_hospital_has_no_secure_sum() -> None:
    with pytest.raises(ConfigError, match="a sum over one site hides nothing"):
        study_of(1, secure=True)


def _measured(sites: int, folder: Path, **options: Any) -> Scale:
    before = OpenTraining.gan
    found = measure_here(sites, rounds=1, folder=folder, **options)
    assert OpenTraining.gan is before, "the timed methods were not put back"
    assert sorted(path.name for path in (folder / "sites").iterdir() if path.is_dir()) == list(
        study_of(sites, secure=False).site_names()
    )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found.bytes_in_all == sum(one["sent_bytes"] + one["received_bytes"] for one in report["traffic"].values())
    assert sum(cost.bytes_in_all for cost in found.phases.values()) < found.bytes_in_all
    rounds = [event for event in Journal(folder / "events.jsonl").read() if event["kind"] == "round"]
    assert {"gan", "archive", "classifier", "vote", "attacks"} <= {event["phase"] for event in rounds}
    for phase, cost in found.phases.items():
        stage = {"gan": "generators", "classifier": "classifier"}[phase]
        # one round: the round is its stage
        assert (cost.wall_s, cost.processor_s) == pytest.approx(found.stages[stage])
        assert 0 < cost.parts["training"] < cost.outside_s + cost.parts["training"] == pytest.approx(cost.processor_s)
        secure = sum(seconds for part, seconds in cost.parts.items() if part != "training")
        assert 0 < secure < cost.outside_s if found.secure else secure == 0
        assert cost.bytes_per_site * sites == pytest.approx(cost.bytes_in_all)
    assert found.secure_s < found.round_s <= found.processor_s
    assert found.wall_s == pytest.approx(sum(wall for wall, _ in found.stages.values()))
    assert found.peak_mib is None or (found.baseline_mib or 0) < found.peak_mib
    return found


def test_the_figures_of_three_and_six_hospitals_add_up(tmp_path: Path) -> None:
    three, six = (_measured(sites, tmp_path / str(sites), secure=True) for sites in (3, 6))
    assert six.images > 1.8 * three.images
    for phase in PHASES:
        # masked weights are as long as bare ones; adverts, letters and shares are one for every other hospital
        assert six.phases[phase].bytes_per_site > three.phases[phase].bytes_per_site


@pytest.mark.slow
def test_open_hospitals_send_the_same_however_many_there_are_and_ray_gives_the_same_bits(tmp_path: Path) -> None:
    three, six = (_measured(sites, tmp_path / str(sites), secure=False) for sites in (3, 6))
    for phase in PHASES:
        assert six.phases[phase].bytes_per_site == three.phases[phase].bytes_per_site
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'xfed[ray]'")
    ray = bench.measure(3, secure=False, backend="ray", rounds=1)
    assert ray.digest == three.digest != six.digest
    assert ray.bytes_in_all == three.bytes_in_all
    assert not any(ray.phases[phase].parts["training"] for phase in PHASES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_hospitals_finish_all_three_phases(tmp_path: Path) -> None:
    found = _measured(100, tmp_path / "100", secure=True)
    assert found.images > 2400
    report = json.loads((tmp_path / "100" / "report.json").read_text(encoding="utf-8"))
    assert report["gan"]["classes"]["Normal"]["holders"] == 100
    assert report["archive"]["privacy_tests"]["vote"]["sites"] == 100
    assert not [event for event in report["events"] if event["kind"] not in ("started", "joining")]


def test_the_command_refuses_what_it_does_not_know() -> None:
    for options in (["--series", "both"], ["--backend", "cluster"], ["--sites", "0"]):
        assert CliRunner().invoke(bench.app, options).exit_code == 2
