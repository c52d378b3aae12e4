"""The preflight: everything that a site needs before it takes part, looked at in the order in which one thing explains the next.

::

    folder -> membership -> proxy -> dns -> tcp -> tls -> coordinator -> clock -> identity
           -> plan -> versions -> policy -> store -> disk -> device -> audit                        --> findings

A check that cannot be made says which one before it failed. Nothing hangs: each check has so many seconds. Nothing is trained, no
image is looked at, nothing leaves but one unsigned request and, with this site's signature, coming online and going.
On disk: what a start would write, too (`xfed.client.home`, `node`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from xfed.client.check_network import check_identity, network_findings
from xfed.client.check_study import (
    check_audit,
    check_device,
    check_disk,
    check_plan,
    check_policy,
    check_store,
    check_versions,
    newest_plan,
)
from xfed.client.dialling import DIAL_S, dial
from xfed.client.finding import Finding, TooSlowError, bounded, failed, ok, unchecked, warning
from xfed.client.home import SiteHome, load_home
from xfed.client.policy import load_policy
from xfed.common.durable import translate_os_errors, write_bytes
from xfed.common.errors import IdentityError, StorageError, XfedError
from xfed.common.identity import certificate_problem, utc_now

__all__ = ["check_folder", "check_membership", "preflight"]

LIMIT_S = 30.0
TORCH_LIMIT_S = 120.0
"""Loading PyTorch from a cold disk takes its time."""
_NEEDING_HOME = (
    "membership",
    "proxy",
    "dns",
    "tcp",
    "tls",
    "coordinator",
    "clock",
    "identity",
    "plan",
    "store",
    "disk",
)

T = TypeVar("T")


class _Preflight:
    """Collects findings; what goes wrong in a check is a finding, too."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.findings: list[Finding] = []
        self._progress = progress

    def add(
        self,
        name: str,
        check: Callable[[], Finding | Iterable[Finding]],
        limit_s: float = LIMIT_S,
        remedy: str = "",
    ) -> None:
        """Make a check of one or more findings; `remedy` is for what it raises."""
        found = self.load(name, lambda: _listed(check()), remedy, limit_s)
        self.findings += found or []

    def load(self, name: str, call: Callable[[], T], remedy: str = "", limit_s: float = LIMIT_S) -> T | None:
        """What `call` returns, or None and a finding that says why not."""
        self._progress(name)
        try:
            return bounded(call, limit_s)
        except TooSlowError as error:
            slow = "is a disk, a network file system or a name server not answering?"
            self.findings.append(failed(name, type(error), f"given up: {error}", slow))
        except XfedError as error:
            self.findings.append(failed(name, type(error), str(error), remedy or "do what the message says"))
        except Exception as error:  # a preflight that ends with a traceback would hide the other findings
            what = f"this check itself failed: {type(error).__name__}: {error}"
            self.findings.append(failed(name, XfedError, what, "report this to those who maintain xfed"))
        return None


def _listed(found: Finding | Iterable[Finding]) -> list[Finding]:
    return [found] if isinstance(found, Finding) else list(found)


def preflight(
    folder: Path, address: str | None = None, progress: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Every check of the site in `folder`, in order. Raises nothing: whatever is wrong is in the findings.

    `address` (host:port) replaces the kit's; `progress` hears the name of each check before it is made.
    """
    run = _Preflight(progress)
    remedy = f"see the message; a site begins with xfed-client enroll --name SITE --dir {folder}"
    home = run.load("folder", lambda: load_home(folder, even_expired=True), remedy)
    if home is None:
        run.findings += [unchecked(name, "folder") for name in _NEEDING_HOME]
        run.add("device", lambda: check_device(None), TORCH_LIMIT_S)
        return run.findings
    run.add("folder", lambda: check_folder(home.folder), remedy=f"make room, and let this user write to {folder}")
    run.add("membership", lambda: check_membership(home, utc_now()))
    _reach(run, home, address or home.address)
    _compare(run, home)
    return run.findings


def _reach(run: _Preflight, home: SiteHome, address: str) -> None:
    def way() -> Iterable[Finding]:
        return network_findings(dial(address, home.ca_pem), home.federation, lambda: dial(address, None))

    run.add("network", way, 2 * DIAL_S + LIMIT_S)
    cause = next((finding.name for finding in run.findings if _keeps_off(finding)), None)
    if cause is not None:
        run.findings.append(unchecked("identity", cause))
    else:
        run.add("identity", lambda: check_identity(home, address))


def _keeps_off(finding: Finding) -> bool:
    """Whether coming online is of no use after this, or could not be undone (in a folder that cannot be written to)."""
    if finding.name == "folder":
        return finding.exit_code == StorageError.exit_code
    return finding.status == "failed" and finding.name != "membership"


def _compare(run: _Preflight, home: SiteHome) -> None:
    count = len(run.findings)
    remedy = f"delete what is in {home.folder / 'plans'}: the coordinator sends its plan again, to be approved again"
    received = run.load("plan", lambda: newest_plan(home), remedy)
    if len(run.findings) == count:
        run.add("plan", lambda: check_plan(home, received))
    plan = received.plan if received is not None else None
    study = plan.study if plan is not None else None
    run.add("versions", lambda: check_versions(home, plan))
    policy = run.load("policy", lambda: load_policy(home.folder / "policy.yaml"), "correct policy.yaml")
    if policy is not None:
        run.add("policy", lambda: check_policy(policy, plan))
    store = home.folder / "store"
    again = f"make it with the study's size and classes: xfed-client import SOURCE --store {store}"
    run.add("store", lambda: check_store(store, policy, study), TORCH_LIMIT_S, again)
    run.add("disk", lambda: check_disk(home, study, policy), TORCH_LIMIT_S)
    run.add("device", lambda: check_device(study), TORCH_LIMIT_S)
    run.add("audit", lambda: check_audit(home.folder / "audit.jsonl"), TORCH_LIMIT_S)


def check_folder(folder: Path) -> Finding:
    """Whether the folder is its owner's alone and can be written to; `load_home` has looked at the key. Raises `StorageError`."""
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        what = f"{folder} can be opened by others than its owner (mode {mode:04o}); patients' images may be in it"
        return failed("folder", IdentityError, what, f"chmod 700 {folder}")
    probe = folder / "check-probe"
    with translate_os_errors(probe):
        write_bytes(probe, b"x" * 65_536, private=True)
        probe.unlink()
    if status.st_uid != os.geteuid():
        what = f"{folder} belongs to user {status.st_uid}, this is user {os.geteuid()}"
        return warning("folder", what, "run xfed-client as the user whose folder it is, check included")
    return ok("folder", f"{folder} is complete, writable, and its owner's alone")


def check_membership(home: SiteHome, now: datetime) -> Finding:
    """Whether the membership and the federation's certificate hold at `now`."""
    renew = f"xfed-client enroll --rotate --dir {home.folder}, send request.json to the coordinator, install its kit"
    if home.expires <= now:
        return failed(
            "membership", IdentityError, f"the membership of {home.name} ended on {home.expires:%Y-%m-%d}", renew
        )
    if (problem := certificate_problem(home.ca_pem, "the federation's certificate", now)) is not None:
        return failed(
            "membership", IdentityError, problem, "compare this machine's clock; then ask the coordinator for a new kit"
        )
    warnings = home.warnings(now)
    if warnings:
        return warning("membership", "; ".join(warnings), renew)
    return ok("membership", f"{home.name} is a member of {home.federation} until {home.expires:%Y-%m-%d}")
