"""A plan in words: what a hospital's people should know before they approve it.

::

    Plan --asked_of_sites--> lines --> xfed-server plan, xfed-client check, approve
"""

from __future__ import annotations

from xfed.common.arms import recipe
from xfed.common.config import Study
from xfed.common.plan import Plan

__all__ = ["asked_of_sites"]


def _privacy_lines(study: Study) -> list[str]:
    if not study.private:
        return [
            "Differential privacy: none (epsilon is infinite): NOT PRIVATE. "
            "What leaves may reveal something about single patients"
        ]
    privacy = study.privacy
    lines = [
        f"Differential privacy: epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for every patient, over the whole study; "
        "this site keeps the ledger, and refuses what would exceed it",
        "Made public by this site: how many patients of each class it declares (declared_patients of its policy)",
    ]
    if "dp-merf" in study.gan.method:
        lines.append(
            f"Phase 1 begins with one noisy mean of {study.gan.merf.features} random features per class (DP-MERF)"
        )
    return lines


def _first_phases(study: Study) -> list[str]:
    gan, archive = study.gan, study.archive
    if archive.reuse is not None:
        return [f"No generators are trained: the coordinator sends an archive that exists (root {archive.reuse[:12]})"]
    if study.unlabelled:
        return _unlabelled_phases(study)
    return [
        f"Phase 1: one generator per class ({gan.family}, width {gan.width}): {gan.rounds} rounds of "
        f"{gan.steps_per_round} steps, batches of {gan.batch}; a site with fewer than "
        f"{gan.minimum_images} training images of a class leaves that class out",
        *_shared_start(study),
        "Phase 2: the coordinator draws synthetic images from the generators and sends them to all sites",
    ]


def _shared_start(study: Study) -> list[str]:
    rounds = study.gan.shared_rounds
    if not rounds:
        return []
    return [
        f"Before that, {rounds} rounds of one generator from the images of all those classes; the others start from it"
    ]


def _unlabelled_phases(study: Study) -> list[str]:
    gan, steering = study.gan, study.gan.steering
    method = "latent class optimisation" if steering.method == "lco" else "rejection sampling"
    named = "".join(f"; {name}: {' with '.join(wanted)}" for name, wanted in study.archive.findings.items())
    return [
        f"Phase 1: one generator of ALL training images of this site, without their labels ({gan.family}, width {gan.width}): "
        f"{gan.rounds} rounds of {gan.steps_per_round} steps, batches of {gan.batch}; a site with fewer than "
        f"{gan.minimum_images} training images takes no part",
        f"A classifier to label its images by, trained here like arm DS1: {steering.rounds} rounds",
        f"Phase 2: the coordinator makes synthetic images of each class by {method} (accepted from a probability of "
        f"{steering.threshold:g} on){named}, and sends them to all sites",
    ]


def asked_of_sites(plan: Plan) -> list[str]:
    """What a plan asks of each site, in words: a line for each thing that people should know before they approve."""
    study, classifier = plan.study, plan.study.classifier
    per_round = (
        f"{classifier.steps_per_round} steps each" if classifier.steps_per_round else "one pass over the images each"
    )
    lines = [
        f"Study {study.name} (digest {study.digest[:12]}) of the federation {plan.federation}",
        f"Sites: {', '.join(plan.members)}",
        f"Classes: {', '.join(study.classes)}; images of {study.image_size} x {study.image_size} pixels",
        *_first_phases(study),
        f"Phase 3: classifiers {' and '.join(f'{arm} ({recipe(arm).title})' for arm in classifier.arms)} "
        f"({classifier.model}, width {classifier.width}): "
        f"at most {classifier.rounds} rounds, {per_round}, batches of {classifier.batch}",
        *_privacy_lines(study),
    ]
    if study.secure:
        lines.append(
            "Secure aggregation: on. What goes into a sum over sites is masked; the coordinator can open the sum only"
        )
    else:
        lines.append("Secure aggregation: off. The coordinator sees the weights and sums of each site by itself")
    lines += [
        "Leaves the site: weights of generators and classifiers, all trained with noise; declared sizes; noised counts of "
        "scores; the privacy ledger"
        if study.private
        else "Leaves the site: weights of generators and classifiers, counts of images and patients, mean losses, "
        "sums of scores and of features",
        "Stays at the site: every image and label, patient numbers, file names, discriminators, optimizers' states",
    ]
    if study.report.share_real_examples:
        lines.append(
            "REAL IMAGES are asked for, to be shown in the report; only a site whose own settings allow it sends any"
        )
    return lines
