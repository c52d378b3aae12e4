"""An archive as WebDataset shards: plain tar files that are read from front to back.

::

    (row, png) .. --> <name>-000000.tar: KEY.png, KEY.cls (class number), KEY.json (the row of metadata.csv); 1,000 samples each

The same archive gives the same bytes: no times, no owners. A key holds no dot, for the first dot ends it.

Source: Aizman, Maltby, Breuel, "High performance I/O for large scale deep learning", IEEE Big Data 2019; POSIX.1-2001 tar.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

__all__ = ["SAMPLES", "write_shards"]

SAMPLES = 1000


def write_shards(manifest: Mapping[str, Any], samples: Iterable[tuple[Mapping[str, str], bytes]], out: Path) -> None:
    """Write `samples` (row of metadata.csv, PNG file) as shards into the folder `out`, in their order."""
    name = manifest["name"].replace(".", "-")
    remaining, number = iter(samples), 0
    while shard := list(islice(remaining, SAMPLES)):
        with tarfile.open(out / f"{name}-{number:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for row, data in shard:
                key = f"{int(row['label_index']):03d}-{Path(row['file_name']).stem.replace('.', '-')}"
                _add(tar, f"{key}.png", data)
                _add(tar, f"{key}.cls", row["label_index"].encode())
                _add(tar, f"{key}.json", json.dumps(dict(row), ensure_ascii=False).encode())
        number += 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
