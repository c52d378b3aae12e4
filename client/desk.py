"""Where every request to a hospital is weighed before anything is read, and every answer before it leaves.

::

    packed request --> audit "asked" --> plan? keep it for approval
                                     --> study approved? bounds? policy? --> Site: train, score, keep --> may it leave?
                                         --> audit "left" --> packed reply
                                     --> no: audit "refused", Refusal with the reason (the other sites go on)

The desk runs in the worker. It reads policy.yaml anew for each request, so that a policy which was tightened holds from the
next request on. The audit line is on disk before the answer is on the wire: the log may name an answer that was never sent,
never the reverse.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from xfed.client.approval import Plans
from xfed.client.audit import AuditLog
from xfed.client.bounds import check_request
from xfed.client.home import load_home
from xfed.client.policy import Policy, load_policy
from xfed.client.reply_bounds import check_reply
from xfed.client.site import Site
from xfed.common.errors import FederationError, IdentityError, RefusedError, XfedError
from xfed.common.messages import PlanStatus, ProposePlan, Refusal, Reply, Request
from xfed.common.packing import pack, unpack_request
from xfed.common.version import SOFTWARE

__all__ = ["Desk"]

_SAYABLE = (RefusedError, FederationError, IdentityError)


class Desk:
    """The desk of the site in `folder`. Raises `XfedError` when the folder is not a joined site's."""

    def __init__(self, folder: Path) -> None:
        self._home = load_home(folder)
        self._plans = Plans(folder, self._home.ca_pem, self._home.federation, self._home.name, self._home.public_key)
        self._audit = AuditLog(folder / "audit.jsonl")
        self._sites: dict[tuple[str, str], Site] = {}

    def answer_packed(self, who: dict[str, Any], header: str, data: bytes) -> tuple[str, bytes]:
        """Answer one packed request from `who` (run, message, coordinator); never raises for what came from outside."""
        try:
            request = unpack_request(header, data)
        except FederationError as error:
            return pack(self._refused(who, None, error))
        self._audit.asked(who, request)
        try:
            reply = self._answer(request)
        except Exception as error:
            # whatever goes wrong inside, the coordinator learns the kind and the site keeps running
            if not isinstance(error, XfedError):
                logging.getLogger("xfed").exception("while answering %s", request.key)
            return pack(self._refused(who, request, error))
        self._audit.left(who, request, reply)
        return pack(reply)

    def _refused(self, who: dict[str, Any], request: Request | None, error: Exception) -> Refusal:
        text = str(error) or type(error).__name__
        self._audit.refused(who, request, text)
        if not isinstance(error, _SAYABLE):
            # what broke inside may name folders and files of the hospital: it stays in the audit log
            text = f"{type(error).__name__} at the site; its audit log says more (xfed-client audit)"
        return Refusal(site=self._home.name, error=type(error).__name__, reason=text)

    def _answer(self, request: Request) -> Reply:
        policy = load_policy(self._home.folder / "policy.yaml")
        if isinstance(request, ProposePlan):
            return self._status(request)
        site = self._site(request.study, policy)
        check_request(request, site.study, policy, tuple(site.members), site=self._home.name)
        return check_reply(site.act(request), policy)

    def _status(self, request: ProposePlan) -> PlanStatus:
        received = self._plans.receive(request.plan, request.signature)
        return PlanStatus(
            site=self._home.name,
            digest=received.plan.digest,
            approved=received.approved is not None,
            software=SOFTWARE,
        )

    def _site(self, study: str, policy: Policy) -> Site:
        plan = self._plans.of_study(study)
        key = (plan.digest, policy.model_dump_json())
        if key not in self._sites:
            site = Site(self._home.folder, self._plans.work(plan), policy)
            torch.set_num_threads(site.study.runtime.threads)
            self._sites = {key: site}
        return self._sites[key]
