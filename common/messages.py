"""Everything that travels between coordinator and sites, in one place.

::

    coordinator --request--> site                         what the reply carries out of the hospital
    ProposePlan              PlanStatus                    whether the site has approved the plan
    Describe                 Description                   counts per split and class, number of patients, versions
    TrainGan                 GanUpdate                     G's float32 weights, number of images, two mean losses
    EmbedClass               Embedding                     private studies: a noisy sum of random features
    OfferArchive             ArchiveWanted                 which shards the site lacks
    KeepArchive              ArchiveKept                   a digest
    TrainClassifier          ClassifierUpdate              classifier weights, number of images, a mean loss
    ScoreClassifier          Scores                        sums: confusion counts, score histograms, patient-level moments
    ScorePrivately           NoisyScores                   private studies: noisy counts of hits and of scores
    MeasureArchive           ArchiveMeasured               sums of features, and a few scores per class
    VoteOnArchive            ArchiveVote                   which synthetic images are too near to a patient's
    AttackArchive            ArchiveAttacked               counts of patients per public bin of a distance, or of a place
    ShowLedger               LedgerLines                   private studies: what was spent, signed, with no patient data
    ShowExamples             Examples                      images: phantoms only, unless the site allows it
    AdvertiseKeys            SessionKeys                   public keys for one secure sum, signed by the site
    ShareKeys                SessionShares                 secrets in shares, each readable by one other site only
    (any, with a session)    Masked                        the answer under masks that cancel in the sum over sites
    Unmask                   UnmaskShares                  shares that take the masks off the sum, and off nothing else
    (any)                    Refusal                       the reason

A discriminator, an optimizer state, a patient number, a file name or a real image of a patient is in none of them.
Each request names the study's digest; a site refuses any other study before it reads data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xfed.common.message_base import Arrays, Reply, Request

__all__ = [
    "REPLIES",
    "REQUESTS",
    "AdvertiseKeys",
    "ArchiveAttacked",
    "ArchiveKept",
    "ArchiveMeasured",
    "ArchiveVote",
    "ArchiveWanted",
    "Arrays",
    "AttackArchive",
    "ClassifierUpdate",
    "Describe",
    "Description",
    "EmbedClass",
    "Embedding",
    "Examples",
    "GanUpdate",
    "KeepArchive",
    "LedgerLines",
    "Masked",
    "MeasureArchive",
    "NoisyScores",
    "OfferArchive",
    "PlanStatus",
    "ProposePlan",
    "Refusal",
    "Reply",
    "Request",
    "ScoreClassifier",
    "ScorePrivately",
    "Scores",
    "SessionKeys",
    "SessionShares",
    "ShareKeys",
    "ShowExamples",
    "ShowLedger",
    "TrainClassifier",
    "TrainGan",
    "Unmask",
    "UnmaskShares",
    "VoteOnArchive",
]


@dataclass(frozen=True, kw_only=True)
class ProposePlan(Request):
    """The plan of a study (JSON text, `xfed.common.plan`) and the federation's signature of it, for approval by people."""

    plan: str
    signature: str


@dataclass(frozen=True, kw_only=True)
class PlanStatus(Reply):
    """Whether this plan is approved at the site."""

    digest: str
    approved: bool
    software: str


@dataclass(frozen=True, kw_only=True)
class Describe(Request):
    """Who are you, and what do you hold?"""


@dataclass(frozen=True, kw_only=True)
class Description(Reply):
    """`counts`: "counts" int64 [3, C], images per split (train, validation, test) and class; "drawn" int64 [C], training
    images of the classes that this site trains a generator of; "holders" int64 [C], 1 for those classes.

    All zero where the study sums securely: then only their sums over sites leave.
    """

    patients: int
    share_examples: bool
    software: str
    counts: Arrays


@dataclass(frozen=True, kw_only=True)
class TrainGan(Request):
    """Train class `class_name` for one round from these generator weights (rounds count from 1).

    `payload` "bfloat16": the weights, which must be rounded to it already, travel as two bytes each, and so does the answer.
    """

    flower_type: ClassVar[str] = "train.gan"
    class_name: str
    round: int
    payload: str = "float32"
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class GanUpdate(Reply):
    """The site's generator after the round. `images`: how many training images it holds (the averaging weight)."""

    images: int
    loss_g: float
    loss_d: float
    seconds: float
    payload: str = "float32"
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class EmbedClass(Request):
    """Release the noisy mean embedding of class `class_name` in `features` features (DP-MERF, `xfed.common.merf`), once."""

    flower_type: ClassVar[str] = "train.gan"
    class_name: str
    features: int


@dataclass(frozen=True, kw_only=True)
class Embedding(Reply):
    """ "sum" float64 [F]: the sum of the patients' features, with noise. `images`: the declared, public size of the class."""

    images: int
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class OfferArchive(Request):
    """The synthetic archive is ready in `shards` parts whose digests are joined by commas in `digests`."""

    root: str
    digests: str


@dataclass(frozen=True, kw_only=True)
class ArchiveWanted(Reply):
    """Positions of the shards that the site lacks, joined by commas; empty when it has all."""

    missing: str


@dataclass(frozen=True, kw_only=True)
class KeepArchive(Request):
    """One shard: arrays "images" uint8 [n, S, S] and "labels" int64 [n]; `digest` is theirs."""

    shard: int
    digest: str
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class ArchiveKept(Reply):
    """The shard is on the site's disk."""

    digest: str


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(Request):
    """Train the classifier of `arm` for one round from these weights."""

    flower_type: ClassVar[str] = "train.classifier"
    arm: str
    round: int
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class ClassifierUpdate(Reply):
    """The site's classifier after the round. `images`: real training images (the averaging weight)."""

    images: int
    loss: float
    seconds: float
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class ScoreClassifier(Request):
    """Score these weights on the site's "validation" or "test" patients."""

    flower_type: ClassVar[str] = "evaluate.classifier"
    arm: str
    round: int
    split: str
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class Scores(Reply):
    """`sums`: the arrays of `xfed.common.metrics.ScoreSums`."""

    sums: Arrays


@dataclass(frozen=True, kw_only=True)
class ScorePrivately(Request):
    """Score these weights on the site's test patients, under differential privacy: once per arm, after the last round."""

    flower_type: ClassVar[str] = "evaluate.classifier"
    arm: str
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class NoisyScores(Reply):
    """ "confusion" float64 [C, C] and "histogram" float64 [C, 2, b], with noise (`xfed.common.noisy_scores`)."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class ShowLedger(Request):
    """The ledger's lines of this study from number `first` on."""

    first: int


@dataclass(frozen=True, kw_only=True)
class LedgerLines(Reply):
    """`lines`: signed JSON lines; `head`: the signed head (JSON); `key`: the site's ledger key and who vouches for it (JSON)."""

    lines: str
    head: str
    key: str


@dataclass(frozen=True, kw_only=True)
class MeasureArchive(Request):
    """Compare the archive with the site's real images in the features of this classifier, divided by `scale` for KID.

    `thinning`: "times" int64 [C], of each class's second half every 2^times-th image counts, so that the floor can be
    measured with as many images as the archive has.
    """

    flower_type: ClassVar[str] = "evaluate.archive"
    arm: str
    scale: float
    thinning: Arrays
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class ArchiveMeasured(Reply):
    """Per class position c: feature sums "c/half0/...", "c/kernel0/..." (and 1) and "c/scores" (`xfed.client.measures`)."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class VoteOnArchive(Request):
    """Which of the `images` of the archive with digest `root` are too near to a training image? (`xfed.client.vote`)

    The weights are the classifier's whose features are compared, besides pixels.
    """

    flower_type: ClassVar[str] = "evaluate.archive"
    arm: str
    root: str
    images: int
    weights: Arrays


@dataclass(frozen=True, kw_only=True)
class ArchiveVote(Reply):
    """ "vetoes" uint8 [images], 0 or 1; "voters" uint8 [], 1; "calibrated" uint8 [], 1 where held-out patients sufficed."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class AttackArchive(Request):
    """Try to tell training patients by the archive, less what "released" uint8 [images] calls 0 (`xfed.client.attacks`)."""

    flower_type: ClassVar[str] = "evaluate.archive"
    root: str
    images: int
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class ArchiveAttacked(Reply):
    """Counts of patients: "membership" int64 [2, C, 2, BINS], "ranks" int64 [2, RANKS], "first" int64 [2]; and "chance" [2]."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class ShowExamples(Request):
    """Ask for up to `count` images per class to show beside synthetic ones."""

    count: int


@dataclass(frozen=True, kw_only=True)
class Examples(Reply):
    """ "images" uint8 [C, count, S, S]; all black where the site lacks a class."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class Refusal(Reply):
    """The site does not do what was asked. `error` is the error's class name, `reason` its message."""

    error: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class AdvertiseKeys(Request):
    """Begin a secure sum: make keys for `session` (`xfed.common.secure_sum`)."""


@dataclass(frozen=True, kw_only=True)
class SessionKeys(Reply):
    """ "advert" uint8: the site's public keys of one session and its signature of them."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class ShareKeys(Request):
    """Everybody's adverts: per site its public keys and signature, uint8."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class SessionShares(Reply):
    """Per peer one ciphertext (uint8) that only the peer can read."""

    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class Masked(Reply):
    """An answer of kind `kind` as masked vectors: "weights" uint32 and "statistics" uint64, both modulo their size."""

    kind: str
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class Unmask(Request):
    """Who delivered and who did not (names joined by commas), and the ciphertexts addressed to this site, by sender."""

    survivors: str
    dropped: str
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class UnmaskShares(Reply):
    """Per site one share (uint8): of its self mask's seed if it delivered, of its key if it did not."""

    arrays: Arrays


_KINDS = [kind for kind in list(globals().values()) if isinstance(kind, type) and kind.__module__ == __name__]
REQUESTS: dict[str, type[Request]] = {kind.__name__: kind for kind in _KINDS if issubclass(kind, Request)}
REPLIES: dict[str, type[Reply]] = {kind.__name__: kind for kind in _KINDS if issubclass(kind, Reply)}
