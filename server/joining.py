"""How a study's sites come together: online, the plan approved, and each has said what it holds.

::

    nodes online --ProposePlan--> approved? -- not yet --> asked again every few seconds, until a person at the site approves
                                     | yes
                                  Describe --> Description --> Exchange (names the sites)

In a real federation a site's name is the one its key was admitted under; a site that calls itself otherwise is refused. In a
simulation (no plan, no registered names) a site's name is what it says. At the time limit the study goes on without those
who are missing, if the quorum stands.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

from flwr.serverapp import Grid

from xfed.common.config import Study
from xfed.common.errors import FederationError
from xfed.common.journal import Journal
from xfed.common.messages import Describe, Description, PlanStatus, ProposePlan
from xfed.server.exchange import Exchange, Presence, presences

__all__ = ["Proposal", "join"]

POLL_S = 0.05
APPROVAL_POLL_S = 2.0


@dataclass(frozen=True)
class Proposal:
    """A plan as the sites are shown it: its text and the federation's signature.

    `join_limit_s`: how long people may take to approve it, where that is not the study's `federation.join_limit_s`.
    """

    text: str
    signature: str
    join_limit_s: float | None = None

    @property
    def members(self) -> dict[str, str]:
        """Site to admitted public key."""
        return {str(site): str(key) for site, key in json.loads(self.text)["members"].items()}


@dataclass
class _Guest:
    presence: Presence
    approved: bool
    next_try: float = 0.0
    told: str = ""
    description: Description | None = None

    @property
    def label(self) -> str:
        return self.presence.name or f"node {self.presence.node}"


def join(
    grid: Grid, study: Study, journal: Journal, proposal: Proposal | None = None
) -> tuple[Exchange, dict[str, Description]]:
    """Wait for the study's sites, and name them. Raises `FederationError` when too few come within `federation.join_limit_s`."""
    federation, expected = study.federation, study.sites.count
    own_limit = proposal.join_limit_s if proposal is not None else None
    limit = federation.join_limit_s if own_limit is None else own_limit
    deadline = time.monotonic() + limit
    guests: dict[int, _Guest] = {}
    while True:
        for node, presence in presences(grid).items():
            if presence.online and node not in guests:
                guests[node] = _Guest(presence, approved=proposal is None)
        _step(grid, study, journal, proposal, guests, max(1.0, deadline - time.monotonic()))
        ready = {guest.description.site: guest for guest in guests.values() if guest.description is not None}
        if len(ready) >= expected:
            break
        if time.monotonic() >= deadline:
            if len(ready) < max(1, math.ceil(federation.quorum * expected)):
                raise FederationError(_missing(guests, len(ready), expected, limit))
            journal.write("joined", text=f"going on with {len(ready)} of {expected} sites: {', '.join(sorted(ready))}")
            break
        time.sleep(POLL_S)
    exchange = Exchange(
        grid,
        {name: guest.presence.node for name, guest in ready.items()},
        absence_limit_s=federation.absence_limit_s,
        notice=lambda site, text: journal.write("presence", site=site, text=text),
    )
    descriptions = {name: guest.description for name, guest in sorted(ready.items()) if guest.description is not None}
    return exchange, descriptions


def _step(
    grid: Grid, study: Study, journal: Journal, proposal: Proposal | None, guests: dict[int, _Guest], limit: float
) -> None:
    now = time.monotonic()
    due = [g for g in guests.values() if g.description is None and now >= g.next_try]
    if not due:
        return
    exchange = Exchange(
        grid, {f"{guest.presence.node:020d}": guest.presence.node for guest in due}, absence_limit_s=5.0
    )
    if proposal is not None:
        propose = ProposePlan(study=study.digest, plan=proposal.text, signature=proposal.signature)
        waiting = [guest for guest in due if not guest.approved]
        for guest, answer in zip(
            waiting,
            exchange.ask([(f"{guest.presence.node:020d}", propose) for guest in waiting], limit),
            strict=True,
        ):
            if isinstance(answer.reply, PlanStatus) and answer.reply.approved:
                guest.approved = True
                _tell(journal, guest, "approved the plan")
            else:
                guest.next_try = time.monotonic() + APPROVAL_POLL_S
                waits = "waits for approval at the site: xfed-client approve"
                _tell(journal, guest, waits if isinstance(answer.reply, PlanStatus) else str(answer.problem))
    describe = Describe(study=study.digest)
    asked = [guest for guest in due if guest.approved]
    for guest, answer in zip(
        asked, exchange.ask([(f"{guest.presence.node:020d}", describe) for guest in asked], limit), strict=True
    ):
        if not isinstance(answer.reply, Description):
            guest.next_try = time.monotonic() + APPROVAL_POLL_S
            _tell(journal, guest, answer.problem or "it sent an unexpected reply")
            continue
        said, name = answer.reply.site, guest.presence.name
        if proposal is not None and said != name:
            guest.next_try = math.inf
            _tell(journal, guest, f"calls itself {said!r}, but its key was admitted as {name!r}: it takes no part")
            continue
        if any(g.description is not None and g.description.site == said for g in guests.values()):
            raise FederationError(f"two sites call themselves {said!r}: each needs a name of its own")
        guest.description = answer.reply


def _tell(journal: Journal, guest: _Guest, text: str) -> None:
    if text != guest.told:
        guest.told = text
        journal.write("joining", site=guest.label, text=text)


def _missing(guests: dict[int, _Guest], ready: int, expected: int, limit: float) -> str:
    reasons = "; ".join(
        f"{guest.label}: {guest.told or 'no answer yet'}" for guest in guests.values() if guest.description is None
    )
    return (
        f"{ready} of {expected} sites joined within {limit:g} s (federation.join_limit_s); {len(guests)} came online"
        + (f" ({reasons})" if reasons else "")
        + ". Start the missing sites, or lower sites.count."
    )
