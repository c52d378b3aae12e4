"""The hospitals judge an archive over the wire: what is vetoed is not released, sums hide whose vote it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny
from tests.test_secure_round import World
from xfed.common import messages as m
from xfed.common.config import Study
from xfed.common.errors import DataError, FederationError
from xfed.common.gan import build_generator
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.server.archive import build_archive, deliver_archive
from xfed.server.archive_manifest import open_archive, read_manifest
from xfed.server.archive_signature import verify_archive
from xfed.server.archive_subset import delivered, delivered_manifest
from xfed.server.votes import judge_archive
from xfed.simulations.phantom import phantom_arrays

COPIES, HONEST = 6, 20
GROUPS = ("training", "held_out")
PATIENTS = dict.fromkeys(("Cardiomegaly", "Normal", "Pleural Effusion"), 75)


def _study(sites: int = 3, **federation: Any) -> Study:
    return tiny(
        sites={"count": sites},
        data={"phantom": {"patients": PATIENTS}},
        archive={"balance": "fixed", "per_class": COPIES + HONEST, "filter": False},
        federation={"retries": 0, "join_limit_s": 30, **federation},
    )


class Judging(World):
    """Real sites, and an archive whose first images of each class are copies of the first two sites' training images."""

    def __init__(self, study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, copies: int = COPIES) -> None:
        super().__init__(study, folder)
        fresh, labels, _ = phantom_arrays(
            classes=study.classes, patients=PATIENTS, images_per_patient=1.0, size=32, seed=901
        )
        made = {}
        for label, name in enumerate(study.classes):
            stores = [site.store for site in self.sites[:2]]
            copied = [np.asarray(store.images[store.rows("train", label)[: copies // 2]]) for store in stores]
            made[name] = np.concatenate([*copied, fresh[labels == label]])
        monkeypatch.setattr(
            "xfed.server.archive.render_block",
            lambda study, name, generator, block: made[name][block * 32 : (block + 1) * 32],
        )
        generators = {name: parameters_of(build_generator(study, (name,))) for name in study.classes}
        build_archive(self.run, generators)
        _, self.images, self.labels = delivered(folder, study.classes)
        deliver_archive(self.run, delivered_manifest(folder)["root_sha256"], self.images, self.labels)
        self.weights = parameters_of(build_classifier(study, torch_generator(1, "judge")))
        self.planted = np.concatenate([np.arange(len(made[n]))[: COPIES + HONEST] < copies for n in study.classes])

    def judge(self) -> Any:
        """One judgement, as a study makes it."""
        return judge_archive(self.run, "DS1", self.weights)


@pytest.fixture
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Judging] = []

    def make(study: Study, **more: Any) -> Judging:
        made.append(Judging(study, tmp_path / str(len(made)), monkeypatch, **more))
        return made[-1]

    yield make
    for world in made:
        world.grid.close()


def test_what_is_vetoed_is_not_released_and_sums_are_what_open_votes_say(judging: Any) -> None:
    judged = {}
    for name, study in (("secure", _study()), ("open", _study(secure_aggregation="off"))):
        world = judging(study)
        assert study.secure == (name == "secure")
        result = judged[name] = world.judge()
        folder = world.run.folder / "archive"
        assert (~result.kept[world.planted]).all(), "every copy is vetoed"
        assert (~result.kept[~world.planted]).mean() <= 0.02
        released = {row["file_name"] for row in open_archive(folder).rows}
        names = delivered(world.run.folder, study.classes)[0]
        assert released == {file for file, kept in zip(names, result.kept, strict=True) if kept}
        assert verify_archive(folder, unsigned=True) == []
        assert result.manifest == read_manifest(folder)
        assert result.manifest["vetoes"]["vetoed"] == (~result.kept).sum() == result.facts["vote"]["vetoed"]
        assert result.facts["vote"]["sites"] == result.facts["vote"]["calibrated"] == 3
        gone = [file for file, kept in zip(names, result.kept, strict=True) if not kept]
        for text in (json.dumps(result.facts), json.dumps(result.manifest)):
            assert not any(file in text for file in gone), "how many, not which"
            assert "site-01" not in text
    np.testing.assert_array_equal(judged["secure"].kept, judged["open"].kept)
    # counts are exact; what guessing would reach is a fraction, and sums keep 24 bits of it
    guessed = [
        result.facts["reidentification"][group].pop("first_by_chance") for result in judged.values() for group in GROUPS
    ]
    assert guessed[:2] == pytest.approx(guessed[2:], abs=1e-6)
    assert judged["secure"].facts == judged["open"].facts
    membership = judged["secure"].facts["membership"]
    assert "could not be told" in membership["statement"]
    assert all(0.2 < figures["auc"] < 0.8 for figures in membership["by_distance"].values())


def test_in_a_secure_study_no_site_s_own_vote_or_count_arrives(judging: Any) -> None:
    world = judging(_study())
    world.judge()
    kinds = {type(reply) for _, request, reply in world.seen if isinstance(request, m.VoteOnArchive | m.AttackArchive)}
    assert kinds == {m.Masked}
    bare = m.AttackArchive(
        study=world.study.digest, root="ab" * 32, images=3, arrays={"released": np.ones(3, np.uint8)}
    )
    reply = world.sites[0].answer(bare)
    assert isinstance(reply, m.Refusal)
    assert "sums securely" in reply.reason


def test_judged_again_nothing_is_asked_and_nothing_changes(judging: Any) -> None:
    world = judging(_study(secure_aggregation="off"))
    first, asked = world.judge(), len(world.seen)
    before = {path: path.stat().st_mtime_ns for path in (world.run.folder / "archive").rglob("*")}
    again = world.judge()
    assert len(world.seen) == asked
    assert again.facts == first.facts
    np.testing.assert_array_equal(again.kept, first.kept)
    assert {path: path.stat().st_mtime_ns for path in (world.run.folder / "archive").rglob("*")} == before


@pytest.mark.parametrize("step", ["set_aside", "without", "attack_archive"])
def test_killed_between_two_steps_the_same_call_goes_on(
    judging: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    world = judging(_study(secure_aggregation="off"))

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"xfed.server.votes.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            world.judge()
    votes = sum(isinstance(request, m.VoteOnArchive) for _, request, _ in world.seen)
    result = world.judge()
    assert sum(isinstance(request, m.VoteOnArchive) for _, request, _ in world.seen) == votes == 3
    assert (~result.kept[world.planted]).all()
    assert verify_archive(world.run.folder / "archive", unsigned=True) == []


def test_a_site_that_is_missing_stops_the_release(judging: Any) -> None:
    """An archive that not every hospital has looked at is not released by itself."""
    world = judging(_study(secure_aggregation="off"))
    world.away = {"site-02": (m.VoteOnArchive,)}
    with pytest.raises(FederationError, match="2 of 3 sites answered"):
        world.judge()
    world.away = {}
    assert world.judge().facts["vote"]["sites"] == 3


def test_a_malformed_vote_counts_as_none(judging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = judging(_study(secure_aggregation="off"))
    real = world.sites[1].answer

    def wrong(request: m.Request) -> m.Reply:
        reply = real(request)
        if isinstance(reply, m.ArchiveVote):
            return m.ArchiveVote(site=reply.site, arrays={**reply.arrays, "vetoes": np.ones(3, np.uint8)})
        return reply

    monkeypatch.setattr(world.sites[1], "answer", wrong)
    with pytest.raises(FederationError, match="2 of 3 sites answered"):
        world.judge()
    assert any("other arrays" in str(event.get("text")) for event in world.run.journal.read())


def test_an_archive_of_copies_alone_is_not_released(judging: Any) -> None:
    world = judging(_study(2, secure_aggregation="off"), copies=COPIES + HONEST)
    with pytest.raises(DataError, match="vetoed every synthetic image"):
        world.judge()


def test_what_the_study_leaves_out_is_said(judging: Any) -> None:
    study = _study(2)
    archive = study.archive.model_copy(update={"vote": False, "attacks": False})
    world = judging(study.model_copy(update={"archive": archive}))
    result = world.judge()
    assert result.kept.all()
    assert {name: facts["left_out"] for name, facts in result.facts.items()} == {
        "vote": "left out: archive.vote is false in the study",
        "membership": "left out: archive.attacks is false in the study",
        "reidentification": "left out: archive.attacks is false in the study",
    }
    assert "vetoes" not in result.manifest
