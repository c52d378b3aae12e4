"""One throw-away training step before several threads train at once.

::

    run_study --warm_up (one thread)--> numeric libraries choose and make their kernels --> worker threads use the same ones

A precaution. In 1 of 240 fresh processes in which two threads were the first to train a network, at the same moment, one of
them ended with other bits (seen on a processor with AMX; which library did it is not known, and no difference was seen once a
process was warm). A study promises equal bits, so kernels are chosen and compiled here, by one thread.
"""

from __future__ import annotations

import numpy as np

from xfed.common.classifier import predict, train_round
from xfed.common.config import Study
from xfed.common.devices import choose_device
from xfed.common.generator_family import new_state, train_generator
from xfed.common.randomness import numpy_generator, torch_generator
from xfed.common.registry import build_classifier

__all__ = ["warm_up"]


def warm_up(study: Study) -> None:
    """Train the study's networks for one step on noise and forget them; takes as long as one step of each."""
    device, rng = choose_device(study.runtime.device), numpy_generator(study.seed, "warm up")
    images = rng.integers(0, 256, (len(study.classes), study.image_size, study.image_size), dtype=np.uint8)
    rows = np.arange(len(images), dtype=np.int64)
    state = new_state(study, device, "warm up")
    # the last step of all, in a study of one step per round: a PGGAN is grown by then
    steps = study.gan.rounds * study.gan.steps_per_round
    one_step = study.model_copy(update={"gan": study.gan.model_copy(update={"steps_per_round": 1, "rounds": steps})})
    train_generator(one_step, state, images, rows, torch_generator(study.seed, "warm up"), steps)
    model = build_classifier(study)
    train_round(
        model,
        images,
        rows,
        None,
        None,
        settings=study.classifier,
        learning_rate=study.classifier.learning_rate,
        steps=1,
        generator=torch_generator(study.seed, "warm up"),
        precision=study.precision,
        device=device,
    )
    predict(model, images, device=device, precision=study.precision)
