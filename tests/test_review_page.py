"""The review page's server: what it shows of an archive, what it writes down, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.review_archives import CLASSES, write_archive
from xfed.common.decision_log import read_decisions, read_log, verify
from xfed.common.errors import CheckpointError, ConfigError, DataError, IdentityError
from xfed.common.pages import running_page
from xfed.common.review_archive import open_archive
from xfed.common.review_page import REASONS, Review, default_log, open_review, review_app

ONE = "images/Normal/normal-000001.png"
TWO = "images/Pleural Effusion/pleural-effusion-000002.png"


class Client:
    """A browser that opened the page."""

    def __init__(self, url: str) -> None:
        self.base, _, self.token = url.partition("?token=")
        self.http = httpx.Client(follow_redirects=True, trust_env=False, base_url=self.base, timeout=30)
        assert self.http.get(url).status_code == 200

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def post(self, path: str, values: Any) -> httpx.Response:
        return self.http.post(path, json=values, headers={"X-Xfed-Token": self.token})

    def decide(self, image: str, verdict: str = "accept", reason: str = "") -> httpx.Response:
        return self.post("/api/decisions", {"image": image, "verdict": verdict, "reason": reason})


@contextlib.contextmanager
def opened(review: Review) -> Iterator[Client]:
    with running_page(lambda token, port: review_app(review, token, port)) as url:
        client = Client(url)
        with contextlib.closing(client.http):
            yield client


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "archive", 4)
    return tmp_path / "archive"


def _review(archive: Path, reader: str = "anna") -> Review:
    return open_review(archive, reader=reader, log=None)[0]


# --- the archive


def test_an_archive_is_read_as_it_is_and_in_its_run(archive: Path) -> None:
    for folder in (archive, archive.parent):
        found = open_archive(folder)
        assert found.folder == archive
        assert found.classes == CLASSES
        assert len(found.images) == len(found.labels) == 20
        assert found.images[5] == ONE
        assert found.labels[:9] == (0, 0, 0, 0, 1, 1, 1, 1, 2)
        assert found.facts == {"name": "tiny chest", "study": "5" * 64, "root_sha256": "a" * 64}


def test_scores_are_the_numeric_columns_that_say_something(archive: Path) -> None:
    assert dict(open_archive(archive).scores) == {"sharpness": [None, 0.25, 0.5, 0.75] * 5}
    table = (archive / "metadata.csv").read_text().splitlines()
    extra = [",note,depth,empty", *([",good,1.5,"] * 19), ",bad,,"]
    (archive / "metadata.csv").write_text("\n".join(row + more for row, more in zip(table, extra, strict=True)) + "\n")
    scores = open_archive(archive).scores
    assert list(scores) == ["depth", "sharpness"]
    assert scores["depth"] == [1.5] * 19 + [None]


def test_what_is_no_archive_is_said(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no archive that can be reviewed"):
        open_archive(tmp_path / "none")
    table = (archive / "metadata.csv").read_text()
    (archive / "metadata.csv").write_text(table.replace("normal-000001", "normal-999999"))
    with pytest.raises(DataError, match=r"normal-999999\.png is not in its manifest"):
        open_archive(archive)
    (archive / "metadata.csv").write_text(table.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="holds no images"):
        open_archive(archive)
    for content in ("", "[]", '{"name": 1}', "nonsense"):
        (archive / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="no archive that can be reviewed"):
            open_archive(archive)


# --- what is shown


def test_the_page_gets_images_labels_scores_and_reasons(archive: Path) -> None:
    with opened(_review(archive)) as client:
        about = client.get("/api/archive").json()
        assert about["images"][5] == ONE
        assert about["labels"][5] == 1
        assert about["reasons"] == list(REASONS)
        assert about["reader"] == "anna"
        assert client.get("/api/decisions").json() == {}
        for image in about["images"]:
            assert client.get(f"/files/{image}").content == (archive / image).read_bytes()
        for asset in ("review_page.js", "review_grid.js", "review_server.js", "review_page.css"):
            assert client.get(f"/assets/{asset}").status_code == 200


def test_only_images_of_the_archive_are_served(archive: Path) -> None:
    (archive / "images" / "Normal" / "unlisted.png").write_bytes(b"x")
    (archive.parent / "secret.png").write_bytes(b"secret")
    (archive / TWO).unlink()
    (archive / TWO).symlink_to(archive.parent / "secret.png")
    review = _review(archive)
    with opened(review) as client:
        for path in ("images/Normal/unlisted.png", "manifest.json", TWO, "images/Normal", "images/Normal/none.png"):
            assert client.get(f"/files/{path}").status_code == 404, path
        for path in ("../secret.png", "images/%2e%2e/%2e%2e/secret.png", str(archive.parent / "secret.png")):
            reply = client.http.send(httpx.Request("GET", f"{client.base}files/{path}", headers=client.http.headers))
            assert (reply.status_code, b"secret" in reply.content) != (200, True)
        assert client.decide(TWO).status_code == 404
    assert review.log.decisions() == []


def test_a_malicious_table_opens_no_other_file(archive: Path) -> None:
    (archive.parent / "secret.png").write_bytes(b"secret")
    for name in ("metadata.csv", "manifest.json"):
        text = (archive / name).read_text()
        (archive / name).write_text(text.replace(ONE, "images/../../secret.png"))
    with opened(_review(archive)) as client:
        assert "images/../../secret.png" in client.get("/api/archive").json()["images"]
        assert client.decide("images/../../secret.png").status_code == 404
        assert client.get("/files/images/%2e%2e/%2e%2e/secret.png").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/api/archive"),
        ("GET", "/api/decisions"),
        ("GET", f"/files/{ONE}"),
        ("POST", "/api/decisions"),
        ("POST", "/api/undo"),
    ],
)
def test_every_route_is_behind_the_token(archive: Path, method: str, path: str) -> None:
    review = _review(archive)
    with opened(review) as client:
        values = {"image": ONE, "verdict": "accept"} if method == "POST" else None
        bare = httpx.request(method, client.base.rstrip("/") + path, json=values, trust_env=False)
        assert bare.status_code == 403
        assert "Normal" not in bare.text
        if method == "POST":  # the cookie alone, as another site's form would send it
            assert client.http.post(path, json=values).status_code == 403
    assert review.log.decisions() == []


# --- what is decided


def test_decisions_are_in_the_log_as_they_are_answered(archive: Path) -> None:
    review = _review(archive)
    log = default_log(archive, "anna")
    with opened(review) as client:
        assert client.decide(ONE).status_code == 200
        assert [(one.image, one.verdict) for one in read_decisions(log)] == [(ONE, "accept")]
        assert client.decide(TWO, "reject", REASONS[1]).status_code == 200
        assert client.decide(ONE, "reject", "other: a second heart").status_code == 200
        assert client.get("/api/decisions").json() == {
            ONE: ["reject", "other: a second heart"],
            TWO: ["reject", "anatomy impossible"],
        }
    found = read_decisions(log)
    assert {one.sha256 for one in found if one.image == ONE} == {review.archive.digests[ONE]}
    assert {one.reader for one in found} == {"anna"}
    assert verify(log) == []
    with opened(_review(archive)) as client:
        assert client.get("/api/decisions").json()[TWO] == ["reject", "anatomy impossible"]


def test_undo_brings_back_what_stood_before(archive: Path) -> None:
    with opened(_review(archive)) as client:
        client.decide(ONE)
        client.decide(ONE, "reject", "duplicate")
        assert client.post("/api/undo", {}).json() == {"image": ONE, "decision": ["accept", ""]}
        assert client.post("/api/undo", {}).json() == {"image": ONE, "decision": None}
        assert client.post("/api/undo", {}).json() == {"image": None, "decision": None}
        assert client.get("/api/decisions").json() == {}


@pytest.mark.parametrize(
    "values",
    [
        {"image": ONE, "verdict": "reject"},
        {"image": ONE, "verdict": "reject", "reason": "ugly"},
        {"image": ONE, "verdict": "reject", "reason": "other: "},
        {"image": ONE, "verdict": "reject", "reason": "other: a\nb"},
        {"image": ONE, "verdict": "reject", "reason": "other: " + "x" * 600},
        {"image": ONE, "verdict": "accept", "reason": "duplicate"},
        {"image": ONE, "verdict": "praise"},
        {"image": ONE, "verdict": "accept", "reader": "somebody else"},
        {"image": 7, "verdict": "accept"},
        {"image": "images/Normal/none.png", "verdict": "accept"},
        {"image": "../secret.png", "verdict": "accept"},
        {"verdict": "accept"},
        [],
        "x",
    ],
)
def test_what_is_no_decision_is_refused_and_not_written(archive: Path, values: Any) -> None:
    review = _review(archive)
    with opened(review) as client:
        assert client.post("/api/decisions", values).status_code in (404, 409, 422)
    assert review.log.decisions() == []


def test_an_image_that_was_changed_is_not_decided_about(archive: Path) -> None:
    review = _review(archive)
    (archive / ONE).write_bytes((archive / TWO).read_bytes())
    with opened(review) as client:
        reply = client.decide(ONE)
        assert reply.status_code == 409
        assert "was changed since the archive was made" in reply.json()["detail"]
    assert review.log.decisions() == []


def test_a_decision_about_another_image_of_the_same_name_does_not_count(archive: Path) -> None:
    with opened(_review(archive)) as client:
        client.decide(ONE)
        client.decide(TWO)
    manifest = json.loads((archive / "manifest.json").read_text())
    manifest["files"][ONE] = "9" * 64
    (archive / "manifest.json").write_text(json.dumps(manifest))
    with opened(_review(archive)) as client:
        assert list(client.get("/api/decisions").json()) == [TWO]


def test_readers_do_not_see_each_others_decisions(archive: Path) -> None:
    log = archive.parent / "shared.jsonl"
    first, _ = open_review(archive, reader="anna", log=log)
    second, _ = open_review(archive, reader="bo", log=log)
    with opened(first) as anna, opened(second) as bo:
        anna.decide(ONE)
        assert bo.get("/api/decisions").json() == {}
        assert bo.post("/api/undo", {}).json()["image"] is None
        bo.decide(ONE, "reject", "duplicate")
        assert anna.get("/api/decisions").json() == {ONE: ["accept", ""]}
    assert [one.reader for one in read_decisions(log)] == ["anna", "bo"]


def test_a_log_that_breaks_meanwhile_is_said_and_nothing_is_lost(archive: Path) -> None:
    review, path = open_review(archive, reader="anna", log=None)
    with opened(review) as client:
        client.decide(ONE)
        before = path.read_bytes()
        path.write_bytes(before.replace(b"accept", b"reject"))
        reply = client.decide(TWO)
        assert reply.status_code == 500
        assert "put it back from a copy" in reply.json()["detail"]
        path.write_bytes(before)
        assert client.decide(TWO).status_code == 200


# --- where the log goes, and the commands


def test_the_log_is_beside_the_archive_and_never_in_it(archive: Path) -> None:
    assert default_log(archive, "Dr. Änna  B") == archive.parent / "archive-review-dr-nna-b.jsonl"
    assert default_log(archive, "李") == archive.parent / "archive-review-reader.jsonl"
    with pytest.raises(ConfigError, match="inside the archive"):
        open_review(archive, reader="anna", log=archive / "log.jsonl")
    with pytest.raises(ConfigError, match="inside the archive"):
        open_review(archive, reader="anna", log=archive / "images" / ".." / "log.jsonl")
    for name in ("", " ", "a\nb", "x" * 81):
        with pytest.raises(ConfigError, match="--reader"):
            open_review(archive, reader=name, log=None)


def test_two_names_that_look_alike_in_a_file_name_do_not_hide_each_other(archive: Path) -> None:
    with opened(_review(archive, "Dr. A")) as client:
        client.decide(ONE)
    with opened(_review(archive, "dr a")) as client:
        assert client.get("/api/decisions").json() == {}


def test_a_log_of_another_archive_or_without_its_key_is_refused(archive: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "other", 1, study="6" * 64)
    _, path = open_review(archive, reader="anna", log=None)
    with pytest.raises(CheckpointError, match="another archive"):
        open_review(tmp_path / "other", reader="anna", log=path)
    path.with_suffix(".key").unlink()
    with pytest.raises(IdentityError, match="not its key"):
        open_review(archive, reader="anna", log=None)


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_commands_serve_until_interrupted_and_go_on_later(archive: Path, side: str) -> None:
    for round in range(2):
        out, url = _run(side, archive, f"{round:,} of them decided")
        lines = out.splitlines()
        log = archive.parent / "archive-review-anna.jsonl"
        facts = read_log(log)
        assert f"Log: {log}   key: {facts.fingerprint}" in out
        assert lines[-1] == f"{round + 1} decided. Head of the log: {facts.head[0]}:{facts.head[1]}"
        assert out.count(url) == 1


def _run(side: str, archive: Path, expected: str) -> tuple[str, str]:
    code = f"from xfed.{side}.cli import main; main()"
    command = [sys.executable, "-c", code, "review", str(archive), "--reader", "anna"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            seen = [process.stdout.readline() for _ in range(4)]
            url = seen[2].removeprefix("Open ").strip()
            assert expected in seen[0]
            client = Client(url)
            with contextlib.closing(client.http):
                done = client.get("/api/decisions").json()
                assert client.decide(ONE if ONE not in done else TWO).status_code == 200
            process.send_signal(signal.SIGINT)
            rest, err = process.communicate(timeout=60)
        finally:
            killer.cancel()
            process.kill()
    assert (process.returncode, err) == (0, "")
    return "".join(seen) + rest, url


def test_a_wrong_folder_ends_with_exit_code_3(tmp_path: Path) -> None:
    code = "from xfed.server.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "review", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3
    assert "no archive that can be reviewed" in done.stderr
    assert list(tmp_path.iterdir()) == []
