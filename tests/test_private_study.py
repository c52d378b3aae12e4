"""A private study from end to end: what is spent is said, a kill costs nothing, and only noised sums tell of a patient."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import tiny
from xfed.client.cohort import cohort, declared_sizes
from xfed.client.ledger import open_ledger
from xfed.client.policy import Policy
from xfed.client.private_site import PrivateSite
from xfed.client.site import Site, SiteSettings, found_site
from xfed.client.store import Store, open_store, write_store
from xfed.common import messages as m
from xfed.common.auditor.cli import app as audit_app
from xfed.common.auditor.replay import compare_pair
from xfed.common.config import Study
from xfed.common.errors import ConfigError, RefusedError
from xfed.common.mechanism import SecretMechanism
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.server.display import StudyDisplay
from xfed.simulations.neighbours import neighbour_study, write_pair
from xfed.simulations.run import run_study

SMALL: dict[str, Any] = {
    "privacy": {"epsilon": 8.0, "delta": 1e-3},
    "gan": {"rounds": 2, "steps_per_round": 1, "method": "dp-merf+dcgan", "merf": {"features": 64, "steps": 5}},
    "classifier": {"balance": "loss", "rounds": 1, "steps_per_round": 1},
    "archive": {"minimum": 8},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "run"
    with StudyDisplay(Console(file=io.StringIO())) as display:
        run_study(tiny(**SMALL), folder, listener=display)
    return folder


def test_the_report_says_what_was_spent_and_the_outsider_agrees(finished: Path) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    privacy = json.loads((finished / "report.json").read_text())["privacy"]
    for site, entry in privacy["sites"].items():
        lines = [json.loads(line) for line in (finished / "ledgers" / f"{site}.jsonl").read_text().splitlines()]
        figures = []
        for name in tiny().classes:
            accountant = PLDAccountant()
            for line in lines:
                event = line["event"]
                if line["kind"] == "spend" and line["class"] in (None, name):
                    gaussian = dp_accounting.GaussianDpEvent(event["sigma"])
                    once = dp_accounting.PoissonSampledDpEvent(event["q"], gaussian) if event["q"] < 1 else gaussian
                    accountant.compose(dp_accounting.SelfComposedDpEvent(once, event["steps"]))
            figures.append(accountant.get_epsilon(entry["delta"]))
        assert entry["epsilon"] == pytest.approx(max(figures), rel=0.01)
        assert 0.95 * 8 <= entry["epsilon"] <= 8
        assert entry["reservations_without_release"] == 0
        # embeddings and two rounds per class, one round and one score per arm
        assert entry["releases"] == 3 * (1 + 2) + 2 * (1 + 1)


def test_the_auditor_verifies_the_run_and_finds_a_cut_ledger(finished: Path, tmp_path: Path) -> None:
    import shutil

    from typer.testing import CliRunner

    found = CliRunner().invoke(audit_app, ["verify", str(finished)])
    assert found.exit_code == 0, found.output
    copy = tmp_path / "cut"
    shutil.copytree(finished, copy)
    ledger = copy / "ledgers" / "site-01.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    assert CliRunner().invoke(audit_app, ["verify", str(copy)]).exit_code != 0


def test_nothing_without_noise_is_in_the_report(finished: Path) -> None:
    manifest = json.loads((finished / "archive" / "manifest.json").read_text())
    assert "epsilon at most 8 at delta 0.001" in manifest["privacy"]
    assert "WITHOUT" not in manifest["privacy"]
    report = json.loads((finished / "report.json").read_text())
    assert all(entry["fid"] is None and entry["recall"] is None for entry in report["archive"]["quality"].values())
    for arm in report["arms"].values():
        assert arm["sites"] == {}
        assert all(entry["loss"] is None for entry in arm["rounds"])
        assert arm["noise"]["deviation"] > 1
    for site in report["sites"].values():
        assert all(count["train"] % 10 == 0 and count["test"] == 0 for count in site["counts"].values())


# --- one site


def _ward(folder: Path, study: Study, seed: int = 0) -> Store:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 30)
    store = write_store(
        folder / "store",
        classes=study.classes,
        images=rng.integers(0, 256, (90, 32, 32), dtype=np.uint8),
        labels=labels,
        patients=np.arange(90) // 2,
        splits=np.zeros(90, np.int8),
    )
    found_site(folder, SiteSettings(name="ward-a"), study)
    return store


def _site(folder: Path, study: Study, policy: Policy | None = None, mechanism: Any = None) -> PrivateSite:
    return PrivateSite(
        name="ward-a",
        work=folder,
        study=study,
        policy=policy or Policy.permissive(),
        store=lambda: open_store(folder / "store"),
        ledger=lambda: open_ledger(folder, "ward-a"),
        mechanism=mechanism,
    )


STUDY = tiny(**SMALL)


def _embed(study: Study = STUDY, name: str = "Normal") -> m.EmbedClass:
    return m.EmbedClass(study=study.digest, class_name=name, features=64)


class _PowerCut(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("where", ["_compute", "keep", "spend", "release"])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_any_place_spends_once_and_sends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, before: bool
) -> None:
    _ward(tmp_path, STUDY)
    site = _site(tmp_path, STUDY)
    owner: Any = {"_compute": site, "keep": site._answers}.get(where, site._ledger)
    real = getattr(owner, where)

    def cut(*args: Any, **more: Any) -> Any:
        if not before:
            real(*args, **more)
        raise _PowerCut

    monkeypatch.setattr(owner, where, cut)
    with pytest.raises(_PowerCut):
        site.answer(_embed())
    kept = site._answers.find(_embed())
    again = _site(tmp_path, STUDY)
    reply = again.answer(_embed())
    assert isinstance(reply, m.Embedding)
    if kept is not None:
        np.testing.assert_array_equal(reply.arrays["sum"], kept.arrays["sum"])  # type: ignore[attr-defined]
    third = again.answer(_embed())
    np.testing.assert_array_equal(third.arrays["sum"], reply.arrays["sum"])  # type: ignore[attr-defined]
    ledger = open_ledger(tmp_path, "ward-a")
    assert len(ledger.spent()) == 1
    assert ledger.standing() == []


def test_other_weights_in_the_same_round_cost_again_and_the_budget_ends_it(tmp_path: Path) -> None:
    study = tiny(**{**SMALL, "classifier": {"balance": "loss", "rounds": 1, "steps_per_round": 1, "arms": ["DS1"]}})
    _ward(tmp_path, study)
    site = _site(tmp_path, study)
    start = parameters_of(build_classifier(study))
    refused = None
    for attempt in range(1, 12):
        weights = {name: value + np.float32(attempt) for name, value in start.items()}
        try:
            site.answer(m.TrainClassifier(study=study.digest, arm="DS1", round=1, weights=weights))
        except RefusedError as error:
            refused = str(error)
            break
    assert refused is not None
    assert "would be exceeded" in refused
    assert attempt > 1, "the first one was planned"
    ledger = open_ledger(tmp_path, "ward-a")
    assert len(ledger.spent()) == attempt - 1
    assert ledger.site_epsilon(study.digest, 1e-3) <= 8.0
    assert '"kind":"refuse"' in (tmp_path / "ledger.jsonl").read_text()


def test_a_total_over_studies_is_kept(tmp_path: Path) -> None:
    _ward(tmp_path, STUDY)
    tight = Policy.permissive().model_copy(update={"epsilon_total_max": 0.5})
    with pytest.raises(RefusedError, match="all studies together"):
        _site(tmp_path, STUDY, tight).answer(_embed())
    assert open_ledger(tmp_path, "ward-a").spent() == []


def test_the_reservation_is_on_disk_before_patients_are_read(tmp_path: Path) -> None:
    _ward(tmp_path, STUDY)
    seen: list[str] = []

    class Looks(SecretMechanism):
        def release(self, sums: Any, *, sensitivity: float, sigma: float) -> Any:
            seen.append((tmp_path / "ledger.jsonl").read_text())
            return super().release(sums, sensitivity=sensitivity, sigma=sigma)

    _site(tmp_path, STUDY, mechanism=Looks()).answer(_embed())
    assert json.loads(seen[0].splitlines()[-1])["kind"] == "reserve"


def test_a_private_study_answers_nothing_that_has_no_noise(tmp_path: Path) -> None:
    _ward(tmp_path, STUDY)
    site = Site(tmp_path, policy=Policy.permissive())
    weights = parameters_of(build_classifier(STUDY))
    for request in (
        m.ScoreClassifier(study=STUDY.digest, arm="DS1", round=2, split="test", weights=weights),
        m.MeasureArchive(study=STUDY.digest, arm="DS1", scale=1.0, thinning={}, weights=weights),
        m.VoteOnArchive(study=STUDY.digest, arm="DS1", root="ab" * 32, images=3, weights=weights),
        m.AttackArchive(study=STUDY.digest, root="ab" * 32, images=3, arrays={}),
        m.ShowExamples(study=STUDY.digest, count=1),
    ):
        with pytest.raises(RefusedError, match="this study is private"):
            site.act(request)


@pytest.mark.parametrize("delta", [1 / 60, 0.05])
def test_a_delta_of_a_patient_or_more_is_refused(tmp_path: Path, delta: float) -> None:
    if delta >= 0.01:
        with pytest.raises(ConfigError, match="delta"):
            tiny(**{**SMALL, "privacy": {"epsilon": 8.0, "delta": delta}})
    study = tiny(**{**SMALL, "privacy": {"epsilon": 8.0, "delta": 0.009}})
    declared = dict.fromkeys(study.classes, 50)
    from xfed.common.budget import plan_budget

    with pytest.raises(ConfigError, match="not below 1 / 150"):
        plan_budget(study, declared)


# --- one patient, one class, one split


def _mixed_store(folder: Path, seed: int, leave_out: int | None = None) -> Store:
    rng = np.random.default_rng(seed)
    labels, patients = rng.integers(0, 3, 120), rng.integers(0, 40, 120)
    images = rng.integers(0, 256, (120, 32, 32), dtype=np.uint8)
    kept = patients != leave_out if leave_out is not None else np.ones(120, bool)
    return write_store(
        folder,
        classes=tiny().classes,
        images=images[kept],
        labels=labels[kept],
        patients=patients[kept],
        splits=np.zeros(int(kept.sum()), np.int8),
    )


def _members(store: Store, declared: tuple[int, ...]) -> dict[int, tuple[str, int, tuple[bytes, ...]]]:
    """Patient -> split, class, and the pixels of the images that are used."""
    found: dict[int, tuple[str, int, tuple[bytes, ...]]] = {}
    who = cohort(store, STUDY, declared)
    for split in ("train", "test"):
        for label, people in enumerate(getattr(who, split)):
            for rows in people:
                (patient,) = set(store.patients[rows].tolist())
                assert patient not in found, "a patient is in two places"
                assert (store.labels[rows] == label).all()
                found[patient] = (split, label, tuple(store.images[row].tobytes() for row in rows))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_one_patient_less_moves_nobody_else(tmp_path: Path, seed: int) -> None:
    declared = (20, 10, 30)
    everybody = _members(_mixed_store(tmp_path / "all", seed), declared)
    assert {split for split, _, _ in everybody.values()} == {"train", "test"}
    for patient in list(everybody)[:8]:
        others = _members(_mixed_store(tmp_path / f"without-{patient}", seed, patient), declared)
        assert others == {name: what for name, what in everybody.items() if name != patient}


def test_a_patient_of_several_classes_is_of_the_one_declared_rarest(tmp_path: Path) -> None:
    store = _mixed_store(tmp_path, 3)
    for declared in ((20, 10, 30), (30, 20, 10), (10, 10, 10)):
        rarity = sorted(range(3), key=lambda label: (declared[label], label))
        for patient, (_, label, _) in _members(store, declared).items():
            has = set(store.labels[store.patients == patient].tolist())
            assert label == next(c for c in rarity if c in has)


def test_declared_sizes_are_said_once_and_kept(tmp_path: Path) -> None:
    store = _ward(tmp_path, STUDY)
    path = tmp_path / "declared.json"
    first = declared_sizes(path, store, STUDY, None)
    assert all(size % 10 == 0 for size in first)
    smaller = dataclasses.replace(
        store, labels=store.labels[:30], patients=store.patients[:30], images=store.images[:30]
    )
    assert declared_sizes(path, smaller, STUDY, {"Normal": 70}) == first
    path.unlink()
    assert declared_sizes(path, store, STUDY, {"Normal": 70})[1] == 70


# --- replay


def test_neighbours_put_the_same_bytes_on_the_wire(tmp_path: Path) -> None:
    assert neighbour_study().private
    for seed in range(2):
        write_pair(tmp_path / str(seed), seed)
        found = compare_pair(tmp_path / str(seed))
        assert found["bytes"] > 100_000
        assert found["differing"] == 0, found


def test_replay_sees_a_count_that_leaves_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PrivateSite.describe

    def telling(self: PrivateSite) -> m.Description:
        return dataclasses.replace(real(self), patients=len(np.unique(self._store.patients)))

    monkeypatch.setattr(PrivateSite, "describe", telling)
    write_pair(tmp_path / "pair", 0)
    assert compare_pair(tmp_path / "pair")["differing"] > 0
