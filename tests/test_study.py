"""`xfed-sim study`: its grid, its processes, what it pairs, and that a second run gives the same figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny
from xfed.client.store import open_store
from xfed.common.config import Study
from xfed.common.errors import ConfigError, XfedError
from xfed.simulations.study_grid import Task, cells_of, check_arms, tasks_of
from xfed.simulations.study_job import OUTCOMES, plan_task, read_outcomes, run_task
from xfed.simulations.study_pool import Standing, check_failures, run_tasks

ARMS = ["DS1", "DS3", "weighted", "alone", "pooled"]


def small(**experiment: Any) -> Study:
    """Two folds of five arms, in a minute."""
    return tiny(
        experiment={"arms": ARMS, "folds": 2, "replicates": 200, **experiment},
        gan={"rounds": 1, "steps_per_round": 1},
        classifier={"rounds": 2},
        archive={"filter": False},
    )


def tasks(study: Study) -> list[Task]:
    return [task for cell in cells_of(study) for task in tasks_of(cell)]


def quiet(_: Standing) -> None:
    """No display."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, finished."""
    out = tmp_path_factory.mktemp("study")
    assert run_tasks(tasks(small()), out, None, 2, quiet) == {}
    return out


def test_the_grid_is_the_product_and_each_cell_has_its_base_first() -> None:
    study = small(sites=[1, 2], skews=["even", "dirichlet"], seeds=[1, 2], models=["dcnn", "googlenet"])
    cells = cells_of(study)
    assert len(cells) == 2 * 2 * 2 * 2 == len({cell.name for cell in cells})
    assert len({cell.study.digest for cell in cells}) == 16
    assert {cell.study.data.seed for cell in cells} == {study.seed}
    for cell in cells:
        listed = list(tasks_of(cell))
        assert listed[0].base
        assert not any(task.base for task in listed[1:])
        arms = [(task.arm, task.model) for task in listed]
        assert len(set(arms)) == len(arms) == (10 if cell.study.sites.count > 1 else 6)


def test_folds_and_seeds_differ_in_the_noise_of_training_and_not_in_who_is_where() -> None:
    one, two = cells_of(small())[:2]
    assert one.study.seed != two.study.seed
    assert one.study.data_seed == two.study.data_seed
    assert (one.study.data.splits.fold, two.study.data.splits.fold) == (0, 1)


@pytest.mark.parametrize(
    ("experiment", "words"),
    [({"arms": ["DS1", "DS9"]}, "DS9"), ({"arms": ["DS1"], "baseline": "DS3"}, "not among experiment.arms")],
)
def test_an_experiment_that_cannot_be_is_refused(experiment: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_arms(small(**experiment))


def test_every_patient_is_tested_once_and_all_arms_judge_the_same_images(done: Path) -> None:
    seen: list[tuple[int, int]] = []
    for cell in cells_of(small()):
        outcomes = {task.arm: read_outcomes(task.folder(done)) for task in tasks_of(cell)}
        first = outcomes["DS1"]
        for arm, arrays in outcomes.items():
            for name in ("sites", "rows", "labels", "patients"):
                assert arrays[name].tolist() == first[name].tolist()
            assert arrays["probabilities"].shape == (2 if arm == "alone" else 1, len(first["labels"]), 3)
            np.testing.assert_allclose(arrays["probabilities"].sum(2), 1, atol=1e-3)
        seen += zip(first["sites"].tolist(), first["rows"].tolist(), strict=True)
    base = cells_of(small())[0]
    stores = [
        open_store(next(iter(tasks_of(base))).folder(done) / "run" / "sites" / name / "store")
        for name in small().site_names()
    ]
    assert sorted(seen) == [(site, row) for site, store in enumerate(stores) for row in range(len(store.labels))]


def test_outcomes_are_what_the_run_itself_reports(done: Path) -> None:
    task = next(iter(tasks_of(cells_of(small())[0])))
    arrays = read_outcomes(task.folder(done))
    report = json.loads((task.folder(done) / "run" / "report.json").read_text())
    right = arrays["probabilities"][0].argmax(1) == arrays["labels"]
    assert report["arms"]["DS1"]["accuracy"] == pytest.approx(right.mean())


def test_alone_sees_its_own_patients_and_pooled_all(done: Path) -> None:
    cell = cells_of(small())[0]
    folders = {task.arm: task.folder(done) for task in tasks_of(cell)}
    counts = {
        name: json.loads(path.read_text())["totals"]["counts"]["Normal"]
        for name, path in {
            "federated": folders["DS1"] / "run" / "report.json",
            "first": folders["alone"] / "run-01" / "report.json",
            "second": folders["alone"] / "run-02" / "report.json",
            "pooled": folders["pooled"] / "run" / "report.json",
        }.items()
    }
    assert counts["pooled"] == counts["federated"]
    assert counts["first"]["train"] + counts["second"]["train"] == counts["pooled"]["train"]
    assert counts["first"]["test"] == counts["second"]["test"] == counts["pooled"]["test"]


def test_a_second_run_of_an_arm_gives_the_same_bits(done: Path, tmp_path: Path) -> None:
    cell = cells_of(small())[0]
    for task in tasks_of(cell):
        if task.base or task.arm in ("DS3", "pooled"):
            folder = plan_task(task, tmp_path, None)
            run_task(folder)
            again, first = read_outcomes(folder), read_outcomes(task.folder(done))
            assert {name: array.tobytes() for name, array in again.items()} == {
                name: array.tobytes() for name, array in first.items()
            }


def test_what_is_finished_is_not_run_again_and_what_changed_is(done: Path) -> None:
    task = next(iter(tasks_of(cells_of(small())[0])))
    before = (task.folder(done) / OUTCOMES).stat().st_mtime_ns
    assert run_tasks([task], done, None, 1, quiet) == {}
    assert (task.folder(done) / OUTCOMES).stat().st_mtime_ns == before
    assert task.digest("phantom") != task.digest("elsewhere")


def test_a_finished_run_leaves_no_checkpoint_no_discriminator_and_no_copy(done: Path) -> None:
    assert not list(done.rglob("checkpoints"))
    assert not list(done.rglob("gan-*.safetensors"))
    assert len(list(done.glob("cells/*/*/run/archive"))) == 2  # the bases'


def test_a_task_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    study = small(arms=["DS1", "DS3"])
    listed = tasks(study)
    broken = next(task for task in listed if not task.base)
    folder = broken.folder(tmp_path)
    for task in listed[:1]:
        run_task(plan_task(task, tmp_path, None))
    plan_task(broken, tmp_path, None)
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "something.txt").write_text("not a run")
    failed = run_tasks(listed[:2], tmp_path, None, 2, quiet)
    assert list(failed) == [str(folder.relative_to(tmp_path / "cells"))]
    assert "is not empty and holds no study" in failed[next(iter(failed))]
    with pytest.raises(XfedError, match="Run the same command again"):
        check_failures(failed)


def test_a_task_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    folder = plan_task(tasks(small())[0], tmp_path, None)
    parent = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-m', 'xfed.simulations.study_job', sys.argv[1]]);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        deadline = time.monotonic() + 60
        while not list(folder.glob("run/sites/*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()
    run_task(folder)
    assert (folder / OUTCOMES).is_file()


@pytest.mark.slow
def test_a_study_killed_goes_on_to_the_same_bits(done: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from tests.test_study import *; import sys;"
        "run_tasks(tasks(small()), Path(sys.argv[1]), None, 2, quiet)"
    )
    for seconds in (12, 20):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run_tasks(tasks(small()), tmp_path, None, 2, quiet) == {}
    for task in tasks(small()):
        again, first = read_outcomes(task.folder(tmp_path)), read_outcomes(task.folder(done))
        assert again["probabilities"].tobytes() == first["probabilities"].tobytes(), task.name
