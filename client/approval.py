"""Plans at the site: shown to people, approved by their digest, and only then acted on.

::

    ProposePlan --signature of the federation? study's own digest?--> plans/<digest>.json         (pending)
    xfed-client approve DIGEST --policy allows it?--> plans/<digest>.approved.json                (who, when)
    request for a study --its plan approved?--> studies/<digest>/study.json, members.json

An approval names one digest. A plan in which a single number differs has another, and waits again.
"""

from __future__ import annotations

import getpass
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xfed.client.policy import Policy, violations
from xfed.common.bundle import DIGEST
from xfed.common.durable import write_json
from xfed.common.errors import IdentityError, RefusedError
from xfed.common.plan import Plan, verify_plan

__all__ = ["Plans", "ReceivedPlan"]


@dataclass(frozen=True, kw_only=True)
class ReceivedPlan:
    """A plan that came, is genuine, and is approved or not."""

    plan: Plan
    received: str
    approved: str | None


class Plans:
    """The plans of one site, under `folder`/plans. `ca_pem` is the federation's certificate, `federation` its name."""

    def __init__(self, folder: Path, ca_pem: str, federation: str, site: str, public_key: str) -> None:
        self._folder = folder
        self._ca_pem, self._federation = ca_pem, federation
        self._site, self._public_key = site, public_key

    def receive(self, text: str, signature: str) -> ReceivedPlan:
        """Check and keep a proposed plan. Raises `IdentityError` (forged, changed, foreign), `RefusedError`."""
        plan = verify_plan(text, signature, self._ca_pem, self._federation)
        if plan.bundle != DIGEST:
            raise RefusedError(
                f"the plan was made for another version of xfed ({plan.software}): its bundle is {plan.bundle[:12]}, the "
                f"installed one {DIGEST[:12]}. Install the same version at the coordinator and at all sites."
            )
        if plan.members.get(self._site) != self._public_key:
            raise RefusedError(f"the plan does not name {self._site} with its present key: ask for a new plan")
        path = self._folder / "plans" / f"{plan.digest}.json"
        if not path.is_file():
            received = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(path, {"plan": text, "signature": signature, "received": received})
        return self._read(path)

    def _read(self, path: Path) -> ReceivedPlan:
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            text, signature, received = str(values["plan"]), str(values["signature"]), str(values["received"])
        except (ValueError, KeyError, TypeError) as error:
            raise IdentityError(
                f"{path} is damaged ({error}): delete it; the coordinator sends the plan again"
            ) from error
        plan = verify_plan(text, signature, self._ca_pem, self._federation)
        approval = path.with_suffix(".approved.json")
        when: str | None = None
        if approval.is_file():
            said = json.loads(approval.read_text(encoding="utf-8"))
            if said.get("digest") == plan.digest:
                when = f"{said.get('approved')} by {said.get('by')}"
        return ReceivedPlan(plan=plan, received=received, approved=when)

    def all(self) -> list[ReceivedPlan]:
        """Every plan that was received, oldest first. Raises `IdentityError` when a file was changed."""
        paths = [path for path in (self._folder / "plans").glob("*.json") if not path.name.endswith(".approved.json")]
        return sorted((self._read(path) for path in paths), key=lambda found: found.received)

    def find(self, prefix: str) -> ReceivedPlan:
        """The plan whose digest begins with `prefix`. Raises `RefusedError` when there is none or more than one."""
        found = [each for each in self.all() if each.plan.digest.startswith(prefix)]
        if len(found) != 1:
            known = ", ".join(each.plan.digest[:12] for each in self.all()) or "none has been received yet"
            raise RefusedError(f"{len(found)} received plans begin with {prefix!r}; the plans here: {known}")
        return found[0]

    def approve(self, prefix: str, policy: Policy) -> ReceivedPlan:
        """Approve one plan by (the beginning of) its digest. Raises `RefusedError` when the policy forbids it."""
        plan = self.find(prefix).plan
        problems = violations(policy, plan.study)
        if problems:
            raise RefusedError(
                "policy.yaml of this site forbids the plan:\n" + "\n".join(f"  {problem}" for problem in problems)
            )
        path = self._folder / "plans" / f"{plan.digest}.json"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            path.with_suffix(".approved.json"), {"digest": plan.digest, "approved": when, "by": getpass.getuser()}
        )
        return self._read(path)

    def of_study(self, study: str) -> Plan:
        """The approved plan of a study's digest, the newest if there are several. Raises `RefusedError`."""
        mine = [each for each in self.all() if each.plan.study.digest == study]
        approved = [each for each in mine if each.approved is not None]
        if not approved:
            known = "it has been received and waits for approval" if mine else "it was never proposed to this site"
            raise RefusedError(f"study {study[:12]} is not approved here: {known} (xfed-client approve)")
        return approved[-1].plan

    def work(self, plan: Plan) -> Path:
        """The folder of a plan's study, with its study.json and members.json written."""
        folder = self._folder / "studies" / plan.study.digest[:16]
        write_json(folder / "study.json", plan.study.resolved())
        write_json(folder / "members.json", plan.members)
        return folder
