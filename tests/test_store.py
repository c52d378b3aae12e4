from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xfed.client.store import Store, open_store, write_store
from xfed.common.errors import DataError

CLASSES = ("A", "B", "C")


def arrays(n: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (n, 8, 8), dtype=np.uint8),
        "labels": np.arange(n, dtype=np.int64) % 2,
        "patients": np.arange(n, dtype=np.int64) // 2,
        "splits": (np.arange(n) % 3).astype(np.int8),
    }


def write(folder: Path, **changed: np.ndarray) -> Store:
    return write_store(folder, classes=CLASSES, **{**arrays(), **changed})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    for name, array in arrays().items():
        read = getattr(store, name)
        assert np.array_equal(read, array)
        assert read.dtype == array.dtype
    assert store.classes == CLASSES
    assert store.size == 8
    assert isinstance(store.images, np.memmap)
    assert not store.images.flags.writeable


def test_counts_and_rows_by_hand(tmp_path: Path) -> None:
    store = write(tmp_path)
    # rows 0..11: label = row % 2, split = row % 3
    assert store.counts().tolist() == [[2, 2, 0]] * 3
    assert store.rows("train").tolist() == [0, 3, 6, 9]
    assert store.rows("validation", 0).tolist() == [4, 10]
    assert store.rows("test", 2).tolist() == []
    with pytest.raises(ValueError, match="not in tuple"):
        store.rows("tset")


def test_the_digest_follows_the_pixels(tmp_path: Path) -> None:
    first = write(tmp_path / "a").digest
    changed = arrays()["images"].copy()
    changed[3, 0, 0] ^= 1
    assert write(tmp_path / "b").digest == first != write(tmp_path / "c", images=changed).digest


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": np.zeros((12, 8, 8), np.float32)}, "uint8"),
        ({"images": np.zeros((12, 8, 9), np.uint8)}, r"\[n, size, size\]"),
        ({"labels": np.zeros(11, np.int64)}, "11 labels"),
        ({"splits": np.zeros(13, np.int8)}, "13 splits"),
        ({"labels": np.full(12, 3)}, r"0\.\.2"),
        ({"labels": np.full(12, -1)}, r"0\.\.2"),
    ],
)
def test_wrong_arrays_are_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        write(tmp_path / "s", **changed)
    assert not (tmp_path / "s").exists()


def test_an_unfinished_store_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="xfed-client import"):
        open_store(tmp_path)
    write(tmp_path)
    (tmp_path / "store.json").unlink()
    with pytest.raises(DataError, match="no finished image store"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["images.npy", "index.npz"])
def test_a_damaged_store_says_import_again(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(b"neither an array nor an archive" * 3)
    with pytest.raises(DataError, match="import again"):
        open_store(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="import again"):
        open_store(tmp_path)


def test_a_cut_index_says_import_again(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "index.npz").write_bytes((tmp_path / "index.npz").read_bytes()[:40])
    with pytest.raises(DataError, match=r"[Ii]mport again"):
        open_store(tmp_path)


def test_a_damaged_header_says_import_again(tmp_path: Path) -> None:
    write(tmp_path)
    header = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(header | {"count": 11}))
    with pytest.raises(DataError, match="disagree in length"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps(header | {"schema": 99}))
    with pytest.raises(DataError, match="schema 99"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match="import again"):
        open_store(tmp_path)
