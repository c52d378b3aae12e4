"""Train on synthetic, test on real (TSTR): a classifier of the archive alone, scored on the sites' test patients.

::

    archive images --train_on_synthetic (here, no real image)--> models/classifier-TSTR.safetensors
        --ScoreClassifier(arm TSTR, split test)--> every site --Scores--> summary, as of any arm

The sites score it once, after the last round, where the approved study says so (archive.tstr_steps); they never train it. In
a private study its score would be one more release of the test patients: it is left out. The file is made once: a killed
run scores the same weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.devices import choose_device
from xfed.common.registry import save_classifier
from xfed.common.synthetic_training import SYNTHETIC_ARM, train_on_synthetic
from xfed.common.weights import Weights, digest_of, load_arrays
from xfed.server.classifiers import score_on_test_patients
from xfed.server.run import Run

__all__ = ["LEFT_OUT_PRIVATE", "score_synthetic_arm"]

PHASE = "tstr"
LEFT_OUT_PRIVATE = (
    "left out: this study is private, and a score on real test patients would be one more release that its budget does "
    "not plan"
)
LEFT_OUT_BY_STUDY = "left out: archive.tstr_steps is 0"


def score_synthetic_arm(run: Run, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    """The report's `tstr`: the summary of a classifier of `images` alone on all test patients, or why there is none.

    `images` uint8 [n, S, S] and `labels` int64 [n] are the archive. Raises `FederationError`.
    """
    study = run.study
    if study.private:
        return {"left_out": LEFT_OUT_PRIVATE}
    if not study.archive.tstr_steps:
        return {"left_out": LEFT_OUT_BY_STUDY}
    weights = _trained(run, images, labels)
    pooled, sites = score_on_test_patients(run, {SYNTHETIC_ARM: weights})[SYNTHETIC_ARM]
    return {
        **pooled,
        "sites": sites,
        "steps": study.archive.tstr_steps,
        "images": len(images),
        "weights_sha256": digest_of(weights),
    }


def _trained(run: Run, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Weights:
    study, taught_by = run.study, digest_of({"images": images, "labels": labels})
    path = run.folder / "models" / f"classifier-{SYNTHETIC_ARM}.safetensors"
    facts = {
        "arm": SYNTHETIC_ARM,
        "images_sha256": taught_by,
        "steps": study.archive.tstr_steps,
        "precision": study.precision,
    }
    if path.is_file():
        weights, found = load_arrays(path)
        if found.get("study") == study.digest and found.get("images_sha256") == taught_by:
            return weights
    run.journal.write("phase", phase=PHASE, round=0, rounds=1)
    weights = dict(
        train_on_synthetic(
            study,
            images,
            labels,
            steps=study.archive.tstr_steps,
            purpose=SYNTHETIC_ARM,
            device=choose_device(study.runtime.device),
        )
    )
    save_classifier(path, study, weights, facts)
    run.journal.write("round", phase=PHASE, round=1, rounds=1)
    return weights
