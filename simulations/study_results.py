"""From finished tasks to study.json: scores of every arm, paired differences, the verdict, the confounder.

::

    cells of a group (sites, skew) x models: outcomes.npz of all folds --concatenated--> Outcomes per arm and seed
      --study_statistics--> scores with intervals (the patient as the unit), paired differences, a sentence
    report.json of each run --> curves, seconds; census --> images per class and arm; label file --> views

Planned comparisons are the baseline arm against every other one of its group, fixed before anything is run: intervals and
p-values are corrected for their number. A fold that is missing for one arm is left out for that arm, and said.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from xfed.client.store import Store, open_store
from xfed.common.arms import ARMS, recipe
from xfed.common.config import Study
from xfed.common.errors import XfedError
from xfed.common.version import SOFTWARE
from xfed.server.archive import plan_counts
from xfed.simulations.hospitals import site_folders
from xfed.simulations.study_grid import ALONE, Task, arm_titles, cells_of, tasks_of
from xfed.simulations.study_job import OUTCOMES, read_outcomes
from xfed.simulations.study_statistics import Outcomes, compare, corrected_t, holm, interval, scores, verdict
from xfed.simulations.study_views import by_view, table_of, view_of_pixels, view_only, views_of

__all__ = ["study_values"]

# the verdict is about real images alone, with as many steps on them, too, where DS3 takes more
_CONTROLS = ("DS1", "longer")
SCORES = ("balanced_accuracy", "accuracy", "auc")


@dataclass(frozen=True, kw_only=True)
class _Done:
    """A finished task with what it made of the test images."""

    task: Task
    folder: Path
    arrays: Mapping[str, Any]


def study_values(
    study: Study,
    out: Path,
    data: Path | None,
    privacy: Sequence[Mapping[str, Any]] = (),
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that the report says; see `xfed.simulations.study_report`. Raises `XfedError` where nothing is finished."""
    done = [found for cell in cells_of(study) for task in tasks_of(cell) if (found := _finished(task, out)) is not None]
    if not done:
        raise XfedError(f"{out}: no task of this study is finished, so there is nothing to report")
    groups: dict[tuple[str, str], list[_Done]] = defaultdict(list)
    for found in done:
        groups[found.task.cell.group, found.task.model].append(found)
    experiment = study.experiment
    own = study.classifier.model
    for (name, model), members in groups.items():
        if model != own and not any(member.task.arm == "DS1" for member in members):
            members += [member for member in groups.get((name, own), []) if member.task.base]
    known = view_of_pixels(data, study) if data is not None else {}
    views = _Views(study, out, known) if known else None
    return {
        "schema": 1,
        "name": study.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": SOFTWARE,
        "classes": list(study.classes),
        "image_size": study.image_size,
        "source": study.data.source,
        "guessing": 1 / len(study.classes),
        "grid": {
            "folds": experiment.folds,
            "seeds": list(experiment.seeds or (study.seed,)),
            "cells": len(cells_of(study)),
            "confidence": experiment.confidence,
            "replicates": experiment.replicates,
        },
        "arms": {arm: {"title": title} for arm, title in arm_titles(experiment.arms).items()},
        "groups": [_group(study, name, model, members, out) for (name, model), members in groups.items()],
        "generators": {name: _generators(members) for (name, model), members in groups.items() if model == own},
        "confounder": views.section(groups) if views is not None else None,
        "privacy": list(privacy),
        "failed": dict(failed or {}),
    }


def _finished(task: Task, out: Path) -> _Done | None:
    folder = task.folder(out)
    if not (folder / OUTCOMES).is_file():
        return None
    return _Done(task=task, folder=folder, arrays=read_outcomes(folder))


def _by_arm(members: Sequence[_Done]) -> dict[str, dict[int, list[_Done]]]:
    """Arm -> seed -> its folds in order."""
    table: dict[str, dict[int, list[_Done]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        table[member.task.arm][member.task.cell.seed].append(member)
    for seeds in table.values():
        for folds in seeds.values():
            folds.sort(key=lambda member: member.task.cell.fold)
    return table


def _outcomes(folds: Sequence[_Done]) -> Outcomes:
    def joined(name: str) -> Any:
        return np.concatenate([member.arrays[name] for member in folds])

    models = min(member.arrays["probabilities"].shape[0] for member in folds)
    return Outcomes(
        patients=joined("patients"),
        labels=joined("labels"),
        folds=np.concatenate([np.full(len(member.arrays["labels"]), member.task.cell.fold) for member in folds]),
        probabilities=np.concatenate([member.arrays["probabilities"][:models] for member in folds], axis=1),
    )


def _group(study: Study, name: str, model: str, members: list[_Done], out: Path) -> dict[str, Any]:
    experiment = study.experiment
    table = _by_arm(members)
    order = [arm for arm in experiment.arms if arm in table]
    runs = {arm: [_outcomes(folds) for _, folds in sorted(table[arm].items())] for arm in order}
    counts = _counts(study, members, out)
    first = runs[order[0]][0]
    cell = members[0].task.cell
    return {
        "id": f"{name}-{model}",
        "sites": cell.study.sites.count,
        "skew": "even" if cell.study.sites.partition == "even" else f"dirichlet {cell.study.sites.alpha:g}",
        "model": model,
        "images": len(first.labels),
        "patients": len(np.unique(first.patients)),
        "arms": {arm: _arm(study, runs[arm], table[arm], counts.get(arm)) for arm in order},
        **_comparisons(study, order, runs, table),
    }


def _arm(study: Study, runs: list[Outcomes], seeds: Mapping[int, list[_Done]], counts: Any) -> dict[str, Any]:
    experiment, classes = study.experiment, len(study.classes)
    folds = [member for of_seed in seeds.values() for member in of_seed]
    single = [scores(_outcomes([member]), classes) for member in folds]

    def told(score: str, values: list[float | None]) -> dict[str, Any]:
        here = [value for value in values if value is not None]
        if not here:
            return dict.fromkeys(("value", "low", "high", "mean", "sd"))
        value, low, high = interval(
            runs, score, confidence=experiment.confidence, replicates=experiment.replicates, seed=study.seed
        )
        mean, sd = (float(np.mean(here)), float(np.std(here, ddof=1))) if len(here) > 1 else (value, None)
        return {"value": value, "low": low, "high": high, "mean": mean, "sd": sd}

    facts: dict[str, Any] = {
        "runs": len(folds),
        "seeds": len(seeds),
        "folds": len({member.task.cell.fold for member in folds}),
        **{score: told(score, [getattr(found, score) for found in single]) for score in SCORES},
        "per_class": {
            name: {
                "sensitivity": told(f"sensitivity:{label}", [found.sensitivity[label] for found in single]),
                "auc": told(f"class_auc:{label}", [found.class_auc[label] for found in single]),
                "n": int((runs[0].labels == label).sum()),
            }
            for label, name in enumerate(study.classes)
        },
        "counts": counts,
        "curve": _curve(folds),
        "seconds": sum(_seconds(member.folder) for member in folds) / len(folds),
    }
    return facts


def _comparisons(
    study: Study,
    order: Sequence[str],
    runs: Mapping[str, list[Outcomes]],
    table: Mapping[str, Mapping[int, list[_Done]]],
) -> dict[str, Any]:
    experiment = study.experiment
    base = experiment.baseline
    if base not in runs:
        return {"comparisons": [], "planned": 0, "verdict": f"No verdict: no run of {base} is finished."}
    planned = [arm for arm in experiment.arms if arm != base]
    results = []
    for arm in order:
        if arm == base:
            continue
        pairs = _paired(table[base], table[arm])
        if not pairs:
            continue
        ours, theirs = ([_outcomes(side) for side in sides] for sides in zip(*pairs, strict=True))
        found = compare(
            ours,
            theirs,
            "balanced_accuracy",
            comparisons=len(planned),
            confidence=experiment.confidence,
            replicates=experiment.replicates,
            seed=study.seed,
        )
        mean, low, high = corrected_t(found.per_fold, 1 / experiment.folds)
        results.append(
            {
                "a": base,
                "b": arm,
                "score": "balanced_accuracy",
                **{key: value for key, value in asdict(found).items() if key != "per_fold"},
                "per_fold": list(found.per_fold),
                "sentence": verdict(base, arm, found, len(planned)),
                "t": {"mean": mean, "low": low, "high": high},
            }
        )
    # what is planned and not finished counts as well, as it does in the intervals
    values = [facts["p"] for facts in results] + [1.0] * (len(planned) - len(results))
    for facts, adjusted in zip(results, holm(values), strict=False):
        facts["p_holm"] = adjusted
    told = [facts["sentence"] for arm in _CONTROLS for facts in results if facts["b"] == arm] or [
        facts["sentence"] for facts in results[:1]
    ]
    sentence = " ".join(told) or f"No verdict: {base} has no finished arm beside it."
    return {"comparisons": results, "planned": len(planned), "verdict": sentence}


def _paired(
    ours: Mapping[int, list[_Done]], theirs: Mapping[int, list[_Done]]
) -> list[tuple[list[_Done], list[_Done]]]:
    """Per seed, the folds that both arms have finished."""
    pairs = []
    for seed in sorted(set(ours) & set(theirs)):
        mine, other = ({member.task.cell.fold: member for member in side[seed]} for side in (ours, theirs))
        shared = sorted(set(mine) & set(other))
        if shared:
            pairs.append(([mine[fold] for fold in shared], [other[fold] for fold in shared]))
    return pairs


def _report(folder: Path) -> dict[str, Any]:
    path = sorted(folder.glob("run*/report.json"))[0]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _seconds(folder: Path) -> float:
    """Seconds of rounds, from the journal's exchanges, over all runs of a task."""
    return float(
        sum(
            sum(json.loads(path.read_text(encoding="utf-8")).get("timings", {}).values())
            for path in folder.glob("run*/report.json")
        )
    )


def _curve(folds: Sequence[_Done]) -> dict[str, Any]:
    """Balanced validation accuracy by round, over all runs that reached the round."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for member in folds:
        for facts in next(iter(_report(member.folder)["arms"].values()))["rounds"]:
            if facts.get("validation_balanced_accuracy") is not None:
                by_round[facts["round"]].append(facts["validation_balanced_accuracy"])
    rounds = sorted(number for number, values in by_round.items() if len(values) == len(folds))
    return {
        "round": rounds,
        "mean": [float(np.mean(by_round[number])) for number in rounds],
        "sd": [float(np.std(by_round[number], ddof=1)) if len(by_round[number]) > 1 else 0.0 for number in rounds],
        "runs": len(folds),
    }


def _stores(task: Task, out: Path) -> list[Store]:
    run = task.base_folder(out) / "run"
    return [open_store(folder / "store") for folder in site_folders(run, task.cell.study)]


def _counts(study: Study, members: Sequence[_Done], out: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Training images per class behind each arm, in the first fold (Figure 4 of the paper)."""
    task = min((member.task for member in members), key=lambda task: task.cell.fold)
    stores = _stores(task, out)
    per_site = np.stack([store.counts()[0] for store in stores])
    report = _report(task.base_folder(out))
    drawn = {name: int(report["archive"]["counts"][name]) for name in study.classes}
    filled = plan_counts(study, dict(zip(study.classes, per_site.sum(0).tolist(), strict=True)))
    least = np.where(per_site > 0, per_site, np.iinfo(np.int64).max).min(1)
    balanced = (np.minimum(per_site, least[:, None]) * (per_site > 0)).sum(0)
    result = {}
    for arm in study.experiment.arms:
        taught = recipe(arm) if arm in map(str, ARMS) else recipe("DS1")
        real = {"all": per_site.sum(0), "balanced": balanced, "none": np.zeros_like(balanced)}[taught.real]
        if arm == ALONE:
            real = per_site.mean(0)
        result[arm] = {
            name: {
                "real": round(float(real[label])) + (filled[name] if arm == "duplicated" else 0),
                "synthetic": drawn[name] if taught.synthetic else 0,
            }
            for label, name in enumerate(study.classes)
        }
    return result


def _generators(members: Sequence[_Done]) -> dict[str, Any]:
    """Scores of the archive per class: means over the bases."""
    found = [_report(member.folder)["archive"]["quality"] for member in members if member.task.base]
    result: dict[str, Any] = {}
    for name in found[0] if found else ():
        keys = {key for quality in found for key, value in quality[name].items() if isinstance(value, float)}
        result[name] = {
            key: float(np.mean(values))
            for key in sorted(keys)
            if (values := [quality[name][key] for quality in found if isinstance(quality[name].get(key), float)])
        }
    return result


class _Views:
    """The views of the test images of a study."""

    def __init__(self, study: Study, out: Path, known: Mapping[str, str]) -> None:
        self._study, self._out, self._known = study, out, known

    def _of(self, member: _Done) -> list[str]:
        stores, arrays = _stores(member.task, self._out), member.arrays
        parts = []
        for index, store in enumerate(stores):
            rows = arrays["rows"][arrays["sites"] == index]
            parts += views_of(store.images[rows], self._known)
        return parts

    def section(self, groups: Mapping[tuple[str, str], list[_Done]]) -> dict[str, Any] | None:
        """The report's `confounder`."""
        study = self._study
        arms: dict[str, Any] = {}
        table: dict[str, dict[str, int]] = {}
        alone: dict[str, Any] = {}
        for (name, model), members in groups.items():
            by_arm = _by_arm(members)
            arms[f"{name}-{model}"] = {}
            for arm, seeds in by_arm.items():
                folds = seeds[min(seeds)]
                views = [view for member in folds for view in self._of(member)]
                outcomes = _outcomes(folds)
                if not any(views):
                    return None
                arms[f"{name}-{model}"][arm] = by_view(views, outcomes.labels, outcomes.probabilities, study.classes)
                if arm == "DS1" and not table:
                    table = table_of(views, outcomes.labels, study.classes)
                    alone = self._alone(views, outcomes)
        return {
            "view": study.experiment.view_column,
            "table": table,
            "view_only": alone,
            "arms": arms,
            "note": "first seed; views with fewer than 20 images of a class leave that class out",
        }

    def _alone(self, views: Sequence[str], outcomes: Outcomes) -> dict[str, Any]:
        told = view_only(views, outcomes.labels, len(self._study.classes))
        reader = Outcomes(
            patients=outcomes.patients, labels=outcomes.labels, folds=outcomes.folds, probabilities=told[None]
        )
        experiment = self._study.experiment
        value, low, high = interval(
            [reader], "balanced_accuracy", confidence=experiment.confidence, replicates=experiment.replicates
        )
        return {"balanced_accuracy": {"value": value, "low": low, "high": high}}
