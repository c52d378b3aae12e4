"""The live page's facts: what the events say, however they are torn; samples and budgets from files; nothing is changed."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import ROOT, tiny
from tests.test_private_study import SMALL
from xfed.common.accounting import epsilon
from xfed.common.config import Study
from xfed.common.dp_events import Event
from xfed.common.durable import exclusive, sha256_file
from xfed.common.errors import ConfigError, DataError
from xfed.common.gan import build_generator
from xfed.common.journal import Journal
from xfed.common.ledger_lines import START, LineContent, write_line
from xfed.common.pages import running_page
from xfed.common.registry import save_generator
from xfed.common.weights import parameters_of
from xfed.server.checkpoints import Checkpoints
from xfed.server.cli import app
from xfed.server.generators import sample_images
from xfed.server.live import LiveRun, _is_held
from xfed.server.live_page import live_page, page_port
from xfed.server.live_state import POINTS, EventTail, Story
from xfed.simulations.deployed import Deployed

T0 = 1_800_000_000.0


def at(when: float, kind: str, **fields: Any) -> dict[str, Any]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(T0 + int(when)))
    return {"time": f"{stamp}.{round(when % 1 * 1000):03d}+00:00", "kind": kind, **fields}


def gan_round(when: float, number: int, rounds: int = 10) -> dict[str, Any]:
    losses = {name: {"loss_d": 1.0 / number, "loss_g": 2.0, "sites": 2} for name in tiny().classes}
    return at(when, "round", phase="gan", round=number, rounds=rounds, losses=losses)


def told(*events: dict[str, Any], sites: tuple[str, ...] = ()) -> Story:
    story = Story(sites)
    for event in events:
        story.take(event)
    return story


# --- reading a file that grows


def test_a_line_under_way_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert list(tail.new()) == []
    line = json.dumps(at(0, "started", text="x")).encode()
    path.write_bytes(line[:10])
    assert list(tail.new()) == []
    path.write_bytes(line + b"\n" + line[:4])
    assert [event["kind"] for event in tail.new()] == ["started"]
    with path.open("ab") as file:
        file.write(line[4:] + b"\n")
    assert [event["kind"] for event in tail.new()] == ["started"]
    assert list(tail.new()) == []


def test_a_line_torn_by_a_power_cut_is_passed_over_after_the_restart(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path).write("started", text="x")
    tail = EventTail(path)
    assert len(list(tail.new())) == 1
    with path.open("ab") as file:
        file.write(b'{"time": "2026-01-01T00:00:00+00:00", "kind": "rou')
    assert list(tail.new()) == []
    Journal(path).write("resumed", text="x")
    assert [event["kind"] for event in tail.new()] == ["resumed"]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(3):
        Journal(path).write("phase", phase="gan", round=number, rounds=3)
    tail = EventTail(path)
    assert len(list(tail.new())) == 3
    assert not tail.begun_anew
    path.unlink()
    assert list(tail.new()) == []
    assert tail.begun_anew
    Journal(path).write("started", text="x")
    assert [event["kind"] for event in tail.new()] == ["started"]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=30), junk=st.binary(max_size=40))
def test_however_a_file_is_cut_into_reads_the_events_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("tail") / "events.jsonl"
    events = [gan_round(number, number + 1) for number in range(5)]
    data = b"".join(json.dumps(event).encode() + b"\n" for event in events[:3])
    data += junk.replace(b"\n", b"") + b"\n" + b"".join(json.dumps(event).encode() + b"\n" for event in events[3:])
    tail, found, start = EventTail(path), [], 0
    for cut in [*cuts, len(data)]:
        with path.open("ab") as file:
            file.write(data[start : start + cut])
        start += cut
        found += list(tail.new())
    assert [event for event in found if event in events] == events


# --- what the events say


def test_the_remaining_time_is_that_of_the_last_rounds() -> None:
    story = told(at(0, "phase", phase="gan", round=0, rounds=30), *[gan_round(4 * n, n, 30) for n in range(1, 11)])
    phase = story.view(T0 + 40)["phases"][0]
    assert (phase["done"], phase["rounds"], phase["state"]) == (10, 30, "now")
    assert phase["remaining"] == pytest.approx(20 * 4)
    assert story.view(T0 + 43)["phases"][0]["remaining"] == pytest.approx(20 * 4 - 3)
    # it got slower: only the last ten rounds count
    for n in range(11, 21):
        story.take(gan_round(40 + 10 * (n - 10), n, 30))
    assert story.view(T0 + 140)["phases"][0]["remaining"] == pytest.approx(10 * 10)


def test_a_stop_overnight_is_no_slow_round() -> None:
    night = 36_000
    story = told(
        at(0, "phase", phase="gan", round=0, rounds=10),
        *[gan_round(5 * n, n) for n in range(1, 5)],
        at(night, "resumed", text="x"),
        at(night, "phase", phase="gan", round=4, rounds=10),
    )
    assert story.view(T0 + night)["phases"][0]["remaining"] is None  # nothing to go by yet
    story.take(gan_round(night + 6, 5))
    assert story.view(T0 + night + 6)["phases"][0]["remaining"] == pytest.approx(5 * 6)
    assert story.view(T0 + night)["resumed"] == 1


def test_phases_before_the_present_one_are_done_even_if_they_stopped_early() -> None:
    story = told(
        at(0, "phase", phase="gan", round=0, rounds=10),
        gan_round(1, 10),
        at(2, "phase", phase="archive", round=0, rounds=90),
        at(3, "phase", phase="classifier", round=0, rounds=50),
        at(4, "round", phase="classifier", round=20, rounds=50, arms={}),
        at(5, "phase", phase="quality", round=0, rounds=1),
    )
    states = {phase["name"]: phase["state"] for phase in story.view(T0 + 6)["phases"]}
    assert states == {"gan": "done", "archive": "done", "classifier": "done", "quality": "now"}
    assert {p["name"]: p["state"] for p in told().view(T0)["phases"]} == dict.fromkeys(states, "ahead")
    fitted = told(at(0, "phase", phase="embeddings", round=0, rounds=1)).view(T0)["phases"]
    assert [(p["title"], p["state"]) for p in fitted][:2] == [("Embeddings", "now"), ("Generators", "ahead")]


def test_sites_say_when_they_answered_and_what_they_refused() -> None:
    traffic = {
        "a": {"sent": 10, "received": 20, "messages": {"GanUpdate": 1}},
        "b": {"sent": 10, "received": 0, "messages": {}},
    }
    story = told(
        at(0, "joining", site="a", text="waits for approval at the site: xfed-client approve"),
        at(1, "problem", phase="gan", round=1, site="b", text="refused (RefusedError): too few", attempt=1),
        at(2, "problem", phase="gan", round=1, site="b", text="no answer within 3 s", attempt=2),
        at(3, "exchange", phase="gan", round=1, seconds=2.0, traffic=traffic),
        at(4, "exchange", phase="classifier-validation", round=2, seconds=2.0, traffic={"a": traffic["a"]}),
        at(5, "presence", site="b", text="went offline"),
        sites=("c",),
    )
    view = story.view(T0 + 9)
    a, b, c = (view["sites"][name] for name in "abc")
    assert (a["seen"], a["phase"], a["round"]) == (T0 + 4, "Classifiers, validation", 2)
    assert (a["sent"], a["received"], a["refusals"], a["problems"]) == (20, 40, 0, 0)
    assert (b["seen"], b["online"], b["refusals"], b["problems"]) == (None, False, 1, 1)
    assert (c["seen"], c["online"], c["phase"]) == (None, None, "")
    assert view["problems"][0] == {
        "time": T0 + 1,
        "where": "Generators, round 1",
        "site": "b",
        "text": "refused (RefusedError): too few",
    }
    story.take(at(6, "presence", site="b", text="is back"))
    assert story.view(T0 + 9)["sites"]["b"]["online"] is True


def test_curves_are_thinned_with_their_ends_kept_and_rounds_told_twice_count_once() -> None:
    story = told(*[gan_round(n, n, 1000) for n in range(1, 1001)], gan_round(2000, 1000, 1000))
    points = story.view(T0)["gan"]["Normal"]
    assert len(points) == POINTS
    assert (points[0][0], points[-1][0]) == (1, 1000)
    assert [point[0] for point in points] == sorted({point[0] for point in points})
    assert points[0][1:] == [1.0, 2.0]
    arm = {"loss": 0.5, "validation_balanced_accuracy": None}
    arms = told(at(0, "round", phase="classifier", round=1, rounds=2, arms={"DS1": arm})).view(T0)["arms"]
    assert arms == {"DS1": [[1, None, None, 0.5, None]]}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["time", "kind", "phase", "round", "rounds", "losses", "arms", "traffic", "site", "text"]),
        st.sampled_from(
            [None, 1, "round", "phase", "exchange", "problem", "2026-01-01T00:00:00+00:00", [], {"a": 1}, {}]
        ),
    )
)
def test_events_that_are_none_do_no_harm(event: dict[str, Any]) -> None:
    story = told({"kind": "round", **event}, gan_round(1, 1))
    assert story.view(T0)["gan"]["Normal"] == [[1, 1.0, 2.0]] or "losses" in event
    json.dumps(story.view(T0), allow_nan=False)


# --- a run folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after three of its ten rounds, as its files are."""
    return begun(tmp_path / "run", tiny(gan={"rounds": 10}))


def begun(folder: Path, study: Study) -> Path:
    (folder / "sites").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(study.resolved()))
    journal = Journal(folder / "events.jsonl")
    journal.write("started", text="x")
    journal.write("phase", phase="gan", round=0, rounds=10)
    checkpoints = Checkpoints(folder / "checkpoints", study.digest)
    shown: dict[str, Any] = {}
    for number in (1, 2, 3):
        weights = {name: parameters_of(build_generator(study, (name, number))) for name in study.classes}
        if number < 3:
            shown[f"shown/{number}"] = sample_images(study, weights)
        arrays = {f"ema/{name}/{key}": value for name, one in weights.items() for key, value in one.items()}
        checkpoints.save("gan", number, {**arrays, **shown}, {"history": {}})
        journal.write("round", **{k: v for k, v in gan_round(0, number).items() if k not in ("time", "kind")})
    return folder


def settled(live: LiveRun, what: str) -> dict[str, Any]:
    """The snapshot once `what` is there; computed beside, so a few calls may be needed."""
    for _ in range(400):
        snapshot = live.snapshot()
        found = snapshot[what]
        if found and (what != "budget" or (found["sites"] and None not in found["sites"].values())):
            return snapshot
        time.sleep(0.05)
    raise AssertionError(f"no {what}")


def test_a_snapshot_says_what_the_files_say(run: Path) -> None:
    study = tiny(gan={"rounds": 10})
    with LiveRun(run) as live:
        snapshot = settled(live, "samples")
        assert snapshot["name"] == "tiny"
        assert snapshot["classes"] == list(study.classes)
        assert list(snapshot["sites"]) == ["site-01", "site-02"]
        assert snapshot["guessing"] == pytest.approx(1 / 3)
        assert snapshot["budget"] is None
        assert snapshot["samples"] == [1, 2, 3]
        weights = {name: parameters_of(build_generator(study, (name, 3))) for name in study.classes}
        newest = sample_images(study, weights)
        for label in range(3):
            sample = live.sample(3, label)
            assert sample is not None
            assert np.array_equal(sample, newest[label])
        assert live.sample(4, 0) is None
        assert live.sample(3, 3) is None
        assert live.sample(3, -1) is None
        json.dumps(snapshot, allow_nan=False)


def test_a_new_checkpoint_brings_its_sample_and_a_damaged_one_none(run: Path) -> None:
    study = tiny(gan={"rounds": 10})
    with LiveRun(run) as live:
        settled(live, "samples")
        (run / "checkpoints" / "gan-000004.safetensors").write_bytes(b"half of")
        for _ in range(5):
            assert live.snapshot()["samples"] == [1, 2, 3]
            time.sleep(0.02)
        weights = {name: parameters_of(build_generator(study, (name, 5))) for name in study.classes}
        arrays = {f"ema/{name}/{key}": value for name, one in weights.items() for key, value in one.items()}
        Checkpoints(run / "checkpoints", study.digest).save("gan", 5, arrays, {})
        deadline = time.monotonic() + 20
        while live.snapshot()["samples"] != [5]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert live.sample(3, 0) is not None  # a page that was told of it a moment ago still asks


def test_generators_that_were_only_fitted_are_shown_too(tmp_path: Path) -> None:
    study = tiny(**{**SMALL, "gan": {"method": "dp-merf", "merf": {"features": 64, "steps": 5}}})
    run = begun(tmp_path / "run", study)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    weights = {name: parameters_of(build_generator(study, (name, 1))) for name in study.classes}
    for name in study.classes:
        save_generator(run / "models" / f"generator-{name}.safetensors", study, name, weights[name], {})
    with LiveRun(run) as live:
        assert settled(live, "samples")["samples"] == [0]
        sample = live.sample(0, 1)
        assert sample is not None
        assert np.array_equal(sample, sample_images(study, weights)[1])


def test_budgets_are_those_of_the_ledgers(tmp_path: Path) -> None:
    study = tiny(**SMALL)
    run = begun(tmp_path / "run", study)
    key, head, data = Ed25519PrivateKey.generate(), START, b""
    normal = Event(sampling="poisson", q=0.1, sigma=1.0, steps=20, clip=1.0)
    every = Event(sampling="poisson", q=0.05, sigma=1.2, steps=30, clip=1.0)
    for kind, digest, class_name, event in (
        ("reserve", study.digest, "Normal", normal.as_json()),
        ("spend", study.digest, "Normal", normal.as_json()),
        ("release", study.digest, "Normal", {"sha256": "0" * 64}),
        ("spend", study.digest, None, every.as_json()),
        ("spend", "0" * 64, "Normal", normal.times(1000).as_json()),  # another study's
    ):
        content = LineContent(
            kind=kind, event=event, study=digest, phase="generators", class_name=class_name, round=1, attempt=1
        )
        line = write_line(content, head, site="site-01", software="x", key=key)
        head = head[0] + 1, json.loads(line)["hash"]
        data += line
    (run / "ledgers").mkdir()
    (run / "ledgers" / "site-01.jsonl").write_bytes(data + data[:50])  # the last line is being written
    (run / "ledgers" / "site-02.jsonl").write_bytes(b"{}\n")
    with LiveRun(run) as live:
        budget = settled(live, "budget")["budget"]
    assert (budget["epsilon"], budget["delta"]) == (8.0, 1e-3)
    assert budget["sites"]["site-02"]["epsilon"] is None  # cannot be read, and is not taken for nothing spent
    one = budget["sites"]["site-01"]
    assert one["releases"] == 1
    for name, events in (("Normal", [normal, every]), ("Cardiomegaly", [every])):
        assert one["per_class"][name] == epsilon(events, 1e-3)
    assert one["epsilon"] == one["per_class"]["Normal"]
    assert (run / "ledgers" / "site-01.jsonl").read_bytes() == data + data[:50]


needs_locks = pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="there is no /proc/locks on this machine")


@needs_locks
def test_the_state_follows_the_lock_and_the_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfed.server.live.FRESH_S", 0.0)
    with LiveRun(run) as live:
        assert live.snapshot()["state"] == "stopped"
        with exclusive(run):
            assert live.snapshot()["state"] == "running"
        assert live.snapshot()["state"] == "stopped"
        with exclusive(run):  # looking did not take the lock
            Journal(run / "events.jsonl").write("finished", study="x")
            assert live.snapshot()["state"] == "running"
        assert live.snapshot()["state"] == "finished"
        Journal(run / "events.jsonl").write("resumed", text="x")
        assert live.snapshot()["state"] == "stopped"


def test_a_run_of_another_version_keeps_the_digest_it_ran_under(tmp_path: Path) -> None:
    """Else a private study would seem to have spent nothing once a version with a new field reads its config.yaml."""
    run, key = begun(tmp_path / "run", tiny(**SMALL)), Ed25519PrivateKey.generate()
    event = Event(sampling="poisson", q=0.1, sigma=1.0, steps=20, clip=1.0)
    content = LineContent(
        kind="spend", event=event.as_json(), study="a1" * 32, phase="generators", class_name=None, round=1, attempt=1
    )
    (run / "ledgers").mkdir()
    (run / "ledgers" / "site-01.jsonl").write_bytes(write_line(content, START, site="site-01", software="x", key=key))
    Journal(run / "events.jsonl").write("resumed", text=f"study tiny {'a1' * 6} with xfed 9.9")
    with LiveRun(run) as live:
        snapshot = settled(live, "budget")
    assert snapshot["digest"] == "a1" * 6
    assert snapshot["budget"]["sites"]["site-01"]["epsilon"] == epsilon([event], 1e-3)


def test_a_run_that_just_wrote_is_taken_to_run_where_locks_cannot_be_seen(run: Path) -> None:
    with LiveRun(run) as live:
        assert live.snapshot()["state"] == "running"


def test_within_the_coordinator_connections_are_known(run: Path) -> None:
    Journal(run / "events.jsonl").write("presence", site="site-01", text="went offline")
    with LiveRun(run, lambda: {"site-01": True, "site-02": False, "stranger": True}) as live:
        snapshot = live.snapshot()
    assert snapshot["state"] == "running"
    assert {name: site["online"] for name, site in snapshot["sites"].items()} == {"site-01": True, "site-02": False}
    assert snapshot["sites"]["site-01"]["seen"] == pytest.approx(snapshot["now"])


def test_before_the_run_and_with_a_foreign_study_there_is_still_a_page(tmp_path: Path) -> None:
    with LiveRun(tmp_path / "nowhere") as live:
        snapshot = live.snapshot()
        assert (snapshot["state"], snapshot["name"], snapshot["sites"]) == ("waiting", None, {})
    run = begun(tmp_path / "run", tiny(gan={"rounds": 10}))
    (run / "config.yaml").write_text("of: another version\n")
    with LiveRun(run) as live:
        snapshot = live.snapshot()
        assert snapshot["name"] is None
        assert list(snapshot["gan"]) == list(tiny().classes)


def test_the_names_of_a_plan_are_known_from_the_start(run: Path) -> None:
    (run / "plan.json").write_text(json.dumps({"plan": json.dumps({"members": {"st-anna": "k", "charite": "k"}})}))
    with LiveRun(run) as live:
        assert list(live.snapshot()["sites"]) == ["charite", "st-anna"]


def test_a_run_replaced_by_another_is_shown_anew(run: Path) -> None:
    with LiveRun(run) as live:
        assert live.snapshot()["events"] == 5
        (run / "events.jsonl").unlink()
        Journal(run / "events.jsonl").write("started", text="x")
        snapshot = live.snapshot()
        assert snapshot["events"] == 1
        assert snapshot["gan"] == {}


# --- the page


@pytest.fixture
def page(run: Path) -> Iterator[str]:
    with LiveRun(run) as live:
        settled(live, "samples")
        with running_page(live_page(live)) as url:
            yield url


def test_the_page_serves_facts_and_samples_and_changes_nothing(run: Path, page: str) -> None:
    before = {path: (path.stat().st_mtime_ns, sha256_file(path)) for path in run.rglob("*") if path.is_file()}
    with httpx.Client(base_url=page.split("/?")[0], follow_redirects=True, trust_env=False) as asking:
        html = asking.get(page).raise_for_status().text
        snapshot = asking.get("/live").raise_for_status().json()
        assert snapshot["samples"] == [1, 2, 3]
        with Image.open(io.BytesIO(asking.get("/sample/3/0").raise_for_status().content)) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
        for path in ("/sample/9/0", "/sample/3/9"):
            assert asking.get(path).status_code == 404
        found = re.search(r"/assets/(\w+\.css)", html)
        assert found is not None
        token = asking.cookies.get(f"xfed-{asking.base_url.port}")
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert asking.request(method, "/live").status_code == 403
            assert asking.request(method, "/live", headers={"x-xfed-token": str(token)}).status_code == 405
    after = {path: (path.stat().st_mtime_ns, sha256_file(path)) for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_every_route_is_behind_the_guard(page: str) -> None:
    base = page.split("/?")[0]
    with httpx.Client(base_url=base, follow_redirects=True, trust_env=False) as asking:
        asking.get(page).raise_for_status()
        for path in ("/", "/live", "/sample/1/0", "/assets/live_page.js"):
            assert httpx.get(base + path, trust_env=False).status_code == 403
            assert asking.get(path).status_code == 200
            assert asking.get(path, headers={"host": "evil.example"}).status_code == 403
            assert asking.get(path, headers={"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("name", ["server/live_page", "server/live_charts", "client/reader_page"])
def test_pages_need_nothing_from_elsewhere(name: str) -> None:
    for suffix in (".html", ".js", ".css"):
        path = ROOT / f"{name}{suffix}"
        if path.is_file():
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//\w+\.\w|@import|url\(|eval\(|innerHTML|style=|onclick=", text), path


def test_the_option_page_is_a_port_or_auto() -> None:
    assert (page_port(None), page_port("auto"), page_port("8080")) == (None, 0, 8080)
    for wrong in ("0", "http", "70000", "-1", ""):
        with pytest.raises(ConfigError, match="--page"):
            page_port(wrong)


def test_what_is_no_run_cannot_be_watched(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert isinstance(done.exception, DataError)
    assert "holds no study" in str(done.exception)


@needs_locks
def test_locks_are_listed_by_the_kernel(tmp_path: Path) -> None:
    assert not _is_held(tmp_path / ".lock")
    with exclusive(tmp_path):
        assert _is_held(tmp_path / ".lock")
    assert not _is_held(tmp_path / ".lock")


def test_a_real_coordinator_shows_who_is_connected(tmp_path: Path) -> None:
    study = tiny(gan={"rounds": 1}, classifier={"rounds": 1}, federation={"join_limit_s": 300})
    with Deployed(study, tmp_path) as deployed:
        deployed.found()
        deployed.start("server", "--page", "auto")
        deployed.start("site-01")
        deadline = time.monotonic() + 240
        while not (found := re.search(r"Live page: (http://\S+)", deployed.tail("server"))):
            assert time.monotonic() < deadline, deployed.tail("server")
            time.sleep(0.2)
        with httpx.Client(base_url=found[1].split("/?")[0], follow_redirects=True, trust_env=False) as asking:
            asking.get(found[1]).raise_for_status()
            while True:
                snapshot = asking.get("/live").raise_for_status().json()
                if snapshot["sites"]["site-01"]["said"].startswith("waits for approval"):
                    break
                assert time.monotonic() < deadline, snapshot
                time.sleep(0.2)
            assert snapshot["state"] == "running"
            assert snapshot["simulated"] is False
            assert {name: site["online"] for name, site in snapshot["sites"].items()} == {
                "site-01": True,
                "site-02": False,
            }
            assert snapshot["sites"]["site-01"]["seen"] == pytest.approx(snapshot["now"], abs=1)
            assert httpx.get(found[1].split("/?")[0] + "/live", trust_env=False).status_code == 403
