"""What may leave a site: the policy's figures only, no small count, no image without consent, no unknown kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfed.client.policy import Policy
from xfed.client.reply_bounds import check_reply, splits_taking_part
from xfed.common import messages as m
from xfed.common.errors import RefusedError
from xfed.common.frechet import feature_sums, to_arrays
from xfed.common.membership import no_counts
from xfed.common.metrics import score_sums
from xfed.common.metrics import to_arrays as score_arrays
from xfed.common.randomness import numpy_generator

LOOSE = Policy.permissive()
DIGEST = "0123456789abcdef" * 4
BYTES = {"ward-a": np.zeros(300, np.uint8)}
WEIGHTS = {"w": np.zeros(3, np.float32)}


def _description(counts: Any, patients: int = 40, **more: Any) -> m.Description:
    arrays = {name: np.array(value) for name, value in {"counts": counts, **more}.items()}
    return m.Description(site="ward-a", patients=patients, share_examples=True, software="xfed", counts=arrays)


def _scores(labels: list[int], patients: list[int] | None = None) -> m.Scores:
    rng = numpy_generator(1, "scores")
    p = rng.dirichlet(np.ones(3), len(labels))
    owners = np.array(patients if patients is not None else range(len(labels)))
    return m.Scores(site="ward-a", sums=score_arrays(score_sums(p, np.array(labels), owners)))


def _measured(halves: dict[int, tuple[int, int]]) -> m.ArchiveMeasured:
    rng = numpy_generator(2, "features")
    arrays: dict[str, Any] = {}
    for label, sizes in halves.items():
        for half, size in enumerate(sizes):
            sums = to_arrays(feature_sums(rng.normal(size=(size, 4))))
            arrays |= {f"{label}/half{half}/{key}": value for key, value in sums.items()}
        arrays[f"{label}/scores"] = np.full(7, 20.0)
    return m.ArchiveMeasured(site="ward-a", arrays=arrays)


def _attacked(members: int, ranked: int = 9) -> m.ArchiveAttacked:
    counts = no_counts(3)
    counts["membership"][:, 1, :, 5] = members
    counts["ranks"][0, :2] = (1, ranked - 1)
    return m.ArchiveAttacked(site="ward-a", arrays=counts)


def _update(images: int) -> m.GanUpdate:
    return m.GanUpdate(site="ward-a", images=images, loss_g=1.0, loss_d=1.0, seconds=1.0, weights=WEIGHTS)


def _classifier_update(images: int) -> m.ClassifierUpdate:
    return m.ClassifierUpdate(site="ward-a", images=images, loss=1.0, seconds=1.0, weights=WEIGHTS)


def _replies() -> dict[str, m.Reply]:
    a: Any = {"site": "ward-a"}
    replies: tuple[m.Reply, ...] = (
        _description([[9, 9, 9]] * 3),
        _update(9),
        _classifier_update(9),
        _scores([0] * 9 + [1] * 9 + [2] * 9),
        _measured({0: (9, 9)}),
        _attacked(9),
        m.ArchiveVote(arrays={"vetoes": np.array([0, 1], np.uint8)}, **a),
        m.Embedding(images=9, arrays={"sum": np.zeros(8)}, **a),
        m.NoisyScores(arrays={"confusion": np.zeros((3, 3))}, **a),
        m.LedgerLines(lines="", head="{}", key="{}", **a),
        m.ArchiveWanted(missing="0", **a),
        m.ArchiveKept(digest=DIGEST, **a),
        m.Examples(arrays={"images": np.zeros((3, 1, 32, 32), np.uint8)}, **a),
        m.Refusal(error="RefusedError", reason="no", **a),
        m.PlanStatus(digest=DIGEST, approved=False, software="xfed", **a),
        m.SessionKeys(arrays=BYTES, **a),
        m.SessionShares(arrays=BYTES, **a),
        m.UnmaskShares(arrays=BYTES, **a),
        m.Masked(kind="GanUpdate", arrays={}, **a),
    )
    return {type(reply).__name__: reply for reply in replies}


def test_every_kind_of_reply_is_known_and_unknown_ones_stay() -> None:
    assert _replies().keys() == m.REPLIES.keys()
    for reply in _replies().values():
        assert check_reply(reply, LOOSE) is not None

    @dataclass(frozen=True, kw_only=True)
    class Discriminator(m.Reply):
        """Never leaves."""

    with pytest.raises(RefusedError, match="Discriminator"):
        check_reply(Discriminator(site="ward-a"), LOOSE)
    with pytest.raises(RefusedError, match="Masked"):
        check_reply(m.Masked(site="ward-a", kind="Discriminator", arrays={}), LOOSE)


FORBIDDEN = {
    "counts": {"Description", "GanUpdate", "ClassifierUpdate", "Embedding"},
    "losses": {"GanUpdate", "ClassifierUpdate"},
    "scores": {"Scores", "NoisyScores"},
    "archive_scores": {"ArchiveMeasured", "ArchiveAttacked"},
}


@pytest.mark.parametrize("metric", FORBIDDEN)
def test_a_figure_that_may_not_leave_does_not(metric: str) -> None:
    policy = LOOSE.model_copy(update={"metrics": tuple(name for name in FORBIDDEN if name != metric)})
    for kind, reply in _replies().items():
        if kind in FORBIDDEN[metric]:
            for form in (reply, m.Masked(site="ward-a", kind=kind, arrays={})):
                with pytest.raises(RefusedError, match=f"{kind} holds {metric}; .*metrics of its policy"):
                    check_reply(form, policy)
        elif kind != "Masked":
            check_reply(reply, policy)


def test_real_images_leave_only_where_the_policy_says_so() -> None:
    policy = LOOSE.model_copy(update={"share_examples": False})
    with pytest.raises(RefusedError, match="share_examples"):
        check_reply(_replies()["Examples"], policy)
    told = check_reply(_description([[9, 9, 9]] * 3), policy)
    assert isinstance(told, m.Description)
    assert not told.share_examples
    told = check_reply(_description([[9, 9, 9]] * 3), LOOSE)
    assert isinstance(told, m.Description)
    assert told.share_examples


FIVE = LOOSE.model_copy(update={"smallest_count": 5})
SMALL: list[tuple[m.Reply, bool]] = [
    (_description([[5, 0, 9], [5, 5, 5], [0, 0, 0]]), True),
    (_description([[5, 0, 9], [5, 4, 5], [0, 0, 0]]), False),
    (_description([[5, 0, 9], [5, 5, 5], [1, 0, 0]]), False),
    (_description([[9, 9, 9]] * 3, patients=4), False),
    (_description([[9, 9, 9]] * 3, drawn=[9, 0, 9], holders=[1, 0, 1]), True),
    (_description([[9, 9, 9]] * 3, drawn=[9, 0, 4], holders=[1, 0, 1]), False),
    (_update(5), True),
    (_update(4), False),
    (_update(1), False),
    (_classifier_update(5), True),
    (_classifier_update(4), False),
    (_scores([0] * 5 + [1] * 5), True),
    (_scores([0] * 5 + [1] * 4), False),
    (_scores([0] * 5 + [1] * 5, [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]), False),
    (_scores([]), True),
    (_attacked(5, 5), True),
    (_attacked(4, 5), False),
    (_attacked(5, 4), False),
]


@pytest.mark.parametrize(("reply", "fine"), SMALL)
def test_no_count_below_the_smallest_leaves(reply: m.Reply, fine: bool) -> None:
    check_reply(reply, LOOSE)
    if fine:
        check_reply(reply, FIVE)
    else:
        with pytest.raises(RefusedError, match="smallest_count"):
            check_reply(reply, FIVE)


def test_a_small_half_leaves_its_class_out_of_the_distance_and_nothing_else() -> None:
    reply = _measured({0: (9, 4), 1: (5, 5), 10: (0, 5)})
    shown = check_reply(reply, FIVE)
    assert isinstance(shown, m.ArchiveMeasured)
    assert shown.arrays.keys() == reply.arrays.keys()
    for name, array in shown.arrays.items():
        if name.startswith("0/half"):
            assert not array.any(), name
            assert array.shape == reply.arrays[name].shape
        else:
            np.testing.assert_array_equal(array, reply.arrays[name])
    assert reply.arrays["0/half0/count"] == 9, "the reply that was given is not changed"
    whole = check_reply(reply, LOOSE)
    assert isinstance(whole, m.ArchiveMeasured)
    assert whole.arrays["0/half1/count"] == 4


ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25), st.integers(0, 2)), max_size=80)


@given(rows=ROWS, smallest=st.integers(0, 6))
def test_a_class_takes_part_in_a_split_whole_or_not_at_all(rows: list[tuple[int, int, int]], smallest: int) -> None:
    labels, patients, splits = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    kept = splits_taking_part(labels, patients, splits.astype(np.int8), smallest)
    assert kept.dtype == np.int8
    for split in range(3):
        for label in range(3):
            cell = (splits == split) & (labels == label)
            enough = len({row[1] for row in rows if (row[0], row[2]) == (label, split)}) >= smallest
            assert (kept[cell] == (split if enough else -1)).all()


@given(rows=ROWS, smallest=st.integers(0, 6))
def test_what_takes_part_passes_the_gate(rows: list[tuple[int, int, int]], smallest: int) -> None:
    """Counts and scores over the images that take part are true, and never below the smallest count."""
    labels, patients, splits = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    kept = splits_taking_part(labels, patients, splits.astype(np.int8), smallest)
    counts = np.array([[((kept == split) & (labels == label)).sum() for label in range(3)] for split in range(3)])
    policy = LOOSE.model_copy(update={"smallest_count": smallest})
    shown = check_reply(_description(counts, len(np.unique(patients[kept >= 0]))), policy)
    assert isinstance(shown, m.Description)
    np.testing.assert_array_equal(shown.counts["counts"], counts)
    for split in range(3):
        taken = kept == split
        check_reply(_scores(list(labels[taken]), list(patients[taken])), policy)
