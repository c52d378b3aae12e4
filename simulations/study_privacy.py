"""Private runs beside the study: rows of `xfed.simulations.privacy_utility` as the study's report shows them.

::

    DIR/utility.json: a row per method and epsilon --privacy_rows--> one row per method, epsilon and arm
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xfed.common.errors import DataError

__all__ = ["privacy_rows"]


def privacy_rows(folder: Path) -> list[dict[str, Any]]:
    """{epsilon (None: not private), delta, arm, generators, recognised, balanced_accuracy {value, low, high}, exact}.

    `exact` is without noise, which only a simulation can know. Raises `DataError`.
    """
    path = folder / "utility.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [
            {
                "epsilon": row["epsilon"],
                "delta": row["delta"],
                "arm": arm,
                "generators": row["method"],
                "recognised": row["recognised_balanced"],
                "balanced_accuracy": {
                    "value": facts["balanced_accuracy"],
                    "low": facts["interval"][0],
                    "high": facts["interval"][1],
                },
                "exact": facts["without_noise"],
            }
            for row in found
            for arm, facts in row["arms"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} holds no table of privacy_utility ({error})") from error
