"""Planted privacy bugs: who is sampled, and with what noise.

::

    as in xfed.simulations.planted_bugs: imported, this module adds to its BUGS; nothing is written
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xfed.simulations.planted_bugs import exchange, module, planted

__all__: list[str] = []

private_site = module("client.private_site")
mechanism = module("common.mechanism")
noise = module("common.noise")
private_classifier = module("common.private_classifier")
private_gan = module("common.private_gan")
Mechanism = mechanism.SecretMechanism
Stream = noise._KeyStream


# Sampling


@planted("test_noise.py::test_poisson_samples_have_binomial_sizes_and_independent_patients")
def batches_of_fixed_size() -> None:
    """Each step takes a random subset of a fixed size, and the claim is of Poisson sampling."""

    def sample(self: Any, patients: int, q: float) -> Any:
        order = np.argsort(noise.secret_words(patients))
        return np.sort(order[: round(q * patients)])

    Mechanism.sample = sample


@planted("test_noise.py::test_poisson_samples_have_binomial_sizes_and_independent_patients")
def shuffled_epochs() -> None:
    """Patients are shuffled once per epoch and dealt out in batches, and the claim is of Poisson sampling."""
    left: list[int] = []

    def sample(self: Any, patients: int, q: float) -> Any:
        size = max(1, round(q * patients))
        if len(left) < size:
            left[:] = np.argsort(noise.secret_words(patients)).tolist()
        return np.sort([left.pop() for _ in range(min(size, patients))]).astype(np.int64)

    Mechanism.sample = sample


@planted("test_noise.py::test_poisson_samples_have_binomial_sizes_and_independent_patients")
def weighted_sampler() -> None:
    """Some patients are drawn more often than others, and q is that of the average one."""

    def sample(self: Any, patients: int, q: float) -> Any:
        rates = np.where(np.arange(patients) % 2, 0.5 * q, min(1.0, 1.5 * q))
        uniforms = noise.secret_words(patients).astype(np.float64) * 2.0**-64
        return np.flatnonzero(uniforms < rates).astype(np.int64)

    Mechanism.sample = sample


@planted("test_private_classifier.py::test_settings_that_void_the_claim_are_refused[changes0-q would not]")
def class_weighted_draws_let_pass() -> None:
    """The classifier accepts balance "sampling", which draws rare classes more often than q says."""
    real = private_classifier._loss_weights
    exchange(real, lambda balance, rows: real("none" if balance == "sampling" else balance, rows))


@planted("test_private_rules.py::test_the_ledger_says_what_the_mechanism_was_asked")
def q_of_another_split() -> None:
    """The rate is computed for training and test patients together, and the draw is of the training patients alone."""
    real = private_site._step
    exchange(real, lambda part: replace(real(part), q=min(1.0, 1.25 * part.per_round.q)))


@planted("test_private_rules.py::test_the_ledger_says_what_the_mechanism_was_asked")
def one_draw_for_all_steps() -> None:
    """Patients are sampled once and used in all steps, which are accounted for as fresh samples."""
    real = private_gan.draw_rows_of_patients
    kept: dict[int, Any] = {}

    def draw(rows_of: Any, q: float, of: Any) -> Any:
        if id(rows_of) not in kept:
            kept[id(rows_of)] = real(rows_of, q, of), rows_of
        return kept[id(rows_of)][0]

    exchange(real, draw)


@planted("test_private_rules.py::test_the_ledger_says_what_the_mechanism_was_asked")
def tested_patients_train_too() -> None:
    """Generators are trained on the test patients as well, who were not counted when q was fixed."""
    real = private_site.cohort

    def both(*arguments: Any) -> Any:
        found = real(*arguments)
        return replace(found, train=tuple((*a, *b) for a, b in zip(found.train, found.test, strict=True)))

    private_site.cohort = both


@planted("test_private_gan.py::test_a_draw_holds_one_image_of_each_patient_drawn")
def all_images_of_a_drawn_patient() -> None:
    """Every image of a sampled patient is a row that is clipped by itself, and the claim is per patient."""

    def draw(rows_of: Any, q: float, of: Any) -> Any:
        chosen = [rows_of[patient] for patient in of.sample(len(rows_of), q)]
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)

    exchange(private_gan.draw_rows_of_patients, draw)


@planted("test_private_gan.py::test_a_draw_holds_one_image_of_each_patient_drawn")
def augmented_twice_counts_twice() -> None:
    """Each drawn image enters a batch in two augmentations, which are clipped apart."""
    real = private_gan.draw_rows_of_patients
    exchange(real, lambda rows_of, q, of: np.repeat(real(rows_of, q, of), 2))


# Noise


@planted("test_noise.py::test_seeds_have_no_effect", "test_noise.py::test_the_key_comes_from_the_operating_system")
def noise_from_the_global_seed() -> None:
    """The noise's key is drawn from torch's global generator, which a study seeds."""

    def start(self: Any) -> None:
        self._key = torch.randint(256, (32,), dtype=torch.uint8).numpy().tobytes()
        self._block = 0

    Stream.__init__ = start


@planted(
    "test_noise.py::test_no_two_releases_share_a_block", "test_noise.py::test_the_key_comes_from_the_operating_system"
)
def one_key_for_all_releases() -> None:
    """The key is drawn when the process starts: each release begins the same stream anew."""
    key = b"7" * 32

    def start(self: Any) -> None:
        self._key, self._block = key, 0

    Stream.__init__ = start


@planted(
    "test_noise.py::test_two_pieces_of_one_release_differ",
    "test_noise.py::test_values_are_independent_within_and_between_pieces",
)
def counter_not_advanced() -> None:
    """Every piece of a release starts at the first block: large models get the same noise several times."""
    real = Stream.fill

    def fill(self: Any, words: Any) -> None:
        real(self, words)
        self._block = 0

    Stream.fill = fill


@planted("test_noise.py::test_nothing_that_makes_noise_is_copied_or_pickled")
def noise_in_the_checkpoint() -> None:
    """What makes noise can be pickled, so a restart from a checkpoint repeats it."""
    del Mechanism.__reduce_ex__, Stream.__reduce_ex__


@planted("test_noise.py::test_noise_is_normal_with_the_deviation_that_was_asked_for[0.3-7.0]")
def noise_not_scaled_by_the_clip() -> None:
    """The noise has deviation sigma, whatever the clip is."""
    real = Mechanism.release
    Mechanism.release = lambda self, sums, *, sensitivity, sigma: real(self, sums, sensitivity=1.0, sigma=sigma)


@planted("test_noise.py::test_noise_is_normal_with_the_deviation_that_was_asked_for[1.0-1.0]")
def half_the_claimed_noise() -> None:
    """The mechanism runs at half its claimed sigma."""
    real = Mechanism.release
    Mechanism.release = lambda self, sums, *, sensitivity, sigma: real(
        self, sums, sensitivity=sensitivity, sigma=sigma / 2
    )


@planted("test_noise.py::test_results_lie_on_the_grid_whatever_the_sums_are")
def floating_noise_on_floating_sums() -> None:
    """Float noise is added to float sums: the last bits of a release tell neighbours apart (Mironov 2012)."""

    def add(sums: Any, *, deviation: float, grid: float) -> Any:
        words = noise.secret_words(2 * len(sums)).astype(np.float64)
        uniforms = (words + 0.5) * 2.0**-64
        normals = np.sqrt(-2 * np.log(uniforms[::2])) * np.cos(2 * np.pi * uniforms[1::2])
        return (sums + deviation * normals).astype(np.float32)

    exchange(noise.add_gaussian, add)


@planted("test_noise.py::test_the_margin_is_added")
def no_margin_for_rounding() -> None:
    """Rounding to the grid and float32 sums move a release further than its noise pays for."""
    real, margin = Mechanism.release, mechanism.MARGIN
    Mechanism.release = lambda self, sums, *, sensitivity, sigma: real(
        self, sums, sensitivity=sensitivity, sigma=sigma / (1 + margin)
    )
