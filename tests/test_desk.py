"""The desk: nothing is done before plan, bounds and policy allow it, nothing leaves that they forbid, all is written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny
from tests.joined import OPEN_POLICY, federation_of, plan_of, store_for
from xfed.client.approval import Plans
from xfed.client.audit import read_audit, verify_audit
from xfed.client.desk import Desk
from xfed.client.home import SiteHome
from xfed.client.policy import load_policy
from xfed.common import messages as m
from xfed.common.config import Study
from xfed.common.errors import IdentityError, RefusedError
from xfed.common.gan import build_generator
from xfed.common.packing import pack, unpack_reply
from xfed.common.plan import new_plan
from xfed.common.weights import parameters_of
from xfed.server.federation import Federation

STUDY = {"sites": {"count": 2}, "federation": {"secure_aggregation": "off"}}
WHO = {"run": "7", "message": "m", "coordinator": "tests"}


class Ward:
    """One joined site with a store, its desk, and its federation."""

    def __init__(self, folder: Path) -> None:
        self.federation: Federation
        self.federation, homes = federation_of(folder, "ward", "other")
        self.home: SiteHome = homes[0]
        self.study: Study = tiny(**STUDY)
        self.plan, self.signature = plan_of(self.federation, self.study)
        self.study = self.plan.study
        store_for(self.home, self.study)
        self.desk = Desk(self.home.folder)
        self.plans = Plans(
            self.home.folder, self.home.ca_pem, self.home.federation, self.home.name, self.home.public_key
        )

    def ask(self, request: m.Request) -> m.Reply:
        return unpack_reply(*self.desk.answer_packed(WHO, *pack(request)))

    def propose(self, text: str | None = None, signature: str | None = None) -> m.Reply:
        text, signature = text or self.plan.text, signature or self.signature
        return self.ask(m.ProposePlan(study=self.study.digest, plan=text, signature=signature))

    def approve(self) -> None:
        self.plans.approve(self.plan.digest[:12], load_policy(self.home.folder / "policy.yaml"))

    def policy(self, text: str) -> None:
        (self.home.folder / "policy.yaml").write_text(OPEN_POLICY + text)

    def train(self, **changes: Any) -> m.TrainGan:
        weights = parameters_of(build_generator(self.study, ("g",)))
        request = m.TrainGan(study=self.study.digest, class_name="Normal", round=1, weights=weights)
        return replace(request, **changes)

    def log(self) -> list[dict[str, Any]]:
        return list(read_audit(self.home.folder / "audit.jsonl"))


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    return Ward(tmp_path)


def _refused(reply: m.Reply, *words: str) -> None:
    assert isinstance(reply, m.Refusal)
    assert all(word in reply.reason for word in words), reply.reason


def test_nothing_is_answered_before_a_person_approved_the_plan(ward: Ward) -> None:
    _refused(ward.ask(ward.train()), "never proposed")
    status = ward.propose()
    assert isinstance(status, m.PlanStatus)
    assert (status.approved, status.digest) == (False, ward.plan.digest)
    _refused(ward.ask(ward.train()), "waits for approval")
    _refused(ward.ask(m.Describe(study=ward.study.digest)), "waits for approval")
    assert not (ward.home.folder / "studies").exists()
    ward.approve()
    status = ward.propose()
    assert isinstance(status, m.PlanStatus)
    assert status.approved
    assert isinstance(ward.ask(ward.train()), m.GanUpdate)


def test_a_changed_plan_waits_again(ward: Ward) -> None:
    ward.propose()
    ward.approve()
    more = tiny(**STUDY, gan={"rounds": 4})
    plan, signature = plan_of(ward.federation, more)
    status = ward.propose(plan.text, signature)
    assert isinstance(status, m.PlanStatus)
    assert not status.approved
    _refused(ward.ask(ward.train(study=plan.study.digest)), "waits for approval")


def test_tampered_and_foreign_plans_are_refused(ward: Ward, tmp_path: Path) -> None:
    """One character of a signed plan changed; another federation's signature; a plan for other members or another bundle."""
    text = ward.plan.text.replace('"rounds":3', '"rounds":9', 1)
    assert text != ward.plan.text
    _refused(ward.propose(text), "signature does not fit")
    stranger, _ = federation_of(tmp_path / "elsewhere", "ward", "other")
    _refused(ward.propose(None, stranger.sign("plan", ward.plan.values())), "signature does not fit")
    members = dict(ward.plan.members)
    members["ward"] = stranger.members()["ward"].public_key
    swapped = replace(ward.plan, members=members)
    _refused(ward.propose(swapped.text, ward.federation.sign("plan", swapped.values())), "present key")
    foreign = replace(ward.plan, bundle="0" * 64)
    _refused(ward.propose(foreign.text, ward.federation.sign("plan", foreign.values())), "bundle", "same version")
    assert not (ward.home.folder / "plans").exists()


def test_a_stored_plan_that_was_edited_approves_nothing(ward: Ward) -> None:
    ward.propose()
    ward.approve()
    path = next((ward.home.folder / "plans").glob(f"{ward.plan.digest}.json"))
    path.write_text(path.read_text().replace("rounds", "rounde", 1))
    with pytest.raises(IdentityError):
        ward.plans.all()
    _refused(ward.ask(ward.train()))


def test_an_approval_names_one_digest(ward: Ward) -> None:
    ward.propose()
    ward.approve()
    other, signature = plan_of(ward.federation, tiny(**STUDY, seed=3))
    ward.propose(other.text, signature)
    approval = ward.home.folder / "plans" / f"{ward.plan.digest}.approved.json"
    (ward.home.folder / "plans" / f"{other.digest}.approved.json").write_text(approval.read_text())
    _refused(ward.ask(ward.train(study=other.study.digest)), "waits for approval")
    with pytest.raises(RefusedError, match="0 received plans"):
        ward.plans.find("zz")
    with pytest.raises(RefusedError, match="2 received plans"):
        ward.plans.find("")


def test_the_policy_decides_before_approval_and_at_every_request(ward: Ward) -> None:
    ward.propose()
    ward.policy("max_generator_rounds: 2\n")
    with pytest.raises(RefusedError, match="of this site forbids the plan"):
        ward.approve()
    ward.policy("")
    ward.approve()
    assert isinstance(ward.ask(ward.train()), m.GanUpdate)
    ward.policy("max_generator_rounds: 2\n")  # tightened while the study runs
    _refused(ward.ask(ward.train(round=2)), "policy")
    (ward.home.folder / "policy.yaml").write_text("allow_non_private: false\n")
    _refused(ward.ask(ward.train(round=2)), "privacy")
    (ward.home.folder / "policy.yaml").write_text("max_generator_rouns: 2\n")
    reply = ward.ask(ward.train(round=2))  # a policy that cannot be read allows nothing
    assert isinstance(reply, m.Refusal)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"round": 4}, "round"),
        ({"class_name": "Luggage"}, "class_name"),
        ({"weights": {}}, "weights"),
        ({"session": "s", "peers": "ward,stranger"}, "stranger"),
        ({"payload": "bfloat16"}, "payload"),
    ],
)
def test_values_from_outside_are_bounded_before_images_are_read(ward: Ward, changes: dict[str, Any], word: str) -> None:
    ward.propose()
    ward.approve()
    (ward.home.folder / "store" / "store.json").unlink()  # reading it would fail in another way
    if "payload" in changes:
        header, data = pack(ward.train())
        header = header.replace('"payload":"float32"', '"payload":"bfloat16"')
        reply = unpack_reply(*ward.desk.answer_packed(WHO, header, data))
    else:
        reply = ward.ask(ward.train(**changes))
    _refused(reply, word)


def test_everything_is_in_the_audit_log_before_it_leaves(ward: Ward) -> None:
    ward.ask(ward.train())
    ward.propose()
    ward.approve()
    reply = ward.ask(ward.train())
    ward.desk.answer_packed(WHO, "no message", b"")
    assert verify_audit(ward.home.folder / "audit.jsonl") == []
    kinds = [event["kind"] for event in ward.log()]
    assert kinds[:2] == ["asked", "refused"]
    assert kinds[-3:] == ["asked", "left", "refused"]
    text = json.dumps(ward.log()[-2])
    assert "GanUpdate" in text
    assert isinstance(reply, m.GanUpdate)
    assert all(name in text for name in reply.weights)


def test_what_breaks_inside_does_not_tell_the_coordinator_about_the_hospitals_folders(ward: Ward) -> None:
    ward.propose()
    ward.approve()
    (ward.home.folder / "store" / "store.json").unlink()
    reply = ward.ask(ward.train())
    assert isinstance(reply, m.Refusal)
    assert str(ward.home.folder) not in reply.reason
    assert str(ward.home.folder) in json.dumps(ward.log()[-1])


def test_a_plan_for_other_sites_is_not_this_sites_business(ward: Ward) -> None:
    members = {name: key for name, key in ward.plan.members.items() if name != "ward"}
    plan = new_plan(tiny(sites={"count": 1}), federation="tests", members=members, bundle=ward.plan.bundle)
    _refused(ward.propose(plan.text, ward.federation.sign("plan", plan.values())), "does not name ward")
