"""Full disks and damaged files.

::

    Disk: a tmpfs of some MiB over a party's folder (root only) --fill--> a file of zeros until nothing fits --release--> gone
    damage: the newest file of a kind in a dead party's folder --truncate | garble | empty--> what it finds when it starts again
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

from xfed.common.config import Study
from xfed.simulations.chaos_schedule import Fault

__all__ = ["Disk", "damage", "mounts_allowed"]

SIZE_MIB = 96
_BALLAST = ".ballast"


def mounts_allowed() -> bool:
    """Whether a small file system can be mounted here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


class Disk:
    """A small disk under `folder`. Where none can be mounted, `fill` returns False and the party has to pretend."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mounted = False
        self._until = 0.0

    def mount(self) -> None:
        """Before anything is in the folder."""
        self._folder.mkdir(parents=True)
        if mounts_allowed():
            command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=0700", "tmpfs", str(self._folder)]
            self._mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, seconds: float) -> bool:
        """Leave no byte free until `seconds` from now."""
        self._until = time.monotonic() + seconds
        if not self._mounted:
            return False
        with (self._folder / _BALLAST).open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        return True

    def release(self, due_only: bool = False) -> None:
        """Give the space back, or do so only if it is time."""
        if self._until and (not due_only or time.monotonic() >= self._until):
            self._until = 0.0
            (self._folder / _BALLAST).unlink(missing_ok=True)

    def unmount(self) -> None:
        """Keep what is on it, in an ordinary folder of the same name."""
        if not self._mounted:
            return
        self.release()
        copy = self._folder.with_name(f"{self._folder.name}.copy")
        shutil.copytree(self._folder, copy)
        subprocess.run(["umount", "-l", str(self._folder)], capture_output=True, check=True)  # noqa: S607
        self._folder.rmdir()
        copy.rename(self._folder)
        self._mounted = False


def _newest(folder: Path, what: str, study: Study) -> Path | None:
    patterns = {
        "checkpoint": f"runs/{study.name}/checkpoints/*.safetensors",
        "events": f"runs/{study.name}/events.jsonl",
        "answer": "studies/*/answers/*.safetensors",
        "state": "studies/*/state/*.safetensors",
        "shard": "studies/*/archive/*.safetensors",
        "session": "studies/*/secure/*",
        "node": "node",
    }
    found = [path for path in folder.glob(patterns[what]) if not path.name.startswith(".")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def damage(folder: Path, fault: Fault, study: Study) -> str:
    """Damage the newest file of the fault's kind; says what was done."""
    what, how = str(fault.detail["what"]), str(fault.detail["how"])
    path = _newest(folder, what, study)
    if path is None:
        return f"there was no {what} to damage"
    data = path.read_bytes()
    if what == "events":  # a log is only ever torn at its end
        end = data.rstrip(b"\n").rfind(b"\n") + 1
        kept = {"truncate": data[: (end + len(data)) // 2], "garble": data[:end] + b"\0" * 40, "empty": data[:end]}[how]
    else:
        middle = len(data) // 2
        garbled = data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 64]) + data[middle + 64 :]
        kept = {"truncate": data[:middle], "garble": garbled, "empty": b""}[how]
    with contextlib.suppress(OSError):
        path.write_bytes(kept)
        return f"{how}: {path.relative_to(folder)}"
    return f"{path.name} could not be damaged ({os.strerror(errno.ENOSPC)})"
