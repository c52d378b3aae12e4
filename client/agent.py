"""`xfed-client start`: the site's side of the wire. It carries letters; it never sees an image and loads no torch.

::

    connect --> receive a letter --> bundle the installed one? --> worker (policy, data, training) --> send --> receive ...
       ^                                     | no: refusal           | died: start it again, ask again
       +---- backoff <-- connection lost ----+-----------------------+

What is on disk when the power goes: the worker's state and answers. A letter that was not answered is sent again by
the coordinator.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from xfed.client.home import SiteHome
from xfed.client.link import FleetLink, Letter, LinkLostError, StaleError
from xfed.client.worker import Worker, WorkerLostError
from xfed.common.bundle import DIGEST
from xfed.common.errors import FederationError
from xfed.common.messages import Refusal
from xfed.common.packing import pack
from xfed.common.stopping import StopFlag
from xfed.common.telemetry import silence

__all__ = ["run_agent"]

Report = Callable[[str, dict[str, Any]], None]

POLL_QUICK_S = 0.1
POLL_SLOW_S = 2.0
HELD_S = 1.0
QUICK_FOR_S = 20.0
BACKOFF_S = (0.5, 10.0)
WORKER_TRIES = 3


def run_agent(home: SiteHome, report: Report, stop: StopFlag, address: str | None = None) -> None:
    """Serve until `stop` is set. Raises `IdentityError` when the coordinator does not (or no longer) admit this site."""
    silence()
    worker = Worker(home.folder, home.folder / "worker.log", lambda pid: report("worker", {"pid": pid}))
    worker.start()
    attempt = 0
    try:
        while not stop.is_set():
            link = FleetLink(address or home.address, home.ca_pem, home.private_key, home.folder / "node")
            try:
                link.connect()
                report("connected", {"address": address or home.address})
                attempt = 0
                _serve(home, link, worker, report, stop)
            except LinkLostError as error:
                attempt += 1
                pause = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(attempt - 1, 10)) * random.uniform(0.7, 1.3)  # noqa: S311
                report("disconnected", {"text": str(error), "again_in_s": round(pause, 1)})
                stop.wait(pause)
            finally:
                link.close()
    finally:
        worker.stop()


def _serve(home: SiteHome, link: FleetLink, worker: Worker, report: Report, stop: StopFlag) -> None:
    quick_until = time.monotonic() + QUICK_FOR_S
    while not stop.is_set():
        asked = time.monotonic()
        try:
            letter = link.receive()
        except StaleError as error:
            report("stale", {"text": str(error)})
            continue
        except LinkLostError:
            raise
        except FederationError as error:
            report("malformed", {"text": str(error)})
            continue
        if letter is None:
            now = time.monotonic()
            if now - asked < HELD_S:  # else the coordinator has waited already
                stop.wait(POLL_QUICK_S if now < quick_until else POLL_SLOW_S)
            continue
        try:
            _answer(home, link, worker, letter, report)
        except StaleError as error:
            report("stale", {"text": str(error)})
        quick_until = time.monotonic() + QUICK_FOR_S


def _answer(home: SiteHome, link: FleetLink, worker: Worker, letter: Letter, report: Report) -> None:
    started = time.monotonic()
    foreign = link.bundle_of(letter.run)
    if foreign != DIGEST:
        text = f"the run's bundle {foreign[:12]} is not the installed xfed's {DIGEST[:12]}: nothing of it was loaded"
        report("refused", {"text": text})
        link.send(letter, *pack(Refusal(site=home.name, error="RefusedError", reason=text)))
        return
    who = {"run": str(letter.run), "message": letter.message_id, "coordinator": home.federation}
    for attempt in range(1, WORKER_TRIES + 1):
        try:
            header, data = worker.ask(who, letter.header, letter.data)
            break
        except WorkerLostError as error:
            report("worker lost", {"text": str(error), "attempt": attempt})
            if attempt == WORKER_TRIES:
                header, data = pack(Refusal(site=home.name, error="WorkerLostError", reason=str(error)))
    link.send(letter, header, data)
    report("answered", {"bytes": len(data), "seconds": round(time.monotonic() - started, 3)})
