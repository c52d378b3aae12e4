"""Planted privacy bugs: budgets, ledgers, audits and reports.

::

    as in xfed.simulations.planted_bugs: imported, this module adds to its BUGS; nothing is written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xfed.common.dp_events import Event
from xfed.simulations.planted_bugs import altered, exchange, module, planted

__all__: list[str] = []

ledger = module("client.ledger")
line_file = module("common.line_file")
private_site = module("client.private_site")
accounting = module("common.accounting")
chain = module("common.auditor.chain")
composition = module("common.auditor.composition")
report = module("common.auditor.report")
budget = module("common.budget")
dp_events = module("common.dp_events")
ledger_lines = module("common.ledger_lines")
ledgers = module("server.ledgers")
privacy = module("server.privacy")
Ledger = ledger.Ledger
Private = private_site.PrivateSite
Copy = ledgers.LedgerCopy


def _mean(values: Any) -> Any:
    given = list(values)
    return sum(given) / len(given)


# Budgets and accountants


@planted("test_budget.py::test_delta_must_be_below_one_in_all_patients")
def delta_above_one_in_n() -> None:
    """A delta is accepted at which publishing one patient at random would pass."""
    real = budget._checked

    def unchecked(study: Any, declared: Any) -> Any:
        small = study.model_copy(update={"privacy": study.privacy.model_copy(update={"delta": 1e-8})})
        return (study.privacy.epsilon, study.privacy.delta, real(small, declared)[2])

    exchange(real, unchecked)


@planted(
    "test_auditor_report.py::test_claims_that_the_ledgers_do_not_bear_out_are_findings[change3-is not below 1 / 940 patients]"
)
def delta_not_audited() -> None:
    """The auditor takes any delta."""
    exchange(report._delta_check, lambda evidence, delta: ("", []))


@planted("test_budget.py::test_the_plan_meets_its_target_from_below[1-3-dcgan]")
def plan_above_its_budget() -> None:
    """The noise of a plan is calibrated to five per cent above the budget."""
    budget.TIGHTNESS = -0.05


@planted("test_budget.py::test_noise_is_rounded_up_to_four_digits")
def noise_rounded_down() -> None:
    """Noise multipliers are rounded to the nearest number."""
    exchange(budget._rounded_up, lambda value: float(f"{value:.4g}"))


@planted("test_budget.py::test_overlap_composes_the_sites_of_a_patient")
def overlap_forgotten() -> None:
    """A patient of several sites is budgeted as if of one."""
    altered(budget._of_class, overlap=lambda given: 1)


@planted("test_budget.py::test_the_plan_meets_its_target_from_below[1-3-dcgan]")
def classifier_left_out_of_the_plan() -> None:
    """What reads patients of every class is not composed with what reads one: phases as if in parallel."""
    real = budget._of_class
    exchange(real, lambda parts, name, overlap: real([p for p in parts if p.class_name == name], name, overlap))


@planted("test_accounting.py::test_figures_of_the_table")
def client_rate_times_batch_rate() -> None:
    """q is multiplied by the share of sites that take part in a round (FL4Health's formula: 7.5 instead of 12.3)."""
    real = accounting._mechanisms
    exchange(real, lambda events: tuple((q if q == 1 else q * 0.6, sigma, n) for q, sigma, n in real(events)))


@planted("test_accounting.py::test_composition_is_of_events_and_not_of_epsilons")
def largest_event_instead_of_composition() -> None:
    """Epsilon is that of the most expensive event."""
    real = accounting.epsilon

    def worst(events: Any, delta: float) -> float:
        return max((real([event], delta) for event in events), default=0.0)

    exchange(real, worst)


@planted("test_accounting.py::test_the_larger_figure_is_claimed_where_they_differ")
def smaller_figure_claimed() -> None:
    """Where two accountants differ, the smaller figure is claimed."""
    real = accounting.claim

    def smaller(events: Any, delta: float) -> Any:
        found = real(events, delta)
        return replace(found, epsilon=min(found.first, found.second))

    exchange(real, smaller)


@planted("test_ledger.py::test_each_distinct_event_has_its_line_and_equal_ones_are_added")
def equal_events_counted_once() -> None:
    """Equal events are one event with the steps of the last."""

    def last(events: Any) -> list[Event]:
        return list({event.times(1): event for event in events}.values())

    exchange(dp_events.merged, last)


# Ledger


@planted("test_ledger.py::test_attempts_are_counted_per_round")
def retries_not_counted() -> None:
    """A round that is asked again is the same attempt: it is charged once."""
    Ledger._attempts_at = lambda self, *place: 0


@planted("test_private_study.py::test_other_weights_in_the_same_round_cost_again_and_the_budget_ends_it")
def second_answer_of_a_round_free() -> None:
    """A round that was paid for once is answered again, with fresh noise, for nothing."""
    real = Private.answer
    paid: set[Any] = set()

    def answer(self: Any, request: Any) -> Any:
        key = (type(request), getattr(request, "arm", None), getattr(request, "round", None))
        if key in paid:
            return self._compute(request, self._part(request))
        paid.add(key)
        return real(self, request)

    Private.answer = answer


@planted("test_private_study.py::test_a_kill_at_any_place_spends_once_and_sends_the_same[True-release]")
def answer_computed_again_after_a_restart() -> None:
    """A stored answer is not found again: after a restart the round is computed, and spent, a second time."""
    private_site.Answers.find = lambda self, request: None


@planted("test_ledger.py::test_every_line_is_on_disk_before_the_call_returns")
def reservation_not_synced() -> None:
    """Lines of the ledger are written and not fsynced."""
    os: Any = line_file.os
    exchange(line_file.put, lambda file, data, at: os.pwrite(file, data, at) and None)


@planted("test_private_study.py::test_the_reservation_is_on_disk_before_patients_are_read")
def reserved_after_reading() -> None:
    """The reservation is written when the answer has been computed."""
    real = Private.answer
    made: list[Any] = []

    def answer(self: Any, request: Any) -> Any:
        if self._answers.find(request) is None:
            made.append(type(self)._compute(self, request, self._part(request)))
            self._compute = lambda *_: made[-1]
        return real(self, request)

    Private.answer = answer


@planted("test_private_rules.py::test_over_budget_is_refused_before_patients_are_read")
def policy_read_after_the_data() -> None:
    """The hospital's bound on the budget is asked when patients have been read."""
    reserved_after_reading()


@planted("test_ledger.py::test_a_closed_attempt_is_not_spent_and_a_spent_one_is_not_closed")
def accountant_reset_on_resume() -> None:
    """What was spent and reserved before a restart is forgotten when a round is resumed."""
    real = Ledger._take

    def take(self: Any, line: Any, written: bytes) -> None:
        real(self, line, written)
        if line.content.kind == "resume":
            self._attempts.clear()

    Ledger._take = take


@planted("test_ledger.py::test_a_budget_counts_what_is_spent_reserved_and_asked")
def reservations_not_counted() -> None:
    """A budget counts what was spent, and not what is reserved and may have been done."""
    Ledger.counted = Ledger.spent


@planted("test_ledger.py::test_what_is_released_was_spent_and_what_is_spent_was_reserved")
def spend_beyond_the_reservation() -> None:
    """A spend is written whatever was reserved."""

    def spend(self: Any, reservation: Any, events: Sequence[Event] | None = None) -> None:
        with line_file.locked(self._path) as file:
            self._catch_up(file)
            for event in events or reservation.events:
                self._append(file, reservation, "spend", event.as_json())

    Ledger.spend = spend


@planted("test_ledger.py::test_epsilon_is_of_each_class_with_what_reads_all_classes")
def epsilon_averaged_over_classes() -> None:
    """A site's epsilon is the mean over its classes."""
    Ledger.site_epsilon = lambda self, study, delta, *, overlap=1: _mean(
        self.epsilon_by_class(study, delta, overlap=overlap).values()
    )


@planted("test_ledger.py::test_the_chain_says_what_is_wrong")
def signatures_not_checked() -> None:
    """Lines that the site's key did not sign are taken."""
    exchange(ledger_lines._is_signed, lambda line, key: True)


@planted("test_auditor_verify.py::test_a_dropped_last_line_is_found_by_head_coordinator_and_report")
def dropped_lines_not_audited() -> None:
    """The auditor follows the chain and compares it with no head: lines cut off at the end are not missed."""
    exchange(chain._marks, lambda lines, marks, file: [])


@planted("test_private_rules.py::test_the_coordinator_takes_no_ledger_that_holds_lines_back")
def held_back_lines_accepted() -> None:
    """The coordinator does not compare the signed head with the lines that it is shown."""
    real = Copy.take

    def take(self: Any, reply: Any) -> Any:
        kept = ledgers.check_head
        known: list[Any] = []

        def like(shown: Any, key: Any, *, site: str) -> Any:
            kept(shown, key, site=site)
            lines = ledgers._lines(reply.lines.encode())
            known.append(ledgers.read_line(lines[-1]).head if lines else self.head())
            return known[-1]

        ledgers.check_head = like
        try:
            return real(self, reply)
        finally:
            ledgers.check_head = kept

    Copy.take = take


@planted("test_private_rules.py::test_the_coordinator_takes_no_ledger_under_another_key")
def new_ledger_key_accepted() -> None:
    """A ledger under another key than before is taken: a site can begin anew and forget what it spent."""

    def unpinned(self: Any, text: str) -> Any:
        identity = ledgers.parse_public_key(self._identity, "the key")
        return ledgers.check_endorsement(ledgers._json(text, self._site), identity, site=self._site)

    Copy._public_key = unpinned


# Reports


@planted("test_private_rules.py::test_the_report_says_the_largest_epsilon_of_the_sites_and_never_a_mean")
def epsilon_averaged_over_sites() -> None:
    """The study's epsilon is the mean over its sites."""
    real = privacy._private

    def mean(run: Any) -> Any:
        found = real(run)
        found["epsilon"] = _mean(entry["epsilon"] for entry in found["sites"].values())
        return found

    exchange(real, mean)


@planted("test_auditor_report.py::test_several_studies_compose_over_every_choice_of_classes")
def other_studies_forgotten() -> None:
    """The auditor's figure for all studies together is that of the dearest."""
    real = composition._groups

    def dearest(attempts: Any, overlap: int, *, standing: bool) -> Any:
        studies = dict.fromkeys(one.study for one in attempts)
        parts = [real([a for a in attempts if a.study == study], overlap, standing=standing) for study in studies]
        return {f"{number} {name}": of for number, found in enumerate(parts) for name, of in found.items()} or real(
            [], overlap, standing=standing
        )

    exchange(real, dearest)


@planted("test_auditor_report.py::test_a_classifier_trained_without_noise_is_infinite_end_to_end")
def unnoised_classifier_has_an_epsilon() -> None:
    """An archive's epsilon is claimed for a classifier that was trained on patients without noise."""
    real = composition._artefact
    altered(real, scope=lambda given: replace(given["scope"], trained=frozenset()))
