"""DP-MERF at the coordinator: one noisy embedding per class and site, then generators fitted to them, without any more patients.

::

    EmbedClass(c) --> every site that declared patients of c --> Embedding (noisy sum) --+--> mean over declared sizes
                                                                                         |      --> checkpoints/embeddings-<0>
    fit_generator (post-processing, public randomness) <---------------------------------+      --> checkpoints/fits-<c>

Harder, Adamczewski and Park 2021. A site releases each embedding once in the life of a study; asked again, it sends the
stored one. The fits are checkpointed class by class: they take minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.merf import fit_generator, mean_embedding
from xfed.common.messages import EmbedClass, Embedding, Reply, Request
from xfed.common.weights import Weights, under
from xfed.server.run import Run

__all__ = ["fit_from_embeddings"]

PHASE, FITS = "embeddings", "fits"


def fit_from_embeddings(
    run: Run, start: Mapping[str, Weights], holders: Mapping[str, tuple[str, ...]]
) -> dict[str, Weights]:
    """Ask for the embeddings and fit a generator per class from the weights `start`, or go on where a killed run was.

    Returns weights per class; the course of the distance stays in the checkpoint. Raises `FederationError`.
    """
    means = _embeddings(run, holders)
    fits: dict[str, Weights] = {}
    history: dict[str, list[dict[str, Any]]] = {}
    checkpoint = run.checkpoints.latest(FITS)
    if checkpoint is not None:
        history = checkpoint.facts["history"]
        fits = {name: under(checkpoint.arrays, f"{name}/") for name in history}
    run.journal.write("phase", phase=FITS, round=len(fits), rounds=len(means))
    for name, mean in means.items():
        if name in fits:
            continue
        fitted = fit_generator(run.study, name, mean, start[name])
        fits[name] = fitted.weights
        history[name] = [{"step": position, "distance": value} for position, value in enumerate(fitted.losses)]
        arrays = {f"{one}/{key}": value for one, weights in fits.items() for key, value in weights.items()}
        run.checkpoints.save(FITS, len(fits), arrays, {"history": history})
        run.journal.write("round", phase=FITS, round=len(fits), rounds=len(means), class_name=name)
    return fits


def _embeddings(run: Run, holders: Mapping[str, tuple[str, ...]]) -> dict[str, npt.NDArray[np.float32]]:
    study = run.study
    if (checkpoint := run.checkpoints.latest(PHASE)) is not None:
        return {name: checkpoint.arrays[name] for name in study.classes if name in checkpoint.arrays}
    run.journal.write("phase", phase=PHASE, round=0, rounds=1)
    sums: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in holders}
    sizes: dict[str, list[int]] = {name: [] for name in holders}

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, Embedding) or not isinstance(request, EmbedClass):
            raise FederationError(f"{site} answered {type(reply).__name__} to EmbedClass")
        array = reply.arrays.get("sum")
        if array is None or array.shape != (study.gan.merf.features,) or not np.isfinite(array).all():
            raise FederationError(f"{site} sent no embedding of {study.gan.merf.features} numbers; it is left out")
        sums[request.class_name].append(array)
        sizes[request.class_name].append(reply.images)

    requests = [EmbedClass(study=study.digest, class_name=name, features=study.gan.merf.features) for name in holders]
    run.sum(PHASE, 1, requests, list(holders.values()), fold)
    means = {name: mean_embedding(sums[name], sizes[name]) for name in holders}
    run.checkpoints.save(PHASE, 1, means, {})
    run.journal.write("round", phase=PHASE, round=1, rounds=1)
    return means
