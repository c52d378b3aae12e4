"""Plans: one spelling, one digest, and nothing that was touched on the way is taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny
from xfed.common.config import Study
from xfed.common.errors import IdentityError
from xfed.common.identity import canonical_json, new_authority, public_text, sign_bytes, sign_json, verify_json
from xfed.common.plan import (
    KIT,
    PLAN,
    Plan,
    check_federation_name,
    differences,
    new_plan,
    parse_form,
    parse_plan,
    plan_differences,
    verify_plan,
)
from xfed.common.plan_words import asked_of_sites

NAME = "Chest North"
CA, OTHER_CA, SITE_A, SITE_B, SITE_C = (ec.generate_private_key(ec.SECP384R1()) for _ in range(5))
CA_PEM = new_authority(NAME, CA, datetime.now(UTC))
MEMBERS = {"st-b": public_text(SITE_B.public_key()), "st-a": public_text(SITE_A.public_key())}
BUNDLE = hashlib.sha256(b"bundle").hexdigest()


def _plan(study: Study | None = None, members: dict[str, str] | None = None) -> Plan:
    return new_plan(study or tiny(), federation=NAME, members=members or MEMBERS, bundle=BUNDLE)


PLAN_HERE = _plan()
TEXT, SIGNATURE = PLAN_HERE.text, sign_json("plan", PLAN_HERE.values(), CA)


def test_a_plan_travels_whole_and_is_signed_by_the_federation() -> None:
    plan = verify_plan(TEXT, SIGNATURE, CA_PEM, NAME)
    assert plan == PLAN_HERE
    assert plan.text == TEXT
    assert list(plan.members) == ["st-a", "st-b"]
    assert plan.digest == hashlib.sha256(TEXT.encode()).hexdigest()
    # the format of the architecture: the signature is over the bytes that are digested
    assert json.dumps(json.loads(TEXT), sort_keys=True, separators=(",", ":"), ensure_ascii=False) == TEXT
    verify_json("plan", json.loads(TEXT), SIGNATURE, CA.public_key())
    assert set(json.loads(TEXT)) == set(PLAN.fields)
    assert json.loads(TEXT)["study_digest"] == plan.study.digest


def test_the_order_of_members_does_not_count_and_everything_else_does() -> None:
    turned = dict(reversed(MEMBERS.items()))
    assert _plan(members=turned).digest == PLAN_HERE.digest
    digests = {PLAN_HERE.digest}
    for other in (
        _plan(tiny(gan={"rounds": 4})),
        _plan(tiny(runtime={"workers": 7})),
        _plan(members={**MEMBERS, "st-a": public_text(SITE_C.public_key())}),
        _plan(members={"st-a": MEMBERS["st-a"], "st-c": MEMBERS["st-b"]}),
        _plan(members={**MEMBERS, "st-c": public_text(SITE_C.public_key())}),
        new_plan(tiny(), federation="Chest South", members=MEMBERS, bundle=BUNDLE),
        new_plan(tiny(), federation=NAME, members=MEMBERS, bundle="0" * 64),
    ):
        assert plan_differences(PLAN_HERE, other)
        digests.add(other.digest)
    assert len(digests) == 8
    assert plan_differences(PLAN_HERE, parse_plan(TEXT)) == []


def test_the_sites_of_a_plan_are_its_members_not_the_simulated_ones() -> None:
    simulated = tiny(sites={"count": 5, "missing": {4: ["Normal"]}, "partition": "dirichlet"})
    plan = _plan(simulated)
    assert plan.study.sites.count == 2
    assert plan.digest == PLAN_HERE.digest
    assert not plan.study.secure
    assert _plan(simulated, {**MEMBERS, "st-c": public_text(SITE_C.public_key())}).study.secure
    alone = tiny(federation={"secure_aggregation": "on"})
    with pytest.raises(IdentityError, match=r"1 sites.*\n.*secure_aggregation"):
        _plan(alone, {"st-a": MEMBERS["st-a"]})


@given(place=st.integers(0, len(TEXT) - 1), change=st.integers(1, 127))
@settings(max_examples=150)
def test_no_changed_character_is_taken(place: int, change: int) -> None:
    text = TEXT[:place] + chr(ord(TEXT[place]) ^ change) + TEXT[place + 1 :]
    with pytest.raises(IdentityError, match="signature does not fit"):
        verify_plan(text, SIGNATURE, CA_PEM, NAME)


def test_nobody_but_the_federation_signs() -> None:
    other_pem = new_authority(NAME, OTHER_CA, datetime.now(UTC))
    forged = sign_json("plan", PLAN_HERE.values(), OTHER_CA)
    as_kit = sign_json("kit", PLAN_HERE.values(), CA)
    for signature, pem, name in (
        (forged, CA_PEM, NAME),
        (as_kit, CA_PEM, NAME),
        ("", CA_PEM, NAME),
        (SIGNATURE, other_pem, NAME),
        (SIGNATURE, CA_PEM, "Chest South"),
        (SIGNATURE, "", NAME),
    ):
        with pytest.raises(IdentityError):
            verify_plan(TEXT, signature, pem, name)
    elsewhere = new_plan(tiny(), federation="Chest South", members=MEMBERS, bundle=BUNDLE)
    with pytest.raises(IdentityError, match="belongs to 'Chest North'"):
        verify_plan(elsewhere.text, sign_json("plan", elsewhere.values(), CA), CA_PEM, NAME)


def _study(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["study"].update(changes)


def _members(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["members"].update(changes)


SIGNED_WRONGLY: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (lambda v: v.update(shell="rm"), "unknown field 'shell'"),
    "missing field": (lambda v: v.pop("bundle"), "no field 'bundle'"),
    "later schema": (lambda v: v.update(schema=2), "schema is 2"),
    "schema true": (lambda v: v.update(schema=True), "schema is True"),
    "study digest": (lambda v: v.update(study_digest="0" * 64), "digest that it states"),
    "study changed": (_study(seed=1), "digest that it states"),
    "unknown field of the study": (_study(shell="rm"), "no such field"),
    "field of the study left out": (lambda v: v["study"].pop("seed"), "not spelt"),
    "number as text": (_study(seed="2018"), "not spelt"),
    "impossible study": (_study(image_size=48), "image_size"),
    "study no object": (lambda v: v.update(study=[]), "not of type dict"),
    "bundle": (lambda v: v.update(bundle="0" * 63 + "G"), "not a SHA-256"),
    "software": (lambda v: v.update(software=1), "not of type str"),
    "federation": (lambda v: v.update(federation="a\nb"), "not a federation's name"),
    "site name": (_members(**{"../st-a": MEMBERS["st-a"]}), "not a site's name"),
    "no key": (_members(**{"st-a": None}), "not text"),
    "bad key": (_members(**{"st-a": "ssh-rsa AAAA"}), "key of st-a"),
    "two sites, one key": (_members(**{"st-a": MEMBERS["st-b"]}), "the same key"),
    "no members": (lambda v: v.update(members={}), "at least one site"),
    "one member more": (_members(**{"st-c": public_text(SITE_C.public_key())}), "names 3 sites, its study 2"),
    "escape codes": (lambda v: v.update(software="\x1b[2J"), "cannot be printed"),
    "escape codes inside": (_study(classes=["a\x9b2J", "b"]), "cannot be printed"),
    "escape codes in a name": (
        lambda v: v["study"]["data"].update(label_map={"a\x9b2J": "Normal"}),
        "cannot be printed",
    ),
    "turned text": (_study(classes=["a\u202eb", "b"]), "cannot be printed"),
}


@pytest.mark.parametrize("case", SIGNED_WRONGLY)
def test_what_is_wrong_is_refused_even_when_the_federation_signed_it(case: str) -> None:
    change, words = SIGNED_WRONGLY[case]
    values = json.loads(TEXT)
    change(values)
    text = canonical_json(values).decode()
    with pytest.raises(IdentityError, match=words):
        verify_plan(text, sign_json("plan", values, CA), CA_PEM, NAME)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(json.loads(TEXT)), "not spelt"),
        (TEXT + " ", "not spelt"),
        (TEXT.replace('"schema":1', '"schema":1,"schema":1'), "twice"),
        (TEXT.replace('"seed":2018', '"seed":NaN'), "NaN"),
        ("[" * 100_000, "not JSON"),
        ('{"schema":' + "9" * 5000 + "}", "not JSON"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ("", "not JSON"),
        (" " * 1_000_001, "too long"),
        ("é" * 600_000, "too long"),
    ],
    ids=range(11),
)
def test_other_spellings_are_refused_even_when_signed(text: str, words: str) -> None:
    with pytest.raises(IdentityError, match=words):
        verify_plan(text, sign_bytes("plan", text.encode(), CA), CA_PEM, NAME)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(IdentityError, match="Unicode"):
        parse_plan("\ud800")
    with pytest.raises(IdentityError):
        verify_plan("\ud800", SIGNATURE, CA_PEM, NAME)
    with pytest.raises(IdentityError, match="not JSON"):
        parse_form(b"\xff", KIT, "kit.json")


def test_a_plan_needs_members_and_a_federation_a_name() -> None:
    with pytest.raises(IdentityError, match="xfed-server approve"):
        new_plan(tiny(), federation=NAME, members={}, bundle=BUNDLE)
    for name in ("", " a", "a ", "a\n", "a/b", "ä", "a" * 65, "-a"):
        with pytest.raises(IdentityError, match="not a federation's name"):
            check_federation_name(name)
    for name in ("a", "Chest X-ray 2.0", "a" * 64):
        assert check_federation_name(name) == name


def test_differences_name_each_field_once() -> None:
    before, now = tiny().resolved(), tiny(gan={"rounds": 4, "ema": 0.5}, runtime={"workers": 9}).resolved()
    assert differences(before, now) == ["gan.rounds was 3, is 4", "gan.ema was 0.9, is 0.5"]
    assert differences(before, before) == []
    assert differences(before, now, skip=frozenset())[-1] == "runtime.workers was 2, is 9"
    assert differences({"a": 1}, {"b": [1]}) == ["a was 1, is None", "b was None, is [1]"]
    more = _plan(tiny(gan={"rounds": 4}), {"st-a": public_text(SITE_C.public_key()), "st-c": MEMBERS["st-a"]})
    assert plan_differences(PLAN_HERE, more) == [
        "gan.rounds was 3, is 4",
        "st-a has a new key",
        "st-b is left out",
        "st-c joins",
    ]


def test_what_is_asked_is_said_in_words() -> None:
    three = {**MEMBERS, "st-c": public_text(SITE_C.public_key())}
    words = "\n".join(asked_of_sites(PLAN_HERE))
    for part in ("st-a, st-b", "Cardiomegaly, Normal, Pleural Effusion", "32 x 32", "3 rounds of 2 steps", "dcgan"):
        assert part in words
    assert "NOT PRIVATE" in words
    assert "epsilon is infinite" in words
    assert "one pass" in words
    assert "aggregation: off" in words
    assert "REAL IMAGES" not in words
    study = tiny(classifier={"steps_per_round": 7, "arms": ["DS1"]}, report={"share_real_examples": True})
    words = "\n".join(asked_of_sites(_plan(study, three)))
    assert "aggregation: on" in words
    assert "7 steps each" in words
    assert "DS3" not in words
    assert "REAL IMAGES" in words
