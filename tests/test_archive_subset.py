"""An archive less some images: what is left, what is kept apart, and that a kill anywhere is made good by doing it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.archives import built, released
from tests.conftest import tiny
from xfed.server.archive_manifest import open_archive, read_manifest
from xfed.server.archive_signature import verify_archive
from xfed.server.archive_subset import delivered, delivered_manifest, recover, set_aside, without

CLASSES = tiny().classes
WHY = {"vetoes": {"sites": 3, "vetoed": 3}}


def _names(folder: Path, *positions: int) -> list[str]:
    rows = open_archive(folder).rows
    return [rows[position]["file_name"] for position in positions]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_left_is_a_whole_archive(tmp_path: Path) -> None:
    folder = built(tmp_path, per_class=4)
    before, gone = read_manifest(folder), _names(folder, 0, 1, 9)
    pixels = _files(folder)
    manifest = without(folder, gone, WHY)
    assert manifest == read_manifest(folder)
    assert verify_archive(folder, unsigned=True) == []
    assert manifest["counts"] == {CLASSES[0]: 2, CLASSES[1]: 4, CLASSES[2]: 3}
    assert manifest["vetoes"] == WHY["vetoes"]
    assert manifest["delivered_root_sha256"] == before["root_sha256"] != manifest["root_sha256"]
    left = _files(folder)
    assert set(pixels) - set(left) == set(gone)
    assert all(left[name] == pixels[name] for name in left if name.startswith("images/"))
    assert [row["file_name"] for row in open_archive(folder).rows] == [
        name for name in before["files"] if name not in (*gone, "metadata.csv")
    ]
    same = {"study", "generators", "seed", "privacy", "planned", "filter", "image_size", "classes", "schema"}
    assert {name: manifest[name] for name in same} == {name: before[name] for name in same}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".archive")] == []


def test_done_twice_or_in_two_parts_is_done_once(tmp_path: Path) -> None:
    a, b = built(tmp_path / "a"), built(tmp_path / "b")
    once = without(a, _names(a, 0, 5), WHY)
    first, second = _names(b, 0), _names(b, 5)
    without(b, first, {})
    assert without(b, [*first, *second], WHY) == once
    files = {path: path.stat().st_mtime_ns for path in a.rglob("*")}
    assert without(a, [*first, *second], WHY) == once
    assert {path: path.stat().st_mtime_ns for path in a.rglob("*")} == files, "nothing was written"
    parts, whole = _files(b), _files(a)
    assert json.loads(parts.pop("manifest.json")) == json.loads(whole.pop("manifest.json"))
    assert parts == whole


def test_nothing_rejected_is_a_note_in_the_manifest(tmp_path: Path) -> None:
    folder = built(tmp_path)
    before = read_manifest(folder)
    assert without(folder, (), WHY) == {**before, **WHY}
    assert read_manifest(folder) == {**before, **WHY}
    assert verify_archive(folder, unsigned=True) == []


def test_a_release_does_not_outlive_a_removal_but_outlives_doing_nothing(tmp_path: Path) -> None:
    folder = released(tmp_path)
    without(folder, (), {})
    assert verify_archive(folder) == []
    without(folder, _names(folder, 3), WHY)
    left = {path.name for path in folder.iterdir()}
    assert left == {"images", "metadata.csv", "manifest.json"}
    assert "signed_by" not in read_manifest(folder)
    assert verify_archive(folder, unsigned=True) == []


class _KilledError(BaseException):
    """As a SIGKILL would end it: no handler of ours catches it."""


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_rename_or_write_the_same_call_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = built(tmp_path / "whole")
    gone = _names(whole, 1, 2)
    set_aside(whole.parent, gone)
    expected = without(whole, gone, WHY)
    folder = built(tmp_path / "killed")
    calls = {"n": 0}

    def counted(real: Any, late: bool) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            calls["n"] += 1
            if calls["n"] == step + 1 and not late:
                raise _KilledError
            result = real(*args, **more)
            if calls["n"] == step + 1:
                raise _KilledError
            return result

        return call

    for late in (False, True):
        calls["n"] = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename, late))
            patch.setattr("xfed.server.archive_subset.write_json", counted(_real("write_json"), late))
            patch.setattr("xfed.server.archive_subset.write_bytes", counted(_real("write_bytes"), late))
            patch.setattr("xfed.server.archive_subset.write_rows", counted(_real("write_rows"), late))
            patch.setattr("xfed.server.archive_subset.remove_tree", counted(_real("remove_tree"), late))
            try:
                set_aside(folder.parent, gone)
                without(folder, gone, WHY)
            except _KilledError:
                pass
        recover(folder)
        names, images, labels = delivered(folder.parent, CLASSES)
        assert len(names) == len(images) == len(labels) == 12
    set_aside(folder.parent, gone)
    assert without(folder, gone, WHY) == expected
    assert _files(folder) == _files(whole)
    assert _files(folder.parent / "withheld") == _files(whole.parent / "withheld")
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def _real(name: str) -> Any:
    from xfed.server import archive_subset

    return getattr(archive_subset, name)


def test_half_a_rebuilt_folder_never_takes_the_place(tmp_path: Path) -> None:
    half = tmp_path / ".archive.without"
    (half / "images").mkdir(parents=True)
    recover(tmp_path / "archive")
    assert list(tmp_path.iterdir()) == []
    folder = built(tmp_path)
    before = _files(folder)
    half.mkdir()
    (half / "manifest.json").write_text("{}")
    recover(folder)
    assert _files(folder) == before, "nor a whole one, where the archive is there"
    assert not half.exists()


def test_the_archive_as_delivered_can_be_read_before_and_after(tmp_path: Path) -> None:
    folder = built(tmp_path)
    root, before = read_manifest(folder)["root_sha256"], delivered(tmp_path, CLASSES)
    gone = _names(folder, 0, 11)
    for step in (lambda: None, lambda: set_aside(tmp_path, gone), lambda: without(folder, gone, WHY)):
        step()
        names, images, labels = delivered(tmp_path, CLASSES)
        assert names == before[0]
        np.testing.assert_array_equal(images, before[1])
        np.testing.assert_array_equal(labels, before[2])
        assert delivered_manifest(tmp_path)["root_sha256"] == root


def test_what_is_withheld_is_for_the_owner_s_eyes(tmp_path: Path) -> None:
    folder = built(tmp_path)
    gone = _names(folder, 0)
    set_aside(tmp_path, ())
    assert not (tmp_path / "withheld").exists()
    set_aside(tmp_path, gone)
    place = tmp_path / "withheld"
    assert place.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in place.rglob("*") if path.is_file())
    assert (place / gone[0]).read_bytes() == (folder / gone[0]).read_bytes()
    assert json.loads((place / "manifest.json").read_text()) == read_manifest(folder)
