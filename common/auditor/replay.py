"""`xfed-audit replay`: does anything but the noised sums tell of a patient?

::

    python -m xfed.simulations.neighbours (the audited software, in a process of its own)
        --> <pair>/with/wire.bin, <pair>/without/wire.bin --compared here, byte by byte--> differing bytes

Both sites answer the same requests; the second lacks one patient, and its mechanism gives out what the first one's did. So all
bytes must be equal: a count, a loss, a shape, an order that hangs on the patient shows as a difference.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from xfed.common.errors import CheckpointError

__all__ = ["compare_pair", "replay"]


def compare_pair(folder: Path) -> dict[str, Any]:
    """Bytes on the wire of both sites of a pair, how many differ, and where the first does (None: nowhere)."""
    first, second = ((folder / side / "wire.bin").read_bytes() for side in ("with", "without"))
    differing = sum(a != b for a, b in zip(first, second, strict=False)) + abs(len(first) - len(second))
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None and len(first) != len(second):
        place = min(len(first), len(second))
    return {"pair": folder.name, "bytes": len(first), "differing": differing, "first_at": place}


def replay(pairs: int, seed: int) -> dict[str, Any]:
    """Run `pairs` neighbouring pairs and compare them. Raises `CheckpointError` when the audited software fails."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "xfed.simulations.neighbours", "--out", name]
        done = subprocess.run(
            [*command, "--pairs", str(pairs), "--seed", str(seed)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CheckpointError(f"the audited software failed on neighbouring data:\n{done.stderr[-2000:]}")
        found = [compare_pair(folder) for folder in sorted(Path(name).iterdir())]
    return {
        "pairs": len(found),
        "bytes": sum(one["bytes"] for one in found),
        "differing_bytes": sum(one["differing"] for one in found),
        "different": [one for one in found if one["differing"]],
    }
