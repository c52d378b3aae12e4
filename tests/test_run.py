"""A whole study on one machine: it ends, it can be killed anywhere, and it says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import ROOT, tiny
from xfed.common.errors import CheckpointError, StorageError
from xfed.common.synthetic_training import train_on_synthetic
from xfed.common.weights import digest_of, load_arrays
from xfed.server.archive import read_archive, verify_archive
from xfed.simulations.run import run_study

# runs the tiny study and kills its own process, without any warning, at the n-th fsync: every durable write is one
KILLER = """
import os, signal, sys
from pathlib import Path
from tests.conftest import tiny
from xfed.simulations.run import run_study
stop, calls, real = int(sys.argv[2]), 0, os.fsync
def fsync(handle):
    global calls
    calls += 1
    if calls == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
run_study(tiny(), Path(sys.argv[1]))
print(calls)
"""


def _results(folder: Path) -> dict[str, Any]:
    """Everything a study ends with, by name; weights as digests."""
    results: dict[str, Any] = {
        path.name: digest_of(load_arrays(path)[0]) for path in sorted((folder / "models").iterdir())
    }
    report = json.loads((folder / "report.json").read_text())
    results["archive"] = report["archive"]["root_sha256"]
    for arm, facts in report["arms"].items():
        results |= {f"{arm} {name}": value for name, value in facts.items()}
    return results


def _differences(folder: Path, unbroken: Path) -> dict[str, Any]:
    """What differs between two studies' results: both values, by name; empty when all is equal."""
    ours, theirs = _results(folder), _results(unbroken)
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "unbroken"
    run_study(tiny(), folder)
    return folder


def test_pretraining_changes_where_ds3_starts_and_nothing_else(unbroken: Path, tmp_path: Path) -> None:
    study = tiny(classifier={"pretraining": 30, "rounds": 1})
    run_study(study, tmp_path / "ready")
    run_study(tiny(classifier={"rounds": 1}), tmp_path / "plain")
    differing = _differences(tmp_path / "ready", tmp_path / "plain")
    assert "classifier-DS3.safetensors" in differing
    assert not [name for name in differing if "DS3" not in name], "DS1, generators and archive read no archive first"
    images, labels = read_archive(unbroken / "archive", study.classes)
    start = train_on_synthetic(study, images, labels, steps=30, purpose="pretraining", device=torch.device("cpu"))
    checkpoint = load_arrays(tmp_path / "ready" / "models" / "classifier-DS3.safetensors")[0]
    moved = [float(np.abs(checkpoint[key] - start[key]).mean()) for key in start]
    plain = load_arrays(tmp_path / "plain" / "models" / "classifier-DS3.safetensors")[0]
    assert np.mean(moved) < 0.5 * np.mean([float(np.abs(plain[key] - start[key]).mean()) for key in start])


def test_a_run_folder_has_what_the_design_promises(unbroken: Path) -> None:
    for name in ("config.yaml", "report.html", "report.json", "events.jsonl", "archive/manifest.json", "checkpoints"):
        assert (unbroken / name).exists(), name
    passport = json.loads((unbroken / "archive" / "passport.json").read_text())
    assert passport["tstr"]["n"] > 0
    assert passport["verdict"]["may_not"]
    models = {path.name for path in (unbroken / "models").iterdir()}
    assert models == {
        *(f"generator-{name}.safetensors" for name in tiny().classes),
        "classifier-DS1.safetensors",
        "classifier-DS3.safetensors",
        "classifier-TSTR.safetensors",
    }
    assert verify_archive(unbroken / "archive") == []
    report = json.loads((unbroken / "report.json").read_text())
    assert report["classes"] == list(tiny().classes)
    for arm in ("DS1", "DS3"):
        facts = report["arms"][arm]
        assert 0 <= facts["balanced_accuracy"] <= 1
        assert set(facts["per_class"]) == set(tiny().classes)
        assert {"accuracy", "sensitivity", "specificity", "auc", "n"} <= set(facts["per_class"]["Normal"])
        assert np.array(facts["confusion"]).sum() == facts["n"]
        assert set(facts["sites"]) == {"site-01", "site-02"}
    assert report["arms"]["DS3"]["counts"]["Normal"]["synthetic"] == 40
    assert report["arms"]["DS1"]["counts"]["Normal"]["synthetic"] == 0
    for site in ("site-01", "site-02"):
        assert report["privacy"]["sites"][site]["epsilon"] is None
        assert report["traffic"][site]["sent_bytes"] > 0
    assert {"fid", "fid_floor", "kid", "precision", "recall", "density", "coverage"} <= set(
        report["archive"]["quality"]["Normal"]
    )


def test_patients_are_in_one_site_and_one_split(unbroken: Path) -> None:
    from xfed.client.store import open_store

    total = 0
    for site in ("site-01", "site-02"):
        store = open_store(unbroken / "sites" / site / "store")
        total += len(store.labels)
        for patient in np.unique(store.patients):
            assert len(np.unique(store.splits[store.patients == patient])) == 1
    assert total == json.loads((unbroken / "sites" / "ready.json").read_text())["images"]


def test_discriminators_are_on_the_sites_disks_and_nowhere_else(unbroken: Path) -> None:
    for path in [*(unbroken / "checkpoints").iterdir(), *(unbroken / "models").iterdir()]:
        assert not any(name.startswith(("d/", "adam")) or "logit" in name for name in load_arrays(path)[0])
    assert list((unbroken / "sites" / "site-01" / "state").iterdir())


def test_running_it_again_changes_nothing_but_the_report(unbroken: Path) -> None:
    before = _results(unbroken)
    rounds = (unbroken / "events.jsonl").read_text().count('"kind": "round"')
    run_study(tiny(runtime={"workers": 1}), unbroken)  # speed may differ
    after = (unbroken / "events.jsonl").read_text().count('"kind": "round"')
    assert _results(unbroken) == before
    assert after - rounds <= 1  # the quality step alone


def test_one_worker_or_two_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    run_study(tiny(runtime={"workers": 1}), tmp_path / "one")
    assert _differences(tmp_path / "one", unbroken) == {}


@pytest.mark.parametrize("share", [0.02, 0.2, 0.37, 0.55, 0.74, 0.93])
def test_killed_at_any_write_the_same_command_ends_with_the_same_bits(
    unbroken: Path, tmp_path: Path, share: float
) -> None:
    _kill_and_resume(unbroken, tmp_path / "killed", [share])


@pytest.mark.slow
def test_killed_thirty_times_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(30)
    for number in range(10):
        _kill_and_resume(unbroken, tmp_path / str(number), list(rng.uniform(0, 0.9, 3)))


def _fsyncs(unbroken: Path) -> int:
    """How many durable writes an unbroken study makes (counted once, in a process of its own)."""
    counted = unbroken.parent / "fsyncs.txt"
    if not counted.exists():
        done = _study_process(unbroken.parent / "counted", 0)
        assert done.returncode == 0, done.stderr[-2000:]
        counted.write_text(done.stdout.split()[-1])
    return int(counted.read_text())


def _study_process(folder: Path, stop: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), str(stop)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _kill_and_resume(unbroken: Path, folder: Path, shares: list[float]) -> None:
    total = _fsyncs(unbroken)
    for share in shares:
        done = _study_process(folder, max(1, int(share * total)))
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr[-2000:]
    if len(shares) == 1:
        assert done.returncode == -signal.SIGKILL
    run_study(tiny(), folder)
    assert _differences(folder, unbroken) == {}


def test_another_study_in_the_same_folder_is_refused(unbroken: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gan.rounds was 3, is 4") as caught:
        run_study(tiny(gan={"rounds": 4}), unbroken)
    assert "--out" in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not empty"):
        run_study(tiny(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "holiday.jpg"]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    from xfed.common.durable import exclusive

    with exclusive(tmp_path), pytest.raises(StorageError, match="in use"):
        run_study(tiny(), tmp_path)


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from xfed.common import durable

    real, calls = os.fsync, {"n": 0}

    def full(handle: int) -> None:
        calls["n"] += 1
        if calls["n"] > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(Exception, match=r"No space left|sites answered"):
        run_study(tiny(), tmp_path / "full")
    monkeypatch.setattr(durable.os, "fsync", real)
    assert not list((tmp_path / "full").rglob("*.tmp"))
    run_study(tiny(), tmp_path / "full")
    assert _differences(tmp_path / "full", unbroken) == {}


def test_a_site_without_a_class_takes_no_part_in_it(tmp_path: Path) -> None:
    study = tiny(
        sites={"count": 3, "missing": {1: ["Cardiomegaly"]}},
        federation={"secure_aggregation": "off"},
        gan={"rounds": 1},
        classifier={"rounds": 1, "arms": ["DS1"]},
    )
    run_study(study, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gan"]["classes"]["Cardiomegaly"]["sites"] == ["site-02", "site-03"]
    assert report["gan"]["classes"]["Normal"]["sites"] == ["site-01", "site-02", "site-03"]
    assert report["gan"]["classes"]["Cardiomegaly"]["rounds"][0]["sites"] == 2
    assert sum(report["sites"]["site-01"]["counts"]["Cardiomegaly"].values()) == 0
    assert "generator of Cardiomegaly" not in report["privacy"]["sites"]["site-01"]["released"]


def test_googlenet_by_name_alone(tmp_path: Path) -> None:
    study = tiny(gan={"rounds": 1}, classifier={"model": "googlenet", "rounds": 1, "arms": ["DS3"], "width": 4})
    run_study(study, tmp_path / "out")
    from xfed.common.registry import load_classifier

    released = load_classifier(tmp_path / "out" / "models" / "classifier-DS3.safetensors")
    assert type(released.model).__name__ == "GoogLeNet"


@pytest.mark.realdata
def test_the_shipped_study_runs_on_real_x_rays_and_shows_none_of_them(real_data: Path, tmp_path: Path) -> None:
    from xfed.simulations.run import load_run_study

    short = ["gan.rounds=1", "gan.steps_per_round=1", "classifier.rounds=1", "gan.width=4", "classifier.width=4"]
    study = load_run_study(ROOT / "configs" / "nih.yaml", settings=short, data=real_data, backend=None)
    run_study(study, tmp_path / "out", real_data)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(sum(count.values()) for count in report["totals"]["counts"].values()) == 3250
    assert all(site["counts"] is None for site in report["sites"].values())  # three sites: sums are all that is known
    assert report["source"] == "folder"
    with np.load(tmp_path / "out" / "report-panels.npz") as panels:
        assert "real" not in panels
    assert "ShowExamples" not in (tmp_path / "out" / "events.jsonl").read_text()


def _cli(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    code = "from xfed.simulations.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        **more,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such.yaml"], 2, ["no-such.yaml", "configs/"]),
        (["configs/demo.yaml", "--set", "gan.rouns=3"], 2, ["gan.rouns", "no such field"]),
        (["configs/demo.yaml", "--set", "gan.rounds=0"], 2, ["gan.rounds", "greater than or equal to 1"]),
        (["configs/demo.yaml", "--set", "gan.rounds"], 2, ["--set", "section.field=value"]),
        (["configs/demo.yaml", "--set", "data.phantom.patients={Luggage: 3}"], 2, ["Luggage", "Cardiomegaly"]),
        (["configs/demo.yaml", "--data", "no/such/folder"], 2, ["no/such/folder"]),
        (["configs/nih.yaml"], 2, ["--data DIR"]),
        (["configs/demo.yaml", "--backend", "cloud"], 2, ["runtime.backend", "local"]),
    ],
)
def test_mistakes_end_with_one_message_and_a_documented_code(
    tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    done = _cli("run", *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_exit_code_5(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = _cli("run", "configs/demo.yaml", "--set", "runtime.device=cuda", "--out", str(tmp_path / "out"))
    assert done.returncode == 5
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    from PIL import Image

    source = tmp_path / "images"
    for name in ("Cardiomegaly", "Normal"):
        (source / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)).save(
                source / name / f"p{number}_1.png"
            )
    done = _cli("run", "configs/nih.yaml", "--data", str(source), "--out", str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "Pneumothorax" in done.stderr


def test_the_command_prints_the_table_and_the_report(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny().resolved()))
    done = _cli("run", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    for word in ("DS1", "DS3", "Pleural Effusion"):
        assert word in done.stdout
    quiet = _cli("run", str(config), "--out", str(tmp_path / "out"), "--json")
    assert json.loads(quiet.stdout)["arms"].keys() == {"DS1", "DS3"}
