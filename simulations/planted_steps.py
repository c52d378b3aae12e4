"""Planted privacy bugs: clipping, and the steps of training.

::

    as in xfed.simulations.planted_bugs: imported, this module adds to its BUGS; nothing is written
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xfed.simulations.planted_bugs import altered, exchange, module, planted

__all__: list[str] = []

book_keeping = module("common.book_keeping")
dcgan = module("common.dcgan")
merf = module("common.merf")
per_patient = module("common.per_patient")
private_classifier = module("common.private_classifier")
private_gan = module("common.private_gan")

# Clipping


def _sum_of(model: Any, inputs: Any, losses: Any) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    with torch.enable_grad():
        found = torch.autograd.grad(losses(model(inputs)).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@planted(
    "test_private_gan.py::test_one_step_equals_a_computation_by_hand[draw0-fast]",
    "test_private_gan.py::test_one_patient_moves_the_sum_by_the_clip_at_most",
)
def clipped_after_averaging() -> None:
    """The batch's gradient is clipped as a whole: one patient turns all of it."""

    def whole(model: Any, inputs: Any, losses: Any, clip: float) -> Any:
        sums = _sum_of(model, inputs, losses)
        norm = torch.stack([value.square().sum() for value in sums.values()]).sum().sqrt()
        return {name: value * min(1.0, clip * len(inputs) / float(norm)) for name, value in sums.items()}

    per_patient._ENGINES["fast"] = whole


@planted(
    "test_private_gan.py::test_one_patient_moves_the_sum_by_the_clip_at_most",
    "test_per_patient.py::test_a_clipped_row_has_the_norm_of_the_clip_and_a_small_one_keeps_its_own",
)
def clipped_layer_by_layer() -> None:
    """Each layer is clipped to the whole clip, so all layers together move by more than the claimed sensitivity."""

    def layers(model: Any, inputs: Any, losses: Any, clip: float) -> Any:
        total: dict[str, Any] = {}
        for row in range(len(inputs)):

            def of_row(outputs: Any, row: int = row) -> Any:
                return losses(outputs)[row]

            for name, value in _sum_of(model, inputs, of_row).items():
                clipped = value * min(1.0, clip / max(float(value.norm()), 1e-30))
                total[name] = total[name] + clipped if name in total else clipped
        return total

    per_patient._ENGINES["fast"] = layers


@planted(
    "test_private_gan.py::test_one_step_equals_a_computation_by_hand[draw0-fast]",
    "test_per_patient.py::test_one_more_row_changes_the_sum_by_the_clip_at_most",
)
def clip_from_the_batch() -> None:
    """Rows are clipped to the median norm of the batch, which hangs on all of its patients and is not charged."""
    real = book_keeping.book_keeping_sum

    def median(norms: Any) -> Any:
        return (norms.median() / norms.clamp(min=1e-30)).clamp(max=1)

    per_patient._ENGINES["fast"] = lambda model, inputs, losses, clip: real(model, inputs, losses, median)


@planted("test_per_patient.py::test_engines_agree_with_micro_batches_of_one_in_float64[dcnn-4-0.01]")
def bias_not_in_the_norm() -> None:
    """The norm that is compared with the clip leaves out the biases of linear layers."""
    real = book_keeping._linear

    def linear(kept: Any, inputs: Any, slopes: Any) -> None:
        real(kept, inputs, slopes)
        if len(kept.norms) > 1:
            kept.norms.pop()

    book_keeping._RULES[nn.Linear] = linear


@planted("test_per_patient.py::test_autocast_outside_changes_nothing")
def norms_in_half_precision() -> None:
    """Norms are computed under autocast: rows exceed their clip by what rounding leaves out."""
    exchange(book_keeping.exact_float32, nullcontext)


@planted("test_private_gan.py::test_sensitivity_and_sigma_reach_the_mechanism_as_claimed")
def fakes_halve_the_sensitivity() -> None:
    """Because half of the rows are fakes, noise is added for half of the clip."""

    class Halved:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def release(self, sums: Any, *, sensitivity: float, sigma: float) -> Any:
            return self._inner.release(sums, sensitivity=sensitivity / 2, sigma=sigma)

    altered(private_gan.private_update, mechanism=lambda given: Halved(given["mechanism"]))


@planted(
    "test_per_patient.py::test_models_that_cannot_be_private_are_refused_with_the_reason"
    "[BatchNorm2d: it normalises over]"
)
def batch_norm_let_pass() -> None:
    """Models that normalise over the batch are trained as if rows were apart."""
    real = per_patient._reason
    batch = nn.modules.batchnorm._BatchNorm
    exchange(real, lambda name, layer: None if isinstance(layer, batch) else real(name, layer))


@planted("test_per_patient.py::test_models_of_the_studies_are_let_pass[discriminator]")
def batch_norm_in_the_discriminator() -> None:
    """The discriminator gets a BatchNorm."""
    real = dcgan.Discriminator.__init__

    def start(self: Any, *arguments: Any, **more: Any) -> None:
        real(self, *arguments, **more)
        self.norm = nn.BatchNorm2d(4)

    dcgan.Discriminator.__init__ = start


@planted(
    "test_per_patient.py::test_models_that_cannot_be_private_are_refused_with_the_reason['model' .Sequential. has buffers]"
)
def buffers_exported() -> None:
    """Models with buffers (running statistics, averages) are let pass: buffers carry patients out without noise."""
    real = per_patient._reason

    def reason(name: str, layer: Any) -> str | None:
        found = real(name, layer)
        return None if found is not None and "buffers" in found else found

    exchange(real, reason)


@planted("test_private_gan.py::test_patients_without_images_or_sharing_one_are_refused")
def an_image_of_two_patients() -> None:
    """An image that is listed under two patients is not noticed: one of them counts twice."""
    exchange(private_gan.check_rows, lambda rows_of: None)


# A private step


@planted(
    "test_private_gan.py::test_one_step_equals_a_computation_by_hand[draw0-fast]",
    "test_private_classifier.py::test_one_step_equals_a_computation_by_hand[draw0-fast]",
)
def normaliser_from_the_draw() -> None:
    """The sum is divided by the number of rows drawn, a secret, instead of the public batch."""
    altered(private_gan.private_update, divisor=lambda given: max(1, len(given["inputs"])))


@planted(
    "test_private_gan.py::test_one_step_equals_a_computation_by_hand[draw0-fast]",
    "test_private_rules.py::test_a_patient_who_is_not_drawn_changes_no_sum[gan]",
)
def normaliser_from_the_true_number() -> None:
    """Expected batch, fakes and divisor follow from the true number of patients, which is secret."""

    def own(given: dict[str, Any]) -> Any:
        return replace(given["step"], expected=max(1, round(given["step"].q * len(given["rows_of"]))))

    altered(private_gan.train_private_gan_round, step=own)


@planted("test_merf.py::test_the_sum_is_of_each_patients_mean")
def embedding_over_the_true_number() -> None:
    """The embedding is divided by the true number of patients before noise is added."""
    real = merf.embedding_sum
    exchange(real, lambda images, rows_of, *more: real(images, rows_of, *more) / max(1, len(rows_of)))


@planted(
    "test_merf.py::test_one_patient_moves_the_sum_by_one_at_most", "test_merf.py::test_the_sum_is_of_each_patients_mean"
)
def embedding_of_every_image() -> None:
    """The embedding adds up images instead of each patient's mean."""
    real = merf.embedding_sum
    exchange(real, lambda images, rows_of, *more: real(images, [row[None] for rows in rows_of for row in rows], *more))


@planted("test_private_gan.py::test_there_are_as_many_releases_as_steps_whatever_is_drawn")
def empty_draw_skipped_by_the_gan() -> None:
    """A step of D in which no patient was drawn is left out: the number of releases tells of it."""
    real = private_gan._discriminator_step
    exchange(real, lambda state, shown, *more: real(state, shown, *more) if len(shown) else None)


@planted("test_private_classifier.py::test_there_are_as_many_releases_as_steps_whatever_is_drawn")
def empty_draw_skipped_by_the_classifier() -> None:
    """A step of the classifier without rows is left out."""
    real = private_gan.private_update
    exchange(real, lambda m, o, inputs, losses, **more: real(m, o, inputs, losses, **more) if len(inputs) else None)


@planted(
    "test_private_gan.py::test_nothing_but_the_releases_tells_of_a_patient[0]",
    "test_private_classifier.py::test_nothing_but_the_releases_tells_of_a_patient[0]",
)
def noise_added_to_a_copy() -> None:
    """The optimizer steps on the sum before noise; what is released is thrown away."""

    class Aside:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def release(self, sums: Any, *, sensitivity: float, sigma: float) -> Any:
            self._inner.release(sums, sensitivity=sensitivity, sigma=sigma)
            return sums

    altered(private_gan.private_update, mechanism=lambda given: Aside(given["mechanism"]))


@planted("test_private_gan.py::test_a_draw_larger_than_one_pass_is_released_once_and_sums_to_the_same")
def noise_for_each_micro_batch() -> None:
    """Every pass of a large draw is released by itself."""
    real = private_gan.private_update

    def each(model: Any, optimizer: Any, inputs: Any, losses: Any, **more: Any) -> None:
        size = more["rows_at_once"]
        for start in range(0, max(1, len(inputs)), size):

            def of_part(part: slice, start: int = start) -> Any:
                return losses(slice(start + part.start, start + part.stop))

            real(model, optimizer, inputs[start : start + size], of_part, **more)

    exchange(real, each)


@planted("test_private_gan.py::test_there_are_as_many_releases_as_steps_whatever_is_drawn")
def one_step_more_in_a_gan_round() -> None:
    """A round of the generators runs one step more than it is charged for."""

    def longer(given: dict[str, Any]) -> Any:
        settings = given["settings"]
        return settings.model_copy(update={"steps_per_round": settings.steps_per_round + 1})

    altered(private_gan.train_private_gan_round, settings=longer)


@planted("test_private_rules.py::test_the_ledger_says_what_the_mechanism_was_asked")
def one_step_more_in_a_classifier_round() -> None:
    """A round of the classifier runs one step more than it is charged for."""
    altered(private_classifier.train_private_round, steps=lambda given: given["steps"] + 1)
