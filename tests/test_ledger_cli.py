"""`xfed-client ledger`: the figures of the ledger, and nothing where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import tiny
from xfed.client.cli import app
from xfed.client.ledger import open_ledger
from xfed.client.site import SiteSettings, found_site
from xfed.common.accounting import epsilon
from xfed.common.dp_events import Event
from xfed.common.errors import CheckpointError, ConfigError

EVENT = Event(sampling="poisson", q=0.1, sigma=2.0, steps=10, clip=1.0)


def _ward(folder: Path) -> Path:
    found_site(folder, SiteSettings(name="ward-a"), tiny())
    ledger = open_ledger(folder, "ward-a")
    for study, name in (("1" * 64, "Normal"), ("1" * 64, "Pneumothorax"), ("2" * 64, "Normal")):
        reservation = ledger.reserve(study, "generators", name, 1, [EVENT])
        ledger.spend(reservation)
        ledger.release(reservation, "0" * 64)
    ledger.reserve("2" * 64, "classifier", None, 1, [EVENT])
    return folder


def test_epsilon_per_study_and_of_all_together(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["ledger", "--dir", str(_ward(tmp_path)), "--delta", "1e-4", "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.output)
    once, twice = epsilon([EVENT], 1e-4), epsilon([EVENT, EVENT], 1e-4)
    assert facts["site"] == "ward-a"
    assert facts["studies"]["1" * 64]["epsilon"] == pytest.approx(once)
    assert facts["studies"]["1" * 64]["epsilon_per_class"] == pytest.approx({"Normal": once, "Pneumothorax": once})
    assert facts["studies"]["2" * 64]["standing"] == 1
    assert facts["all"]["epsilon"] == pytest.approx(twice)
    assert facts["all"]["spends"] == 3
    shown = CliRunner().invoke(app, ["ledger", "--dir", str(tmp_path)])
    assert "all studies together" in shown.output
    assert facts["head"]["hash"] in shown.output.replace("\n", "")


def test_no_ledger_and_a_changed_one_are_said(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["ledger", "--dir", str(tmp_path)])
    assert isinstance(missing.exception, ConfigError)
    path = _ward(tmp_path / "ward") / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sigma":2.0', b'"sigma":9.0', 1))
    changed = CliRunner().invoke(app, ["ledger", "--dir", str(tmp_path / "ward")])
    assert isinstance(changed.exception, CheckpointError)
