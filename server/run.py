"""What every phase is given: the study, the run folder, the sites, and how a round is asked with a quorum.

::

    phase --requests--> Run.ask --> answers folded one by one --> quorum per group? -- yes --> phase checkpoints the round
                           |                                                     -- no ---> ask the missing again, then stop
          --requests--> Run.sum --> open study: Run.ask; secure study: one summed answer per request (xfed.server.secure)
                           +--> events.jsonl: one line per round (bytes, seconds), one per refusal or lost site
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from xfed.common.config import Study
from xfed.common.errors import FederationError
from xfed.common.journal import Journal
from xfed.common.messages import Description, Reply, Request, ShowLedger
from xfed.server.census import Census
from xfed.server.checkpoints import Checkpoints
from xfed.server.exchange import Answer, Exchange
from xfed.server.ledgers import LedgerCopies
from xfed.server.secure import sum_over_sites

__all__ = ["ALL_SITES", "Fold", "Run"]

Fold = Callable[[str, Request, Reply], None]
ALL_SITES = "sum over sites"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A study under way."""

    study: Study
    folder: Path
    exchange: Exchange
    journal: Journal
    checkpoints: Checkpoints
    descriptions: dict[str, Description]
    census: Census
    members: Mapping[str, str] = field(default_factory=dict)

    @property
    def ledgers(self) -> LedgerCopies:
        """The copies of the sites' privacy ledgers (private studies)."""
        return LedgerCopies(self.folder / "ledgers", self.members)

    def ask(
        self,
        phase: str,
        round: int,
        requests: Sequence[tuple[str, Request]],
        fold: Fold,
        group: Callable[[Request], str] = lambda request: type(request).__name__,
    ) -> None:
        """Ask, fold what comes, retry what is missing. Raises `FederationError` when a group stays below the quorum.

        A fold that raises `FederationError` (a malformed update) counts as no answer from that site.
        """
        tally = _Tally(self, phase, round)
        federation = self.study.federation
        asked = Counter(group(request) for _, request in requests)
        answered: Counter[str] = Counter()

        def take(answer: Answer) -> None:
            if answer.reply is not None:
                fold(answer.site, answer.request, answer.reply)
                answered[group(answer.request)] += 1

        pending = list(requests)
        for attempt in range(1 + federation.retries):
            pending = tally.ask(pending, take, attempt)
            if all(answered[name] >= federation.quorum * count for name, count in asked.items()):
                break
        tally.write()
        for name, count in asked.items():
            if answered[name] < federation.quorum * count:
                raise FederationError(self._no_quorum(f"{phase}, round {round}, {name}", answered[name], count))

    def _no_quorum(self, where: str, answered: int, asked: int) -> str:
        return (
            f"{where}: {answered} of {asked} sites answered, the quorum is {self.study.federation.quorum:.0%} "
            "(federation.quorum). events.jsonl says why each is missing. "
            "Run the same command again to go on from the last whole round."
        )

    def sum(
        self, phase: str, round: int, requests: Sequence[Request], holders: Sequence[Sequence[str]], fold: Fold
    ) -> None:
        """Ask each request of the sites that hold something for it, and fold the answers; their sum alone in a secure study.

        In a secure study every site is asked everything (who holds what is not known here), and `fold` is called once per
        request with `ALL_SITES` and the summed answer. Raises `FederationError` when the quorum is missed.
        """
        if not self.study.secure:
            named = {id(request): str(number) for number, request in enumerate(requests)}
            pairs = [(site, request) for request, sites in zip(requests, holders, strict=True) for site in sites]
            labels = {named[id(request)]: _label(request) for request in requests}
            self.ask(phase, round, pairs, fold, group=lambda request: labels[named[id(request)]])
            self.collect_ledgers(phase, round)
            return
        tally = _Tally(self, phase, round)
        federation, sites = self.study.federation, self.exchange.sites
        least = max(2, math.ceil(federation.quorum * len(sites) - 1e-9))
        for attempt in range(1 + federation.retries):
            try:
                result = sum_over_sites(
                    partial(tally.ask, attempt=attempt),
                    sites,
                    requests,
                    len(self.study.classes),
                    least,
                )
                break
            except FederationError as error:
                tally.problem(ALL_SITES, str(error), attempt)
                if attempt == federation.retries:
                    tally.write()
                    raise FederationError(
                        f"{phase}, round {round}: {error} (federation.quorum {federation.quorum:.0%}). events.jsonl says why "
                        "each site is missing. Run the same command again to go on from the last whole round."
                    ) from error
        tally.write(summed=list(result.partition.survivors), dropped=list(result.partition.dropped))
        for request, reply in result.replies:
            fold(ALL_SITES, request, reply)
        self.collect_ledgers(phase, round)

    def collect_ledgers(self, phase: str, round: int) -> None:
        """In a private study, fetch what the sites' ledgers say since the last time; who shows nothing right is noted."""
        if not self.study.private:
            return
        tally, copies = _Tally(self, "ledgers", round), self.ledgers
        heads: dict[str, tuple[int, str]] = {}
        fold = copies.fold(heads)
        tally.ask(
            [
                (site, ShowLedger(study=self.study.digest, first=copies.copy(site).head()[0] + 1))
                for site in self.exchange.sites
            ],
            lambda answer: fold(answer.site, answer.request, answer.reply),
            0,
        )
        tally.write()
        for site, (seq, digest) in sorted(heads.items()):
            self.journal.write("ledger", site=site, seq=seq, hash=digest, phase=phase, round=round)


def _label(request: Request) -> str:
    return str(getattr(request, "class_name", "") or getattr(request, "arm", "") or type(request).__name__)


class _Tally:
    """Asks for one round, and keeps its bytes, seconds and problems for the journal."""

    def __init__(self, run: Run, phase: str, round: int) -> None:
        self._run, self._phase, self._round = run, phase, round
        self._started = time.perf_counter()
        self._traffic: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"sent": 0, "received": 0, "messages": Counter()}
        )

    def ask(
        self, requests: Sequence[tuple[str, Request]], take: Callable[[Answer], None], attempt: int
    ) -> list[tuple[str, Request]]:
        """Hand every answer that is there to `take`; returns what is missing, `take`'s refusals (`FederationError`) included."""
        missing: list[tuple[str, Request]] = []
        for answer in self._run.exchange.ask(requests, self._run.study.federation.time_limit_s):
            entry = self._traffic[answer.site]
            entry["sent"] += answer.sent_bytes
            entry["received"] += answer.received_bytes
            problem = answer.problem
            if answer.reply is not None:
                entry["messages"][type(answer.reply).__name__] += 1
                try:
                    take(answer)
                except FederationError as error:
                    problem = str(error)
            if problem is not None:
                missing.append((answer.site, answer.request))
                self.problem(answer.site, problem, attempt)
            del answer  # its reply, before the next one is pulled
        return missing

    def problem(self, site: str, text: str, attempt: int) -> None:
        """Note a refusal, a silence, a malformed answer."""
        self._run.journal.write(
            "problem", phase=self._phase, round=self._round, site=site, text=text, attempt=attempt + 1
        )

    def write(self, **more: Any) -> None:
        """One line for the whole round."""
        self._run.journal.write(
            "exchange",
            phase=self._phase,
            round=self._round,
            seconds=time.perf_counter() - self._started,
            traffic=self._traffic,
            **more,
        )
