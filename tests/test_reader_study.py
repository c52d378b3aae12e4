"""A reader study is balanced, blinded, resumable and unchangeable, and only what may leave does."""

from __future__ import annotations

import io
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import tiny
from tests.reading import CLASSES, make_archive, make_site
from xfed.client.cli import app
from xfed.client.reader_design import Design, draw_design, open_synthetic, parse_design, pictures, write_design
from xfed.client.reader_page import plain_png, reader_page
from xfed.client.reader_result import aggregate, in_words
from xfed.client.reader_study import ReaderStudy, load_study
from xfed.client.store import SPLITS, Store, open_store, write_store
from xfed.common.durable import write_json
from xfed.common.errors import CheckpointError, ConfigError, DataError, RefusedError
from xfed.common.pages import running_page


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path / "archive")


def begun(site: Path, archive: Path, *, images: int = 20, seed: int = 987_654_321) -> ReaderStudy:
    synthetic = open_synthetic(archive)
    place = site / "reader" / synthetic.root[:16]
    write_design(place, draw_design(open_store(site / "store"), synthetic, images=images, confidence=True, seed=seed))
    return load_study(place)


def answer_all(study: ReaderStudy, reader: str, says: Callable[[int], str], confidence: int | None = 2) -> None:
    for number, item in enumerate(study.order(reader)):
        study.record(reader, number, says(int(item)), confidence)


def rightly(study: ReaderStudy) -> Callable[[int], str]:
    return lambda item: study.design.items[item].kind


# --- the design


def _check(design: Design, store: Store) -> None:
    """What every design promises."""
    kinds = Counter((item.kind, item.label) for item in design.items)
    for label in range(len(design.classes)):
        assert kinds["real", label] == kinds["synthetic", label]
    rows = [item.row for item in design.items if item.row is not None]
    patients = store.patients[rows]
    assert len(np.unique(patients)) == len(rows)
    assert (store.splits[rows] >= 0).all()
    for item in design.items:
        if item.row is not None:
            assert store.labels[item.row] == item.label
        else:
            assert item.file is not None
            assert f"/{design.classes[item.label]}/" in item.file
    assert len({item.file for item in design.items if item.file}) == len(rows)
    assert sum(design.held_out.values()) == len(rows)
    assert {SPLITS[store.splits[row]] for row in rows} == {name for name, count in design.held_out.items() if count}


def test_a_design_is_balanced_and_of_held_out_patients_first(site: Path, archive: Path) -> None:
    store, synthetic = open_store(site / "store"), open_synthetic(archive)
    design = draw_design(store, synthetic, images=36, confidence=True, seed=1)
    _check(design, store)
    assert len(design.items) == 36
    assert design.held_out == {"test": 18, "validation": 0, "train": 0}
    assert design.notes == ()
    # 10 test patients and 10 validation patients per class: 24 more than the first reach into training
    more = draw_design(store, synthetic, images=96, confidence=True, seed=1)
    _check(more, store)
    assert more.held_out == {"test": 20, "validation": 20, "train": 8}
    assert "8 real images are of patients whom the generators were trained on" in more.notes[-1]


def test_kinds_and_classes_come_in_no_order_and_the_seed_decides(site: Path, archive: Path) -> None:
    store, synthetic = open_store(site / "store"), open_synthetic(archive)
    first, again, other = (draw_design(store, synthetic, images=40, confidence=True, seed=s) for s in (3, 3, 4))
    assert first.items == again.items
    assert first.items != other.items
    # over many draws the first image is real half of the time
    real = sum(
        draw_design(store, synthetic, images=8, confidence=True, seed=s).items[0].kind == "real" for s in range(400)
    )
    assert 160 <= real <= 240


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_designs_of_any_store_keep_their_promises(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n, classes = data.draw(st.integers(6, 60)), ("A", "B", "C")
    numbers = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    folder = tmp_path_factory.mktemp("any")
    store = write_store(
        folder / "store",
        classes=classes,
        images=np.zeros((n, 8, 8), dtype=np.uint8),
        labels=np.array(data.draw(numbers)),
        patients=np.array(data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))),
        splits=np.array(data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n)), dtype=np.int8),
    )
    synthetic = open_synthetic(make_archive(folder / "archive", per_class=4, size=8, classes=classes))
    try:
        design = draw_design(store, synthetic, images=data.draw(st.sampled_from([6, 12, 30])), confidence=True, seed=n)
    except DataError:  # nothing to show
        held = {c for c, s in zip(store.labels, store.splits, strict=True) if s >= 0}
        assert not held
        return
    _check(design, store)


def test_what_cannot_be_drawn_is_refused_or_said(site: Path, archive: Path, tmp_path: Path) -> None:
    store, synthetic = open_store(site / "store"), open_synthetic(archive)
    with pytest.raises(ConfigError, match="multiple of 4, for instance 48"):
        draw_design(store, synthetic, images=50, confidence=True, seed=1)
    small = open_synthetic(make_archive(tmp_path / "small", size=16))
    with pytest.raises(DataError, match="the size would give the answer away"):
        draw_design(store, small, images=20, confidence=True, seed=1)
    few = draw_design(
        store, open_synthetic(make_archive(tmp_path / "few", per_class=3)), images=20, confidence=True, seed=1
    )
    _check(few, store)
    assert len(few.items) == 12
    assert "Normal: 3 images of each kind instead of 5" in few.notes[1]
    other = open_synthetic(make_archive(tmp_path / "other", classes=("Luggage", "Nothing")))
    with pytest.raises(DataError, match="no class has both"):
        draw_design(store, other, images=20, confidence=True, seed=1)


def test_a_damaged_archive_is_not_shown(site: Path, archive: Path, tmp_path: Path) -> None:
    study = begun(site, archive)
    store, synthetic = open_store(site / "store"), open_synthetic(archive)
    assert len(pictures(study.design, store, synthetic)) == 20
    name = next(item.file for item in study.design.items if item.file)
    path = archive / str(name)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match="not what the manifest says"):
        pictures(study.design, store, synthetic)
    (archive / "metadata.csv").write_text("file_name,label\n../../etc/passwd,Normal\n")
    with pytest.raises(DataError, match="no readable archive"):
        open_synthetic(archive)
    manifest = json.loads((archive / "manifest.json").read_text())
    (archive / "manifest.json").write_text(json.dumps({**manifest, "files": {"../../etc/passwd": "0"}}))
    with pytest.raises(DataError, match="outside"):
        open_synthetic(archive)


def test_another_store_or_archive_does_not_go_on_with_this_study(site: Path, archive: Path, tmp_path: Path) -> None:
    study = begun(site, archive)
    with pytest.raises(DataError, match="not the image store"):
        pictures(study.design, open_store(make_site(tmp_path / "b", per_patient=2) / "store"), open_synthetic(archive))
    other = open_synthetic(make_archive(tmp_path / "c", per_class=12))
    with pytest.raises(DataError, match="not the archive"):
        pictures(study.design, open_store(site / "store"), other)


def test_the_design_is_for_its_owner_alone_and_comes_back_whole(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    path = study.folder / "design.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert parse_design(path.read_bytes(), "here") == study.design
    for damaged in (
        b"{",
        b"{}",
        path.read_bytes().replace(b'"real"', b'"reel"', 1),
        path.read_bytes().replace(b"seed", b"sead"),
    ):
        with pytest.raises(DataError, match="damaged"):
            parse_design(damaged, "here")


# --- answers


def test_each_reader_sees_the_same_images_in_an_order_of_their_own(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    orders = [study.order(name).tolist() for name in ("ada", "bo", "ada")]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    with pytest.raises(ConfigError, match="--reader"):
        study.order("../ada")


def test_answers_are_kept_in_order_once_and_for_all(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    assert study.record("ada", 0, "real", 3) == 1
    assert study.record("ada", 0, "real", 3) == 1  # the browser did not hear the first time
    with pytest.raises(RefusedError, match="no going back"):
        study.record("ada", 0, "synthetic", 3)
    with pytest.raises(RefusedError, match="no going back"):
        study.record("ada", 2, "real", 1)
    with pytest.raises(RefusedError, match="no going back"):
        study.record("ada", -1, "real", 1)
    for called, confidence in (("fake", 1), ("real", 0), ("real", 4), ("real", True)):
        with pytest.raises(RefusedError, match="an answer is"):
            study.record("ada", 1, called, confidence)
    assert study.record("ada", 1, "synthetic", None) == 2
    assert [(a["called"], a["confidence"]) for a in study.answers("ada")] == [("real", 3), ("synthetic", None)]
    assert study.readers() == {"ada": 2}
    assert study.readings() == {}
    assert stat.S_IMODE((study.folder / "answers" / "ada.jsonl").stat().st_mode) == 0o600


def test_after_the_last_image_there_is_nothing_to_answer(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    answer_all(study, "ada", rightly(study))
    with pytest.raises(RefusedError, match="no going back"):
        study.record("ada", 20, "real", 1)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_that_the_power_cut_short_is_asked_again(site: Path, archive: Path, cut: int) -> None:
    study = begun(site, archive)
    for number in range(3):
        study.record("ada", number, "real", 1)
    path = study.folder / "answers" / "ada.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = load_study(study.folder)
    assert len(again.answers("ada")) == 2
    assert again.record("ada", 2, "synthetic", 2) == 3
    assert [answer["called"] for answer in again.answers("ada")] == ["real", "real", "synthetic"]
    assert path.read_bytes().count(b"\n") == 4


def test_changed_answers_are_found(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    for number in range(4):
        study.record("ada", number, "real", 1)
    path = study.folder / "answers" / "ada.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for changed in (
        b"".join([*lines[:2], *lines[3:]]),  # one taken out
        b"".join([lines[0], lines[2], lines[1], *lines[3:]]),  # two exchanged
        whole.replace(b'"real"', b'"reel"', 1),
        whole.replace(b'"ada"', b'"bob"'),
        b"x" + whole,
    ):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="was changed"):
            study.answers("ada")
    path.write_bytes(whole)
    write_design(study.folder, begun(site, archive, seed=12).design)
    with pytest.raises(CheckpointError, match=r"of another design\.json"):
        load_study(study.folder).answers("ada")


# --- the page


@contextmanager
def client(url: str) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """Past the token, as a browser is, with the header that changes need."""
    with httpx.Client(base_url=url.split("/?")[0], follow_redirects=True, trust_env=False) as asking:
        page = asking.get(url).raise_for_status().text
        found = re.search(r'name="xfed-token" content="([^"]+)"', page)
        assert found is not None
        yield asking, {"x-xfed-token": found[1]}


def _page(site: Path, archive: Path, study: ReaderStudy, reader: str) -> Any:
    return running_page(
        reader_page(study, reader, pictures(study.design, open_store(site / "store"), open_synthetic(archive)))
    )


def test_nothing_on_the_wire_tells_real_from_synthetic_but_the_pixels(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    store = open_store(site / "store")
    seen: dict[str, list[tuple[Any, ...]]] = {"real": [], "synthetic": []}
    with _page(site, archive, study, "ada") as url, client(url) as (asking, header):
        texts = [asking.get(url).text, asking.get("/state").text]
        texts += [asking.get(f"/assets/reader_page.{kind}").text for kind in ("js", "css")]
        for number, item in enumerate(study.order("ada")):
            shown = asking.get(f"/image/{number}").raise_for_status()
            headers = {name: value for name, value in shown.headers.items() if name != "date"}
            kind = study.design.items[item].kind
            seen[kind].append((len(shown.content), tuple(sorted(headers.items())), shown.content[:41]))
            with Image.open(io.BytesIO(shown.content)) as image:
                assert (image.mode, image.size, image.info) == ("L", (32, 32), {})
                pixels = np.array(image)
            if kind == "real":
                assert np.array_equal(pixels, store.images[study.design.items[item].row])
            else:
                with Image.open(archive / str(study.design.items[item].file)) as original:
                    assert np.array_equal(pixels, np.array(original))
            reply = asking.post("/answer", json={"number": number, "called": "real", "confidence": 1}, headers=header)
            texts.append(reply.raise_for_status().text)
            assert reply.json() == {"answered": number + 1}
    assert set(seen["real"]) == set(seen["synthetic"])
    assert len(set(seen["real"])) == 1
    for item in study.design.items:  # file names and row numbers of images stay with the server
        assert item.file is None or not any(Path(item.file).stem in text or item.file in text for text in texts)
    assert not any(study.design.archive_root[:8] in text or str(study.design.seed) in text for text in texts)


def test_pngs_of_one_size_have_one_length() -> None:
    rng = np.random.default_rng(0)
    for size in (32, 64, 128, 256):
        pixels = (np.zeros((size, size), np.uint8), rng.integers(0, 256, (size, size), dtype=np.uint8))
        assert len({len(plain_png(each)) for each in pixels}) == 1


def test_only_the_next_image_is_shown_and_the_result_at_the_end(site: Path, archive: Path) -> None:
    study = begun(site, archive, images=4)
    with _page(site, archive, study, "ada") as url, client(url) as (asking, header):
        assert asking.get("/image/1").status_code == 404
        assert asking.get("/image/-1").status_code in (404, 422)
        assert asking.get("/result").status_code == 403
        for number in range(4):
            assert asking.get("/result").status_code == 403
            body = {"number": number, "called": "synthetic", "confidence": None}
            assert asking.post("/answer", json={**body, "number": number + 1}, headers=header).status_code == 409
            assert asking.post("/answer", json={**body, "more": 1}, headers=header).status_code == 422
            assert asking.post("/answer", json=body, headers=header).status_code == 200
            assert asking.get(f"/image/{number}").status_code == 404
        result = asking.get("/result").raise_for_status().json()
    assert result["you"]["correct"] == 2
    assert result["you"]["words"][0] == "2 of 4 answers were right."
    assert json.loads((study.folder / "reader-study.json").read_text()) == study.figures()


def test_every_route_is_behind_the_guard(site: Path, archive: Path) -> None:
    study = begun(site, archive, images=4)
    body = {"number": 0, "called": "real", "confidence": None}
    with _page(site, archive, study, "ada") as url, client(url) as (asking, header):
        base = url.split("/?")[0]
        for path in ("/", "/state", "/image/0", "/result", "/assets/reader_page.js", "/openapi.json"):
            assert httpx.get(base + path, trust_env=False).status_code == 403
            assert asking.get(path, headers={"host": "evil.example"}).status_code == 403
            assert asking.get(path, headers={"origin": "http://evil.example"}).status_code == 403
        assert httpx.post(f"{base}/answer", json=body, trust_env=False).status_code == 403
        assert asking.post("/answer", json=body).status_code == 403  # the cookie alone does not change anything
        assert asking.post("/answer", json=body, headers={**header, "origin": "null"}).status_code == 403
        assert study.answers("ada") == []
        assert asking.post("/answer", json=body, headers=header).status_code == 200


# --- the result, and what may leave


def test_figures_of_two_readers_by_hand(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    answer_all(study, "ada", rightly(study), 3)
    answer_all(study, "bo", lambda item: "real", None)
    study.record("cy", 0, "real", 1)  # has only begun: counts for nothing
    figures = study.figures()
    assert list(figures["readers"]) == ["ada", "bo"]
    ada, bo = figures["readers"]["ada"], figures["readers"]["bo"]
    assert (ada["correct"], ada["sensitivity"], ada["specificity"], ada["auc"]) == (20, 1, 1, 1)
    assert (bo["correct"], bo["sensitivity"], bo["specificity"], bo["auc"]) == (10, 0, 1, None)
    assert ada["p_value"] == pytest.approx(2 * 0.5**20)
    assert (bo["accuracy"], bo["d_prime"]) == (0.5, pytest.approx(0))
    assert figures["pooled"]["correct"] == 30
    # they agree on the ten real images; by chance on 1/2 * 1 + 1/2 * 0
    assert figures["agreement"]["kappa"] == pytest.approx(0)
    assert figures["agreement"]["observed"] == 0.5
    assert "synthetic images were told from real ones" in in_words(ada)[2]
    assert in_words(bo)[3] == "Synthetic images were called real in 10 of 10 answers, real ones in 10 of 10."
    assert "Chance can explain this" in in_words(bo)[2]


def test_nobody_finished_is_said(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    with pytest.raises(DataError, match="nobody has begun"):
        study.figures()
    study.record("ada", 0, "real", 1)
    with pytest.raises(DataError, match=r"no reader has answered all 20 images yet \(ada 1\)"):
        study.figures()


def _finished(site: Path, archive: Path) -> ReaderStudy:
    study = begun(site, archive)
    for name in ("Dr.Ada", "Dr.Bo"):
        answer_all(study, name, rightly(study))
    return study


def test_the_aggregate_names_nobody_and_no_image(site: Path, archive: Path) -> None:
    study = _finished(site, archive)
    values = aggregate(study, site)
    text = json.dumps(values)
    assert set(values["readers"]) == {"reader-1", "reader-2"}
    assert "Ada" not in text
    assert "Bo" not in text
    assert ".png" not in text
    assert not {"seed", "items", "time", "row", "number"} & set(re.findall(r'"(\w+)":', text))
    assert values["only_held_out_patients"] is True
    assert values["pooled"]["accuracy"] == 1
    assert "notes" not in values  # they count patients


def test_a_class_of_few_patients_leaves_no_count_behind_not_even_as_a_difference(site: Path, archive: Path) -> None:
    study = _finished(site, archive)
    items = [item for item in study.design.items if item.label == 0]
    kept = [item for item in study.design.items if item.label == 1][:]
    fewer = [item for kind in ("real", "synthetic") for item in [i for i in items if i.kind == kind][:4]]
    design = Design(**{**study.design.__dict__, "items": tuple(kept + fewer)})
    write_design(study.folder, design)
    for path in (study.folder / "answers").iterdir():
        path.unlink()
    study = load_study(study.folder)
    answer_all(study, "ada", rightly(study))
    values = aggregate(study, site)
    assert values["classes_left_out"] == [CLASSES[0]]
    assert values["images"] == values["pooled"]["n"] == len(kept)
    assert list(values["pooled"]["per_class"]) == [CLASSES[1]]
    (site / "policy.yaml").write_text("allow_non_private: true\nsmallest_count: 4\n")
    assert aggregate(study, site)["classes_left_out"] == []
    (site / "policy.yaml").write_text("allow_non_private: true\nsmallest_count: 6\n")
    with pytest.raises(RefusedError, match="no class has 6 real images"):
        aggregate(study, site)


PRIVATE = tiny(
    name="p",
    privacy={"epsilon": 8, "delta": 1e-4},
    gan={"method": "dp-merf"},
    classifier={"balance": "loss"},
)


@pytest.mark.parametrize("where", ["study.json", "studies/abc/study.json", "plans/abc.json"])
def test_of_a_private_study_nothing_leaves(site: Path, tmp_path: Path, where: str) -> None:
    study = _finished(site, make_archive(tmp_path / "private", study=PRIVATE.digest))
    assert aggregate(study, site)
    values = PRIVATE.resolved()
    write_json(site / where, {"plan": json.dumps({"study": values})} if where.startswith("plans") else values)
    with pytest.raises(RefusedError, match="which is private"):
        aggregate(study, site)


def test_open_studies_of_the_site_do_not_stand_in_the_way(site: Path, tmp_path: Path) -> None:
    study = _finished(site, make_archive(tmp_path / "open", study=tiny().digest))
    write_json(site / "study.json", tiny().resolved())
    assert aggregate(study, site)


@pytest.mark.parametrize(
    ("policy", "ledger", "reason"),
    [
        ("{}\n", False, "allow_non_private is false"),
        ("allow_non_private: true\nmetrics: [counts, scores, losses]\n", False, "no archive_scores"),
        ("allow_non_private: true\n", True, "private studies"),
    ],
)
def test_what_the_hospital_forbids_does_not_leave(
    site: Path, archive: Path, policy: str, ledger: bool, reason: str
) -> None:
    study = _finished(site, archive)
    assert aggregate(study, site)
    (site / "policy.yaml").write_text(policy)
    if ledger:
        (site / "ledger.jsonl").write_text("")
    with pytest.raises(RefusedError, match=reason):
        aggregate(study, site)


def test_without_a_policy_nothing_leaves(site: Path, archive: Path) -> None:
    study = _finished(site, archive)
    (site / "policy.yaml").unlink()
    with pytest.raises(ConfigError, match="there is no policy"):
        aggregate(study, site)


# --- the commands


def test_result_and_export_from_the_command_line(site: Path, archive: Path, tmp_path: Path) -> None:
    study = _finished(site, archive)
    shown = CliRunner().invoke(app, ["reader", "result", "--dir", str(site), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == study.figures()
    table = CliRunner().invoke(app, ["reader", "result", "--dir", str(site)])
    assert "Dr.Ada" in table.stdout
    assert "kappa 1.00" in table.stdout
    out = tmp_path / "aggregate.json"
    done = CliRunner().invoke(app, ["reader", "export", "--dir", str(site), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text()) == aggregate(study, site)
    assert (study.folder / "exports.jsonl").read_text().count("export") == 1


def test_wrong_options_are_said(site: Path, archive: Path) -> None:
    study = begun(site, archive)
    base = ["reader", "--dir", str(site), "--archive", str(archive), "--reader"]
    for arguments, error, words in (
        (["reader", "--dir", str(site)], ConfigError, "say which archive and who reads"),
        ([*base, "ada", "--images", "40"], ConfigError, "begun with 20"),
        ([*base, "a/b"], ConfigError, "--reader 'a/b'"),
        (["reader", "result", "--dir", str(site), "--study", "zz"], DataError, study.folder.name),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, error), done.output
        assert words in str(done.exception)
