"""What a reply may carry before it leaves the site: figures that the policy lets out, and no small counts.

::

    store --splits_taking_part--> train / score --> reply --check_reply--> (mask) --> out
    On disk: nothing. A kind of reply that is not listed here does not leave.

The rule of small counts (`Policy.smallest_count`, k). Where fewer than k patients of a class are in a split, but at least one,
the class takes no part in that split at this site: `splits_taking_part` marks its images, and they are not counted, not
trained on (neither generator nor classifier) and not scored. So the count that leaves is 0 and true: no image
takes part. `check_reply` refuses a reply that would show 1 to k - 1 all the same. Sums of features are taken over half
of the patients each; a class whose half has 1 to k - 1 images is left out of the Frechet distance, with a count of 0.
What is not covered: single cells of a confusion matrix and bins of a histogram may hold a 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.client.policy import Policy
from xfed.common import messages as m
from xfed.common.errors import RefusedError

__all__ = ["check_reply", "splits_taking_part"]

_METRICS: Mapping[type[m.Reply], tuple[str, ...]] = {
    m.Refusal: (),
    m.PlanStatus: (),
    m.ArchiveWanted: (),
    m.ArchiveKept: (),
    m.SessionKeys: (),
    m.SessionShares: (),
    m.UnmaskShares: (),
    m.Masked: (),
    m.Examples: (),
    m.Description: ("counts",),
    m.GanUpdate: ("counts", "losses"),
    m.Embedding: ("counts",),
    m.ClassifierUpdate: ("counts", "losses"),
    m.Scores: ("scores",),
    m.NoisyScores: ("scores",),
    m.LedgerLines: (),
    m.ArchiveMeasured: ("archive_scores",),
    m.ArchiveAttacked: ("archive_scores",),
    m.ArchiveVote: (),
}
"""Per kind of reply: the figures in it, as `Policy.metrics` calls them."""


def check_reply(reply: m.Reply, policy: Policy) -> m.Reply:
    """The reply that may leave under `policy`: this one, or one that says less. Raises `RefusedError` when none may.

    Of a masked reply only its kind can be seen here: what is in it is small only in a sum over sites. The rule of small
    counts is in the module's docstring. `Description.share_examples` is false wherever the policy says so.
    """
    kind = _kind_of(reply)
    for metric in _METRICS[kind]:
        if metric not in policy.metrics:
            allowed = ", ".join(policy.metrics) or "none"
            raise RefusedError(
                f"{kind.__name__} holds {metric}; figures that may leave this site: {allowed} (metrics of its policy)"
            )
    if kind is m.ArchiveVote and not policy.archive_votes:
        raise RefusedError("this site does not vote on synthetic images (archive_votes of its policy is false)")
    match reply:
        case m.Description():
            for name in reply.counts.keys() - {"holders"}:
                _large(policy, "images of a class in a split", reply.counts[name])
            _large(policy, "patients", np.array([reply.patients]))
            return dataclasses.replace(reply, share_examples=reply.share_examples and policy.share_examples)
        case m.GanUpdate() | m.ClassifierUpdate():
            _large(policy, "training images", np.array([reply.images]))
        case m.Scores():
            _large(policy, "scored images of a class", reply.sums["confusion"].sum(axis=1))
            _large(policy, "scored patients", reply.sums["patients"])
        case m.ArchiveMeasured():
            return dataclasses.replace(reply, arrays=_without_small_halves(reply.arrays, policy.smallest_count))
        case m.ArchiveAttacked():
            for name in ("membership", "ranks"):
                _large(policy, "attacked patients", reply.arrays[name].sum(axis=-1))
        case m.Examples():
            if not policy.share_examples:
                raise RefusedError("this site does not show real images (share_examples of its policy is false)")
    return reply


def _kind_of(reply: m.Reply) -> type[m.Reply]:
    """What the reply is, or what it was before it was masked."""
    kind = m.REPLIES.get(reply.kind, m.Reply) if isinstance(reply, m.Masked) else type(reply)
    if kind not in _METRICS:
        raise RefusedError(f"this site does not let {type(reply).__name__:.60} ({kind.__name__}) leave")
    return kind


def _large(policy: Policy, what: str, counts: npt.NDArray[np.integer[Any]]) -> None:
    least = policy.smallest_count
    if ((counts > 0) & (counts < least)).any():
        raise RefusedError(
            f"a count of {what} is below {least} and may not leave this site (smallest_count of its policy); "
            "the images of such a class are to take no part (splits_taking_part)"
        )


def _without_small_halves(arrays: m.Arrays, smallest: int) -> m.Arrays:
    """Zeros in place of the sums of every class with a half of 1 to `smallest` - 1 images."""
    small = {
        name.partition("/")[0]
        for name, array in arrays.items()
        if name.endswith("/count") and 0 < float(array.sum()) < smallest
    }
    return {
        name: np.zeros_like(array) if name.partition("/")[0] in small and not name.endswith("/scores") else array
        for name, array in arrays.items()
    }


def splits_taking_part(
    labels: npt.NDArray[np.int64], patients: npt.NDArray[np.int64], splits: npt.NDArray[np.int8], smallest: int
) -> npt.NDArray[np.int8]:
    """The splits int8 [n] with -1 for images that take no part: see the rule of small counts above.

    `labels` and `patients`, both [n], are a store's; `smallest` is `Policy.smallest_count`, 0 = off.
    """
    cells = splits.astype(np.int64) * (labels.max(initial=0) + 1) + labels
    owned = np.unique(np.stack([cells, patients]), axis=1)
    held = np.bincount(owned[0], minlength=int(cells.max(initial=0)) + 1)
    return np.where(held[cells] < smallest, np.int8(-1), splits).astype(np.int8)
