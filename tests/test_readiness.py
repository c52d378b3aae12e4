"""The readiness report, and `xfed-client import` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.test_importing import make_source
from xfed.client.cli import app
from xfed.client.readiness import Readiness, inverted_score, measure, symmetry
from xfed.common.console import progress_bar, run_app
from xfed.common.errors import ConfigError, DataError


def chest(n: int = 6) -> np.ndarray:
    """Bright body with dark lungs on a dark ground, with some noise."""
    y, x = np.mgrid[0:64, 0:64] / 63
    body = ((x - 0.5) / 0.45) ** 2 + ((y - 0.6) / 0.6) ** 2 < 1
    lungs = (np.abs(np.abs(x - 0.5) - 0.22) < 0.12) & (np.abs(y - 0.45) < 0.25)
    picture = np.where(lungs, 60, np.where(body, 190, 10)).astype(float)
    noise = np.random.default_rng(0).normal(0, 4, (n, 64, 64))
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def ready(images: np.ndarray, labels: list[int], patients: list[int], splits: list[int]) -> Readiness:
    return measure(
        images=images,
        labels=np.array(labels, dtype=np.int64),
        patients=np.array(patients, dtype=np.int64),
        splits=np.array(splits, dtype=np.int8),
        classes=("A", "B"),
        sizes=[(100, 200)] * (len(images) - 1) + [(20, 10)],
        laterals=[True] + [False] * (len(images) - 1),
        left_out={"carries none of the classes": 3},
        quarantined={"cannot be decoded": 2},
    )


def test_readiness_counts_by_hand() -> None:
    images = chest()
    images[5] = images[4]
    images[3] = 255 - images[3]
    images[2] = 128
    report = ready(images, [0, 0, 0, 0, 1, 0], [0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 0, 2])
    assert report.images == {
        "A": {"train": 2, "validation": 1, "test": 2},
        "B": {"train": 1, "validation": 0, "test": 0},
    }
    assert report.patients["A"] == {"train": 1, "validation": 1, "test": 2}
    assert (report.total_images, report.total_patients, report.balance) == (6, 5, 5.0)
    assert report.suspects == {"blank": 1, "inverted": 1, "lateral": 1}
    assert report.duplicates == {
        "images": 1,
        "groups": 1,
        "groups_across_patients": 1,
        "groups_across_classes": 1,
        "groups_across_splits": 1,
    }
    assert report.original_sizes == {"200x100": 5, "10x20": 1}
    text = "\n".join(report.warnings)
    for words in (
        "B has no patients in validation or test",
        "blank",
        "inverted",
        "side views",
        "enlarged",
        "quarantine",
    ):
        assert words in text
    assert Readiness.from_json(json.loads(json.dumps(report.as_json()))) == report


def test_suspect_scores_are_antisymmetric_and_see_a_shift() -> None:
    images = chest()
    assert np.allclose(inverted_score(images), -inverted_score(255 - images), atol=1e-4)
    assert (inverted_score(images) > 0.5).all()
    assert (symmetry(images) > 0.9).all()
    assert (symmetry(np.roll(images, 2, axis=2)) > 0.9).all()
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (1, 64, 1))
    assert symmetry(ramp)[0] < -0.9
    assert symmetry(np.full((1, 64, 64), 9, np.uint8))[0] == 1


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from xfed.client.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_command_line_prints_json_and_ends_with_documented_codes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", patients=20)
    done = cli("import", source, "--store", tmp_path / "store", "--size", 32, "--json", "--map", "x=Normal")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["readiness"]["total_images"] == 40
    again = cli("import", source, "--store", tmp_path / "store", "--size", 64)
    assert again.returncode == 3
    assert again.stdout == ""
    assert "size was 32, now 64" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [(DataError("bad [file]\udc80"), 3, "bad [file]"), (KeyboardInterrupt(), 130, ""), (None, 0, "")],
)
def test_run_app_ends_with_the_errors_code(
    raised: BaseException | None,
    code: int,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @small.command()
    def fail() -> None:
        with progress_bar("Working") as progress:
            progress(1, 2)
            if raised is not None:
                raise raised

    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run_app(small)
    assert end.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert shown in err
    assert "Traceback" not in err


def test_help_lists_the_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(app, ["import", "--help"]).output.split())
    assert "Exit codes" in text
    assert "130 interrupted" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train", 0.9], "add up to 1"),
        (["--map", "x"], "their label=Our Class"),
        (["--map", "x=Hernia"], "unknown class 'Hernia'"),
        (["--classes", "A"], "at least two classes"),
        (["--layout", "tree"], "--layout"),
        (["--seed", -1], "--seed"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: list[object], words: str) -> None:
    arguments = ["import", str(tmp_path), "--store", str(tmp_path / "s"), *map(str, options)]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_the_table_is_for_people(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", patients=20)
    (source / "NAMEOFFILE003_0.png").write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["import", str(source), "--store", str(tmp_path / "store"), "--size", "32"])
    assert result.exit_code == 0, result.output
    for words in ("39 images of 20 patients", "Pleural Effusion", "quarantined: 1", "stays at", "layout: csv"):
        assert words in result.output
