"""The site's gate: just inside passes, just outside is refused with field, value and what is allowed; nothing is read before."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny
from xfed.client import bounds
from xfed.client.bounds import check_request
from xfed.client.policy import Policy
from xfed.common import messages as m
from xfed.common.config import Study
from xfed.common.errors import RefusedError
from xfed.common.gan import build_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.server.archive import SHARD

STUDY = tiny()
SECURE = tiny(sites={"count": 3})
MEMBERS = {"ward-a": "key", "ward-b": "key", "ward-c": "key"}
LOOSE = Policy.permissive()
G = parameters_of(build_generator(STUDY))
C = parameters_of(build_classifier(STUDY))
DIGEST = "0123456789abcdef" * 4
BYTES = {"ward-a": np.zeros(300, np.uint8)}


def _shard(count: int = 4, side: int = 32) -> dict[str, np.ndarray[Any, Any]]:
    return {"images": np.zeros((count, side, side), np.uint8), "labels": np.arange(count) % 3}


def _requests(study: Study = STUDY) -> dict[str, m.Request]:
    """One of each kind, all inside."""
    d = study.digest
    summed = {"session": "s-1", "peers": "ward-a,ward-b", "total": 10} if study.secure else {}
    session = {"session": "s-1", "peers": "ward-a,ward-b"}
    keys = {site: np.zeros(130, np.uint8) for site in MEMBERS}
    requests = (
        m.Describe(study=d),
        m.TrainGan(study=d, class_name="Normal", round=1, weights=G, **summed),
        m.OfferArchive(study=d, root=DIGEST, digests=DIGEST),
        m.KeepArchive(study=d, shard=0, digest=DIGEST, arrays=_shard()),
        m.TrainClassifier(study=d, arm="DS1", round=1, weights=C, **summed),
        m.ScoreClassifier(study=d, arm="DS1", round=1, split="validation", weights=C, **summed),
        m.MeasureArchive(study=d, arm="DS3", scale=1.0, thinning={"times": np.array([0, 1, 6])}, weights=C, **summed),
        m.VoteOnArchive(study=d, arm="DS1", root=DIGEST, images=3, weights=C, **summed),
        m.AttackArchive(study=d, root=DIGEST, images=3, arrays={"released": np.array([1, 0, 1], np.uint8)}, **summed),
        m.ShowExamples(study=d, count=1),
        m.AdvertiseKeys(study=d, **session),
        m.ShareKeys(study=d, arrays=keys, **session),
        m.Unmask(study=d, survivors="ward-a,ward-b", dropped="ward-c", arrays=BYTES, **session),
    )
    return {type(request).__name__: request for request in requests}


def _refusal(request: m.Request, study: Study = STUDY, policy: Policy = LOOSE) -> str:
    with pytest.raises(RefusedError) as caught:
        check_request(request, study, policy, MEMBERS, site="ward-a")
    return str(caught.value)


def _passes(request: m.Request, study: Study = STUDY, policy: Policy = LOOSE) -> None:
    check_request(request, study, policy, MEMBERS, site="ward-a")


def test_every_kind_of_request_is_known_but_a_proposal_which_belongs_to_no_study() -> None:
    assert _requests().keys() | _private_requests().keys() | {"ProposePlan"} == m.REQUESTS.keys()
    for study in (STUDY, SECURE):
        for request in _requests(study).values():
            _passes(request, study)
    assert "ProposePlan" in _refusal(m.ProposePlan(study=STUDY.digest, plan="", signature=""))


PRIVATE_STUDY = tiny(
    privacy={"epsilon": 3.0, "delta": 1e-4},
    classifier={"balance": "loss"},
    gan={"method": "dp-merf", "merf": {"features": 8}},
)


def _private_requests(study: Study = PRIVATE_STUDY) -> dict[str, m.Request]:
    """One of each kind that private studies alone have, all inside."""
    d = study.digest
    requests = (
        m.EmbedClass(study=d, class_name="Normal", features=8),
        m.ScorePrivately(study=d, arm="DS1", weights=C),
        m.ShowLedger(study=d, first=1),
    )
    return {type(request).__name__: request for request in requests}


def test_what_private_studies_alone_ask_for_is_refused_in_others_and_the_reverse() -> None:
    for request in _private_requests().values():
        _passes(request, PRIVATE_STUDY)
    for request in _private_requests(STUDY).values():
        assert "private study" in _refusal(request, STUDY)
    for kind in ("ScoreClassifier", "MeasureArchive", "VoteOnArchive", "AttackArchive"):
        request = dataclasses.replace(_requests()[kind], study=PRIVATE_STUDY.digest)
        assert "differentially private" in _refusal(request, PRIVATE_STUDY)
    # dp-merf alone has no rounds of training
    assert "gan.method is dp-merf" in _refusal(_requests(PRIVATE_STUDY)["TrainGan"], PRIVATE_STUDY)
    for features in (7, 9, 0, 8.0):
        wrong = m.EmbedClass(study=PRIVATE_STUDY.digest, class_name="Normal", features=features)  # type: ignore[arg-type]
        assert "EmbedClass.features" in _refusal(wrong, PRIVATE_STUDY)
    assert "EmbedClass.class_name" in _refusal(
        m.EmbedClass(study=PRIVATE_STUDY.digest, class_name="../x", features=8), PRIVATE_STUDY
    )
    assert "ShowLedger.first" in _refusal(m.ShowLedger(study=PRIVATE_STUDY.digest, first=-1), PRIVATE_STUDY)


def test_an_unknown_kind_is_refused_even_when_it_looks_like_a_known_one() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Exfiltrate(m.Request):
        """Not of this version."""

    @dataclass(frozen=True, kw_only=True)
    class TrainGanToo(m.TrainGan):
        """A kind of its own."""

    assert "Exfiltrate" in _refusal(Exfiltrate(study=STUDY.digest))
    assert "TrainGanToo" in _refusal(TrainGanToo(study=STUDY.digest, class_name="Normal", round=1, weights=G))


# kind, field, values just inside, values just outside, word of the refusal beside "<kind>.<field>"
EDGES: list[tuple[str, str, list[Any], list[Any], str]] = [
    ("TrainGan", "round", [1, 3], [0, 4, -1, 2**63, True, 1.0], "1..3"),
    ("TrainGan", "class_name", ["Normal", "Pleural Effusion"], ["normal", "", "../x", "N" * 10**6], "Cardiomegaly"),
    ("TrainGan", "payload", ["float32"], ["bfloat16", "", "float16"], "float32"),
    ("TrainClassifier", "round", [1, 3], [0, 4], "1..3"),
    ("TrainClassifier", "arm", ["DS1", "DS3"], ["DS2", "", "ds1", "TSTR"], "DS1, DS3"),
    ("ScoreClassifier", "round", [1, 3], [0, 4], "1..3"),
    ("ScoreClassifier", "split", ["validation"], ["train", "", "tests"], "validation, test"),
    ("ScoreClassifier", "arm", ["DS3"], ["DS4", "TSTR"], "DS1, DS3"),
    ("MeasureArchive", "arm", ["DS1"], ["", "TSTR"], "DS1, DS3"),
    ("MeasureArchive", "scale", [2.0**-20, 1.0, 2.0**20], [0.0, -1.0, 2.0**21, np.nan, np.inf, 1, True], "9.53674e-07"),
    ("VoteOnArchive", "arm", ["DS1"], ["", "TSTR"], "DS1, DS3"),
    ("VoteOnArchive", "root", [DIGEST], ["", DIGEST[1:], "../x"], "SHA-256"),
    ("VoteOnArchive", "images", [1, 4096 * SHARD], [0, -1, 4096 * SHARD + 1, True, 3.0], "1..8388608"),
    ("AttackArchive", "root", [DIGEST], ["", DIGEST.upper()], "SHA-256"),
    ("AttackArchive", "images", [3], [0, -1, 4096 * SHARD + 1], "1..8388608"),
    ("ShowExamples", "count", [1, 16], [0, 17, -1], "1..16"),
    ("KeepArchive", "shard", [0, 4095], [-1, 4096], "0..4095"),
    (
        "KeepArchive",
        "digest",
        [DIGEST],
        [DIGEST[1:], DIGEST + "0", DIGEST.upper(), "../../etc/passwd", DIGEST + "\n"],
        "SHA",
    ),
    ("OfferArchive", "root", [DIGEST], ["r", DIGEST + "0", ""], "SHA-256"),
    (
        "OfferArchive",
        "digests",
        [DIGEST, ",".join([DIGEST] * 4096)],
        ["", DIGEST + ",", "x", DIGEST + ", " + DIGEST],
        "SHA",
    ),
    ("OfferArchive", "digests", [], [",".join([DIGEST] * 4097)], "at most 4096"),
    ("AdvertiseKeys", "session", ["s", "A-z0.9_" + "s" * 193], ["s" * 201, "a b", "../x", "s\n", "ü"], "1 to 200"),
    ("AdvertiseKeys", "session", [], [""], "name of a session"),
    ("ShareKeys", "session", ["s"], [""], "name of a session"),
    ("Unmask", "session", ["s"], [""], "name of a session"),
    (
        "AdvertiseKeys",
        "peers",
        ["ward-a,ward-b", "ward-c,ward-b,ward-a"],
        ["ward-a,ward-x", "ward-a, ward-b", ","],
        "members",
    ),
    ("AdvertiseKeys", "peers", [], ["ward-a,ward-b,ward-b"], "each member once"),
    ("AdvertiseKeys", "peers", [], ["ward-b,ward-c"], "a list with ward-a in it"),
    ("AdvertiseKeys", "peers", [], ["ward-a"], "2 sites or more"),
    ("AdvertiseKeys", "peers", [], ["ward-a," * 1000 + "ward-b"], "at most 1000"),
    ("AdvertiseKeys", "total", [0, 2**53], [-1, 2**53 + 1], "0..9007199254740992"),
    ("Unmask", "survivors", ["ward-a,ward-b"], ["ward-a,ward-x"], "members"),
    ("Unmask", "survivors", [], ["ward-a", ""], "2 sites or more"),
    ("Unmask", "dropped", ["", "ward-c"], ["ward-d", "ward-c,ward-c"], "member"),
    ("Unmask", "dropped", [], ["ward-b"], "none of the survivors"),
    ("Describe", "study", [STUDY.digest], ["", "0" * 64, STUDY.digest[:-1]], STUDY.digest[:12]),
]


@pytest.mark.parametrize(("kind", "field", "inside", "outside", "allowed"), EDGES)
def test_every_scalar_is_bounded_on_both_sides(
    kind: str, field: str, inside: list[Any], outside: list[Any], allowed: str
) -> None:
    request = _requests()[kind]
    for value in inside:
        _passes(replace(request, **{field: value}))
    for value in outside:
        text = _refusal(replace(request, **{field: value}))
        assert text.startswith(f"{kind}.{field} is "), text
        assert allowed in text
        assert len(text) < 400


def test_no_field_of_any_request_goes_unchecked() -> None:
    """A field that is added to a request and forgotten here passes with nonsense in it, and fails this test."""
    wrong = {"str": "\x00 nonsense", "int": -7, "float": -7.0, "Arrays": {"nonsense": np.zeros(3, np.int8)}}
    for request in _requests(SECURE).values():
        for field in dataclasses.fields(request):
            _refusal(replace(request, **{field.name: wrong[str(field.type)]}), SECURE)


def test_the_test_patients_are_scored_after_the_last_round_only() -> None:
    score = _requests()["ScoreClassifier"]
    _passes(replace(score, split="test", round=4))
    for split, round in (("test", 3), ("test", 5), ("validation", 4)):
        assert "ScoreClassifier.round" in _refusal(replace(score, split=split, round=round))


def test_a_classifier_of_the_archive_alone_is_scored_once_on_test_patients_where_the_study_says_so() -> None:
    score = replace(_requests()["ScoreClassifier"], arm="TSTR", split="test", round=4)
    _passes(score)
    assert "ScoreClassifier.arm" in _refusal(replace(score, arm="tstr"))
    assert "ScoreClassifier.arm" in _refusal(replace(score, split="validation", round=3))
    assert "ScoreClassifier.round" in _refusal(replace(score, round=3))
    assert "weights" in _refusal(replace(score, weights={}))
    without = tiny(archive={"tstr_steps": 0})
    assert "ScoreClassifier.arm" in _refusal(replace(score, study=without.digest), without)
    private = replace(score, study=PRIVATE_STUDY.digest)
    assert "differentially private" in _refusal(private, PRIVATE_STUDY)
    noisy = m.ScorePrivately(study=PRIVATE_STUDY.digest, arm="TSTR", weights=C)
    assert "ScorePrivately.arm" in _refusal(noisy, PRIVATE_STUDY)


@pytest.mark.parametrize(
    "times", [[0, 0, 7], [-1, 0, 0], [0, 0], [0, 0, 0, 0], [[0, 0, 0]], [0.0, 1.0, 2.0], [np.nan, 0, 0]]
)
def test_a_half_is_thinned_by_powers_of_two_only(times: list[Any]) -> None:
    request = replace(_requests()["MeasureArchive"], thinning={"times": np.array(times)})
    assert "MeasureArchive.thinning" in _refusal(request)
    assert "MeasureArchive.thinning" in _refusal(replace(request, thinning={"shares": np.array([0, 0, 0])}))


WEIGHTED = ("TrainGan", "TrainClassifier", "ScoreClassifier", "MeasureArchive", "VoteOnArchive")


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_are_exactly_the_models(kind: str) -> None:
    request = _requests()[kind]
    good = dict(request.weights)
    name = next(iter(good))

    def refused(weights: dict[str, Any]) -> str:
        return _refusal(replace(request, weights=weights))

    assert name in refused({key: value for key, value in good.items() if key != name})
    assert "extra" in refused({**good, "extra": good[name]})
    assert f"weights[{name}]" in refused({**good, name: good[name][..., None]})
    assert "float64" in refused({**good, name: good[name].astype(np.float64)})
    assert "float16" in refused({**good, name: good[name].astype(np.float16)})
    assert ">f4" in refused({**good, name: good[name].astype(">f4")})
    assert "weights" in refused({})
    other = parameters_of(build_generator(tiny(gan={"width": 8})))
    assert "weights" in refused(other)


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_number_that_is_not_finite_is_found(kind: str, value: float) -> None:
    request = _requests()[kind]
    weights = dict(request.weights)
    name = list(weights)[-1]
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[-1] = value
    text = _refusal(replace(request, weights=weights))
    assert name in text
    assert "finite" in text


@pytest.mark.parametrize("kind", [*WEIGHTED, "KeepArchive", "Unmask", "ShareKeys", "AttackArchive"])
def test_huge_shapes_are_refused_by_their_shape_alone(kind: str) -> None:
    request = _requests()[kind]
    field = next(field.name for field in dataclasses.fields(request) if field.type == "Arrays")
    good = getattr(request, field)
    started = time.perf_counter()
    for name, array in good.items():
        huge = np.broadcast_to(np.zeros((), array.dtype), (2**40,))  # 4 TB that take no memory unless they are read
        _refusal(replace(request, **{field: {**good, name: huge}}))
        _refusal(
            replace(request, **{field: {**good, name: huge}}), policy=LOOSE.model_copy(update={"max_request_mb": 2**40})
        )
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("model", ["dcnn", "googlenet"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_expected_shapes_are_those_of_the_built_models(model: str, size: int) -> None:
    study = tiny(image_size=size, classifier={"model": model})
    for name, weights, build in (
        ("generator", bounds._generator_shapes("dcgan", size, study.gan.width, study.gan.latent), build_generator),
        ("classifier", bounds._classifier_shapes(model, size, 3, study.classifier.width), build_classifier),
    ):
        built = parameters_of(build(study))
        assert {key: value.shape for key, value in built.items()} == weights, name


def test_shapes_are_computed_once_a_study() -> None:
    bounds._classifier_shapes.cache_clear()
    for _ in range(3):
        _passes(_requests()["TrainClassifier"])
    assert bounds._classifier_shapes.cache_info().misses == 1


def test_archive_shards_are_bounded_before_anything_in_them_is_read() -> None:
    keep = _requests()["KeepArchive"]

    def refused(arrays: dict[str, Any]) -> str:
        return _refusal(replace(keep, arrays=arrays))

    assert bounds.SHARD == SHARD
    _passes(replace(keep, arrays=_shard(SHARD)))
    _passes(replace(keep, arrays=_shard(1)))
    assert "1..2048" in refused(_shard(SHARD + 1))
    assert "1..2048" in refused(_shard(0))
    assert "1..2048" in refused({})
    good = _shard()
    assert "images" in refused({**good, "images": good["images"][:3]})
    assert "images" in refused(_shard(side=64))
    assert "images" in refused({**good, "images": good["images"].astype(np.int8)})
    assert "labels" in refused({**good, "labels": good["labels"].astype(np.int32)})
    assert "labels" in refused({**good, "labels": good["labels"].reshape(2, 2)})
    assert "0..2" in refused({**good, "labels": np.array([0, 1, 2, 3])})
    assert "0..2" in refused({**good, "labels": np.array([0, 1, 2, -1])})
    assert "arrays" in refused({**good, "more": good["labels"]})


def test_which_images_are_attacked_is_a_zero_or_one_for_each() -> None:
    attack = _requests()["AttackArchive"]
    for array in (np.zeros(3, np.uint8), np.ones(3, np.uint8)):
        _passes(replace(attack, arrays={"released": array}))
    for arrays in (
        {"released": np.ones(2, np.uint8)},
        {"released": np.ones(3, np.int8)},
        {"released": np.ones((3, 1), np.uint8)},
        {"released": np.array([0, 1, 2], np.uint8)},
        {"released": np.ones(3, np.uint8), "more": np.ones(3, np.uint8)},
        {},
    ):
        assert "arrays" in _refusal(replace(attack, arrays=arrays))
    small, vote = LOOSE.model_copy(update={"max_archive_images": 120}), _requests()["VoteOnArchive"]
    for count, check in ((120, _passes), (121, _refusal)):
        check(replace(attack, images=count, arrays={"released": np.ones(count, np.uint8)}), policy=small)
        check(replace(vote, images=count), policy=small)


def test_the_archive_takes_no_more_disk_than_the_policy_gives() -> None:
    policy = LOOSE.model_copy(update={"max_archive_images": 2 * SHARD + 1})
    requests = _requests()
    _passes(replace(requests["OfferArchive"], digests=",".join([DIGEST] * 3)), policy=policy)
    _passes(replace(requests["KeepArchive"], shard=2), policy=policy)
    four = replace(requests["OfferArchive"], digests=",".join([DIGEST] * 4))
    assert "max_archive_images" in _refusal(four, policy=policy)
    assert "0..2" in _refusal(replace(requests["KeepArchive"], shard=3), policy=policy)


def test_the_size_of_a_request_is_bounded_by_the_policy() -> None:
    train = _requests()["TrainClassifier"]
    size = sum(array.nbytes for array in C.values())
    assert 4 * 2**20 < size < 5 * 2**20
    _passes(train, policy=LOOSE.model_copy(update={"max_request_mb": 5}))
    assert "max_request_mb" in _refusal(train, policy=LOOSE.model_copy(update={"max_request_mb": 4}))


def test_the_arrays_of_a_secure_sum_are_bytes_of_members() -> None:
    requests = _requests()
    name = "ward-b"
    for kind in ("Unmask", "ShareKeys"):

        def given_(name: str, array: Any, kind: str = kind) -> m.Request:
            return replace(requests[kind], arrays={name: array})

        for size in (0, 1, 16_384):
            _passes(given_(name, np.zeros(size, np.uint8)))
        for array in (
            np.zeros(16_385, np.uint8),
            np.zeros((2, 2), np.uint8),
            np.zeros(9, np.int8),
        ):
            assert f"arrays[{name}]" in _refusal(given_(name, array))
        assert "members" in _refusal(given_("stranger", np.zeros(9, np.uint8)))


@pytest.mark.parametrize("kind", WEIGHTED)
def test_where_the_study_promises_sums_no_single_answer_is_given(kind: str) -> None:
    request = _requests(SECURE)[kind]
    assert "sums over sites only" in _refusal(replace(request, session="", peers="", total=0), SECURE)
    assert "2 sites or more" in _refusal(replace(request, peers="ward-a"), SECURE)
    three = LOOSE.model_copy(update={"minimum_summed_sites": 3})
    assert "3 sites or more" in _refusal(request, SECURE, three)
    _passes(replace(request, peers="ward-a,ward-b,ward-c"), SECURE, three)
    assert "session" in _refusal(replace(_requests()[kind], peers="ward-a,ward-b")), "peers without a session"
    assert "session" in _refusal(replace(_requests()[kind], total=3)), "a total without a session"


def test_counts_of_a_secure_study_are_summed_over_enough_sites_too() -> None:
    describe = _requests(SECURE)["Describe"]
    _passes(describe, SECURE)  # without a session it tells no counts
    _passes(replace(describe, session="s", peers="ward-a,ward-c"), SECURE)
    for peers in ("", "ward-a"):
        assert "2 sites or more" in _refusal(replace(describe, session="s", peers=peers), SECURE)


@pytest.mark.parametrize("kind", ["OfferArchive", "KeepArchive", "ShowExamples"])
def test_what_cannot_be_summed_takes_no_session(kind: str) -> None:
    request = replace(_requests(SECURE)[kind], session="s", peers="ward-a,ward-b")
    assert f"{kind}.session" in _refusal(request, SECURE)


def test_a_sum_is_opened_only_over_enough_survivors() -> None:
    three = LOOSE.model_copy(update={"minimum_summed_sites": 3})
    unmask = replace(_requests(SECURE)["Unmask"], peers="")
    assert "Unmask.survivors" in _refusal(unmask, SECURE, three)
    _passes(replace(unmask, survivors="ward-a,ward-b,ward-c", dropped=""), SECURE, three)


@pytest.mark.parametrize("kind", ["AdvertiseKeys", "ShareKeys", "Unmask"])
def test_keys_belong_to_a_session(kind: str) -> None:
    assert f"{kind}.session is ''" in _refusal(replace(_requests()[kind], session="", peers=""))


def test_a_thousand_peers_are_allowed() -> None:
    members = [f"site-{number:04d}" for number in range(1001)]
    request = replace(_requests()["AdvertiseKeys"], peers=",".join(members[:1000]))
    check_request(request, STUDY, LOOSE, members)
    with pytest.raises(RefusedError, match="at most 1000 names"):
        check_request(replace(request, peers=",".join(members)), STUDY, LOOSE, members)


MEASURES = ("MeasureArchive", "VoteOnArchive", "AttackArchive")
POLICIES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("phases", {"phases": ("archive", "classifier")}, {"TrainGan"}),
    ("phases", {"phases": ("generators", "classifier")}, {"OfferArchive", "KeepArchive", *MEASURES}),
    ("phases", {"phases": ("generators", "archive")}, {"TrainClassifier", "ScoreClassifier"}),
    ("metrics", {"metrics": ("counts", "scores", "archive_scores")}, {"TrainGan", "TrainClassifier"}),
    ("metrics", {"metrics": ("counts", "losses", "archive_scores")}, {"ScoreClassifier"}),
    ("metrics", {"metrics": ("counts", "losses", "scores")}, {"MeasureArchive", "AttackArchive"}),
    ("archive_votes", {"archive_votes": False}, {"VoteOnArchive"}),
    ("metrics", {"metrics": ("scores", "archive_scores", "losses")}, set(_requests())),
    ("share_examples", {"share_examples": False}, {"ShowExamples"}),
    ("allow_non_private", {"allow_non_private": False}, set(_requests())),
    ("epsilon_max", {"epsilon_max": 3.0}, set(_requests())),
    ("max_image_size", {"max_image_size": 16}, set(_requests())),
    ("classes", {"classes": ("Normal",)}, set(_requests())),
    ("max_generator_rounds", {"max_generator_rounds": 2}, {"TrainGan"}),
    ("classifier_models", {"classifier_models": ("googlenet",)}, {"TrainClassifier", "ScoreClassifier"}),
    ("require_secure_aggregation", {"require_secure_aggregation": True}, set(_requests())),
]


@pytest.mark.parametrize(("field", "changes", "forbidden"), POLICIES)
def test_a_policy_tightened_after_the_approval_refuses_what_it_is_about_and_no_more(
    field: str, changes: dict[str, Any], forbidden: set[str]
) -> None:
    policy = LOOSE.model_copy(update=changes)
    for kind, request in _requests().items():
        if kind in forbidden:
            assert field in _refusal(request, policy=policy)
        else:
            _passes(request, policy=policy)


def test_a_refusal_is_short_enough_to_log_whatever_was_sent() -> None:
    text = _refusal(m.TrainGan(study=STUDY.digest, class_name="\x1b[31m" * 10**5, round=1, weights=G))
    assert len(text) < 400
    assert "\x1b" not in text
    json.dumps(text)
