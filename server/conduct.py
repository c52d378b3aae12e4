"""A whole study from the coordinator's chair: three phases, then the facts of the report.

::

    join --> train_generators --> build_archive --> deliver_archive
         --> train_classifiers --> archive_quality --> judge_archive (vote, attacks) --> report.json, report.html

    archive.reuse: join --> the archive that is there --> deliver_archive --> train_classifiers --> report.json, report.html

Each step begins by looking at what is on disk, so that running a killed study again goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.arms import recipe
from xfed.common.config_family import sample_names
from xfed.common.durable import sha256_file
from xfed.common.errors import FederationError
from xfed.common.messages import Describe, Description, Examples, Reply, Request, ShowExamples
from xfed.common.version import versions
from xfed.common.weights import digest_of
from xfed.server.archive import build_archive, deliver_archive, read_archive, reused_archive
from xfed.server.archive_release import release_archive
from xfed.server.archive_subset import delivered, delivered_manifest, recover
from xfed.server.census import Census, census_of
from xfed.server.classifiers import ArmResult, train_classifiers
from xfed.server.generators import Generators, train_generators
from xfed.server.heat_panels import heat_panels
from xfed.server.passport import write_passport
from xfed.server.privacy import privacy_section
from xfed.server.quality import archive_quality
from xfed.server.report import verdict, write_report
from xfed.server.report_signature import sign_report
from xfed.server.run import ALL_SITES, Run
from xfed.server.siblings import generator_cost
from xfed.server.steering import agreement, judged_by, train_steering
from xfed.server.synthetic_arm import score_synthetic_arm
from xfed.server.votes import judge_archive

__all__ = ["conduct"]

SHOWN = 6
REUSED = "the archive existed before this study: its own report and passport say what it is worth"
CENSUS = "census"


def conduct(run: Run) -> dict[str, Any]:
    """Run or continue the study; returns the report that was written. Raises `XfedError`."""
    study = run.study
    if study.secure and not study.private:  # declared sizes are public
        run = dataclasses.replace(run, census=_count_securely(run))
    if study.archive.reuse is not None:
        return conduct_on_archive(run)
    generators = train_generators(run)
    recover(run.folder / "archive")
    build_archive(run, generators.weights, train_steering(run) if study.unlabelled else None)
    received = delivered_manifest(run.folder)
    _, images, labels = delivered(run.folder, study.labels)
    deliver_archive(run, received["root_sha256"], images, labels)
    one = labels < len(study.classes)  # the others show several findings: they are in no arm
    arms = train_classifiers(run, images[one], labels[one])
    judge = "DS1" if "DS1" in arms else next(iter(arms))
    quality = archive_quality(run, judge, arms[judge].weights, images[one], labels[one])
    quality["tstr"] = score_synthetic_arm(run, images[one], labels[one])
    if study.unlabelled:
        seen = agreement(study, arms[judge].weights, images, labels)
        quality["steering"] = judged_by(received["steering"], seen, judge)
    judged = judge_archive(run, judge, arms[judge].weights)
    manifest, quality["privacy_tests"] = judged.manifest, judged.facts
    report = {
        **_header(run),
        "arms": {name: _arm(run, name, arm, received["counts"]) for name, arm in arms.items()},
        "gan": {
            "classes": {
                name: {
                    "sites": [] if study.secure else list(generators.holders[name]),
                    "holders": int(run.census.holders[label]),
                    "rounds": generators.history[name],
                }
                for label, name in enumerate(study.generators)
            },
            "family": study.gan.family,
            "progress_rounds": sorted(generators.progress),
            "progress_of": sample_names(study.classes, study.gan.family),
            "cost": generator_cost(run, received),
        },
        "archive": {"counts": manifest["counts"], "root_sha256": received["root_sha256"], **quality},
        "privacy": privacy_section(run, generators.holders),
        **_from_journal(run),
        "versions": versions(),
        "digests": _digests(run.folder, arms, manifest),
    }
    panels = _panels(run, generators, images[judged.kept], labels[judged.kept])
    write_report(run.folder, report, panels | heat_panels(study, arms[judge].weights, panels))
    write_passport(run.folder, report)
    release_archive(run.folder, report, verdict(report))
    sign_report(run.folder)
    run.journal.write("finished", study=study.digest)
    return report


def conduct_on_archive(run: Run) -> dict[str, Any]:
    """Run or continue a study on an archive that exists (`archive.reuse`): phase 3 and its report. Raises `XfedError`."""
    study = run.study
    received = reused_archive(run.folder / "archive", study)
    images, labels = read_archive(run.folder / "archive", study.labels)
    deliver_archive(run, received["root_sha256"], images, labels)
    one = labels < len(study.classes)
    arms = train_classifiers(run, images[one], labels[one])
    report = {
        **_header(run),
        "arms": {name: _arm(run, name, arm, received["counts"]) for name, arm in arms.items()},
        "archive": {"counts": received["counts"], "root_sha256": received["root_sha256"], "left_out": REUSED},
        "privacy": privacy_section(run, {}),
        **_from_journal(run),
        "versions": versions(),
        "digests": _digests(run.folder, arms, received),
    }
    panels = {"synthetic": np.stack([_first(images[labels == label]) for label in range(len(study.classes))])}
    write_report(run.folder, report, panels)
    sign_report(run.folder)
    run.journal.write("finished", study=study.digest)
    return report


def _header(run: Run) -> dict[str, Any]:
    study = run.study
    return {
        "schema": 1,
        "name": study.name,
        "study_digest": study.digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": list(study.classes),
        "source": study.data.source,
        "image_size": study.image_size,
        "sites": _sites(run),
        "totals": {"patients": run.census.patients, "counts": _counts(run, run.census.counts)},
        "secure_aggregation": study.secure,
    }


def _count_securely(run: Run) -> Census:
    """The census of a secure study: the sum of the sites' counts, asked for once in its life. Raises `FederationError`."""
    if (checkpoint := run.checkpoints.latest(CENSUS)) is not None:
        return Census(**checkpoint.arrays, patients=checkpoint.facts["patients"], sites={})
    found: list[Description] = []

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, Description):
            raise FederationError(f"{site} answered {type(reply).__name__} to Describe")
        found.append(reply)

    run.sum(CENSUS, 0, [Describe(study=run.study.digest)], [run.exchange.sites], fold)
    census = census_of({ALL_SITES: found[0]}, len(run.study.classes), secure=True)
    arrays = {"counts": census.counts, "drawn": census.drawn, "holders": census.holders}
    run.checkpoints.save(CENSUS, 0, arrays, {"patients": census.patients})
    return census


def _sites(run: Run) -> dict[str, Any]:
    result = {}
    for site, description in run.descriptions.items():
        counts = run.census.sites.get(site)
        result[site] = {
            "patients": description.patients if counts is not None else None,
            "counts": _counts(run, counts) if counts is not None else None,
        }
    return result


def _counts(run: Run, counts: npt.NDArray[np.int64]) -> dict[str, dict[str, int]]:
    return {
        name: {split: int(counts[row, label]) for row, split in enumerate(("train", "validation", "test"))}
        for label, name in enumerate(run.study.classes)
    }


def _arm(run: Run, name: str, arm: ArmResult, synthetic: Mapping[str, int]) -> dict[str, Any]:
    classes = run.study.classes
    real = {c: int(run.census.counts[0, label]) for label, c in enumerate(classes)}
    return {
        **arm.test,
        "sites": arm.sites,
        "rounds": arm.rounds,
        "best_round": arm.best_round,
        "stopped": arm.stopped,
        **_taught_from(name, classes, real, synthetic),
    }


def _taught_from(
    name: str, classes: tuple[str, ...], real: Mapping[str, int], synthetic: Mapping[str, int]
) -> dict[str, Any]:
    """Images per class behind an arm; nothing where each site left images out by itself, for only the site knows how many."""
    taught = recipe(name)
    if taught.real == "balanced":
        return {}
    return {
        "counts": {
            c: {
                "real": real[c] if taught.real == "all" else 0,
                "synthetic": synthetic[c] if taught.synthetic else 0,
            }
            for c in classes
        }
    }


def _from_journal(run: Run) -> dict[str, Any]:
    """Traffic per site, seconds per phase, problems: all summed from events.jsonl, so that a resumed study counts everything."""
    traffic: dict[str, dict[str, Any]] = {
        site: {"sent_bytes": 0, "received_bytes": 0, "messages": defaultdict(int)} for site in run.exchange.sites
    }
    timings: dict[str, float] = defaultdict(float)
    events = []
    for event in run.journal.read():
        match event["kind"]:
            case "exchange":
                timings[event["phase"]] += event["seconds"]
                for site, entry in event["traffic"].items():
                    if site not in traffic:
                        continue
                    # seen from the hospital: what the coordinator received is what the site sent
                    traffic[site]["sent_bytes"] += entry["received"]
                    traffic[site]["received_bytes"] += entry["sent"]
                    for message, count in entry["messages"].items():
                        traffic[site]["messages"][message] += count
            case "problem":
                events.append(
                    {"time": event["time"], "kind": event["phase"], "site": event["site"], "text": event["text"]}
                )
            case "joining" | "presence":
                events.append(
                    {"time": event["time"], "kind": event["kind"], "site": event["site"], "text": event["text"]}
                )
            case "started" | "resumed":
                events.append({"time": event["time"], "kind": event["kind"], "site": "", "text": event["text"]})
    return {"traffic": traffic, "timings": dict(timings), "events": events}


def _digests(folder: Path, arms: Mapping[str, ArmResult], manifest: Mapping[str, Any]) -> dict[str, str]:
    result = {f"classifier-{name} weights": digest_of(arm.weights) for name, arm in arms.items()}
    result |= {f"generator {name} weights": digest for name, digest in manifest["generators"].items()}
    result["archive root"] = manifest["root_sha256"]
    result["config.yaml"] = sha256_file(folder / "config.yaml")
    return result


def _panels(
    run: Run, generators: Generators, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.uint8]]:
    panels = {
        "synthetic": np.stack([_first(images[labels == label]) for label in range(len(run.study.classes))]),
        "progress": np.stack([generators.progress[round] for round in sorted(generators.progress)]),
    }
    willing = [site for site in run.exchange.sites if run.descriptions[site].share_examples and not run.study.private]
    if willing:
        shown: list[npt.NDArray[np.uint8]] = []

        def fold(site: str, request: Request, reply: Reply) -> None:
            if not isinstance(reply, Examples):
                raise FederationError(f"{site} answered {type(reply).__name__} to ShowExamples")
            shown.append(reply.arrays["images"])

        request = ShowExamples(study=run.study.digest, count=SHOWN)
        run.ask("examples", 0, [(site, request) for site in willing[:1]], fold)
        panels["real"] = shown[0]
    return panels


def _first(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The first images of a class, black ones where there are fewer than `SHOWN`."""
    result = np.zeros((SHOWN, *images.shape[1:]), dtype=np.uint8)
    result[: len(images[:SHOWN])] = images[:SHOWN]
    return result
