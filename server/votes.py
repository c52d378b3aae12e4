"""The hospitals judge the archive before it is released: their vote, and attacks on what is left; what they veto is taken out.

::

    archive as delivered --VoteOnArchive--> every site --0 or 1 per image--> number of sites that veto each --> checkpoints/vote-
      --> withheld/ (xfed.server.archive_subset.set_aside) --> archive/ without them (without), vetoes in its manifest
      --AttackArchive (which images are left)--> every site --counts--> sum --> checkpoints/attacks- --> figures with intervals

In a secure study the coordinator sees how many sites veto an image, and the attacks' counts summed. Who vetoed what would say
where a patient is, so in an open study it goes into no file either. The archive's manifest says how many were vetoed, not
which. In a private study all of this would be touches of patients without noise: it is left out, and that is said.

Formal guarantees
    No image that a site which answered vetoed is in archive/ after `judge_archive`, nor in anything that is made from its result.
    Every step is on disk before the next one; a killed run goes on from there, and asks no site twice.
Not covered
    A generator that is released with a vetoed image's seed draws that image again; classifiers trained on the archive as
    delivered (DS3, TSTR) saw it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import CheckpointError, DataError, FederationError
from xfed.common.membership import ATTACKS, linkage_figures, membership_figures, no_counts
from xfed.common.messages import ArchiveAttacked, ArchiveVote, AttackArchive, Reply, Request, VoteOnArchive
from xfed.common.weights import Weights
from xfed.server.archive_subset import delivered, delivered_manifest, set_aside, without
from xfed.server.run import Run

__all__ = ["Judged", "attack_archive", "judge_archive", "vote_on_archive"]

VOTE, ATTACKS_PHASE = "vote", "attacks"
PRIVATE = (
    "left out: this study is private, and comparing the archive with patients without noise would be one more release that its "
    "budget does not plan"
)
BY_STUDY = "left out: archive.{field} is false in the study"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is left: `kept` bool [n], per image as delivered; the archive's `manifest`; `facts` per test, for the report."""

    kept: npt.NDArray[np.bool_]
    manifest: dict[str, Any]
    facts: dict[str, Any]


def judge_archive(run: Run, arm: str, weights: Weights) -> Judged:
    """Vote, take out what was vetoed, attack the rest. `weights`: of the classifier of `arm`, whose features the vote uses.

    Raises `FederationError` (no quorum), `DataError` (nothing is left).
    """
    study = run.study
    names, _, labels = delivered(run.folder, study.labels)
    root = str(delivered_manifest(run.folder)["root_sha256"])
    kept = np.ones(len(names), bool)
    facts: dict[str, Any] = {"vote": {"left_out": PRIVATE if study.private else BY_STUDY.format(field="vote")}}
    manifest = delivered_manifest(run.folder)
    if study.archive.vote and not study.private:
        vetoed, facts["vote"] = vote_on_archive(run, arm, weights, root, labels)
        kept = ~vetoed
        if not kept.any():
            raise DataError(
                "the hospitals vetoed every synthetic image: the generators repeat their training images, and nothing can be "
                "released. Train them for fewer rounds or on more patients, in a study of its own."
            )
        rejected = [name for name, out in zip(names, vetoed, strict=True) if out]
        set_aside(run.folder, rejected)
        manifest = without(run.folder / "archive", rejected, {"vetoes": _for_the_manifest(facts["vote"])})
    reason = PRIVATE if study.private else BY_STUDY.format(field="attacks")
    facts |= {"membership": {"left_out": reason}, "reidentification": {"left_out": reason}}
    if study.archive.attacks and not study.private:
        facts |= attack_archive(run, root, kept)
    return Judged(kept=kept, manifest=manifest, facts=facts)


def _for_the_manifest(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("sites", "images", "vetoed", "vetoed_per_class")}


def vote_on_archive(
    run: Run, arm: str, weights: Weights, root: str, labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], dict[str, Any]]:
    """Which images bool [n] at least one site vetoes, and the facts of the vote. Asked once in a study's life."""
    count, totals = len(labels), Counter[str]()
    checkpoint = run.checkpoints.latest(VOTE)
    if checkpoint is None:
        vetoes = np.zeros(count, np.int64)

        def fold(site: str, request: Request, reply: Reply) -> None:
            if not isinstance(reply, ArchiveVote):
                raise FederationError(f"{site} answered {type(reply).__name__} to VoteOnArchive")
            votes = _checked(site, reply.arrays, {"vetoes": (count,), "voters": (), "calibrated": ()})
            vetoes[:] += votes["vetoes"]
            totals.update({name: int(votes[name]) for name in ("voters", "calibrated")})

        run.journal.write("phase", phase=VOTE, round=0, rounds=1)
        request = VoteOnArchive(study=run.study.digest, arm=arm, root=root, images=count, weights=dict(weights))
        run.sum(VOTE, 1, [request], [run.exchange.sites], fold)
        arrays = {"vetoed": (vetoes > 0).astype(np.uint8)}  # by whom, and by how many, is of no further use
        run.checkpoints.save(VOTE, 1, arrays, dict(totals))
        run.journal.write("round", phase=VOTE, round=1, rounds=1)
    else:
        arrays, totals = checkpoint.arrays, Counter(checkpoint.facts)
    vetoed = arrays["vetoed"].astype(bool)
    if len(vetoed) != count:
        raise CheckpointError(
            f"{run.folder}: the vote was on {len(vetoed)} images, the archive has {count}. Put back the one that was voted on."
        )
    return vetoed, _vote_facts(run, vetoed, labels, totals)


def _vote_facts(
    run: Run, vetoed: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], totals: Mapping[str, int]
) -> dict[str, Any]:
    sites, calibrated, out = totals["voters"], totals["calibrated"], int(vetoed.sum())
    text = (
        f"{sites} of {len(run.exchange.sites)} hospitals compared every image with their training images and with held-out "
        f"patients; {out:,} of {len(vetoed):,} images ({out / len(vetoed):.1%}) were nearer to a training image than another "
        "patient would be, at one hospital or more, and are left out. An honest image is vetoed with a chance of about 1%."
    )
    if calibrated < sites:
        text += f" {sites - calibrated} had too few held-out images, and looked for near-identical copies alone."
    return {
        "statement": text,
        "sites": sites,
        "calibrated": calibrated,
        "images": len(vetoed),
        "vetoed": out,
        "vetoed_per_class": {name: int(vetoed[labels == label].sum()) for label, name in enumerate(run.study.labels)},
    }


def attack_archive(run: Run, root: str, kept: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Facts of "membership" and "reidentification" on the images `kept`, from the sites' counts. Asked once."""
    classes, released = run.study.classes, kept.astype(np.uint8)
    checkpoint = run.checkpoints.latest(ATTACKS_PHASE)
    if checkpoint is None:
        sums = no_counts(len(classes))

        def fold(site: str, request: Request, reply: Reply) -> None:
            if not isinstance(reply, ArchiveAttacked):
                raise FederationError(f"{site} answered {type(reply).__name__} to AttackArchive")
            shapes = {name: array.shape for name, array in sums.items()}
            for name, array in _checked(site, reply.arrays, shapes).items():
                sums[name] += array

        run.journal.write("phase", phase=ATTACKS_PHASE, round=0, rounds=1)
        request = AttackArchive(study=run.study.digest, root=root, images=len(released), arrays={"released": released})
        run.sum(ATTACKS_PHASE, 1, [request], [run.exchange.sites], fold)
        run.checkpoints.save(ATTACKS_PHASE, 1, sums, {})
        run.journal.write("round", phase=ATTACKS_PHASE, round=1, rounds=1)
    else:
        sums = checkpoint.arrays
    return {
        "membership": _membership(classes, sums["membership"]),
        "reidentification": _linkage(linkage_figures(sums["ranks"], sums["first"], sums["chance"])),
    }


def _checked(site: str, arrays: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays, which must be those of `shapes`, finite and not negative."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    if {name: array.shape for name, array in found.items()} != shapes:
        raise FederationError(f"{site} sent other arrays than were asked for; they are left out")
    if any(not np.isfinite(array).all() or (array < 0).any() for array in found.values()):
        raise FederationError(f"{site} sent counts below 0; they are left out")
    return found


def _membership(classes: tuple[str, ...], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    # each of the intervals that say "told apart" has its share of the 5%
    strict = 1 - 0.05 / (len(ATTACKS) * len(classes))
    told = [
        name
        for label, name in enumerate(classes)
        if any(
            (membership_figures(counts[number, label], strict)["auc_interval"] or [0.0])[0] > 0.5
            for number in range(len(ATTACKS))
        )
    ]
    measured = [name for label, name in enumerate(classes) if counts[0, label].sum(1).all()]
    if not measured:
        text = "not measured: no hospital had enough training and held-out patients of a class."
    elif told:
        text = f"training patients could be told from held-out ones by the archive: {', '.join(told)}."
    else:
        text = "training patients could not be told from held-out ones by these two attacks."
    text = f"Membership inference, from the archive alone: {text} 0.5 is guessing, 1 is certainty."
    return {"statement": text} | {
        f"by_{attack}": {name: membership_figures(counts[number, label]) for label, name in enumerate(classes)}
        for number, attack in enumerate(ATTACKS)
    }


def _linkage(figures: dict[str, Any]) -> dict[str, Any]:
    span = figures["excess"]["interval"]
    if span is None:
        text = "not measured: too few patients with two images of a class."
    elif span[0] > 0:
        text = "images of training patients are linked better than those of held-out ones: the archive gives them away."
    else:
        text = "images of training patients are not shown to be linked better than those of held-out ones, whom no generator saw."
    return {
        "statement": f"Is a patient's other image nearest to the archive image that the first one leads to? {text}"
    } | figures
