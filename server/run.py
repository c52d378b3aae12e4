"""What every phase is given: the study, the run folder, the sites, and how a round is asked with a quorum.

::

    phase --requests--> Run.ask --> answers folded one by one --> quorum per group? -- yes --> phase checkpoints the round
                           |                                                     -- no ---> ask the missing again, then stop
                           +--> events.jsonl: one line per round (bytes, seconds), one per refusal or lost site
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfed.common.config import Study
from xfed.common.errors import FederationError
from xfed.common.journal import Journal
from xfed.common.messages import Description, Reply, Request
from xfed.server.checkpoints import Checkpoints
from xfed.server.exchange import Exchange

__all__ = ["Fold", "Run"]

Fold = Callable[[str, Request, Reply], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A study under way."""

    study: Study
    folder: Path
    exchange: Exchange
    journal: Journal
    checkpoints: Checkpoints
    descriptions: dict[str, Description]

    def images(self, site: str, split: int, label: int) -> int:
        """How many images of a class a site said it holds in a split (0 train, 1 validation, 2 test)."""
        return int(self.descriptions[site].counts["counts"][split, label])

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
        federation = self.study.federation
        started = time.perf_counter()
        asked = Counter(group(request) for _, request in requests)
        answered: Counter[str] = Counter()
        traffic: dict[str, dict[str, Any]] = defaultdict(lambda: {"sent": 0, "received": 0, "messages": Counter()})
        pending = list(requests)
        for attempt in range(1 + federation.retries):
            missing: list[tuple[str, Request]] = []
            for answer in self.exchange.ask(pending, federation.time_limit_s):
                entry = traffic[answer.site]
                entry["sent"] += answer.sent_bytes
                entry["received"] += answer.received_bytes
                problem = answer.problem
                if answer.reply is not None:
                    entry["messages"][type(answer.reply).__name__] += 1
                    try:
                        fold(answer.site, answer.request, answer.reply)
                        answered[group(answer.request)] += 1
                    except FederationError as error:
                        problem = str(error)
                if problem is not None:
                    missing.append((answer.site, answer.request))
                    self.journal.write(
                        "problem", phase=phase, round=round, site=answer.site, text=problem, attempt=attempt + 1
                    )
                del answer  # its reply, before the next one is pulled
            pending = missing
            if all(answered[name] >= federation.quorum * count for name, count in asked.items()):
                break
        self.journal.write(
            "exchange",
            phase=phase,
            round=round,
            seconds=time.perf_counter() - started,
            traffic=traffic,
        )
        for name, count in asked.items():
            if answered[name] < federation.quorum * count:
                raise FederationError(
                    f"{phase}, round {round}, {name}: {answered[name]} of {count} sites answered, the quorum is "
                    f"{federation.quorum:.0%} (federation.quorum). events.jsonl says why each is missing. "
                    "Run the same command again to go on from the last whole round."
                )
