"""Rules that hold between parts: what the ledger says is what the mechanism did, and what leaves is public or released."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests import test_private_classifier, test_private_gan
from tests.audited import DELTA, SiteLedger, once, study, study_ledger
from xfed.client import private_site
from xfed.client.cohort import Cohort, cohort
from xfed.client.ledger import open_ledger
from xfed.client.policy import Policy
from xfed.client.private_site import PrivateSite
from xfed.client.store import open_store
from xfed.common import messages as m
from xfed.common.dp_events import Event
from xfed.common.errors import FederationError, RefusedError
from xfed.common.identity import public_text
from xfed.common.ledger_lines import endorse, read_line, sign_head
from xfed.common.mechanism import SecretMechanism
from xfed.server import privacy
from xfed.server.ledgers import LedgerCopy
from xfed.simulations import neighbours

STUDY = neighbours.neighbour_study()


class Noted(SecretMechanism):
    """Keeps what it was asked, and the sums before noise."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float]] = []
        self.asked: list[tuple[float, float]] = []
        self.sums: list[dict[str, np.ndarray]] = []

    def sample(self, patients: int, q: float) -> Any:
        self.draws.append((patients, q))
        return super().sample(patients, q)

    def release(self, sums: Any, *, sensitivity: float, sigma: float) -> Any:
        self.asked.append((sensitivity, sigma))
        self.sums.append({name: value.double().numpy().copy() for name, value in sums.items()})
        return super().release(sums, sensitivity=sensitivity, sigma=sigma)


@dataclass(kw_only=True)
class Told:
    """One request, what the mechanism was asked for it, and what the ledger says was spent."""

    request: m.Request
    reply: m.Reply
    draws: list[tuple[int, float]]
    asked: list[tuple[float, float]]
    sums: list[dict[str, np.ndarray]]
    spent: list[tuple[str | None, Event]]


@dataclass(kw_only=True)
class Ward:
    declared: tuple[int, ...]
    who: Cohort
    told: list[Told] = field(default_factory=list)
    class_sizes: list[tuple[int, ...]] = field(default_factory=list)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """A site that answered every kind of private request once."""
    folder, mechanism = tmp_path_factory.mktemp("ward") / "site", Noted()
    neighbours._found(folder, STUDY, 0, None)
    site = neighbours._site(folder, STUDY, mechanism)
    found = Ward(declared=site.declared, who=cohort(open_store(folder / "store"), STUDY, site.declared))
    train = private_site.train_private_round

    def watched(*arguments: Any, **more: Any) -> None:
        found.class_sizes.append(tuple(more["class_sizes"]))
        train(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_site, "train_private_round", watched)
        for request in neighbours._requests(STUDY):
            match request:
                case m.OfferArchive():
                    site.shards.offer(request)
                case m.KeepArchive():
                    site.shards.keep(request)
                case m.TrainGan() | m.EmbedClass() | m.TrainClassifier() | m.ScorePrivately():
                    before = len(mechanism.draws), len(mechanism.asked), len(site._ledger.spent())
                    reply = site.answer(request)
                    found.told.append(
                        Told(
                            request=request,
                            reply=reply,
                            draws=mechanism.draws[before[0] :],
                            asked=mechanism.asked[before[1] :],
                            sums=mechanism.sums[before[1] :],
                            spent=site._ledger.spent()[before[2] :],
                        )
                    )
        yield found


def test_the_ledger_says_what_the_mechanism_was_asked(ward: Ward) -> None:
    """As many releases as steps, with the sensitivity and sigma of the event; as many fresh draws, with its q."""
    kinds = set()
    for one in ward.told:
        kinds.add(type(one.request))
        ((class_name, event),) = one.spent
        assert one.asked == [(event.clip, event.sigma)] * event.steps
        if isinstance(one.request, m.TrainGan | m.TrainClassifier):
            of = ward.who.train if class_name is None else (ward.who.train[STUDY.classes.index(class_name)],)
            assert one.draws == [(sum(map(len, of)), event.q)] * event.steps
            assert event.q < 1
        else:
            assert one.draws == []
            assert (event.sampling, event.q, event.steps) == ("none", 1, 1)
    assert kinds == set(private_site.PRIVATE)


def test_answers_hold_public_figures_and_releases_alone(ward: Ward) -> None:
    """Weights in averages and in the loss are declared sizes; there is no loss of reals and no time that hangs on a draw."""
    assert ward.class_sizes
    assert set(ward.class_sizes) == {ward.declared}
    assert ward.declared != tuple(len(people) for people in ward.who.train), "otherwise nothing is seen here"
    for one in ward.told:
        reply = one.reply
        if isinstance(reply, m.GanUpdate | m.Embedding):
            assert reply.images == ward.declared[STUDY.classes.index(one.request.class_name)]  # type: ignore[attr-defined]
        if isinstance(reply, m.ClassifierUpdate):
            assert (reply.images, reply.loss) == (sum(ward.declared), 0.0)
        if isinstance(reply, m.GanUpdate | m.ClassifierUpdate):
            assert reply.seconds == 0.0


@pytest.mark.parametrize("kind", ["gan", "classifier"])
def test_a_patient_who_is_not_drawn_changes_no_sum(kind: str) -> None:
    """The same draw out of twelve patients and out of eleven: no weight, number of fakes or divisor hangs on who is there."""
    draw, found = [0, 3, 9], []
    for patients in (12, 11):
        if kind == "gan":
            bare = test_private_gan.Bare([draw])
            few = test_private_gan._settings(steps_per_round=1)
            state, _ = test_private_gan._play(bare, test_private_gan._rows(patients), few, engine="fast")
            model: Any = state.discriminator
        else:
            bare, model = test_private_gan.Bare([draw]), test_private_classifier._model()
            weighted = test_private_classifier._settings(balance="loss")
            rows_of = test_private_classifier.ROWS[:patients]
            test_private_classifier._train(bare, model, rows_of, synthetic=True, settings=weighted, steps=1)
        divided = {f"{name}, divided": parameter.grad for name, parameter in model.named_parameters()}
        found.append({**bare.released[0], **divided})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_test_patient_counts_once_in_the_scores(ward: Ward) -> None:
    patients = sum(map(len, ward.who.test))
    assert patients > 0
    scores = [one for one in ward.told if isinstance(one.request, m.ScorePrivately)]
    assert len(scores) == len(STUDY.classifier.arms)
    for one in scores:
        assert one.sums[0]["confusion"].sum() == patients
        assert one.sums[0]["histogram"].sum() == pytest.approx(len(STUDY.classes) ** 0.5 * patients)


class Untouched(SecretMechanism):
    """Nothing may be asked of it."""

    def sample(self, patients: int, q: float) -> Any:
        pytest.fail("patients were sampled for a request that is over the budget")

    def pick(self, counts: Any) -> Any:
        pytest.fail("images were picked for a request that is over the budget")

    def release(self, sums: Any, *, sensitivity: float, sigma: float) -> Any:
        pytest.fail("a sum was made for a request that is over the budget")


def test_over_budget_is_refused_before_patients_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    neighbours._found(folder, STUDY, 0, None)
    site = PrivateSite(
        name="site",
        work=folder,
        study=STUDY,
        policy=Policy.permissive().model_copy(update={"epsilon_total_max": 1e-3}),
        store=lambda: open_store(folder / "store"),
        ledger=lambda: open_ledger(folder, "site"),
        mechanism=Untouched(),
    )
    refused = 0
    for request in neighbours._requests(STUDY):
        if isinstance(request, m.TrainGan | m.EmbedClass | m.TrainClassifier | m.ScorePrivately):
            with pytest.raises(RefusedError, match="would be exceeded"):
                site.answer(request)
            refused += 1
    kinds = [json.loads(line)["kind"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert kinds == ["refuse"] * refused
    assert refused > 4


# The coordinator


def _shown(ledger: SiteLedger, lines: int, head: int) -> m.LedgerLines:
    """The first `lines` lines under the signed head of line `head`."""
    return m.LedgerLines(
        site=ledger.site,
        lines=b"".join(ledger.lines[:lines]).decode(),
        head=json.dumps(sign_head(ledger.heads[head], site=ledger.site, key=ledger.key)),
        key=json.dumps(endorse(ledger.site, ledger.key.public_key(), ledger.identity)),
    )


def _copy(folder: Path, ledger: SiteLedger) -> LedgerCopy:
    return LedgerCopy(folder, ledger.site, public_text(ledger.identity.public_key()))


def test_the_coordinator_takes_no_ledger_that_holds_lines_back(tmp_path: Path) -> None:
    ledger = study_ledger("site-01", study())
    copy = _copy(tmp_path, ledger)
    for lines, head in ((4, 6), (6, 4)):
        with pytest.raises(FederationError, match="holds lines back"):
            copy.take(_shown(ledger, lines, head))
        assert copy.lines() == []
    assert copy.take(_shown(ledger, 4, 4)) == ledger.heads[4]
    with pytest.raises(FederationError, match="rewrite"):
        copy.take(_shown(ledger, 4, 4))
    assert [line.head for line in copy.lines()] == ledger.heads[1:5]


def test_the_coordinator_takes_no_ledger_under_another_key(tmp_path: Path) -> None:
    first = study_ledger("site-01", study())
    copy = _copy(tmp_path, first)
    copy.take(_shown(first, 0, 0))
    second = SiteLedger("site-01", study().digest)
    second.identity = first.identity
    second.key = Ed25519PrivateKey.generate()
    second.attempt("scores", None, 1, [once(4.0)])
    with pytest.raises(FederationError, match="another ledger key than before"):
        copy.take(_shown(second, 3, 3))
    assert copy.lines() == []


def test_the_report_says_the_largest_epsilon_of_the_sites_and_never_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    of = study()
    ledgers = {name: SiteLedger(name, of.digest) for name in ("site-01", "site-02", "site-03")}
    for ledger, sigma in zip(ledgers.values(), (6.0, 2.0, 9.0), strict=True):
        ledger.attempt("generators", "Normal", 1, [once(sigma)])
        ledger.attempt("generators", "Cardiomegaly", 1, [once(2 * sigma)])
    counts = {"counts": np.array([[300, 400, 240], [0, 0, 0], [0, 0, 0]])}
    copies = {
        name: SimpleNamespace(lines=lambda ledger=ledger: [read_line(line) for line in ledger.lines])
        for name, ledger in ledgers.items()
    }
    run: Any = SimpleNamespace(
        study=of,
        exchange=SimpleNamespace(sites=list(ledgers)),
        ledgers=SimpleNamespace(copy=copies.__getitem__),
        descriptions={name: SimpleNamespace(counts=counts) for name in ledgers},
    )
    plan = SimpleNamespace(epsilon=8.0, warnings=())
    monkeypatch.setattr(privacy, "budgets_of", lambda run: dict.fromkeys(ledgers, plan))
    found = privacy.privacy_section(run, {})
    from xfed.common.accounting import epsilon

    right = {name: epsilon([once(sigma)], DELTA) for name, sigma in zip(ledgers, (6.0, 2.0, 9.0), strict=True)}
    assert {name: entry["epsilon"] for name, entry in found["sites"].items()} == pytest.approx(right)
    assert found["epsilon"] == pytest.approx(right["site-02"])
    assert set(found["artefacts"].values()) == {found["epsilon"]}
    ledgers["site-03"].lines.clear()
    assert privacy.privacy_section(run, {})["epsilon"] is None, "a ledger that was never seen may hold anything"
