"""The hospital's policy: each field tightens, none widens; what is wrong in the file is said in full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, tiny
from xfed.client.policy import METRICS, PHASES, Policy, default_policy_text, load_policy, parse_policy, violations
from xfed.common.config import Study, load_study
from xfed.common.errors import ConfigError

LOOSE = Policy.permissive()
SECURE = {"sites": {"count": 3}, "federation": {"secure_aggregation": "on"}}

# field of the policy: its value at the bound, a study inside, a study just outside, the study's field in the words
PRIVATE = {"classifier": {"balance": "loss"}}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "classes": (
        ("Normal", "Cardiomegaly"),
        {"classes": ["Cardiomegaly", "Normal"], "data": {"phantom": {}}},
        {},
        "classes: the study wants Pleural Effusion",
    ),
    "max_image_size": (64, {"image_size": 64}, {"image_size": 128}, "image_size: the study wants 128"),
    "max_generator_rounds": (9, {"gan": {"rounds": 9}}, {"gan": {"rounds": 10}}, "gan.rounds: the study wants 10"),
    "max_classifier_rounds": (
        9,
        {"classifier": {"rounds": 9}},
        {"classifier": {"rounds": 10}},
        "classifier.rounds: the study wants 10",
    ),
    "max_batch": (
        16,
        {"classifier": {"batch": 16}},
        {"classifier": {"batch": 17}},
        "classifier.batch: the study wants 17",
    ),
    "max_steps_per_round": (
        5,
        {"gan": {"steps_per_round": 5}, "classifier": {"steps_per_round": 5}},
        {"gan": {"steps_per_round": 6}},
        "gan.steps_per_round: the study wants 6",
    ),
    "max_archive_images": (
        30,
        {"archive": {"balance": "fixed", "per_class": 10}},
        {"archive": {"balance": "fixed", "per_class": 11}},
        "archive: the study wants 33 images",
    ),
    "minimum_images": (
        8,
        {"gan": {"minimum_images": 8}},
        {"gan": {"minimum_images": 7}},
        "gan.minimum_images: the study wants 7",
    ),
    "classifier_models": (
        ("dcnn",),
        {},
        {"classifier": {"model": "googlenet"}},
        "classifier.model: the study wants googlenet",
    ),
    "require_secure_aggregation": (True, SECURE, {}, "federation.secure_aggregation: the study wants auto"),
    "minimum_summed_sites": (
        3,
        SECURE,
        {"sites": {"count": 2}, "federation": {"secure_aggregation": "on"}},
        "sites.count: the study wants 2",
    ),
    "epsilon_max": (
        3.0,
        {**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 1e-4}},
        {**PRIVATE, "privacy": {"epsilon": 3.1, "delta": 1e-4}},
        "privacy.epsilon: the study wants 3.1",
    ),
    "delta_max": (
        1e-4,
        {**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 1e-4}},
        {**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 2e-4}},
        "privacy.delta: the study wants 0.0002",
    ),
    "archive_votes": (
        False,
        {"archive": {"vote": False}},
        {},
        "archive.vote: the study wants True",
    ),
    "share_examples": (
        False,
        {},
        {"report": {"share_real_examples": True}},
        "report.share_real_examples: the study wants True",
    ),
}
# these say no to every study of this version once they are set: its value, a value that allows, the words
ALL_OR_NOTHING: dict[str, tuple[Any, Any, str]] = {
    "phases": (("generators", "archive"), PHASES, "phases: the study wants classifier"),
    "generator_models": (("other",), ("dcgan", "other"), "gan.family: the study wants dcgan"),
    "metrics": (("counts", "losses"), METRICS, "metrics: the study wants scores"),
    "allow_non_private": (False, True, "without differential privacy"),
}
# these bound requests and replies, not the study: tests/test_bounds.py
PER_REQUEST = {"smallest_count", "max_request_mb", "epsilon_total_max", "declared_patients"}


def _with(**changes: Any) -> Policy:
    return LOOSE.model_copy(update=changes)


def test_every_field_is_tried_below() -> None:
    assert CASES.keys() | ALL_OR_NOTHING.keys() | PER_REQUEST == set(Policy.model_fields)


@pytest.mark.parametrize("field", CASES)
def test_a_study_at_the_bound_passes_and_one_above_is_refused(field: str) -> None:
    bound, inside, outside, words = CASES[field]
    policy = _with(**{field: bound})
    assert violations(policy, tiny(**inside)) == []
    (text,) = violations(policy, tiny(**outside))
    assert text.startswith(words)
    assert f"({field})" in text
    assert violations(LOOSE, tiny(**outside)) == []


@pytest.mark.parametrize("field", ALL_OR_NOTHING)
def test_what_no_study_of_this_version_can_do_without(field: str) -> None:
    forbids, allows, words = ALL_OR_NOTHING[field]
    assert violations(_with(**{field: allows}), tiny()) == []
    texts = violations(_with(**{field: forbids}), tiny())
    assert any(words in text for text in texts)
    assert all(field in text for text in texts)


def test_a_study_without_differential_privacy_is_refused_with_what_to_set_and_what_it_means() -> None:
    (text,) = violations(Policy(minimum_images=1), tiny())
    assert "epsilon is infinite" in text
    assert "single patients" in text
    remedy = re.search(r"set in policy.yaml: (.+)$", text)
    assert remedy is not None
    assert violations(parse_policy({**yaml.safe_load(remedy[1]), "minimum_images": 1}, "remedy"), tiny()) == []


@pytest.mark.parametrize(("field", "value"), [("epsilon_max", 1e6), ("delta_max", 0.5)])
def test_a_bound_on_the_budget_refuses_studies_without_one(field: str, value: float) -> None:
    (text,) = violations(_with(**{field: value}), tiny())
    assert "without differential privacy" in text
    assert field in text


def test_a_private_study_needs_no_permission_to_be_not_private() -> None:
    study = tiny(**{**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 1e-4}})
    assert violations(_with(allow_non_private=False), study) == []


def test_all_violations_are_told_at_once_and_parts_narrow_them() -> None:
    policy = _with(max_generator_rounds=1, max_classifier_rounds=1, max_batch=1, metrics=("counts", "losses"))
    texts = violations(policy, tiny())
    assert len(texts) == 6
    assert [text.split(":")[0] for text in violations(policy, tiny(), ("generators",))] == ["gan.rounds", "gan.batch"]
    assert [text for text in violations(policy, tiny(), ("scores",)) if "scores" in text]
    assert violations(policy, tiny(), ()) == []
    assert len(violations(_with(max_image_size=16), tiny(), ())) == 1, "what concerns the whole study is always told"


def test_a_private_study_holds_no_vote_whatever_it_says() -> None:
    study = tiny(**{**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 1e-4}})
    assert study.archive.vote
    assert violations(_with(archive_votes=False), study) == []


def test_both_phases_are_bound_by_what_holds_for_a_step_or_a_round() -> None:
    policy = _with(max_steps_per_round=2, max_batch=16)
    texts = violations(policy, tiny(gan={"batch": 17}, classifier={"batch": 17, "steps_per_round": 3}))
    assert [text.split(":")[0] for text in texts] == ["gan.batch", "classifier.steps_per_round", "classifier.batch"]


def test_one_pass_over_the_sites_own_images_is_inside_every_bound() -> None:
    assert violations(_with(max_steps_per_round=2), tiny(classifier={"steps_per_round": 0})) == []


def test_no_secure_sum_means_no_least_number_of_sites() -> None:
    study = tiny(sites={"count": 2}, federation={"secure_aggregation": "off"})
    assert violations(_with(minimum_summed_sites=9), study) == []


@pytest.mark.parametrize("name", ["demo", "nih", "paper"])
def test_the_shipped_studies_are_inside_the_default_policy_once_the_hospital_accepts_no_privacy(name: str) -> None:
    study = load_study(ROOT / "configs" / f"{name}.yaml")
    assert len(violations(Policy(), study)) == 1
    assert violations(Policy(allow_non_private=True), study) == []


STUDIES = st.builds(
    lambda **v: tiny(
        image_size=v["size"],
        gan={"rounds": v["rounds"], "batch": v["batch"], "minimum_images": v["least"]},
        classifier={"rounds": v["rounds"], "steps_per_round": v["steps"], "model": v["model"]},
        sites={"count": v["sites"]},
        report={"share_real_examples": v["share"]},
    ),
    size=st.sampled_from([32, 64, 128, 256]),
    rounds=st.integers(1, 400),
    batch=st.integers(2, 400),
    least=st.integers(1, 12),
    steps=st.integers(0, 900),
    model=st.sampled_from(["dcnn", "googlenet"]),
    sites=st.integers(1, 5),
    share=st.booleans(),
)
TIGHTER: dict[str, st.SearchStrategy[Any]] = {
    "classes": st.just(("Normal",)),
    "phases": st.lists(st.sampled_from(PHASES), unique=True).map(tuple),
    "generator_models": st.just(("another",)),
    "classifier_models": st.just(("dcnn",)),
    "max_image_size": st.integers(1, 256),
    "max_generator_rounds": st.integers(1, 400),
    "max_classifier_rounds": st.integers(1, 400),
    "max_steps_per_round": st.integers(1, 900),
    "max_batch": st.integers(1, 400),
    "max_archive_images": st.integers(1, 400),
    "minimum_images": st.integers(1, 12),
    "allow_non_private": st.booleans(),
    "epsilon_max": st.floats(0.1, 10),
    "delta_max": st.floats(1e-9, 0.1),
    "epsilon_total_max": st.floats(0.1, 10),
    "declared_patients": st.just({"Normal": 10}),
    "require_secure_aggregation": st.booleans(),
    "minimum_summed_sites": st.integers(2, 6),
    "share_examples": st.booleans(),
    "metrics": st.lists(st.sampled_from(METRICS), unique=True).map(tuple),
    "smallest_count": st.integers(0, 20),
    "max_request_mb": st.integers(1, 4096),
}


@given(study=STUDIES, data=st.data())
def test_setting_any_field_can_only_add_violations(study: Study, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(TIGHTER)), unique=True))
    policy, before = LOOSE, violations(LOOSE, study)
    assert before == []
    for name in names:
        policy = parse_policy({**policy.model_dump(), name: data.draw(TIGHTER[name])}, "drawn")
        now = violations(policy, study)
        assert {text.split(":")[0] for text in before} <= {text.split(":")[0] for text in now}
        before = now


def test_the_template_says_what_the_defaults_are(tmp_path: Path) -> None:
    text = default_policy_text()
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert load_policy(path) == Policy()
    assert yaml.safe_load(text).keys() == Policy.model_fields.keys(), "every field is written out"
    for name in Policy.model_fields:
        assert re.search(rf"^# .+\n{name}: ", text, re.MULTILINE), f"{name} has a comment above it"
    assert max(map(len, text.splitlines())) <= 120


def test_the_careful_defaults() -> None:
    policy = Policy()
    assert not policy.allow_non_private
    assert not policy.share_examples
    assert (policy.smallest_count, policy.minimum_summed_sites, policy.max_request_mb) == (5, 2, 2048)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch: 0", "max_batch: Input should be greater than or equal to 1 (it is 0)"),
        ("max_batch: 64.0", "max_batch: Input should be a valid integer"),
        ("max_batch: true", "max_batch: Input should be a valid integer"),
        ("max_batch: null", "max_batch: Input should be a valid integer"),
        ("allow_non_private: 'true'", "allow_non_private: Input should be a valid boolean"),
        ("allow_non_private: 1", "allow_non_private: Input should be a valid boolean"),
        ("phases: [generators, training]", "'generators', 'archive' or 'classifier' (it is 'training')"),
        ("metrics: all", "metrics: Input should be a valid tuple"),
        ("classes: []", "classes: Tuple should have at least 1 item"),
        ("epsilon_max: -1", "epsilon_max: Input should be greater than 0"),
        ("epsilon_max: .nan", "epsilon_max: Input should be a finite number"),
        ("delta_max: 1", "delta_max: Input should be less than 1"),
        ("minimum_summed_sites: 1", "minimum_summed_sites: Input should be greater than or equal to 2"),
        ("smallest_count: -1", "smallest_count: Input should be greater than or equal to 0"),
        ("allow_nonprivate: true", "there is no such field; the fields are classes, phases"),
        ("- max_batch", "it must be a mapping"),
        ("", "it must be a mapping"),
        ("max_batch: [", "is not YAML"),
        ("max_batch: 8\nmax_batch: 4096", "max_batch is there more than once"),
    ],
)
def test_a_wrong_policy_file_names_file_field_value_and_what_is_allowed(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def test_all_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy({"max_batch": 0, "nonsense": 1, "smallest_count": "5"}, "policy.yaml")
    assert [name in str(caught.value) for name in ("max_batch", "nonsense", "smallest_count")] == [True] * 3


def test_a_lost_policy_is_not_replaced_by_wider_defaults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no policy"):
        load_policy(tmp_path / "policy.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_policy(path)


def test_a_policy_cannot_be_changed_in_passing() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Policy().allow_non_private = True  # type: ignore[misc]
