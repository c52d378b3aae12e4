"""Planted privacy bugs: what leaves a site without noise or with too little, and who takes part as what.

::

    as in xfed.simulations.planted_bugs: imported, this module adds to its BUGS; nothing is written
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import softplus

from xfed.simulations.planted_bugs import altered, exchange, module, planted

__all__: list[str] = []

bounds = module("client.bounds")
cohort = module("client.cohort")
private_site = module("client.private_site")
site = module("client.site")
merf = module("common.merf")
noisy_scores = module("common.noisy_scores")
private_classifier = module("common.private_classifier")
private_gan = module("common.private_gan")
Private = private_site.PrivateSite

_REPLAY = "test_private_gan.py::test_nothing_but_the_releases_tells_of_a_patient"
_WIRE = "test_private_study.py::test_neighbours_put_the_same_bytes_on_the_wire"
_ASKED = "test_private_rules.py::test_the_ledger_says_what_the_mechanism_was_asked"
_PUBLIC = "test_private_rules.py::test_answers_hold_public_figures_and_releases_alone"


# What leaves a round


@planted(f"{_REPLAY}[0]")
def loss_on_real_images_in_the_answer() -> None:
    """The loss that a GAN round reports is that of real images too."""
    real = private_gan.train_private_gan_round

    def telling(state: Any, images: Any, rows_of: Any, *more: Any, **named: Any) -> Any:
        losses = real(state, images, rows_of, *more, **named)
        device = next(state.discriminator.parameters()).device
        rows = np.array([rows[0] for rows in rows_of], np.int64)
        shown = torch.from_numpy(images[rows]).to(device).unsqueeze(1).float().div_(127.5).sub_(1)
        with torch.no_grad():
            return replace(losses, discriminator=float(softplus(-state.discriminator(shown)).mean()))

    exchange(real, telling)


@planted(_REPLAY)  # all pairs: two draws may be of one length
def generator_batch_from_the_draw() -> None:
    """A generator step draws as many fakes as the last Poisson draw had patients."""
    drawn = [1]
    step_d, step_g = private_gan._discriminator_step, private_gan._generator_step

    def watched(state: Any, shown: Any, *more: Any) -> None:
        drawn[0] = max(1, len(shown))
        step_d(state, shown, *more)

    exchange(step_d, watched)
    altered(step_g, settings=lambda given: given["settings"].model_copy(update={"batch": drawn[0]}))


@planted(f"{_REPLAY}[0]")
def ladder_fed_with_reals() -> None:
    """How many D steps make a G step is decided by D's accuracy on real images: an early stopping that is not charged."""
    step = private_gan._discriminator_step
    seen = [0.5]

    def watched(state: Any, shown: Any, *more: Any) -> None:
        if len(shown):
            with torch.no_grad():
                seen[0] = float(state.discriminator(shown).sigmoid().mean())
        step(state, shown, *more)

    exchange(step, watched)
    climb = private_gan.Ladder.after_generator_step
    private_gan.Ladder.after_generator_step = lambda self, accuracy: climb(self, seen[0])


@planted(_REPLAY)  # all pairs: two draws may be of one length
def reals_move_the_public_stream() -> None:
    """Real images are augmented from the public stream: a longer draw moves every later latent."""
    streams: list[Any] = []

    def remember(given: dict[str, Any]) -> Any:
        streams.append(given["rng"])
        return given["rng"]

    altered(private_gan.train_private_gan_round, rng=remember)
    exchange(private_gan.secret_generator, lambda mechanism: streams[-1])


@planted(_PUBLIC)
def class_counts_as_weights() -> None:
    """The weight of an answer in the average is the true number of patients."""
    real = Private._train_gan

    def train(self: Any, request: Any, part: Any) -> Any:
        true = len(self._cohort.train[self._label(request.class_name)])
        return replace(real(self, request, part), images=true)

    Private._train_gan = train


@planted("test_private_rules.py::test_a_patient_who_is_not_drawn_changes_no_sum[classifier]")
def loss_weights_from_true_counts() -> None:
    """Class weights in the classifier's loss follow from the true numbers: a patient moves the gradients of all others."""

    def counts(given: dict[str, Any]) -> Any:
        labels = np.array([given["labels"][rows[0]] for rows in given["rows_of"]], np.int64)
        return tuple(np.bincount(labels, minlength=len(given["class_sizes"])).tolist())

    altered(private_classifier.train_private_round, class_sizes=counts)


@planted(_PUBLIC)
def accuracy_on_training_patients_in_the_answer() -> None:
    """The classifier's answer carries its accuracy on the training patients."""
    real = Private._train_classifier

    def train(self: Any, request: Any, part: Any) -> Any:
        rows = np.array([rows[0] for of_class in self._cohort.train for rows in of_class], np.int64)
        found = private_site.predict(
            self._model(request.weights), self._store.images[rows], device=self._device, precision="float32"
        )
        wrong = found.argmax(1) != self._store.labels[rows]
        return replace(real(self, request, part), loss=float(wrong.mean()))

    Private._train_classifier = train


@planted(_PUBLIC)
def time_of_a_round_in_the_answer() -> None:
    """The answer says how long the round took: a larger draw takes longer."""
    real = Private._compute

    def compute(self: Any, request: Any, part: Any) -> Any:
        started = time.perf_counter()
        reply = real(self, request, part)
        return replace(reply, seconds=time.perf_counter() - started) if hasattr(reply, "seconds") else reply

    Private._compute = compute


@planted(_WIRE)
def true_number_of_patients_described() -> None:
    """The description of a site tells how many patients it has."""
    real = Private.describe
    Private.describe = lambda self: replace(real(self), patients=len(np.unique(self._store.patients)))


@planted("test_private_study.py::test_a_private_study_answers_nothing_that_has_no_noise")
def validation_scores_without_noise() -> None:
    """The site answers requests for un-noised scores (early stopping on real data, uncharged)."""
    real = site.Site._privately

    def answer(self: Any, request: Any, summed: bool) -> Any:
        if not isinstance(request, private_site.PRIVATE):
            return None
        return real(self, request, summed)

    site.Site._privately = answer
    exchange(bounds._not_private, lambda asked: None)


@planted("test_bounds.py::test_what_private_studies_alone_ask_for_is_refused_in_others_and_the_reverse")
def unnoised_requests_in_bounds() -> None:
    """The first check of a request does not refuse un-noised figures in a private study."""
    exchange(bounds._not_private, lambda asked: None)


@planted("test_private_rules.py::test_a_test_patient_counts_once_in_the_scores")
def scores_of_every_image() -> None:
    """Every image of a test patient is counted in the scores, whose noise is for one."""
    real = noisy_scores.count_scores
    exchange(real, lambda p, labels: real(np.repeat(p, 2, axis=0), np.repeat(labels, 2)))


# Noise as claimed


@planted("test_merf.py::test_there_is_one_release_with_the_claimed_noise")
def half_the_sensitivity_of_an_embedding() -> None:
    """The embedding's noise is for a sensitivity of one half."""
    merf.SENSITIVITY = 0.5


@planted(_ASKED)
def scores_of_sensitivity_one() -> None:
    """The noise of the scores is for the confusion table alone, and the histograms are released with it."""
    private_site.SENSITIVITY = 1.0


# Who takes part


@planted("test_private_study.py::test_one_patient_less_moves_nobody_else")
def a_patient_in_two_classes() -> None:
    """A patient with images of two classes is in both, and the classes are claimed to compose in parallel."""
    real = cohort.cohort

    def both(store: Any, study: Any, declared: Any) -> Any:
        found = real(store, study, declared)
        train = [list(people) for people in found.train]
        for person in np.unique(store.patients):
            for label in np.unique(store.labels[store.patients == person])[1:]:
                train[label].append(np.flatnonzero((store.patients == person) & (store.labels == label)))
        return replace(found, train=tuple(map(tuple, train)))

    exchange(real, both)


@planted("test_private_study.py::test_a_patient_of_several_classes_is_of_the_one_declared_rarest")
def class_by_true_rarity() -> None:
    """A patient's class is the rarest by true counts: one patient more can move all others."""

    def by_images(given: dict[str, Any]) -> Any:
        counts = np.bincount(given["store"].labels, minlength=len(given["store"].classes))
        return np.argsort(counts, kind="stable").tolist()

    altered(cohort._classes_of, order=by_images)


@planted("test_private_study.py::test_one_patient_less_moves_nobody_else")
def split_dealt_over_all_patients() -> None:
    """Training and test patients are dealt out in turn: one patient less moves those behind."""
    turn = [0]

    def dealt(images: Any, salt: str, share: float) -> bool:
        turn[0] += 1
        return turn[0] % 5 == 0

    exchange(cohort._is_tested, dealt)


@planted("test_private_study.py::test_declared_sizes_are_said_once_and_kept")
def declared_sizes_follow_the_data() -> None:
    """Declared sizes are counted anew at every request."""
    real = cohort.declared_sizes

    def anew(path: Any, *more: Any) -> Any:
        path.unlink(missing_ok=True)
        return real(path, *more)

    exchange(real, anew)
