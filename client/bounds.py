"""The site's gate: what a request may say before any data is read, and what a reply may carry before it leaves.

::

    request --check_request--> inside the approved study? inside the policy? names, numbers, shapes, sizes known?
                 | no: RefusedError (field, value, what is allowed)      | yes
                 v                                                       v
              Refusal                                            train / score (what leaves: xfed.client.reply_bounds)
    On disk: nothing. A kind of request that is not listed here is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch

from xfed.client.policy import Policy, violations
from xfed.common import messages as m
from xfed.common.archive_figures import MOST_THINNING
from xfed.common.arms import STEERING
from xfed.common.config import Study
from xfed.common.config_family import ALL
from xfed.common.errors import RefusedError
from xfed.common.registry import CLASSIFIERS, GENERATORS
from xfed.common.summable import SUMMABLE
from xfed.common.synthetic_training import SYNTHETIC_ARM

__all__ = [
    "MOST_PEERS",
    "MOST_SHARDS",
    "SHARD",
    "check_request",
]

SHARD = 2048
"""Images in one shard of the archive, at the most."""
MOST_SHARDS = 4096
MOST_PEERS = 1000
MOST_EXAMPLES = 16
MOST_KEY_BYTES = 16_384
LEAST_SCALE = 2.0**-20
_KEYS = (m.AdvertiseKeys, m.ShareKeys, m.Unmask)
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_SESSION = re.compile(r"[A-Za-z0-9._-]{1,200}")

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """One request under examination, and what it is held against."""

    request: Any
    study: Study
    policy: Policy
    members: Collection[str]
    site: str

    def refuse(self, field: str, value: object, allowed: str) -> NoReturn:
        """Raise `RefusedError` naming field, value (80 characters of it) and what is allowed."""
        raise RefusedError(f"{type(self.request).__name__}.{field} is {value!r:.80}; allowed here: {allowed}")

    def within(self, field: str, low: int, high: int) -> None:
        """The field is a whole number from `low` to `high`."""
        value = getattr(self.request, field)
        if type(value) is not int or not low <= value <= high:
            self.refuse(field, value, f"{low}..{high}" if low < high else str(low))

    def one_of(self, field: str, known: Collection[str]) -> None:
        """The field is one of the names `known`."""
        value = getattr(self.request, field)
        if value not in known:
            self.refuse(field, value, ", ".join(known))

    def matching(self, field: str, value: str, pattern: re.Pattern[str], words: str) -> None:
        """`value`, of the field, has the form `pattern`, which is called `words`."""
        if pattern.fullmatch(value) is None:
            self.refuse(field, value, words)

    def names(self, field: str) -> tuple[str, ...]:
        """The field's comma-joined names of members, each once; () when it is empty."""
        text = getattr(self.request, field)
        names = tuple(text.split(",", MOST_PEERS)) if text else ()
        if len(names) > MOST_PEERS:
            self.refuse(field, text, f"at most {MOST_PEERS} names")
        for name in names:
            if name not in self.members:
                self.refuse(field, name, "names of the study's members, joined by commas")
        if len(set(names)) != len(names):
            self.refuse(field, text, "each member once")
        return names

    def weights(self, shapes: Shapes) -> None:
        """The arrays `weights` are those of the study's model: names, shapes, float32, finite."""
        self.arrays("weights", {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()})
        for name, array in self.request.weights.items():
            if not np.isfinite(array).all():
                self.refuse(f"weights[{name}]", "NaN or infinity", "finite numbers")

    def arrays(self, field: str, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
        """The arrays of the field have exactly these names, types and shapes; nothing in them is read."""
        arrays = getattr(self.request, field)
        if arrays.keys() != expected.keys():
            odd = sorted(arrays.keys() ^ expected.keys())
            self.refuse(field, odd[:3], f"exactly the {len(expected)} arrays of the study's model or message")
        for name, (dtype, shape) in expected.items():
            array = arrays[name]
            if array.dtype != dtype or array.shape != shape:
                self.refuse(f"{field}[{name}]", f"{array.dtype} {array.shape}", f"{dtype} {shape}")


def check_request(
    request: m.Request, study: Study, policy: Policy, members: Collection[str], *, site: str = ""
) -> None:
    """Refuse whatever is not inside the approved `study`, the `policy`, and the bounds of this module.

    `members`: names of the sites in the approved plan; `site`: this site's own name, which must then be among
    the `peers` of a secure sum. Call it before any data is read. Raises `RefusedError` naming field, value and what is allowed.
    """
    asked = _Asked(request=request, study=study, policy=policy, members=members, site=site)
    rule = _RULES.get(type(request))
    if rule is None:
        raise RefusedError(f"this site does not answer {type(request).__name__:.60} within a study")
    parts, check = rule
    if request.study != study.digest:
        asked.refuse("study", request.study, f"the approved study {study.digest[:12]}")
    _check_session(asked)
    limit = policy.max_request_mb * 2**20
    if (size := _bytes_of(request)) > limit:
        asked.refuse("arrays", f"{size} bytes", f"{limit} bytes (max_request_mb of the policy)")
    problems = violations(policy, study, parts)
    if problems:
        raise RefusedError(f"this site's policy forbids {type(request).__name__}: " + "; ".join(problems))
    check(asked)


def _bytes_of(request: m.Request) -> int:
    groups = [getattr(request, field.name) for field in dataclasses.fields(request) if field.type == "Arrays"]
    return sum(array.nbytes for group in groups for array in group.values())


def _check_session(asked: _Asked) -> None:
    request = asked.request
    asked.within("total", 0, 2**53)
    peers = asked.names("peers")
    if not request.session:
        if peers or request.total:
            asked.refuse("session", "", "the name of a session, where there are peers or a total")
        # a description without a session holds no counts where the study is secure
        if asked.study.secure and type(request) in SUMMABLE and not isinstance(request, m.Describe):
            asked.refuse("session", "", "a session: the approved study shows the coordinator sums over sites only")
        return
    asked.matching("session", request.session, _SESSION, "1 to 200 of A-Z a-z 0-9 . _ -")
    if type(request) not in SUMMABLE and not isinstance(request, _KEYS):
        asked.refuse("session", request.session, "none: such an answer cannot be part of a secure sum")
    if peers or not isinstance(request, m.ShareKeys | m.Unmask):
        _enough(asked, "peers", peers)
        if asked.site and asked.site not in peers:
            asked.refuse("peers", request.peers, f"a list with {asked.site} in it")


def _enough(asked: _Asked, field: str, names: tuple[str, ...]) -> None:
    least = asked.policy.minimum_summed_sites
    if len(names) < least:
        asked.refuse(field, ",".join(names), f"{least} sites or more (minimum_summed_sites of the policy)")


def _check_nothing(asked: _Asked) -> None:
    """All of such a request is checked by what is common to all requests."""


def _check_train_gan(asked: _Asked) -> None:
    settings = asked.study.gan
    if "dcgan" not in settings.method:
        asked.refuse("study", asked.study.name, f"no rounds of training: gan.method is {settings.method}")
    shared = settings.shared_rounds
    together = bool(shared) and asked.request.class_name == ALL
    asked.one_of("class_name", (ALL,) if together else asked.study.generators)
    asked.within("round", 1 if together else shared + 1, shared if together else shared + settings.rounds)
    asked.one_of("payload", (asked.study.federation.payload,))
    asked.weights(_generator_shapes(settings.family, asked.study.image_size, settings.width, settings.latent))


def _check_embed(asked: _Asked) -> None:
    _check_private(asked, "dp-merf" in asked.study.gan.method)
    asked.one_of("class_name", asked.study.classes)
    asked.within("features", asked.study.gan.merf.features, asked.study.gan.merf.features)


def _check_private(asked: _Asked, part_of_study: bool) -> None:
    if not asked.study.private or not part_of_study:
        asked.refuse("study", asked.study.name, "a private study that has this part")


def _check_score_privately(asked: _Asked) -> None:
    _check_private(asked, True)
    _check_classifier_weights(asked)


def _check_ledger(asked: _Asked) -> None:
    _check_private(asked, True)
    asked.within("first", 0, 2**53)


def _not_private(asked: _Asked) -> None:
    if asked.study.private:
        asked.refuse("study", asked.study.name, "no un-noised figures: this study is differentially private")


def _check_measure(asked: _Asked) -> None:
    _not_private(asked)
    scale = asked.request.scale
    if type(scale) is not float or not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        asked.refuse("scale", scale, f"{LEAST_SCALE:g}..{1 / LEAST_SCALE:g}")
    asked.arrays("thinning", {"times": (np.dtype(np.int64), (len(asked.study.classes),))})
    times = asked.request.thinning["times"]
    # powers of two only: no two requests differ by a single image
    if times.min() < 0 or times.max() > MOST_THINNING:
        asked.refuse("thinning[times]", times.tolist(), f"0..{MOST_THINNING}")
    _check_classifier_weights(asked)


def _check_classifier_weights(asked: _Asked, *more: str) -> None:
    study, settings = asked.study, asked.study.classifier
    asked.one_of("arm", (*settings.arms, *more))
    asked.weights(_classifier_shapes(settings.model, study.image_size, len(study.classes), settings.width))


def _check_train_classifier(asked: _Asked) -> None:
    study = asked.study
    steering = study.unlabelled and asked.request.arm == STEERING
    asked.within("round", 1, study.gan.steering.rounds if steering else study.classifier.rounds)
    _check_classifier_weights(asked, *([STEERING] if study.unlabelled else []))


def _check_score(asked: _Asked) -> None:
    _not_private(asked)
    rounds = asked.study.classifier.rounds
    asked.one_of("split", ("validation", "test"))
    # the test patients are asked once, after the last round: no choice may be made by them
    first, last = (1, rounds) if asked.request.split == "validation" else (rounds + 1, rounds + 1)
    asked.within("round", first, last)
    # a classifier of the archive alone was trained elsewhere; it may be scored here once, where the approved study says so
    tested_too = asked.request.split == "test" and asked.study.archive.tstr_steps
    _check_classifier_weights(asked, *([SYNTHETIC_ARM] if tested_too else []))


def _shards(policy: Policy) -> int:
    return min(MOST_SHARDS, -(-policy.max_archive_images // SHARD))


def _check_offer(asked: _Asked) -> None:
    asked.matching("root", asked.request.root, _HEX_DIGEST, "a SHA-256 in hexadecimal")
    most = _shards(asked.policy)
    digests = asked.request.digests.split(",", most)
    if len(digests) > most:
        asked.refuse("digests", asked.request.digests, f"at most {most} digests (max_archive_images of the policy)")
    for digest in digests:
        asked.matching("digests", digest, _HEX_DIGEST, "SHA-256 digests in hexadecimal, joined by commas")


def _check_keep(asked: _Asked) -> None:
    study, arrays = asked.study, asked.request.arrays
    asked.within("shard", 0, _shards(asked.policy) - 1)
    asked.matching("digest", asked.request.digest, _HEX_DIGEST, "a SHA-256 in hexadecimal")
    labels = arrays.get("labels")
    count = labels.size if labels is not None else 0
    if not 1 <= count <= SHARD:
        asked.refuse("arrays[labels]", f"{count} labels", f"1..{SHARD}")
    side = study.image_size
    images = (np.dtype(np.uint8), (count, side, side))
    asked.arrays("arrays", {"images": images, "labels": (np.dtype(np.int64), (count,))})
    low, high = int(arrays["labels"].min()), int(arrays["labels"].max())
    if low < 0 or high >= len(study.labels):
        asked.refuse("arrays[labels]", f"{low}..{high}", f"0..{len(study.labels) - 1}")


def _check_vote(asked: _Asked) -> None:
    _not_private(asked)
    if not asked.study.archive.vote:
        asked.refuse("study", asked.study.name, "no vote: archive.vote is false in the approved study")
    _check_archive(asked)
    _check_classifier_weights(asked)


def _check_attack(asked: _Asked) -> None:
    _not_private(asked)
    if not asked.study.archive.attacks:
        asked.refuse("study", asked.study.name, "no attacks: archive.attacks is false in the approved study")
    _check_archive(asked)
    asked.arrays("arrays", {"released": (np.dtype(np.uint8), (asked.request.images,))})
    if (highest := int(asked.request.arrays["released"].max())) > 1:
        asked.refuse("arrays[released]", highest, "0 or 1")


def _check_archive(asked: _Asked) -> None:
    """Which archive is meant: its root and number of images."""
    asked.matching("root", asked.request.root, _HEX_DIGEST, "a SHA-256 in hexadecimal")
    asked.within("images", 1, min(MOST_SHARDS * SHARD, asked.policy.max_archive_images))


def _check_show(asked: _Asked) -> None:
    if not asked.policy.share_examples:
        raise RefusedError("this site does not show real images (share_examples of its policy is false)")
    asked.within("count", 1, MOST_EXAMPLES)


def _check_advertise(asked: _Asked) -> None:
    if not asked.request.session:
        asked.refuse("session", "", "the name of a session")


def _check_keys(asked: _Asked) -> None:
    """A secure sum's arrays: bytes under known names; what they say is checked by `xfed.common.secure_sum`."""
    _check_advertise(asked)
    for name, array in asked.request.arrays.items():
        if name not in asked.members:
            asked.refuse("arrays", name, "names of the study's members")
        if array.dtype != np.uint8 or array.ndim != 1 or array.size > MOST_KEY_BYTES:
            asked.refuse(f"arrays[{name}]", f"{array.dtype} {array.shape}", f"uint8, at most {MOST_KEY_BYTES} of them")


def _check_unmask(asked: _Asked) -> None:
    survivors, dropped = asked.names("survivors"), asked.names("dropped")
    if both := set(survivors) & set(dropped):
        asked.refuse("dropped", min(both), "none of the survivors")
    _enough(asked, "survivors", survivors)
    _check_keys(asked)


_RULES: Mapping[type[m.Request], tuple[tuple[str, ...], Callable[[_Asked], None]]] = {
    m.Describe: ((), _check_nothing),
    m.TrainGan: (("generators", "losses"), _check_train_gan),
    m.EmbedClass: (("generators",), _check_embed),
    m.OfferArchive: (("archive",), _check_offer),
    m.KeepArchive: (("archive",), _check_keep),
    m.TrainClassifier: (("classifier", "losses"), _check_train_classifier),
    m.ScoreClassifier: (("classifier", "scores"), _check_score),
    m.ScorePrivately: (("classifier", "scores"), _check_score_privately),
    m.ShowLedger: ((), _check_ledger),
    m.MeasureArchive: (("archive", "archive_scores"), _check_measure),
    m.VoteOnArchive: (("archive", "archive_votes"), _check_vote),
    m.AttackArchive: (("archive", "archive_scores"), _check_attack),
    m.ShowExamples: (("examples",), _check_show),
    m.AdvertiseKeys: ((), _check_advertise),
    m.ShareKeys: ((), _check_keys),
    m.Unmask: ((), _check_unmask),
}
"""Per kind of request: the parts of the policy it falls under (`violations`), and its own checks."""


@lru_cache(maxsize=8)
def _generator_shapes(family: str, size: int, width: int, latent: int) -> Shapes:
    with torch.device("meta"):  # shapes without memory
        return _shapes_of(GENERATORS[family](size, width, latent))


@lru_cache(maxsize=8)
def _classifier_shapes(model: str, size: int, classes: int, width: int) -> Shapes:
    with torch.device("meta"):
        return _shapes_of(CLASSIFIERS[model](size, classes, width, 0.0))


def _shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
