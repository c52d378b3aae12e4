"""A hospital: what it answers, what it refuses, what it keeps, and what must not be in what it sends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny
from xfed.client.site import Site, SiteSettings, found_site
from xfed.client.store import write_store
from xfed.common import messages as m
from xfed.common.config import Study
from xfed.common.dcgan import Discriminator
from xfed.common.gan import build_generator
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import digest_of, parameters_of


def _site(folder: Path, study: Study | None = None, *, share: bool = False) -> Site:
    study = study or tiny()
    rng = numpy_generator(7, "site")
    labels = np.repeat(np.arange(3), [20, 12, 1])
    write_store(
        folder / "store",
        classes=study.classes,
        images=rng.integers(0, 255, (33, 32, 32), dtype=np.uint8),
        labels=labels,
        patients=np.arange(33),
        splits=(np.arange(33) % 4 // 2).astype(np.int8),
    )
    found_site(folder, SiteSettings(name="ward", share_examples=share), study)
    return Site(folder)


def _train_request(site: Site, round: int = 1, class_name: str = "Normal") -> m.TrainGan:
    weights = parameters_of(build_generator(site.study, ("g",)))
    return m.TrainGan(study=site.study.digest, class_name=class_name, round=round, weights=weights)


def test_it_describes_counts_and_no_identity(tmp_path: Path) -> None:
    site = _site(tmp_path)
    reply = site.answer(m.Describe(study=site.study.digest))
    assert isinstance(reply, m.Description)
    assert (reply.site, reply.patients) == ("ward", 33)
    assert reply.counts["counts"].sum() == 33


def test_another_study_is_refused_before_the_store_is_read(tmp_path: Path) -> None:
    site = _site(tmp_path)
    (tmp_path / "store" / "store.json").unlink()
    reply = Site(tmp_path).answer(m.Describe(study="0" * 64))
    assert isinstance(reply, m.Refusal)
    assert reply.error == "RefusedError"
    assert site.study.digest[:12] in reply.reason


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (m.TrainGan(study="S", class_name="Luggage", round=1, weights={}), "not a generator"),
        (m.TrainGan(study="S", class_name="Pleural Effusion", round=1, weights={}), "too few"),
        (m.TrainGan(study="S", class_name="Normal", round=1, weights={}), "do not fit"),
        (m.TrainClassifier(study="S", arm="DS9", round=1, weights={}), "not an arm"),
        (m.TrainClassifier(study="S", arm="DS3", round=1, weights={}), "archive"),
        (m.ScoreClassifier(study="S", arm="DS1", round=1, split="train", weights={}), "not a split"),
        (m.ShowExamples(study="S", count=3), "does not show"),
        (m.OfferArchive(study="S", root="r", digests="../../etc/passwd"), "digest"),
        (m.KeepArchive(study="S", shard=0, digest="0" * 64, arrays={}), "not been offered"),
    ],
)
def test_requests_outside_the_study_are_refused_with_the_reason(
    tmp_path: Path, request_: m.Request, words: str
) -> None:
    site = _site(tmp_path)
    reply = site.answer(replace(request_, study=site.study.digest))
    assert isinstance(reply, m.Refusal)
    assert words in reply.reason


def test_an_answer_is_stored_and_sent_again_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = _site(tmp_path)
    first = site.answer(_train_request(site))
    assert isinstance(first, m.GanUpdate)
    calls: list[int] = []
    monkeypatch.setattr("xfed.client.open_training.train_generator", lambda *a: calls.append(1))
    again = Site(tmp_path).answer(_train_request(site))
    assert isinstance(again, m.GanUpdate)
    assert not calls
    assert digest_of(again.weights) == digest_of(first.weights)
    assert (again.images, again.loss_d, again.seconds) == (first.images, first.loss_d, first.seconds)


def test_other_weights_in_the_same_round_are_a_new_question(tmp_path: Path) -> None:
    site = _site(tmp_path)
    first = site.answer(_train_request(site))
    other = parameters_of(build_generator(site.study, ("other",)))
    second = site.answer(replace(_train_request(site), weights=other))
    assert isinstance(first, m.GanUpdate)
    assert isinstance(second, m.GanUpdate)
    assert digest_of(first.weights) != digest_of(second.weights)


def test_a_kill_between_state_and_answer_repeats_the_round_to_the_bit(tmp_path: Path) -> None:
    site = _site(tmp_path)
    site.answer(_train_request(site, 1))
    whole = site.answer(_train_request(site, 2))
    for path in (tmp_path / "answers").glob("TrainGan-Normal-2*"):
        path.unlink()  # the state of round 2 is on disk, its answer is not
    again = Site(tmp_path).answer(_train_request(site, 2))
    assert isinstance(whole, m.GanUpdate)
    assert isinstance(again, m.GanUpdate)
    assert digest_of(whole.weights) == digest_of(again.weights)


def test_the_discriminator_stays_home_and_is_kept(tmp_path: Path) -> None:
    site = _site(tmp_path)
    reply = site.answer(_train_request(site, 1))
    assert isinstance(reply, m.GanUpdate)
    assert reply.weights.keys() == _train_request(site).weights.keys()
    shapes = {tuple(p.shape) for p in Discriminator(32, 4, torch_generator(0, "d")).parameters()}
    private = [v for k, v in reply.weights.items() if k.startswith("d/") or k.startswith("adam")]
    assert not private
    assert shapes
    for round in (2, 3, 4):
        site.answer(_train_request(site, round))
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert kept == ["gan-Normal-000003.safetensors", "gan-Normal-000004.safetensors"]
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_the_archive_is_kept_by_digest_and_fetched_once(tmp_path: Path) -> None:
    site = _site(tmp_path)
    study = site.study.digest
    shard = {"images": np.zeros((4, 32, 32), np.uint8), "labels": np.array([0, 1, 2, 2])}
    digest = digest_of(shard)
    offer = m.OfferArchive(study=study, root="r", digests=digest)
    wanted = site.answer(offer)
    assert isinstance(wanted, m.ArchiveWanted)
    assert wanted.missing == "0"
    tampered = {**shard, "labels": np.array([0, 1, 2, 1])}
    assert isinstance(site.answer(m.KeepArchive(study=study, shard=0, digest=digest, arrays=tampered)), m.Refusal)
    assert isinstance(site.answer(m.KeepArchive(study=study, shard=0, digest=digest, arrays=shard)), m.ArchiveKept)
    wanted = site.answer(offer)
    assert isinstance(wanted, m.ArchiveWanted)
    assert wanted.missing == ""
    model = parameters_of(build_classifier(site.study, torch_generator(1, "c")))
    reply = site.answer(m.TrainClassifier(study=study, arm="DS3", round=1, weights=model))
    assert isinstance(reply, m.ClassifierUpdate)
    thinning = {"times": np.zeros(3, np.int64)}
    measured = site.answer(m.MeasureArchive(study=study, arm="DS3", scale=1.0, thinning=thinning, weights=model))
    assert isinstance(measured, m.ArchiveMeasured)


def test_examples_only_with_the_sites_consent(tmp_path: Path) -> None:
    willing = _site(tmp_path / "a", share=True)
    reply = willing.answer(m.ShowExamples(study=willing.study.digest, count=3))
    assert isinstance(reply, m.Examples)
    assert reply.arrays["images"].shape == (3, 3, 32, 32)


def test_no_reply_holds_pixels_of_the_store_unless_examples_are_shared(tmp_path: Path) -> None:
    """Every reply of a site that shares nothing: no row of any stored image occurs in its bytes."""
    site = _site(tmp_path)
    study = site.study.digest
    model = parameters_of(build_classifier(site.study, torch_generator(1, "c")))
    shard = {"images": np.zeros((4, 32, 32), np.uint8), "labels": np.array([0, 1, 2, 2])}
    site.answer(m.OfferArchive(study=study, root="r", digests=digest_of(shard)))
    site.answer(m.KeepArchive(study=study, shard=0, digest=digest_of(shard), arrays=shard))
    requests = [
        m.Describe(study=study),
        _train_request(site),
        m.TrainClassifier(study=study, arm="DS1", round=1, weights=model),
        m.TrainClassifier(study=study, arm="DS3", round=1, weights=model),
        m.ScoreClassifier(study=study, arm="DS1", round=1, split="validation", weights=model),
        m.MeasureArchive(study=study, arm="DS1", scale=1.0, thinning={"times": np.zeros(3, np.int64)}, weights=model),
        m.ShowExamples(study=study, count=2),
    ]
    rows = [image[16].tobytes() for image in site.store.images]
    for request in requests:
        reply = site.answer(request)
        arrays = [getattr(reply, f.name) for f in reply.__dataclass_fields__.values() if f.type == "Arrays"]
        payload = b"".join(np.asarray(a).tobytes() for group in arrays for a in group.values())
        assert not any(row in payload for row in rows), type(request).__name__
