"""`xfed-server start`: one process that is the whole coordinator.

::

    study.yaml + members --> plan.json (signed) --> sites approve it
    public port, TLS:   Gate --> Flower's fleet routes --> link state        (threads)
    127.0.0.1:          /status, /metrics; control.json says where; the live page    (threads)
    members/ changed?   --> link state follows within a second               (thread)
    main thread:        ServerApp of `xfed.server.app` over LinkGrid --> runs/<study>/ as xfed-sim's

What is on disk when the power goes: checkpoints, archive, events, membership, node numbers. The same command goes on from
the last whole round: a new Flower run, the same plan, and sites that send again what they had computed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from xfed.common.bundle import DIGEST
from xfed.common.config import Study
from xfed.common.durable import exclusive, write_json
from xfed.common.errors import ConfigError, StorageError, XfedError
from xfed.common.gan import build_generator
from xfed.common.identity import parse_certificate, utc_now
from xfed.common.journal import Journal, Listener
from xfed.common.listening import bound_socket, served
from xfed.common.plan import Plan, new_plan, parse_plan
from xfed.common.registry import build_classifier
from xfed.common.telemetry import silence
from xfed.server.app import make_server_app
from xfed.server.federation import Federation
from xfed.server.gate import Gate
from xfed.server.joining import Proposal
from xfed.server.link import Link, LinkStateError
from xfed.server.live_page import page_beside
from xfed.server.run_folder import claim
from xfed.server.status import Board, status_app

__all__ = ["Deployment", "plan_for", "run_deployment"]

RECONCILE_S = 1.0
FAREWELL_S = 1.0
STATISTICS_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A coordinator's run. `listen` and `control` are (host, port); port 0 takes any free one.

    `join_limit_s`: seconds for the sites to come and for people to approve, instead of the study's `federation.join_limit_s`.
    `page`: the live page's port on 127.0.0.1 (0: any free one), None for no page; `announce` is told its address.
    """

    federation: Federation
    plan: Plan
    out: Path
    listen: tuple[str, int]
    control: tuple[str, int]
    join_limit_s: float | None = None
    page: int | None = None
    announce: Callable[[str], None] = print


def plan_for(federation: Federation, study: Study, out: Path) -> Plan:
    """The plan of `study` for the federation's active members. Raises `ConfigError` when they are not as many as it says.

    A study that was begun in `out` keeps its members, so that it can go on (the quorum decides) after one was revoked.
    """
    members = {name: member.public_key for name, member in federation.active_members().items()}
    if (out / "plan.json").is_file():
        begun = parse_plan(
            str(json.loads((out / "plan.json").read_text(encoding="utf-8"))["plan"]), str(out / "plan.json")
        )
        kept = {name: members.get(name, key) for name, key in begun.members.items()}
        again = new_plan(study, federation=federation.name, members=kept, bundle=DIGEST)
        if study.sites.count == len(kept) and again.study.digest == begun.study.digest:
            return again
    if len(members) != study.sites.count:
        raise ConfigError(
            f"study {study.name} is for {study.sites.count} sites (sites.count), federation {federation.name} has {len(members)} "
            f"active members ({', '.join(members) or 'none'}). Set sites.count to {len(members)}, or approve or revoke sites."
        )
    return new_plan(study, federation=federation.name, members=members, bundle=DIGEST)


def run_deployment(deployment: Deployment, listener: Listener | None = None) -> Path:
    """Run or continue the study; returns the path of report.html. Raises `XfedError`, then and only then it has failed."""
    federation, plan, out = deployment.federation, deployment.plan, deployment.out
    silence()
    federation.check_server()
    with exclusive(federation.folder), exclusive(out), _link_errors(federation.state_path):
        claim(plan.study, out)
        if _finished(plan.study, out):
            return out / "report.html"
        signature = federation.sign("plan", plan.values())
        write_json(out / "plan.json", {"plan": plan.text, "signature": signature, "digest": plan.digest})
        link = Link(federation.state_path)
        known = federation.members()
        fingerprints = {name: known[name].fingerprint for name in plan.members}
        board = Board(plan.study.name, plan.study.digest, plan.digest, fingerprints, lambda: _online(link))

        def hear(event: dict[str, Any]) -> None:
            board.note(event)
            if listener is not None:
                listener(event)

        members = _Members(federation, link, hear)
        grid = link.begin(reply_limit=_reply_limit(plan.study))
        gate = Gate(link.fleet_app(), lambda: members.keys)
        board.refused, board.expiries = lambda: dict(gate.refused), _expiries(federation)
        succeeded = False
        page = page_beside(out, deployment.page, deployment.announce, lambda: _online(link))
        with _serving(deployment, gate, board), _following(members), page:
            try:
                app = make_server_app(plan.study, out, hear, Proposal(plan.text, signature, deployment.join_limit_s))
                app(grid, Context(grid.run_id, 0, UserConfig(), RecordDict(), UserConfig()))
                succeeded = True
                time.sleep(FAREWELL_S)  # a site may be in the middle of saying that it is done
            finally:
                grid.end(succeeded)
    return out / "report.html"


@contextlib.contextmanager
def _link_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LinkStateError as error:
        raise StorageError(
            f"cannot write {path} ({error.orig}). Free some space, then run the same command again: it continues from the "
            "last whole round."
        ) from error


def _finished(study: Study, out: Path) -> bool:
    """Whether the study has ended here and its report is there: then no site is asked for anything again."""
    ended = {"kind": "finished", "study": study.digest}
    whole = all((out / name).is_file() for name in ("report.json", "report.html"))
    return whole and any(ended.items() <= event.items() for event in Journal(out / "events.jsonl").read())


def _online(link: Link) -> dict[str, bool]:
    return {info.name: info.status == "online" for info in link.nodes()}


def _expiries(federation: Federation) -> dict[str, float]:
    now = utc_now()
    ends = {site: member.expires for site, member in federation.active_members().items()}
    pem = federation.server_cert.read_text(encoding="ascii")
    ends["server certificate"] = parse_certificate(pem, str(federation.server_cert)).not_valid_after_utc
    return {name: (end - now).total_seconds() / 86400 for name, end in ends.items()}


def _reply_limit(study: Study) -> int:
    """Bytes that no honest answer exceeds: twice the larger model, and room for statistics."""
    models = (build_generator(study), build_classifier(study))
    return 2 * max(sum(4 * p.numel() for p in model.parameters()) for model in models) + STATISTICS_BYTES


@contextlib.contextmanager
def _serving(deployment: Deployment, gate: Gate, board: Board) -> Iterator[None]:
    federation = deployment.federation
    public = uvicorn.Config(
        gate,
        ssl_certfile=federation.server_cert,
        ssl_keyfile=str(federation.server_key),
        lifespan="off",
        ws="none",
        timeout_keep_alive=120,
        limit_concurrency=1000,
        server_header=False,
        access_log=False,
        log_config=None,
    )
    private = uvicorn.Config(status_app(board), lifespan="off", ws="none", access_log=False, log_config=None)
    with _listening(public, deployment.listen) as port, _listening(private, deployment.control) as control:
        write_json(
            federation.folder / "control.json",
            {"control": f"{deployment.control[0]}:{control}", "public_port": port, "run": str(deployment.out)},
        )
        try:
            yield
        finally:
            (federation.folder / "control.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _listening(config: uvicorn.Config, address: tuple[str, int]) -> Iterator[int]:
    host, port = address
    remedy = "Choose another with --listen or --control."
    with bound_socket(host, port, remedy) as bound, served(config, bound, f"listener on {host}:{port}"):
        yield bound.getsockname()[1]


class _Members:
    """The keys that may speak, as members/ says; a revoked site is shut out while the study runs."""

    def __init__(self, federation: Federation, link: Link, hear: Listener) -> None:
        self._federation, self._link, self._hear = federation, link, hear
        self.keys: frozenset[bytes] | None = None
        self._wrong = ""
        self.look()

    def look(self) -> None:
        """Read members/ again. While a file there is damaged nobody is admitted, and the coordinator's screen says why."""
        try:
            members = self._federation.active_members()
            keys = frozenset(member.public_pem for member in members.values())
            if keys != self.keys:
                self._link.reconcile({name: member.public_key for name, member in members.items()})
            self.keys, self._wrong = keys, ""
        except (XfedError, LinkStateError) as error:
            self.keys = None
            if str(error) != self._wrong:
                self._wrong = str(error)
                self._hear({"kind": "presence", "site": "members", "text": f"nobody is admitted: {error}"})


@contextlib.contextmanager
def _following(members: _Members) -> Iterator[None]:
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(RECONCILE_S):
            members.look()

    thread = threading.Thread(target=follow, name="members", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
