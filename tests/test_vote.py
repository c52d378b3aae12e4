"""A hospital's vote: planted copies are vetoed, honest images are not, and nothing but the vote leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.conftest import tiny
from xfed.client.bounds import check_request
from xfed.client.policy import Policy
from xfed.client.reply_bounds import check_reply
from xfed.client.site import Site, SiteSettings, found_site
from xfed.client.store import Store, write_store
from xfed.client.vote import FREEDOM, HONEST, LEAST, limit_of, vote
from xfed.common import messages as m
from xfed.common.config import Study
from xfed.common.errors import RefusedError
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import digest_of, parameters_of
from xfed.simulations.phantom import apply_style, phantom_arrays, site_style
from xfed.simulations.planted_copies import PROMISED, SITES, hospital, plant, taught, toy_study

CPU = torch.device("cpu")
STUDY = toy_study(32, 5)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder = tmp_path_factory.mktemp("hospitals")
    return [hospital(STUDY, folder / str(index), 40, index) for index in range(2)]


@pytest.fixture(scope="module")
def model(stores: list[Store]) -> torch.nn.Module:
    return taught(STUDY, stores, steps=60)


@pytest.fixture(scope="module")
def honest() -> Any:
    """Phantoms of patients whom no hospital has, in the styles of both."""
    fresh, _, _ = phantom_arrays(
        classes=STUDY.classes, patients=dict.fromkeys(STUDY.classes, 60), images_per_patient=1.0, size=32, seed=78
    )
    styles = [site_style(STUDY.seed, index, 0.2) for index in range(2)]
    return np.concatenate([apply_style(fresh, style, numpy_generator(1, "style")) for style in styles])


def _part(store: Store, folder: Path, rows: Any, splits: Any = None) -> Store:
    return write_store(
        folder,
        classes=store.classes,
        images=np.asarray(store.images[rows]),
        labels=store.labels[rows],
        patients=store.patients[rows],
        splits=store.splits[rows] if splits is None else splits,
    )


def test_planted_copies_are_vetoed(stores: list[Store], model: torch.nn.Module) -> None:
    store = stores[0]
    planted = plant(np.asarray(store.images[store.rows("train")]), numpy_generator(1, "plant"))
    archive = np.concatenate([planted[kind] for kind in PROMISED])
    cast = vote(store, archive, model, CPU, "float32", sites=SITES)
    assert cast.calibrated
    for kind, vetoed in zip(PROMISED, np.split(cast.vetoed, len(PROMISED)), strict=True):
        assert vetoed.mean() >= 0.99, kind


class _TopRows(torch.nn.Module):
    """Features that are the two top rows of the picture, and nothing else of it."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        rows = images[:, 0, :2].flatten(1)
        return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)  # each picture is standardised before


def test_each_of_the_two_tests_finds_what_the_other_cannot(
    stores: list[Store], model: torch.nn.Module, honest: Any
) -> None:
    store = stores[0]
    known = np.asarray(store.images[store.rows("train")])
    grainy = numpy_generator(1, "grain").normal(known[:, :, ::-1], 12).clip(0, 255).astype(np.uint8)
    blind = _TopRows()  # a mirrored picture has other top rows, and grain on them
    assert vote(store, grainy, blind, CPU, "float32", sites=SITES).vetoed.mean() > 0.9
    patched = honest[: len(known)].copy()
    patched[:, :2] = known[: len(patched), :2]
    assert vote(store, patched, blind, CPU, "float32", sites=SITES).vetoed.mean() > 0.9
    assert vote(store, patched, model, CPU, "float32", sites=SITES).vetoed.mean() < 0.05
    assert vote(store, honest, blind, CPU, "float32", sites=SITES).vetoed.mean() <= 0.02


def test_honest_images_are_not(stores: list[Store], model: torch.nn.Module, honest: Any) -> None:
    votes = [vote(store, honest, model, CPU, "float32", sites=SITES) for store in stores]
    assert all(cast.calibrated for cast in votes)
    assert np.logical_or.reduce([cast.vetoed for cast in votes]).mean() <= 0.02


def test_copies_of_other_hospitals_and_of_held_out_patients_are_not_this_ones_business(
    stores: list[Store], model: torch.nn.Module
) -> None:
    """What is vetoed is nearness to training images; a held-out patient's image is no sign of memorising."""
    foreign = np.asarray(stores[1].images[stores[1].rows("train")])
    assert vote(stores[0], foreign, model, CPU, "float32", sites=SITES).vetoed.mean() <= 0.02
    held = np.asarray(stores[0].images[stores[0].rows("test")])
    assert not vote(stores[0], held, model, CPU, "float32", sites=SITES).vetoed.any()


def test_the_same_vote_again(stores: list[Store], model: torch.nn.Module, honest: Any) -> None:
    first = vote(stores[0], honest[:100], model, CPU, "float32", sites=SITES)
    again = vote(stores[0], honest[:100], model, CPU, "float32", sites=SITES)
    np.testing.assert_array_equal(first.vetoed, again.vetoed)


def test_with_few_held_out_images_only_what_is_as_good_as_identical_is_vetoed(
    stores: list[Store], model: torch.nn.Module, honest: Any, tmp_path: Path
) -> None:
    store = stores[0]
    train, held = store.rows("train"), np.flatnonzero(store.splits > 0)
    small = _part(store, tmp_path / "small", np.concatenate([train, held[: LEAST - 1]]))
    planted = plant(np.asarray(store.images[train]), numpy_generator(1, "plant"))
    for kind in ("exact", "shifted by 2", "mirrored"):
        cast = vote(small, planted[kind], model, CPU, "float32", sites=SITES)
        assert not cast.calibrated
        assert cast.vetoed.all(), kind
    assert vote(small, planted["grain 5/255"], model, CPU, "float32", sites=SITES).vetoed.mean() > 0.9
    assert not vote(small, honest, model, CPU, "float32", sites=SITES).vetoed.any()
    enough = _part(store, tmp_path / "enough", np.concatenate([train, held[:LEAST]]))
    assert vote(enough, honest[:10], model, CPU, "float32", sites=SITES).calibrated


def test_a_training_image_that_is_among_the_held_out_ones_too_hides_no_copy(
    stores: list[Store], model: torch.nn.Module, tmp_path: Path
) -> None:
    """The same picture imported under two patient numbers: its ratio is 1, and yet its copy is a copy."""
    store = stores[0]
    train = store.rows("train")
    twice = np.concatenate([np.arange(len(store.labels)), train[:8]])
    splits = np.concatenate([store.splits, np.full(8, 2, np.int8)])
    doubled = write_store(
        tmp_path / "doubled",
        classes=store.classes,
        images=np.asarray(store.images[twice]),
        labels=store.labels[twice],
        patients=np.concatenate([store.patients, 10_000 + np.arange(8)]),
        splits=splits,
    )
    cast = vote(doubled, np.asarray(store.images[train]), model, CPU, "float32", sites=SITES)
    assert cast.vetoed.all()


def test_a_hospital_without_training_images_vetoes_nothing(
    stores: list[Store], model: torch.nn.Module, tmp_path: Path
) -> None:
    store = stores[0]
    held = _part(store, tmp_path / "held", np.flatnonzero(store.splits > 0))
    cast = vote(held, np.asarray(store.images[:9]), model, CPU, "float32", sites=SITES)
    assert not cast.vetoed.any()
    assert not cast.calibrated


def test_the_limit_is_student_s(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = numpy_generator(1, "limit")
    ratios = rng.normal(-0.1, 0.2, 4000)
    for chance in (HONEST / 2, HONEST / 6, HONEST / 200):
        expected = -0.1 + 0.2 * stats.t.ppf(chance, FREEDOM)
        assert limit_of(ratios, chance) == pytest.approx(expected, rel=0.05)
    heavy = stats.t.rvs(FREEDOM, -0.1, 0.2, 200_000, random_state=1)
    assert (heavy < limit_of(heavy, HONEST / 6)).mean() <= 1.2 * HONEST / 6
    clean = limit_of(ratios[:100], 0.001)
    spoilt = limit_of(np.append(ratios[:100], [-6.0, -5.5, -6.2]), 0.001)
    assert spoilt > clean - 0.15, "held-out images that were trained on do not widen it"
    assert limit_of(np.zeros(30), 0.001) < -0.15, "equal ratios do not make it sharp"
    assert limit_of(ratios[:20], 0.001) < limit_of(ratios[:20], 0.01)


def _site(folder: Path, store: Store, study: Study) -> Site:
    _part(store, folder / "store", np.arange(len(store.labels)))
    found_site(folder, SiteSettings(name="ward"), study)
    return Site(folder)


def _offered(site: Site, images: Any, labels: Any) -> dict[str, Any]:
    """Bring an archive to the site; what requests about it say."""
    study, shard = site.study.digest, {"images": images, "labels": labels}
    digest, root = digest_of(shard), "ab" * 32
    site.act(m.OfferArchive(study=study, root=root, digests=digest))
    site.act(m.KeepArchive(study=study, shard=0, digest=digest, arrays=shard))
    return {"study": study, "root": root, "images": len(labels)}


@pytest.fixture
def asked(stores: list[Store], tmp_path: Path) -> tuple[Site, m.VoteOnArchive, m.AttackArchive]:
    study = toy_study(32, 5)
    study = study.model_copy(update={"sites": study.sites.model_copy(update={"count": 2})})  # two: no secure sum
    site, store = _site(tmp_path / "ward", stores[0], study), stores[0]
    rows = store.rows("train")[:30]
    about = _offered(site, np.asarray(store.images[rows]), store.labels[rows])
    weights = parameters_of(build_classifier(study, torch_generator(1, "c")))
    kept = np.ones(30, np.uint8)
    kept[:10] = 0
    return (
        site,
        m.VoteOnArchive(arm="DS1", weights=weights, **about),
        m.AttackArchive(arrays={"released": kept}, **about),
    )


def test_a_site_sends_the_vote_and_nothing_else(asked: tuple[Site, m.VoteOnArchive, m.AttackArchive]) -> None:
    site, request, _ = asked
    reply = site.answer(request)
    assert isinstance(reply, m.ArchiveVote)
    assert reply.arrays.keys() == {"vetoes", "voters", "calibrated"}
    assert reply.arrays["vetoes"].dtype == np.uint8
    assert reply.arrays["vetoes"].tolist() == [1] * 30
    assert (int(reply.arrays["voters"]), int(reply.arrays["calibrated"])) == (1, 1)
    assert check_reply(reply, Policy.permissive()) is reply


def test_an_answer_is_kept_and_sent_again(
    asked: tuple[Site, m.VoteOnArchive, m.AttackArchive], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, request, attack = asked
    first = [site.answer(request), site.answer(attack)]

    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("computed twice")

    monkeypatch.setattr("xfed.client.site.vote", never)
    monkeypatch.setattr("xfed.client.site.attack_archive", never)
    again = [Site(site.folder).answer(request), Site(site.folder).answer(attack)]
    for a, b in zip(first, again, strict=True):
        assert isinstance(a, m.ArchiveVote | m.ArchiveAttacked)
        assert isinstance(b, m.ArchiveVote | m.ArchiveAttacked)
        assert digest_of(a.arrays) == digest_of(b.arrays)


def test_what_is_not_released_is_not_attacked(asked: tuple[Site, m.VoteOnArchive, m.AttackArchive]) -> None:
    site, _, request = asked
    reply = site.answer(request)
    whole = site.answer(replace(request, arrays={"released": np.ones(30, np.uint8)}))
    assert isinstance(reply, m.ArchiveAttacked)
    assert isinstance(whole, m.ArchiveAttacked)
    nearest_bin = [int(arrays["membership"][0, :, 0, 0].sum()) for arrays in (reply.arrays, whole.arrays)]
    assert 0 < nearest_bin[0] < nearest_bin[1], "members at distance 0 are those whose images are released"
    assert check_reply(reply, Policy.permissive()) is reply


def test_another_archive_than_the_one_that_came_is_refused(
    asked: tuple[Site, m.VoteOnArchive, m.AttackArchive],
) -> None:
    site, request, attack = asked
    for other in (replace(request, root="cd" * 32), replace(request, images=29), replace(attack, root="cd" * 32)):
        reply = site.answer(other)
        assert isinstance(reply, m.Refusal)
        assert "Offer the archive that is meant" in reply.reason


def test_small_counts_stay(asked: tuple[Site, m.VoteOnArchive, m.AttackArchive]) -> None:
    site, _, request = asked
    reply = site.answer(request)
    assert isinstance(reply, m.ArchiveAttacked)
    least = int(reply.arrays["ranks"].sum(1)[reply.arrays["ranks"].sum(1) > 0].min())
    with pytest.raises(RefusedError, match="attacked patients is below"):
        check_reply(reply, Policy.permissive().model_copy(update={"smallest_count": least + 1}))
    strict = Site(site.folder, policy=Policy.permissive().model_copy(update={"smallest_count": 6}))
    for path in (site.folder / "answers").iterdir():
        path.unlink()
    shown = strict.answer(request)
    assert isinstance(shown, m.ArchiveAttacked)
    totals = np.concatenate([shown.arrays["ranks"].sum(-1).ravel(), shown.arrays["membership"].sum(-1).ravel()])
    assert not ((totals > 0) & (totals < 6)).any()


@pytest.mark.parametrize("kind", [m.VoteOnArchive, m.AttackArchive])
def test_a_private_study_is_refused_with_the_reason_at_both_gates(
    stores: list[Store], tmp_path: Path, kind: Any
) -> None:
    values = STUDY.resolved() | {"privacy": {"epsilon": 3.0, "delta": 1e-4}, "sites": {"count": 2}}
    values["classifier"] = {**values["classifier"], "balance": "loss"}
    values["gan"] = {**values["gan"], "method": "dp-merf", "merf": {"features": 8}}
    study = Study.model_validate(values)
    site = _site(tmp_path / "ward", stores[0], study)
    more: dict[str, Any] = (
        {"arm": "DS1", "weights": parameters_of(build_classifier(study))}
        if kind is m.VoteOnArchive
        else {"arrays": {"released": np.ones(3, np.uint8)}}
    )
    request = kind(study=study.digest, root="ab" * 32, images=3, **more)
    reply = site.answer(request)
    assert isinstance(reply, m.Refusal)
    assert "this study is private" in reply.reason
    with pytest.raises(RefusedError, match="differentially private"):
        check_request(request, study, Policy.permissive(), {"ward": "key"})
    assert not (tmp_path / "ward" / "ledger.jsonl").exists(), "no patient was read"


def test_a_policy_without_votes_lets_none_out_masked_or_not() -> None:
    policy = Policy.permissive().model_copy(update={"archive_votes": False})
    bare = m.ArchiveVote(site="ward", arrays={"vetoes": np.zeros(3, np.uint8)})
    for reply in (bare, m.Masked(site="ward", kind="ArchiveVote", arrays={})):
        with pytest.raises(RefusedError, match="archive_votes"):
            check_reply(reply, policy)
        check_reply(reply, Policy.permissive())


def test_a_study_that_asks_for_no_vote_gets_none() -> None:
    study = tiny(archive={"vote": False, "attacks": False})
    weights = parameters_of(build_classifier(study))
    about: dict[str, Any] = {"study": study.digest, "root": "ab" * 32, "images": 3}
    for request, words in (
        (m.VoteOnArchive(arm="DS1", weights=weights, **about), "archive.vote is false"),
        (m.AttackArchive(arrays={"released": np.ones(3, np.uint8)}, **about), "archive.attacks is false"),
    ):
        with pytest.raises(RefusedError, match=words):
            check_request(request, study, Policy.permissive(), {"ward": "key"})
