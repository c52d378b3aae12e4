"""`xfed-sim study`: the honest experiment. DS1, DS2, DS3 and their controls, over folds, seeds, sites and skews.

::

    CONFIG + --set --> Study.experiment --study_grid--> tasks --study_pool--> OUT/cells/<cell>/<task>/outcomes.npz
                                                                --study_results--> OUT/study.json
                                                                --study_report--> OUT/study.html, figures/, tables/

Whatever is finished is reported, and what is not is named; the same command goes on. `OUT/study.yaml` keeps what was asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from xfed.common.config import Study
from xfed.common.devices import choose_device
from xfed.common.durable import exclusive, write_json, write_text
from xfed.simulations.study_grid import cells_of, check_arms, tasks_of
from xfed.simulations.study_pool import Progress, check_failures, run_tasks
from xfed.simulations.study_privacy import privacy_rows
from xfed.simulations.study_report import write_study_report
from xfed.simulations.study_results import study_values

__all__ = ["conduct_study"]


def conduct_study(
    study: Study,
    out: Path,
    data: Path | None,
    *,
    jobs: int = 0,
    utility: Sequence[Path] = (),
    progress: Progress,
) -> Path:
    """Run what is not finished, `jobs` tasks at a time (0: one per core), and report; returns study.html's path.

    `utility`: folders of `xfed.simulations.privacy_utility`, shown beside. Raises `ConfigError`, and `XfedError` after the report
    is written when tasks failed.
    """
    check_arms(study)
    choose_device(study.runtime.device)
    rows = [row for folder in utility for row in privacy_rows(folder)]
    tasks = [task for cell in cells_of(study) for task in tasks_of(cell)]
    with exclusive(out):
        write_text(out / "study.yaml", yaml.safe_dump(study.resolved(), sort_keys=False, allow_unicode=True))
        failed = run_tasks(tasks, out, data, jobs or os.cpu_count() or 1, progress)
        values = study_values(study, out, data, rows, failed)
        write_json(out / "study.json", values)
        page = write_study_report(out, values)
    check_failures(failed)
    return page
