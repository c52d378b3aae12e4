"""Which answers can be summed over sites, and how each becomes two vectors of numbers whose sum says what is needed.

::

    site: GanUpdate(weights, images, losses) --to_vectors--> weights * images / total (uint32), images, images * losses (uint64)
    coordinator: sums over sites --from_vectors--> one GanUpdate: mean weights, all images, mean losses

The rebuilt answer has the form of a single site's, so a phase folds it as it would fold one site. Per-site figures do not exist
then: neither the coordinator nor its report can show them. Statistics of the archive that are means become sums weighted by
the number of images, and are divided again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common import fixed_point as fp
from xfed.common import frechet, kernel_sums, membership, metrics, noisy_scores
from xfed.common import messages as m
from xfed.common.errors import FederationError, RefusedError
from xfed.common.features import DIMENSIONS, KERNEL_DIMENSIONS, SCORES

__all__ = ["SUMMABLE", "from_vectors", "layouts", "to_vectors"]

Arrays = Mapping[str, npt.NDArray[Any]]
Words = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]

SUMMABLE: dict[type[m.Request], type[m.Reply]] = {
    m.Describe: m.Description,
    m.TrainGan: m.GanUpdate,
    m.TrainClassifier: m.ClassifierUpdate,
    m.EmbedClass: m.Embedding,
    m.ScoreClassifier: m.Scores,
    m.ScorePrivately: m.NoisyScores,
    m.MeasureArchive: m.ArchiveMeasured,
    m.VoteOnArchive: m.ArchiveVote,
    m.AttackArchive: m.ArchiveAttacked,
}
_SUM = "sum over sites"
_COUNT, _NUMBER = np.zeros((), np.int64), np.zeros((), np.float64)
_SCORES = re.compile(r"\d+/scores")


def layouts(request: m.Request, classes: int) -> tuple[fp.Layout, fp.Layout]:
    """The layouts of the weights and of the statistics of an answer to `request`; both sides make the same."""
    return fp.weights_layout(_weights_of(request)), fp.sums_layout(_statistics_template(request, classes))


def _weights_of(request: m.Request) -> Arrays:
    return request.weights if isinstance(request, m.TrainGan | m.TrainClassifier) else {}


def _statistics_template(request: m.Request, classes: int) -> Arrays:
    match request:
        case m.Describe():
            per_class = np.zeros(classes, np.int64)
            return {
                "patients": _COUNT,
                "counts": np.zeros((3, classes), np.int64),
                "holders": per_class,
                "drawn": per_class,
            }
        case m.TrainGan():
            return {"images": _COUNT, "loss_g": _NUMBER, "loss_d": _NUMBER}
        case m.TrainClassifier():
            return {"images": _COUNT, "loss": _NUMBER}
        case m.EmbedClass():
            return {"images": _COUNT, "sum": np.zeros(request.features)}
        case m.ScoreClassifier():
            return metrics.to_arrays(metrics.zero(classes))
        case m.ScorePrivately():
            return {"confusion": np.zeros((classes, classes)), "histogram": np.zeros((classes, 2, noisy_scores.BINS))}
        case m.MeasureArchive():
            template: dict[str, npt.NDArray[Any]] = {}
            for label in range(classes):
                for half in (0, 1):
                    for key, array in frechet.to_arrays(frechet.zero(DIMENSIONS)).items():
                        template[f"{label}/half{half}/{key}"] = array
                    for key, array in kernel_sums.kernel_to_arrays(kernel_sums.kernel_zero(KERNEL_DIMENSIONS)).items():
                        template[f"{label}/kernel{half}/{key}"] = array
                template[f"{label}/scores"] = np.zeros(1 + len(SCORES))
            return template
        case m.VoteOnArchive():
            return {"vetoes": np.zeros(request.images, np.uint8), "voters": _COUNT, "calibrated": _COUNT}
        case m.AttackArchive():
            return membership.no_counts(classes)
    raise FederationError(f"{type(request).__name__} cannot be summed over sites")


def to_vectors(request: m.Request, reply: m.Reply, classes: int, sites: int) -> Words:
    """A site's answer as uint32 and uint64 vectors (not yet masked). Raises `RefusedError` when a number has no place in them."""
    if SUMMABLE.get(type(request)) is not type(reply):
        raise RefusedError(
            f"{type(reply).__name__} is no answer to {type(request).__name__} that can be summed over sites"
        )
    weights, statistics = layouts(request, classes)
    match reply:
        case m.GanUpdate():
            values: Arrays = _weighted(reply.images, loss_g=reply.loss_g, loss_d=reply.loss_d)
        case m.ClassifierUpdate():
            values = _weighted(reply.images, loss=reply.loss)
        case m.Embedding():
            values = {"images": np.array(reply.images, np.int64), **reply.arrays}
        case m.Scores():
            values = reply.sums
        case m.NoisyScores() | m.ArchiveVote() | m.ArchiveAttacked():
            values = reply.arrays
        case m.Description():
            values = {"patients": np.array(reply.patients, np.int64), **reply.counts}
        case m.ArchiveMeasured():
            values = {name: _times(name, array) for name, array in reply.arrays.items()}
        case _:
            raise RefusedError(f"{type(reply).__name__} cannot be summed over sites")
    small = fp.pack_sums(statistics, values, sites)
    if isinstance(reply, m.GanUpdate | m.ClassifierUpdate):
        return fp.pack_weights(weights, reply.weights, reply.images, request.total), small
    return np.empty(0, np.uint32), small


def _weighted(images: int, **losses: float) -> Arrays:
    return {"images": np.array(images, np.int64)} | {name: np.array(images * value) for name, value in losses.items()}


def _times(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.append(array[:1], array[0] * array[1:]) if _SCORES.fullmatch(name) else array


def _divided(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.append(array[:1], array[1:] / max(1.0, array[0])) if _SCORES.fullmatch(name) else array


def from_vectors(request: m.Request, words: Words, classes: int) -> m.Reply:
    """The sums over sites as one answer. Raises `FederationError` when they hold no image or do not fit."""
    weights, statistics = layouts(request, classes)
    sums = fp.unpack_sums(statistics, words[1])
    match request:
        case m.TrainGan() | m.TrainClassifier():
            images = int(sums["images"])
            mean = fp.unpack_weights(weights, words[0], images, request.total)
            if isinstance(request, m.TrainGan):
                return m.GanUpdate(
                    site=_SUM,
                    images=images,
                    loss_g=float(sums["loss_g"]) / images,
                    loss_d=float(sums["loss_d"]) / images,
                    seconds=0.0,
                    weights=mean,
                )
            return m.ClassifierUpdate(
                site=_SUM, images=images, loss=float(sums["loss"]) / images, seconds=0.0, weights=mean
            )
        case m.EmbedClass():
            return m.Embedding(site=_SUM, images=int(sums["images"]), arrays={"sum": sums["sum"]})
        case m.ScoreClassifier():
            return m.Scores(site=_SUM, sums=sums)
        case m.ScorePrivately():
            return m.NoisyScores(site=_SUM, arrays=sums)
        case m.MeasureArchive():
            return m.ArchiveMeasured(site=_SUM, arrays={name: _divided(name, array) for name, array in sums.items()})
        case m.VoteOnArchive():
            return m.ArchiveVote(site=_SUM, arrays=sums)
        case m.AttackArchive():
            return m.ArchiveAttacked(site=_SUM, arrays=sums)
        case m.Describe():
            patients = int(sums.pop("patients"))
            return m.Description(site=_SUM, patients=patients, share_examples=False, software="", counts=sums)
    raise FederationError(f"{type(request).__name__} cannot be summed over sites")
