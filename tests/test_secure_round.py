"""Secure sums in a study: what the coordinator gets, what it cannot get, and who may be missing."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.conftest import tiny
from xfed.client.site import Site
from xfed.common import messages as m
from xfed.common.codec import decode_request, encode
from xfed.common.config import Study
from xfed.common.errors import FederationError
from xfed.common.gan import build_generator
from xfed.common.journal import Journal
from xfed.common.weights import parameters_of
from xfed.server.census import census_of
from xfed.server.checkpoints import Checkpoints
from xfed.server.conduct import _count_securely  # the one step of a study that has no other door
from xfed.server.joining import join
from xfed.server.run import Run
from xfed.simulations.flower import LocalGrid
from xfed.simulations.hospitals import build_hospitals, site_folders

Behave = Any


class World:
    """Real `Site`s behind a local grid; `seen` is everything the coordinator received, `away` who does not answer what."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        build_hospitals(study, folder, None)
        self.sites = [Site(path) for path in site_folders(folder, study)]
        self.seen: list[tuple[str, m.Request, m.Reply]] = []
        self.away: dict[str, tuple[type[m.Request], ...]] = {}
        self.lock = threading.Lock()
        app = ClientApp()

        def answer(message: Message, context: Context) -> Message:
            site = self.sites[int(context.node_config["partition-id"])]
            request = decode_request(message.content)
            if isinstance(request, self.away.get(site.settings.name, ())):
                raise RuntimeError("the line is dead")
            with self.lock:
                reply = site.answer(request)
                self.seen.append((site.settings.name, request, reply))
            return Message(encode(reply), reply_to=message)

        for kind in {request.flower_type for request in m.REQUESTS.values()}:
            group, action = kind.split(".")
            getattr(app, group)(action)(answer)
        self.grid = LocalGrid(app, len(self.sites), 2)
        journal = Journal(folder / "events.jsonl")
        exchange, descriptions = join(self.grid, study, journal)
        run = Run(
            study=study,
            folder=folder,
            exchange=exchange,
            journal=journal,
            checkpoints=Checkpoints(folder / "checkpoints", study.digest),
            descriptions=descriptions,
            census=census_of(descriptions, len(study.classes), study.secure),
        )
        self.open_census = run.census
        self.run = replace(run, census=_count_securely(run)) if study.secure else run

    def round(self, number: int = 1, seed: str = "g") -> dict[str, tuple[str, m.GanUpdate]]:
        """One round of all classes; by class, who is said to have answered, and with what."""
        requests = [
            m.TrainGan(
                study=self.study.digest,
                class_name=name,
                round=number,
                weights=parameters_of(build_generator(self.study, (seed, name))),
                total=int(self.run.census.drawn[label]) if self.study.secure else 0,
            )
            for label, name in enumerate(self.study.classes)
        ]
        found: dict[str, list[tuple[str, m.GanUpdate]]] = {name: [] for name in self.study.classes}

        def fold(site: str, request: m.Request, reply: m.Reply) -> None:
            assert isinstance(request, m.TrainGan)
            assert isinstance(reply, m.GanUpdate)
            found[request.class_name].append((site, reply))

        self.run.sum("gan", number, requests, [self.run.exchange.sites] * len(requests), fold)
        return {name: answers[0] for name, answers in found.items() if answers}

    def alone(self, name: str) -> list[m.GanUpdate]:
        """What each site answers by itself: read at the site, where it stays."""
        folders = [site.folder / "answers" for site in self.sites]
        assert all(folder.is_dir() for folder in folders)
        request = m.TrainGan(
            study=self.study.digest,
            class_name=name,
            round=1,
            weights=parameters_of(build_generator(self.study, ("g", name))),
        )
        replies = [site._answers.find(request) for site in self.sites]
        return [reply for reply in replies if isinstance(reply, m.GanUpdate)]


def _study(sites: int, **federation: Any) -> Study:
    return tiny(
        sites={"count": sites},
        gan={"rounds": 2, "steps_per_round": 1, "minimum_images": 2},
        federation={"retries": 0, "quorum": 0.5, "join_limit_s": 20, **federation},
    )


@pytest.fixture
def worlds(tmp_path: Path) -> Any:
    made: list[World] = []

    def make(study: Study) -> World:
        made.append(World(study, tmp_path / str(len(made))))
        return made[-1]

    yield make
    for world in made:
        world.grid.close()


def test_the_sum_is_the_mean_of_what_stayed_at_the_sites(worlds: Any) -> None:
    world = worlds(_study(3))
    for name, (who, update) in world.round().items():
        own = world.alone(name)
        images = [reply.images for reply in own]
        assert who == "sum over sites"
        assert update.images == sum(images)
        bound = len(own) * 2**-27 + 2**-24  # of the sum, and of the float32 that the mean is rounded to
        for key, value in update.weights.items():
            stack = np.stack([reply.weights[key].astype(np.float64) for reply in own])
            mean = np.average(stack, axis=0, weights=images)
            assert np.abs(value - mean).max() <= bound * max(1.0, np.abs(mean).max())
        loss = np.average([reply.loss_d for reply in own], weights=images)
        assert update.loss_d == pytest.approx(loss, abs=1e-6)


def test_the_coordinator_receives_no_sites_own_numbers(worlds: Any) -> None:
    world = worlds(_study(3))
    world.round()
    kinds = {type(reply) for _, _, reply in world.seen}
    assert kinds == {m.Description, m.SessionKeys, m.SessionShares, m.Masked, m.UnmaskShares}
    for _, _, reply in world.seen:
        if isinstance(reply, m.Description):
            assert reply.patients == 0
            assert not any(array.any() for array in reply.counts.values())
    assert not world.open_census.counts.any()
    true = sum(site.store.counts() for site in world.sites)
    assert np.array_equal(world.run.census.counts, true)
    # a site's masked weights look like anybody's noise: no byte of the plain fixed-point vector stands where it stood
    masked = [reply for _, r, reply in world.seen if isinstance(reply, m.Masked) and isinstance(r, m.TrainGan)]
    for reply in masked:
        words = reply.arrays["weights"]
        counts = np.bincount(words.view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # chi-square, 255 degrees: 1e-8 of chance


@pytest.mark.parametrize(("sites", "gone"), [(3, ["site-02"]), (5, ["site-01", "site-04"])])
@pytest.mark.parametrize("when", [m.TrainGan, m.Unmask])
def test_sites_may_drop_out(worlds: Any, sites: int, gone: list[str], when: type[m.Request]) -> None:
    world = worlds(_study(sites))
    world.away = dict.fromkeys(gone, (when, m.Unmask))
    answers = world.round()
    survivors = [site for site in world.sites if when is m.Unmask or site.settings.name not in gone]
    for label, name in enumerate(world.study.classes):
        held = [int(site.store.counts()[0, label]) for site in survivors]
        assert answers[name][1].images == sum(h for h in held if h >= world.study.gan.minimum_images)
    (line,) = [e for e in world.run.journal.read() if e["kind"] == "exchange" and e["phase"] == "gan"]
    assert line["dropped"] == ([] if when is m.Unmask else gone)


def test_a_site_lost_before_the_keys_is_left_out(worlds: Any) -> None:
    world = worlds(_study(3))
    world.away = {"site-03": tuple(m.REQUESTS.values())}
    assert len(world.round()) == 3
    world.away = {"site-03": tuple(m.REQUESTS.values()), "site-02": tuple(m.REQUESTS.values())}
    with pytest.raises(FederationError, match="needs 2 sites that agree on keys"):
        world.round(2)


def test_too_few_survivors_give_nothing(worlds: Any) -> None:
    world = worlds(_study(3))
    world.away = {"site-01": (m.TrainGan,), "site-02": (m.TrainGan,)}
    with pytest.raises(FederationError, match="1 of 3 sites answered"):
        world.round()
    assert not any(
        isinstance(reply, m.UnmaskShares) for _, r, reply in world.seen if r.session == world.seen[-1][1].session
    )


def test_a_second_sum_over_other_sites_is_refused(worlds: Any) -> None:
    """The difference of two sums would be one site's answer (its weights, its counts)."""
    world = worlds(_study(3))
    world.round()
    world.round()  # the same sites again: a coordinator that was killed before it could write the round down
    world.away = {"site-03": (m.TrainGan, m.Unmask)}
    with pytest.raises(FederationError):
        world.round()
    refused = [reply.reason for _, _, reply in world.seen if isinstance(reply, m.Refusal)]
    assert len(refused) == 2
    assert all("by difference" in reason for reason in refused)
    world.away = {}
    assert len(world.round(2)) == 3  # other weights, another answer: nothing to subtract


def test_a_site_gives_nothing_of_its_own_in_a_secure_study(worlds: Any) -> None:
    world = worlds(_study(3))
    site, study = world.sites[0], world.study
    weights = parameters_of(build_generator(study, ("g",)))
    bare = m.TrainGan(study=study.digest, class_name="Normal", round=1, weights=weights)
    reply = site.answer(bare)
    assert isinstance(reply, m.Refusal)
    assert "sums securely" in reply.reason
    for peers in ("site-01", "site-01,stranger", "site-02,site-03", ""):
        asked = site.answer(m.AdvertiseKeys(study=study.digest, session="s", peers=peers))
        assert isinstance(asked, m.Refusal), peers
    reply = site.answer(replace(bare, session="never", peers="site-01,site-02", total=9))
    assert isinstance(reply, m.Refusal)
    assert "takes no part" in reply.reason


def test_forged_keys_are_refused_by_the_sites(worlds: Any) -> None:
    """A coordinator that puts keys of its own in the place of another site's is found out by the registered signature."""
    world = worlds(_study(3))
    study, names = world.study.digest, [site.settings.name for site in world.sites]
    joined = ",".join(names)
    adverts = {}
    for site in world.sites:
        reply = site.answer(m.AdvertiseKeys(study=study, session="x", peers=joined))
        assert isinstance(reply, m.SessionKeys)
        adverts[site.settings.name] = reply.arrays["advert"]
    forged = dict(adverts)
    forged["site-02"] = np.concatenate([adverts["site-03"][:49], adverts["site-02"][49:]])
    reply = world.sites[0].answer(m.ShareKeys(study=study, session="x", arrays=forged))
    assert isinstance(reply, m.Refusal)
    assert "site-02" in reply.reason
    assert isinstance(world.sites[0].answer(m.ShareKeys(study=study, session="x", arrays=adverts)), m.SessionShares)


def test_an_open_study_is_as_before(worlds: Any) -> None:
    world = worlds(_study(3, secure_aggregation="off"))
    answers = world.round()
    assert {who for who, _ in answers.values()} == {"site-01"}
    kinds = {type(reply) for _, _, reply in world.seen}
    assert kinds == {m.Description, m.GanUpdate}


def test_session_files_are_secret_and_few(worlds: Any) -> None:
    world = worlds(_study(3))
    for number in range(1, 13):
        world.round(number, seed=f"g{number}")
    for site in world.sites:
        folder = site.work / "secure"
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix == ""]
        assert 1 <= len(files) <= 9
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
