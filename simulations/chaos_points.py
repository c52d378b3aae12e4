"""The named points at which a party of a federation is killed: a function, and whether just before or just after it.

::

    Point(name, party, "module:function", before | after | torn) --chaos_armed--> the n-th call there --> SIGKILL

The points are beside the product, not in it: `xfed.simulations.chaos_armed` puts a wrapper around the function when it starts a
party. "torn" is harder than a kill: half of what was to be written is written first, as at a power cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "POINTS", "Kind", "Point", "Role", "points_of"]

Kind = Literal["open", "secure"]
Role = Literal["server", "agent", "worker"]
When = Literal["before", "after", "torn"]

KINDS: tuple[Kind, ...] = ("open", "secure")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place in a party's life.

    `path` is a regular expression that the first argument (a path or an open file) must match for a call to count. `calls`:
    how many calls there surely are in an unbroken run; a fault picks one of them. `only`: the kind of study that has it.
    """

    name: str
    role: Role
    target: str
    when: When
    about: str
    path: str = ""
    calls: int = 1
    only: Kind | None = None


def _point(
    name: str, target: str, when: When, about: str, *, path: str = "", calls: int = 1, only: Kind | None = None
) -> Point:
    role: Role = "server" if name.startswith("server") else "agent" if name.startswith("agent") else "worker"
    return Point(name=name, role=role, target=target, when=when, about=about, path=path, calls=calls, only=only)


_WRITE = "xfed.common.durable:write_bytes"
_RENAME = "pathlib:Path.replace"
_FSYNC = "os:fsync"
_FLEET = "flwr.supernode.fleet_http_client:FleetHttpClient"
_SITE = "xfed.client.site:Site"
_SUMS = "xfed.client.secure:SecureSums"
_CHECKPOINT = r"/checkpoints/"

# fmt: off
POINTS: tuple[Point, ...] = (
    # the coordinator: start and joining
    _point("server.plan.before", _WRITE, "before", "no plan is on disk yet", path=r"/plan\.json$"),
    _point("server.plan.after", _WRITE, "after", "the plan is on disk, nobody has seen it", path=r"/plan\.json$"),
    _point("server.members.after", "xfed.server.link:Link.reconcile", "after", "sites are registered, no run exists"),
    _point("server.begin.after", "xfed.server.link:Link.begin", "after", "Flower's run exists, nothing was asked"),
    _point("server.journal.torn", "xfed.common.durable:append_line", "torn",
           "half a line of events.jsonl", path=r"/events\.jsonl$", calls=8),
    _point("server.join.before", "xfed.server.joining:join", "before", "sites may be online, none was asked"),
    _point("server.join.after", "xfed.server.joining:join", "after", "all sites described themselves"),
    _point("server.census.after", "xfed.server.census:census_of", "after", "the sites' counts are added up"),
    # the coordinator: letters
    _point("server.push.before", "xfed.server.link:LinkGrid.push_messages", "before",
           "a request is made, not stored", calls=12),
    _point("server.push.after", "xfed.server.link:LinkGrid.push_messages", "after", "a request may be on its way", calls=12),
    _point("server.pull.before", "xfed.server.link:LinkGrid._inflate", "before",
           "a reply has come, nobody read it", calls=12),
    _point("server.pull.after", "xfed.server.link:LinkGrid._inflate", "after",
           "a reply was read and is gone from the store", calls=12),
    _point("server.fold.before", "xfed.server.aggregate:RunningMean.add", "before",
           "a reply was decoded, not folded", calls=6),
    _point("server.fold.after", "xfed.server.aggregate:RunningMean.add", "after",
           "part of a round is folded, in memory", calls=6),
    # the coordinator: secure sums
    _point("server.secure.keys", "xfed.server.secure:_advert", "after",
           "some sites made session keys", calls=9, only="secure"),
    _point("server.secure.shares", "xfed.server.secure:_letters", "after",
           "some sites handed out shares", calls=9, only="secure"),
    _point("server.secure.masked", "xfed.common.secure_masks:MaskedSums.add", "after",
           "a masked answer is in the sum", calls=9, only="secure"),
    _point("server.unmask.before", "xfed.server.secure:_shares", "before",
           "the sum is there, its masks too", calls=3, only="secure"),
    _point("server.unmask.after", "xfed.server.secure:_shares", "after",
           "sites opened a session whose sum is lost", calls=3, only="secure"),
    # the coordinator: rounds on disk
    _point("server.checkpoint.before", "xfed.server.checkpoints:Checkpoints.save", "before",
           "a round is done, not on disk", calls=4),
    _point("server.checkpoint.torn", _FSYNC, "torn",
           "half a checkpoint under its temporary name", path=_CHECKPOINT + r"\..*\.tmp", calls=4),
    _point("server.checkpoint.rename.before", _RENAME, "before",
           "a whole checkpoint under its temporary name", path=_CHECKPOINT, calls=4),
    _point("server.checkpoint.rename.after", _RENAME, "after",
           "the checkpoint has its name, its folder is not synced", path=_CHECKPOINT, calls=4),
    _point("server.checkpoint.after", "xfed.server.checkpoints:Checkpoints.save", "after",
           "the round is on disk, not in the journal", calls=4),
    _point("server.generator.before", "xfed.common.registry:save_generator", "before",
           "phase 1 is done, some models are missing", calls=2),
    _point("server.generator.after", "xfed.common.registry:save_generator", "after",
           "some models of phase 1 are written", calls=2),
    # the coordinator: the archive
    _point("server.archive.before", "xfed.server.archive:build_archive", "before", "no archive yet"),
    _point("server.archive.block", "xfed.server.archive:render_block", "after",
           "the archive is half built beside its place", calls=3),
    _point("server.archive.manifest", _WRITE, "after",
           "the archive is whole beside its place", path=r"\.archive\.building/manifest\.json$"),
    _point("server.archive.after", "xfed.server.archive:build_archive", "after", "the archive is in its place"),
    _point("server.deliver.after", "xfed.server.archive:deliver_archive", "after", "every site has the archive"),
    # the coordinator: classifiers, report
    _point("server.judge.after", "xfed.server.classifiers:_judge", "after", "a round is scored, not on disk", calls=2),
    _point("server.classifier.after", "xfed.common.registry:save_classifier", "after", "one arm's model is written"),
    _point("server.quality.before", "xfed.server.quality:archive_quality", "before", "all models are written"),
    _point("server.quality.after", "xfed.server.quality:archive_quality", "after",
           "everything is measured, nothing reported"),
    _point("server.report.json", _WRITE, "after", "report.json is written, report.html is not", path=r"/report\.json$"),
    _point("server.report.after", "xfed.server.report:write_report", "after",
           "the report is written, the journal says unfinished"),
    _point("server.end.before", "xfed.server.link:LinkGrid.end", "before", "the study is finished, the sites were not told"),
    # the site's agent
    _point("agent.worker.after", "xfed.client.worker:Worker.start", "after", "a worker runs, its agent dies"),
    _point("agent.connect.before", "xfed.client.link:FleetLink.connect", "before", "the site is not online"),
    _point("agent.activate.after", f"{_FLEET}.ActivateNode", "after",
           "the coordinator takes the site for online, it has no node number"),
    _point("agent.connect.after", "xfed.client.link:FleetLink.connect", "after", "the site is online and dies at once"),
    _point("agent.pull.after", f"{_FLEET}.PullObject", "after", "part of a request has come", calls=8),
    _point("agent.confirm.before", f"{_FLEET}.ConfirmMessageReceived", "before", "a whole request, not confirmed", calls=8),
    _point("agent.confirm.after", f"{_FLEET}.ConfirmMessageReceived", "after",
           "a confirmed request that nobody will answer", calls=8),
    _point("agent.ask.before", "xfed.client.worker:Worker.ask", "before", "the worker was not asked", calls=8),
    _point("agent.ask.after", "xfed.client.worker:Worker.ask", "after", "the answer is stored, not sent", calls=8),
    _point("agent.push.before", f"{_FLEET}.PushMessages", "before", "nothing of the answer was sent", calls=8),
    _point("agent.push.after", f"{_FLEET}.PushMessages", "after",
           "the answer is announced, its objects are not sent", calls=8),
    _point("agent.object.after", f"{_FLEET}.PushObject", "after", "some objects of the answer are sent", calls=8),
    _point("agent.send.after", "xfed.client.link:FleetLink.send", "after", "the whole answer is sent", calls=8),
    # the site's worker: desk and audit log
    _point("worker.start.after", "xfed.client.desk:Desk.__init__", "after", "the worker holds the site's lock"),
    _point("worker.asked.before", "xfed.client.audit:AuditLog.asked", "before", "a request was read, not logged", calls=8),
    _point("worker.asked.after", "xfed.client.audit:AuditLog.asked", "after", "a request is logged, not weighed", calls=8),
    _point("worker.audit.torn", "xfed.client.audit:put", "torn", "half a line of audit.jsonl", calls=12),
    _point("worker.plan.after", "xfed.client.approval:Plans.receive", "after",
           "a plan is kept, the coordinator does not know"),
    _point("worker.left.before", "xfed.client.audit:AuditLog.left", "before", "an answer is stored, not logged", calls=8),
    _point("worker.left.after", "xfed.client.audit:AuditLog.left", "after", "an answer is logged, not sent", calls=8),
    _point("worker.reply.torn", "xfed.client.worker:write_frame", "torn",
           "half an answer is in the pipe to the agent", calls=8),
    _point("worker.reply.after", "xfed.client.worker:write_frame", "after", "the agent has the answer", calls=8),
    # the site's worker: training
    _point("worker.gan.before", "xfed.common.gan:train_gan_round", "before", "a round is about to be trained", calls=4),
    _point("worker.gan.after", "xfed.common.gan:train_gan_round", "after",
           "a round is trained, nothing of it on disk", calls=4),
    _point("worker.state.torn", _FSYNC, "torn", "half a state under its temporary name", path=r"/state/\..*\.tmp", calls=4),
    _point("worker.state.rename.before", _RENAME, "before",
           "a whole state under its temporary name", path=r"/state/", calls=4),
    _point("worker.state.rename.after", _RENAME, "after",
           "the state is on disk, its answer is not", path=r"/state/", calls=4),
    _point("worker.answer.before", "xfed.client.answers:Answers.keep", "before",
           "an answer is computed, not stored", calls=6),
    _point("worker.answer.torn", _FSYNC, "torn",
           "half an answer under its temporary name", path=r"/answers/\..*\.tmp", calls=6),
    _point("worker.answer.rename.after", _RENAME, "after",
           "an answer is stored, old ones are not removed", path=r"/answers/", calls=6),
    _point("worker.answer.after", "xfed.client.answers:Answers.keep", "after", "an answer is stored", calls=6),
    _point("worker.classifier.before", "xfed.common.classifier:train_round", "before",
           "a classifier is about to be trained", calls=2),
    _point("worker.classifier.after", "xfed.common.classifier:train_round", "after",
           "a classifier is trained, nothing on disk", calls=2),
    _point("worker.score.after", f"{_SITE}._score", "after", "a classifier is scored, nothing on disk", calls=3),
    _point("worker.measure.after", f"{_SITE}._measure", "after", "the archive is measured, nothing on disk"),
    # the site's worker: the archive, secure sums
    _point("worker.offer.after", f"{_SITE}._wanted", "after", "the archive's list is kept, no shard"),
    _point("worker.shard.torn", _FSYNC, "torn",
           "half a shard under its temporary name", path=r"/archive/\.[0-9a-f]{64}\..*\.tmp"),
    _point("worker.shard.after", f"{_SITE}._keep_archive", "after", "a shard is kept, the coordinator does not know"),
    _point("worker.keys.before", "xfed.common.secure_sum:new_session", "after",
           "session keys are made, not on disk", calls=3, only="secure"),
    _point("worker.keys.after", f"{_SUMS}.advertise", "after", "session keys are on disk, not sent", calls=3, only="secure"),
    _point("worker.shares.before", "xfed.common.secure_sum:exchange", "after",
           "shares are made, not on disk", calls=3, only="secure"),
    _point("worker.shares.after", f"{_SUMS}.share", "after", "shares are on disk, not sent", calls=3, only="secure"),
    _point("worker.mask.before", "xfed.common.secure_sum:mask", "after",
           "an answer is masked, the session does not know", calls=4, only="secure"),
    _point("worker.mask.after", f"{_SUMS}.mask", "after",
           "the session knows what was masked, nothing left", calls=4, only="secure"),
    _point("worker.unmask.before", "xfed.common.secure_sum:reveal", "after",
           "shares are opened, the session is not closed", calls=3, only="secure"),
    _point("worker.unmask.after", f"{_SUMS}.unmask", "after",
           "the session is closed, the shares were not sent", calls=3, only="secure"),
)
# fmt: on


def points_of(kind: Kind) -> tuple[Point, ...]:
    """The points that a study of this kind passes."""
    return tuple(point for point in POINTS if point.only in (None, kind))
