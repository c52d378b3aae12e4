"""What a running coordinator tells on its own machine: one JSON object for people's tables, and figures for Prometheus.

::

    events.jsonl lines --Board.note--> phase, round, problems, traffic ---+
    link state --presence--> which site is online -----------------------+--> GET /status (JSON), GET /metrics (text) on 127.0.0.1
    gate --> requests refused, by reason --------------------------------+

Nothing here can change anything, and nothing of it is served on the public port. Counts, names of sites, no image and no score.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["Board", "status_app"]

KEPT_PROBLEMS = 20
Presences = Callable[[], Mapping[str, bool]]


class Board:
    """The state of one study, put together from its events. Safe to read while another thread notes."""

    def __init__(self, study: str, digest: str, plan: str, members: Mapping[str, str], presences: Presences) -> None:
        self._lock = threading.Lock()
        self._presences = presences
        self._facts: dict[str, Any] = {"study": study, "study_digest": digest, "plan_digest": plan}
        self._members = dict(members)
        self._phase: dict[str, Any] = {"phase": "starting", "round": 0, "rounds": 0}
        self._said: dict[str, str] = {}
        self._problems: list[dict[str, Any]] = []
        self._problem_counts: Counter[str] = Counter()
        self._bytes: dict[str, Counter[str]] = {site: Counter() for site in members}
        self._since = datetime.now(UTC)
        self.refused: Callable[[], Mapping[str, int]] = dict
        self.expiries: Mapping[str, float] = {}

    def note(self, event: Mapping[str, Any]) -> None:
        """Take one event of the journal."""
        with self._lock:
            match event["kind"]:
                case "phase" | "round":
                    self._phase = {key: event[key] for key in ("phase", "round", "rounds")}
                case "finished":
                    self._phase = {"phase": "finished", "round": 0, "rounds": 0}
                case "joining" | "presence":
                    self._said[event["site"]] = event["text"]
                    if event["site"] not in self._members:
                        self._problems.append({"phase": "", "round": 0, "time": "", **event})
                case "problem":
                    self._problem_counts[event["site"]] += 1
                    self._problems.append({key: event[key] for key in ("time", "phase", "round", "site", "text")})
                    del self._problems[:-KEPT_PROBLEMS]
                case "exchange":
                    for site, entry in event["traffic"].items():
                        self._bytes.setdefault(site, Counter()).update(sent=entry["sent"], received=entry["received"])

    def snapshot(self) -> dict[str, Any]:
        """Everything, as plain values."""
        online = self._presences()
        with self._lock:
            return {
                **self._facts,
                **self._phase,
                "running_s": round((datetime.now(UTC) - self._since).total_seconds(), 1),
                "sites": {
                    site: {
                        "online": online.get(site, False),
                        "fingerprint": self._members[site],
                        "state": self._said.get(site, ""),
                        "bytes_sent_to": self._bytes[site]["sent"],
                        "bytes_received_from": self._bytes[site]["received"],
                        "problems": self._problem_counts[site],
                    }
                    for site in self._members
                },
                "problems": list(self._problems),
                "requests_refused": dict(self.refused()),
                "expires_in_days": {name: round(days, 1) for name, days in self.expiries.items()},
            }

    def collect(self) -> list[Metric]:
        """The snapshot as Prometheus metrics."""
        now = self.snapshot()
        rounds = GaugeMetricFamily("xfed_round", "Rounds done in the phase", labels=["study", "phase"])
        rounds.add_metric([now["study"], now["phase"]], now["round"])
        planned = GaugeMetricFamily("xfed_rounds_planned", "Rounds of the phase", labels=["study", "phase"])
        planned.add_metric([now["study"], now["phase"]], now["rounds"])
        online = GaugeMetricFamily("xfed_site_online", "1 while the site is connected", labels=["site"])
        sent = CounterMetricFamily("xfed_sent_bytes", "Payload sent to the site", labels=["site"])
        received = CounterMetricFamily("xfed_received_bytes", "Payload received from the site", labels=["site"])
        problems = CounterMetricFamily("xfed_problems", "Refusals, silences, malformed answers", labels=["site"])
        for site, facts in now["sites"].items():
            online.add_metric([site], float(facts["online"]))
            sent.add_metric([site], facts["bytes_sent_to"])
            received.add_metric([site], facts["bytes_received_from"])
            problems.add_metric([site], facts["problems"])
        refused = CounterMetricFamily("xfed_requests_refused", "Requests stopped at the public port", labels=["reason"])
        for reason, count in now["requests_refused"].items():
            refused.add_metric([reason], count)
        expires = GaugeMetricFamily("xfed_expires_days", "Days until a certificate or membership ends", labels=["what"])
        for what, days in now["expires_in_days"].items():
            expires.add_metric([what], days)
        return [rounds, planned, online, sent, received, problems, refused, expires]


def status_app(board: Board) -> Callable[..., Awaitable[None]]:
    """An ASGI app with GET /status and GET /metrics. It answers loopback's own names only, against DNS rebinding."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(board)

    async def app(scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost", "[::1]") or scope["method"] != "GET":
            status, kind, body = 404, "text/plain", b"Not Found\n"
        elif scope["path"] == "/status":
            status, kind, body = 200, "application/json", json.dumps(board.snapshot()).encode()
        elif scope["path"] == "/metrics":
            status, kind, body = 200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry)
        else:
            status, kind, body = 404, "text/plain", b"Not Found\n"
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
