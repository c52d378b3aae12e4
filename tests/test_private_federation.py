"""A private study over real processes and TLS, summed securely: ledgers at the sites, copies at the coordinator, the auditor."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from tests.conftest import tiny
from xfed.client.ledger import open_ledger
from xfed.common.auditor.cli import app as audit_app
from xfed.simulations.deployed import Deployed

STUDY = tiny(
    name="private",
    sites={"count": 3},
    privacy={"epsilon": 8.0, "delta": 1e-3},
    gan={"rounds": 1, "steps_per_round": 1, "method": "dp-merf+dcgan", "merf": {"features": 64, "steps": 5}},
    classifier={"balance": "loss", "rounds": 1, "steps_per_round": 1, "arms": ["DS1"]},
    archive={"minimum": 8},
    federation={"join_limit_s": 120, "time_limit_s": 240},
)


def test_what_is_spent_at_real_sites_is_what_the_coordinator_reports_and_the_auditor_verifies(tmp_path: Path) -> None:
    with Deployed(STUDY, tmp_path) as deployed:
        deployed.found()
        for site in deployed.sites:  # no permission to train without privacy is needed
            path = deployed.site(site) / "policy.yaml"
            path.write_text(
                path.read_text().replace("allow_non_private: true", "allow_non_private: false\nepsilon_max: 8")
            )
        deployed.start_all()
        deployed.approve_when_received()
        assert deployed.wait(400) == 0, deployed.tail("server")
        report = json.loads((deployed.out / "report.json").read_text())
        for site in deployed.sites:
            copy = (deployed.out / "ledgers" / f"{site}.jsonl").read_text()
            assert copy == (deployed.site(site) / "ledger.jsonl").read_text()
            spent = open_ledger(deployed.site(site), site).site_epsilon(STUDY.digest, 1e-3)
            entry = report["privacy"]["sites"][site]
            assert abs(entry["epsilon"] - spent) <= 0.01 * spent
            assert 0 < spent <= 8
        assert report["privacy"]["epsilon"] == max(e["epsilon"] for e in report["privacy"]["sites"].values())
        found = CliRunner().invoke(audit_app, ["verify", str(deployed.out)])
        assert found.exit_code == 0, found.output
