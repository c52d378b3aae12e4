"""The archive: counts, layout, the same bytes again, and every change found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests.archives import REAL, FakeRun, weights_of
from tests.conftest import tiny
from xfed.common.errors import CheckpointError
from xfed.common.registry import load_generator, save_generator
from xfed.server.archive import build_archive, plan_counts, read_archive, render_block
from xfed.server.archive_signature import verify_archive
from xfed.server.run import Run


def test_plan_fills_every_class_to_the_target() -> None:
    assert plan_counts(tiny(archive={"minimum": 1}), REAL) == {"Cardiomegaly": 40, "Normal": 1, "Pleural Effusion": 60}
    # the paper balances to twice the largest class (Figure 4)
    doubled = plan_counts(tiny(archive={"minimum": 1, "target": 2.0}), REAL)
    assert {name: doubled[name] + REAL[name] for name in REAL} == dict.fromkeys(REAL, 140)
    fixed = plan_counts(tiny(archive={"balance": "fixed", "per_class": 9}), REAL)
    assert set(fixed.values()) == {9}


def test_layout_and_reproducibility(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "a")
    weights = weights_of(run)
    manifest = build_archive(cast(Run, run), weights)
    folder = tmp_path / "a" / "archive"
    with (folder / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(manifest["counts"].values()) == 40 + 40 + 60
    for row in rows[::17]:
        with Image.open(folder / row["file_name"]) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
        assert row["file_name"].split("/")[1] == row["label"]
    assert verify_archive(folder, unsigned=True) == []
    # the same command again keeps it, another folder gives the same bytes
    assert build_archive(cast(Run, run), weights) == manifest
    other = FakeRun(tmp_path / "b")
    assert build_archive(cast(Run, other), weights)["root_sha256"] == manifest["root_sha256"]
    # any one image from the generator's file and its number alone
    save_generator(tmp_path / "g.safetensors", run.study, "Normal", weights["Normal"], {})
    generator, facts = load_generator(tmp_path / "g.safetensors")
    assert facts["class"] == "Normal"
    images, labels = read_archive(folder, run.study.classes)
    again = render_block(run.study, "Normal", generator, 1)[3]
    assert np.array_equal(images[labels == 1][35], again)


def test_every_change_is_found(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, archive={"balance": "fixed", "per_class": 3})
    build_archive(cast(Run, run), weights_of(run))
    folder = tmp_path / "archive"
    victims = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    for path in victims:
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
        assert verify_archive(folder, unsigned=True) == [f"{path.relative_to(folder)}: changed"]
        path.unlink()
        assert verify_archive(folder, unsigned=True) == [f"{path.relative_to(folder)}: missing"]
        path.write_bytes(whole)
    (folder / "images" / "Normal" / "extra.png").write_bytes(b"x")
    assert verify_archive(folder, unsigned=True) == ["images/Normal/extra.png: not in the manifest"]
    (folder / "images" / "Normal" / "extra.png").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["metadata.csv"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("root digest" in problem for problem in verify_archive(folder, unsigned=True))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest"):
        verify_archive(folder, unsigned=True)


def test_a_build_that_was_cut_short_leaves_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path, archive={"balance": "fixed", "per_class": 40})
    calls = {"n": 0}
    real = render_block

    def cut(*args: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("xfed.server.archive.render_block", cut)
    with pytest.raises(KeyboardInterrupt):
        build_archive(cast(Run, run), weights_of(run))
    assert not (tmp_path / "archive").exists()
    monkeypatch.setattr("xfed.server.archive.render_block", real)
    build_archive(cast(Run, run), weights_of(run))
    assert verify_archive(tmp_path / "archive", unsigned=True) == []


def test_the_command_says_untouched_or_what_changed(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from xfed.server.cli import app

    run = FakeRun(tmp_path, archive={"balance": "fixed", "per_class": 2})
    build_archive(cast(Run, run), weights_of(run))
    folder = tmp_path / "archive"
    good = CliRunner().invoke(app, ["archive", "verify", str(folder), "--unsigned"])
    assert good.exit_code == 0
    assert "untouched" in good.output
    assert "not signed" in good.output
    bare = CliRunner().invoke(app, ["archive", "verify", str(folder)])
    assert "--unsigned" in str(bare.exception)
    (folder / "metadata.csv").write_text("x")
    bad = CliRunner().invoke(app, ["archive", "verify", str(folder), "--unsigned"])
    assert isinstance(bad.exception, CheckpointError)
    assert "metadata.csv: changed" in str(bad.exception)
