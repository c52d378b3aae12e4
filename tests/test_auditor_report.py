"""xfed-audit report and plan: figures against dp_accounting alone, the 21 points, and everything that must not look private."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.audited import DECLARED, DELTA, SiteLedger, once, poisson, run_folder, study, study_ledger
from xfed.common.auditor.accountants import claim, mechanisms
from xfed.common.auditor.chain import audit_site
from xfed.common.auditor.cli import app
from xfed.common.auditor.composition import Scope, site_facts
from xfed.common.auditor.curve import curve_svg
from xfed.common.auditor.evidence import gather
from xfed.common.auditor.lines import Event
from xfed.common.auditor.plan import parse_patients
from xfed.common.auditor.report import audit_facts, render
from xfed.common.auditor.statements import consequence
from xfed.common.errors import ConfigError

STUDY = study()


def outsider(path: Path, delta: float) -> float:
    """Epsilon from the spend lines with dp_accounting alone."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    spends = [line for line in lines if line["kind"] == "spend"]
    worst = 0.0
    for name in {line["class"] for line in spends if line["class"]} or {None}:
        accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        steps: Counter[tuple[float, float]] = Counter()
        for event in (line["event"] for line in spends if line["class"] in (None, name)):
            steps[event["q"], event["sigma"]] += event["steps"]
        for (q, sigma), count in steps.items():
            one = dp_accounting.GaussianDpEvent(sigma)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(q, one) if q < 1 else one, count)
        worst = max(worst, accountant.get_epsilon(delta))
    return worst


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    second = study_ledger("site-02", STUDY, 1.2, ["Normal"])
    second.attempt("classifier", None, 4, [poisson(0.1, 1.2, 30)], kinds="reserve")
    ledgers = [study_ledger("site-01", STUDY), second]
    return run_folder(tmp_path_factory.mktemp("run") / "run", STUDY, ledgers)


@pytest.fixture(scope="module")
def facts(run: Path) -> dict[str, Any]:
    return audit_facts(gather([run], None, {}))


def facts_of(ledger: SiteLedger, **scope: Any) -> dict[str, Any]:
    audit = audit_site(ledger.site, b"".join(ledger.lines), None, None)
    return site_facts(audit, Scope(**{"study": STUDY.digest, "delta": DELTA, **scope}))


def test_epsilon_is_what_dp_accounting_alone_gives_from_the_spend_lines(run: Path, facts: dict[str, Any]) -> None:
    for name, site in facts["sites"].items():
        assert site["epsilon"] == pytest.approx(outsider(run / "ledgers" / f"{name}.jsonl", DELTA), rel=2e-3)
        assert site["delta"] == DELTA
        assert site["epsilon"] == max(one["epsilon"] for one in site["classes"].values())
    assert facts["sites"]["site-01"]["classes"].keys() == DECLARED.keys()
    assert facts["verified"]
    assert facts["maximum"] == {"site": "site-02", "epsilon": facts["sites"]["site-02"]["epsilon"]}


def test_gaussians_without_sampling_have_the_closed_form() -> None:
    from xfed.common.accounting import epsilon
    from xfed.common.dp_events import Event as Written

    events = [Event(q=1.0, sigma=3.0, clip=1.0, steps=4), Event(q=1.0, sigma=5.0, clip=2.0, steps=1)]
    sigma = 1 / math.sqrt(4 / 9 + 1 / 25)
    exact = epsilon([Written(sampling="none", q=1.0, sigma=sigma, steps=1, clip=1.0)], 1e-5)
    found = claim(mechanisms(events), 1e-5)
    assert exact <= found.first <= exact * 1.001
    assert found.agree


def test_two_accountants_agree_and_the_larger_counts() -> None:
    found = claim(mechanisms([Event(q=0.02, sigma=1.1, clip=1.0, steps=500)]), 1e-5)
    assert found.agree
    assert found.epsilon == found.first
    assert "dp_accounting" in found.names[0]
    assert "opacus" in found.names[1]
    assert claim((), 1e-5).epsilon == 0
    with pytest.raises(ConfigError, match="delta"):
        claim((), 0.0)


def test_what_happened_is_counted(facts: dict[str, Any]) -> None:
    one, two = facts["sites"]["site-01"], facts["sites"]["site-02"]
    assert (one["releases"], one["retries"], one["broken_off"]) == (9, 1, 1)
    assert one["noised_sums"] == 6 * 20 + 2 * 30 + 1
    assert [refusal["reason"] for refusal in one["refusals"]] == ["over budget"]
    assert one["standing"] == []
    assert one["epsilon_with_standing"] == one["epsilon"]
    assert len(two["standing"]) == 1
    assert two["epsilon_with_standing"] > 1.5 * two["epsilon"]
    assert one["budget_left"] == pytest.approx(8 - one["epsilon"])
    artefacts = one["artefacts"]
    assert artefacts["archive"] == artefacts["generators"]
    assert artefacts["generators"]["epsilon"] < artefacts["classifier"]["epsilon"] < one["epsilon"]


def test_a_classifier_trained_without_noise_is_infinite_end_to_end(tmp_path: Path) -> None:
    ledger = SiteLedger("site-01", STUDY.digest)
    ledger.attempt("generators", "Normal", 1, [poisson(STUDY.gan.batch / DECLARED["Normal"], 1.5, 20)])
    run = run_folder(tmp_path / "run", STUDY, [ledger])
    facts = audit_facts(gather([run], None, {}))
    artefacts = facts["sites"]["site-01"]["artefacts"]
    assert artefacts["archive"]["epsilon"] > 0
    assert artefacts["classifier"]["epsilon"] is None
    assert facts["maximum"]["epsilon"] is None
    assert facts["artefacts"]["classifier"] == {"epsilon": None, "site": "site-01"}
    assert "with certainty" in facts["consequence"]
    page = render(facts)
    assert "∞" in page
    # a site that sent no classifier has nothing to answer for
    extra = {"traffic": {"site-01": {"messages": {"GanUpdate": 1}}}}
    run = run_folder(tmp_path / "other", STUDY, [ledger], extra=extra)
    assert audit_facts(gather([run], None, {}))["maximum"]["epsilon"] > 0


def test_classes_are_parallel_phases_are_not_and_overlap_multiplies() -> None:
    ledger = SiteLedger("site-01", STUDY.digest)
    ledger.attempt("generators", "Normal", 1, [once(2.0)])
    ledger.attempt("generators", "Cardiomegaly", 1, [once(3.0)])
    alone = facts_of(ledger)
    assert alone["worst_class"] == "Normal"
    assert alone["epsilon"] == pytest.approx(claim(((1.0, 2.0, 1),), DELTA).epsilon)
    ledger.attempt("classifier", None, 1, [once(2.0)])
    both = facts_of(ledger)
    assert both["epsilon"] == pytest.approx(claim(((1.0, 2.0, 2),), DELTA).epsilon)
    assert facts_of(ledger, overlap=3)["epsilon"] == pytest.approx(claim(((1.0, 2.0, 6),), DELTA).epsilon)


def test_several_studies_compose_over_every_choice_of_classes() -> None:
    ledger = SiteLedger("site-01", "a" * 64)
    ledger.attempt("generators", "Normal", 1, [once(2.0)])
    ledger.study = "b" * 64
    ledger.attempt("generators", "Normal", 1, [once(9.0)])
    ledger.attempt("generators", "Cardiomegaly", 1, [once(3.0)])
    # a patient may have been Normal in the first study and Cardiomegaly in the second
    expected = claim(((1.0, 2.0, 1), (1.0, 3.0, 1)), DELTA).epsilon
    together = facts_of(ledger, study=None)
    assert together["epsilon"] == pytest.approx(expected)
    one = facts_of(ledger, study="b" * 64)
    assert one["epsilon"] == pytest.approx(claim(((1.0, 3.0, 1),), DELTA).epsilon)
    assert one["epsilon_all_studies"] == pytest.approx(expected)


def test_a_ledger_that_cannot_be_read_has_no_finite_epsilon() -> None:
    ledger = study_ledger("site-01", STUDY)
    ledger.lines[4] = ledger.lines[4].replace(b'"sigma":1.5', b'"sigma":150')
    found = facts_of(ledger)
    assert found["epsilon"] is None
    assert all(one["epsilon"] is None for one in found["artefacts"].values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"claimed": {"site-01": 0.2}}, "claims epsilon 0.2 for site-01"),
        ({"sigma": 0.4}, "above the budget of 8"),
        ({"q": 0.5}, "sampled at q 0.5"),
        ({"delta": 9e-3}, "is not below 1 / 940 patients"),
    ],
)
def test_claims_that_the_ledgers_do_not_bear_out_are_findings(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    of = study(delta=change["delta"]) if "delta" in change else STUDY
    ledger = study_ledger("site-01", of, change.get("sigma", 1.5), ["Normal"])
    if "q" in change:
        ledger.attempt("generators", "Normal", 3, [poisson(change["q"], 5.0, 1)])
    run = run_folder(tmp_path / "run", of, [ledger], claimed=change.get("claimed"))
    found = audit_facts(gather([run], None, {}))
    assert any(said in problem for problem in found["problems"]), found["problems"]
    assert not found["verified"]
    assert "Not verified" in render(found)


def test_the_page_states_the_21_points_and_loads_nothing(facts: dict[str, Any], tmp_path: Path) -> None:
    assert [point["number"] for point in facts["points"]] == list(range(1, 22))
    assert all(point["title"] and point["text"] for point in facts["points"])
    page = render(facts)
    for point in facts["points"]:
        assert point["title"].replace("'", "&#39;") in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<svg") == 2
    assert "dp_accounting" in page
    json.dumps(facts, allow_nan=False)


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    ledger = SiteLedger("site-01", "d" * 64)
    ledger.attempt("generators", "<script>alert(1)</script>", 1, [once(9.0)])
    path = ledger.write(tmp_path)
    found = audit_facts(gather([path], None, {}), delta=DELTA)
    assert "<script" not in render(found)


def test_the_report_command(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    ledgers = [str(path) for path in sorted((run / "ledgers").glob("*.jsonl"))]
    done = runner.invoke(app, ["report", *ledgers, "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["sites"]["site-01"]["epsilon"] > 0
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == values
    assert "<html" in (tmp_path / "out" / "audit.html").read_text()
    table = runner.invoke(app, ["report", str(run)])
    assert "site-02" in table.stdout
    assert "odds" in table.stdout


def test_a_bound_above_the_claim_is_a_finding(run: Path) -> None:
    asked: list[Any] = []

    def attack(bound: float) -> Any:
        def found(events: Any, delta: float) -> dict[str, Any]:
            asked.append(events)
            return {"epsilon_lower_bound": bound, "confidence": 0.95, "right": 9, "guesses": 10, "canaries": 1000}

        return found

    honest = audit_facts(gather([run], None, {}), attack=attack(0.1))
    assert honest["verified"], honest["problems"]
    site = honest["sites"]["site-01"]
    assert asked[0] == tuple((one["q"], one["sigma"], one["steps"]) for one in site["mechanisms"])
    assert claim(asked[0], DELTA).epsilon == pytest.approx(site["epsilon"])
    said = {point["title"]: point["text"] for point in honest["points"]}
    assert "at least 0.1 beside" in said["Empirical lower bound"]
    wrong = audit_facts(gather([run], None, {}), attack=attack(1000.0))
    assert not wrong["verified"]
    assert any("canaries prove epsilon at least 1000" in problem for problem in wrong["problems"])


def test_without_a_run_delta_must_be_given(tmp_path: Path) -> None:
    ledger = SiteLedger("site-01", "d" * 64)
    ledger.attempt("classifier", None, 1, [once(9.0)])
    path = ledger.write(tmp_path)
    evidence = gather([path], None, {})
    with pytest.raises(ConfigError, match="--delta"):
        audit_facts(evidence)
    with pytest.raises(ConfigError, match="no ledger knows"):
        audit_facts(evidence, study="nope", delta=DELTA)
    assert audit_facts(evidence, delta=DELTA)["sites"]["site-01"]["epsilon"] > 0
    cut = tmp_path / "site-01.head.json"
    cut.unlink()
    done = CliRunner().invoke(app, ["report", str(path), "--delta", "1e-4", "--json"])
    assert done.exit_code == 4
    assert json.loads(done.stdout)["verified"] is False


def test_consequences_are_odds() -> None:
    assert "factor of at most 2.7" in consequence(1.0, 1e-5)
    assert "50% becomes at most 74%" in consequence(1.0, 1e-5)
    assert "strong" in consequence(1.0, 1e-5)
    assert "hardly anybody" in consequence(20.0, 1e-5)
    assert "tells nothing" in consequence(0.0, 1e-5)
    assert consequence(1e9, 1e-5)


def test_the_curve_is_drawn_within_its_box() -> None:
    points = [(10**-k, 3.0 * k) for k in range(2, 10)]
    drawing = curve_svg(points, 1e-5, 15.0)
    xs = [float(pair.split(",")[0]) for pair in re.search(r'points="([^"]+)"', drawing)[1].split()]  # type: ignore[index]
    assert xs == sorted(xs)
    assert 0 < xs[0] < xs[-1] < 640
    assert "ε 15 at δ 1e-05" in drawing
    assert curve_svg([], 1e-5, 1.0) == ""
    assert curve_svg(points, 1e-5, 0.0) == ""


PLAN = {
    "name": "plan",
    "classes": ["Normal", "Pneumothorax", "Pneumonia"],
    "gan": {"method": "dp-merf", "minimum_images": 20},
    "classifier": {"balance": "none", "rounds": 2, "steps_per_round": 3, "batch": 64},
    "privacy": {"epsilon": 3, "delta": 1e-5},
}


def test_the_plan_says_what_is_feasible(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    runner = CliRunner()
    done = runner.invoke(app, ["plan", str(path), "--patients", "Normal=6000, Pneumothorax=10", "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert 0.98 * 3 <= values["epsilon"] <= 3
    normal = values["classes"]["Normal"]
    assert normal["feasible"]
    assert {part["part"] for part in normal["parts"]} == {"embeddings", "classifier", "scores"}
    classifier = next(part for part in normal["parts"] if part["part"] == "classifier")
    assert classifier["q"] == pytest.approx(64 / 6000)
    assert classifier["steps"] == 2 * 2 * 3
    assert 0 < classifier["epsilon_alone"] < 3
    assert not values["classes"]["Pneumothorax"]["feasible"]
    assert "minimum_images" in values["classes"]["Pneumothorax"]["reasons"][0]
    assert "no patients" in values["classes"]["Pneumonia"]["reasons"][0]
    assert not values["feasible"]
    shown = runner.invoke(app, ["plan", str(path), "--patients", "Normal=6000"], env={"COLUMNS": "200"})
    assert "embeddings" in shown.stdout
    refused = runner.invoke(app, ["plan", str(path), "--patients", "Normal=200000"])
    assert "not below 1 / 200000" in str(refused.exception)


@pytest.mark.parametrize("text", ["", "Normal", "Normal=", "=5", "Normal=-1", "Normal=1.5", "Normal=1,Normal=2", "N=²"])
def test_patients_are_whole_numbers_per_class(text: str) -> None:
    with pytest.raises(ConfigError, match="--patients"):
        parse_patients(text)


def test_class_names_may_hold_an_equals_sign() -> None:
    assert parse_patients("a=b=3, Pleural Effusion = 4") == {"a=b": 3, "Pleural Effusion": 4}
