"""A small study is watched in Chromium while it runs, is killed, goes on, and until it ends: curves and samples appear."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.browser import chromium, contrast_faults, errors, nameless, prefer
from tests.conftest import ROOT, tiny

STUDY = tiny(gan={"rounds": 24, "steps_per_round": 3}, classifier={"rounds": 4}, runtime={"workers": 1})
LIMIT_S = 420


@contextmanager
def process(side: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """An xfed command as a process of its own, gently; killed at the end."""
    started = subprocess.Popen(
        [sys.executable, "-c", f"from xfed.{side}.cli import main; main()", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.nice(19),
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        if started.stdout is not None:
            started.stdout.close()


def address(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    said = ""
    for line in started.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line):
            return found[0]
    pytest.fail(f"no address was printed:\n{said}")


def until(browser: Any, script: str, limit: float = LIMIT_S) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, limit, poll_frequency=0.2).until(lambda each: each.execute_script(f"return {script}"))


def state(browser: Any) -> str:
    return str(browser.execute_script("return document.querySelector('#state').textContent"))


IS = "document.querySelector('#state').textContent === '{}'"
LOADED = "[...document.querySelectorAll('.samples img')].filter(each => each.naturalWidth === 32).length"


def test_a_study_is_watched_from_its_first_round_to_its_end(tmp_path: Path) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(STUDY.resolved(), sort_keys=False))
    with chromium(tmp_path, height=1400) as browser:
        with process("simulations", "run", config, "--out", out, "--page", "auto") as study:
            own = address(study)
            browser.get(own)  # the page of the process that runs the study
            until(browser, f"{IS.format('running')} && document.querySelectorAll('#gan svg').length === 3")
            until(browser, f"{LOADED} >= 3")
            study.send_signal(signal.SIGSTOP)  # on a fast machine it would be over before the second page is there
            with process("server", "watch", out) as watching:
                browser.get(address(watching))  # the same run from its files alone
                until(browser, f"document.querySelectorAll('#gan svg').length === 3 && {LOADED} >= 3")
                assert "Generators: " in browser.execute_script("return document.querySelector('#now').textContent")
                first = browser.execute_script(f"return {LOADED}")
                study.send_signal(signal.SIGCONT)
                until(browser, f"{LOADED} > {first}")  # they come by themselves
                study.send_signal(signal.SIGKILL)
                study.wait()
                until(browser, IS.format("stopped"), limit=60)
                words = browser.execute_script("return document.querySelector('#now').textContent")
                assert "The same command goes on from the last whole round" in words
                with process("simulations", "run", config, "--out", out) as again:
                    until(browser, IS.format("running"))
                    until(browser, "document.querySelectorAll('#arms svg').length === 4")
                    assert again.stdout is not None
                    said = again.stdout.read()  # to its end, so that its pipe never fills
                    assert again.wait() == 0, said
                until(browser, IS.format("finished"), limit=60)
                _finished(browser)
                assert not errors(browser)
        until(browser, IS.format("page ended"), limit=60)  # and says so when its server is gone
        assert "what was known at" in browser.execute_script("return document.querySelector('#since').textContent")


def _finished(browser: Any) -> None:
    """What the page shows of the finished study, and that it can be read."""
    assert "went on after 1 stop" in browser.execute_script("return document.querySelector('#since').textContent")
    paths = browser.execute_script(
        "return [...document.querySelectorAll('#gan path')].map(each => (each.getAttribute('d').match(/[ML]/g) || []).length)"
    )
    assert paths == [24] * 6  # three classes, D and G, a point per round
    arms = browser.execute_script(
        "return [...document.querySelectorAll('#arms svg')].map(e => e.getAttribute('aria-label'))"
    )
    assert len(arms) == 4
    assert all("over 4 rounds" in label and "DS1" in label and "DS3" in label for label in arms)
    rounds = browser.execute_script(
        "return [...document.querySelectorAll('#samples tr')].map(each => Number(each.dataset.round))"
    )
    assert rounds == sorted(rounds, reverse=True)
    assert len(rounds) >= 6
    assert max(rounds) == 24
    phases = browser.execute_script("return [...document.querySelectorAll('#phases progress')].map(each => each.value)")
    assert set(phases) == {1}
    assert browser.execute_script("return document.title") == "finished: tiny"
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(e => !e.startsWith(location.origin))"
    )
    assert outside == []
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        assert not contrast_faults(browser)
    assert not nameless(browser)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 640, "height": 900, "deviceScaleFactor": 2, "mobile": False}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")  # at 200% zoom
