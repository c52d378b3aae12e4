"""Two radiologists finish a reader study by keyboard in Chromium; the server is killed in the middle, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from tests.browser import chromium, contrast_faults, errors, nameless, prefer
from tests.conftest import ROOT
from tests.reading import make_archive, make_site

IMAGES = 20
START = "import sys; from xfed.client.cli import main; sys.argv[0] = 'xfed-client'; main()"


@contextmanager
def command(site: Path, archive: Path, reader: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`xfed-client reader` as a process of its own, and the address that it prints."""
    options = ["--dir", str(site), "--archive", str(archive), "--reader", reader, "--images", str(IMAGES)]
    process = subprocess.Popen(
        [sys.executable, "-c", START, "reader", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Open "):
                yield process, line.split()[1]
                break
        else:
            pytest.fail(f"the command printed no address:\n{said}")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def until(browser: Any, script: str) -> Any:
    """Wait until the script's value is true, at most 20 s."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda each: each.execute_script(f"return {script}"))


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def shown(number: int) -> str:
    """The image `number` (1, 2, ...) is on the screen, whole."""
    return (
        f"document.querySelector('#film').alt === 'X-ray {number} of {IMAGES}'"
        " && document.querySelector('#film').naturalWidth > 0 && !document.querySelector('#film').classList.contains('gone')"
    )


def read(browser: Any, first: int, last: int, plan: list[tuple[str, str]]) -> None:
    """Answer the images first..last by keyboard."""
    for number in range(first, last + 1):
        until(browser, shown(number))
        press(browser, "".join(plan[number - 1]))
        following = shown(number + 1) if number < IMAGES else "!document.querySelector('#done').hidden"
        until(browser, following)


def plan_of(seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [(str(rng.choice(["r", "s"])), str(rng.choice(["1", "2", "3"]))) for _ in range(IMAGES)]


def log(site: Path, reader: str) -> list[dict[str, Any]]:
    (path,) = (site / "reader").glob(f"*/answers/{reader}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_two_readers_finish_by_keyboard_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    site, archive = make_site(tmp_path / "site"), make_archive(tmp_path / "archive")
    ada, bo = plan_of(1), plan_of(2)
    with chromium(tmp_path) as browser:
        with command(site, archive, "ada") as (process, url):
            browser.get(url)
            until(browser, "!document.querySelector('#intro').hidden")
            for scheme in ("dark", "light"):
                prefer(browser, scheme)
                assert not contrast_faults(browser)
            assert not nameless(browser)
            press(browser, "\n")
            read(browser, 1, 8, ada)
            press(browser, "r")  # not sent before the reader says how sure they are
            until(browser, "document.querySelector('#real').getAttribute('aria-pressed') === 'true'")
            for scheme in ("dark", "light"):
                prefer(browser, scheme)
                assert not contrast_faults(browser)
            assert not nameless(browser)
            sizes = browser.execute_script(
                "return performance.getEntriesByType('resource').filter(e => e.name.includes('/image/'))"
                ".map(e => [e.encodedBodySize, e.transferSize, e.responseStatus])"
            )
            assert len(sizes) == 9
            assert len({tuple(size) for size in sizes}) == 1
            assert not errors(browser)
            process.send_signal(signal.SIGKILL)
            process.wait()
            press(browser, "1")
            until(browser, "!document.querySelector('#trouble').hidden")
            assert "no answer is lost" in browser.execute_script(
                "return document.querySelector('#trouble').textContent"
            )
        assert [answer["called"][0] for answer in log(site, "ada")] == [called for called, _ in ada[:8]]
        errors(browser)
        with command(site, archive, "ada") as (_, url):
            browser.get(url)
            until(browser, "!document.querySelector('#intro').hidden")
            assert "image 9" in browser.execute_script("return document.querySelector('#begin').textContent")
            press(browser, "\n")
            read(browser, 9, IMAGES, ada)
            for scheme in ("dark", "light"):
                prefer(browser, scheme)
                assert not contrast_faults(browser)
            assert not nameless(browser)
            assert not errors(browser)
            browser.refresh()
            until(browser, "!document.querySelector('#done').hidden")  # a finished reader sees the result again
        with command(site, archive, "bo") as (_, url):
            browser.get(url)
            until(browser, "!document.querySelector('#intro').hidden")
            press(browser, "\n")
            read(browser, 1, IMAGES, bo)
            words = browser.execute_script("return document.querySelector('#done').innerText")
            assert not errors(browser)
    figures = _by_hand(site, {"ada": ada, "bo": bo})
    correct, accuracy = figures["readers"]["bo"]["correct"], figures["readers"]["bo"]["accuracy"]
    assert f"{correct} of {IMAGES} answers were right." in words
    assert f"That is {accuracy:.0%}" in words
    assert "all 2 readers" in words


def _by_hand(site: Path, plans: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """reader-study.json, after its figures were computed again from design.json and the logs alone."""
    (folder,) = (site / "reader").iterdir()
    items = json.loads((folder / "design.json").read_text())["items"]
    figures: dict[str, Any] = json.loads((folder / "reader-study.json").read_text())
    called: dict[str, dict[int, bool]] = {}
    for reader, plan in plans.items():
        answers = log(site, reader)
        assert [(a["called"][0], str(a["confidence"])) for a in answers] == plan
        assert sorted(a["item"] for a in answers) == list(range(IMAGES))
        right = [a["called"] == items[a["item"]]["kind"] for a in answers]
        mine = figures["readers"][reader]
        oracle = stats.binomtest(sum(right), IMAGES)
        interval = oracle.proportion_ci(0.95, "exact")
        assert mine["correct"] == sum(right)
        assert mine["p_value"] == pytest.approx(oracle.pvalue)
        assert mine["accuracy_interval"] == pytest.approx([interval.low, interval.high])
        truth = [items[a["item"]]["kind"] == "synthetic" for a in answers]
        score = [a["confidence"] * (1 if a["called"] == "synthetic" else -1) for a in answers]
        assert mine["auc"] == pytest.approx(roc_auc_score(truth, score))
        hits = sum(t and s > 0 for t, s in zip(truth, score, strict=True))
        alarms = sum(not t and s > 0 for t, s in zip(truth, score, strict=True))
        z, half = stats.norm.ppf, IMAGES // 2
        assert mine["d_prime"] == pytest.approx(z((hits + 0.5) / (half + 1)) - z((alarms + 0.5) / (half + 1)))
        called[reader] = {a["item"]: a["called"] == "synthetic" for a in answers}
    ada, bo = ([called[name][item] for item in range(IMAGES)] for name in ("ada", "bo"))
    assert figures["agreement"]["kappa"] == pytest.approx(cohen_kappa_score(ada, bo))
    assert figures["pooled"]["correct"] == sum(figures["readers"][name]["correct"] for name in plans)
    return figures


def test_a_mouse_will_do_and_the_first_choice_can_be_changed(tmp_path: Path) -> None:
    site, archive = make_site(tmp_path / "site"), make_archive(tmp_path / "archive")
    with chromium(tmp_path) as browser, command(site, archive, "ada") as (_, url):
        browser.get(url)
        until(browser, "!document.querySelector('#intro').hidden")

        def click(name: str) -> None:
            browser.find_element("id", name).click()

        click("begin")
        until(browser, shown(1))
        click("real")
        click("synthetic")
        click("sure-0")
        until(browser, shown(2))
        press(browser, "rs3")
        until(browser, shown(3))
        press(browser, "2")  # a confidence without a choice is no answer
        until(browser, shown(3))
    assert [(answer["called"], answer["confidence"]) for answer in log(site, "ada")] == [
        ("synthetic", None),
        ("synthetic", 3),
    ]
