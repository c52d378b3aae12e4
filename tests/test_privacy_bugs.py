"""The bench of planted privacy bugs: a sample of it, all of it (slow), and that it can say no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from xfed.simulations import planted_bugs
from xfed.simulations.planted_bugs import all_bugs, exchange, module, planted
from xfed.simulations.privacy_bugs import Outcome, markdown

SAMPLE = ("batches-of-fixed-size", "retries-not-counted", "signatures-not-checked", "half-the-claimed-noise")


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xfed.simulations.privacy_bugs", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_sample_of_the_bugs_is_caught() -> None:
    done = _bench("--json", *[word for name in SAMPLE for word in ("--only", name)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["bugs"], found["caught"]) == (4, 4)
    assert {one["bug"] for one in found["results"]} == set(SAMPLE)


@pytest.mark.slow
def test_every_bug_is_caught() -> None:
    done = _bench("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["caught"] == found["bugs"] == len(all_bugs()) >= 30


def test_the_page_holds_the_table_of_all_bugs() -> None:
    page = (ROOT / "docs" / "privacy-bench.md").read_text(encoding="utf-8")
    assert markdown() in page, "python -m xfed.simulations.privacy_bugs --list --markdown gives the table anew"
    assert f"{len(all_bugs())} bugs" in page


def test_every_test_that_a_bug_names_is_there() -> None:
    for bug in all_bugs().values():
        for test in bug.tests:
            path, _, name = test.partition("::")
            assert f"def {name.split('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), (bug.name, test)


def test_an_unknown_bug_is_refused() -> None:
    done = _bench("--only", "no-such-bug")
    assert done.returncode == 2
    assert "no bug is called no-such-bug" in done.stderr


ID = "tests/test_x.py::test_it"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"failed": {f"{ID}[1-2]": "AssertionError"}, "passed": (f"{ID}[3-4]",)}, None),
        ({"failed": {f"{ID}_too": "AssertionError"}}, "did not fail"),
        ({"failed": {}, "code": 0, "passed": (ID,)}, "pytest ended with 0"),
        ({"failed": {}, "code": 4}, "did not fail"),
        ({"failed": {ID: "NameError"}}, "the planting is wrong"),
        ({"failed": {ID: "TypeError"}}, "the planting is wrong"),
        ({"broken": ("tests/test_x.py cannot be collected",)}, "error beside the tests"),
        ({"broken": (f"setup of {ID}",)}, "error beside the tests"),
    ],
)
def test_only_a_test_that_ran_and_failed_has_caught_a_bug(changes: dict[str, Any], why: str | None) -> None:
    values = {"code": 1, "passed": (), "failed": {ID: "AssertionError"}, "broken": (), "seconds": 1.0, "output": ""}
    found = Outcome(**{**values, **changes}).misses([ID])
    assert (found == []) == (why is None)
    if why is not None:
        assert any(why in reason for reason in found), found


def test_a_bug_that_no_test_sees_ends_the_bench_with_an_error(tmp_path: Path) -> None:
    """A copy of the bench whose only bug does no harm."""
    code = (
        "import sys\n"
        "from xfed.simulations import planted_bugs, privacy_bugs\n"
        "planted_bugs.PARTS = ()\n"
        "@planted_bugs.planted('test_noise.py::test_a_stream_is_chacha20_of_its_key')\n"
        "def harmless():\n"
        "    'Nothing at all.'\n"
        "@planted_bugs.planted('test_noise.py::test_a_stream_is_chacha20_of_its_key')\n"
        "def wrongly_planted():\n"
        "    'Something that is not there.'\n"
        "    planted_bugs.exchange(object(), None)\n"
        "sys.argv[1:] = ['--json']\n"
        "privacy_bugs.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    found = {one["bug"]: one["why_not"] for one in json.loads(done.stdout)["results"]}
    assert "pytest ended with 0" in found["harmless"]
    assert "error beside the tests: the child ended early" in found["wrongly-planted"]
    assert "2 planted bugs were not noticed" in done.stderr


def test_what_is_exchanged_is_exchanged_wherever_it_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, noise = module("common.mechanism"), module("common.noise")
    real = noise.add_gaussian
    for owner in (mechanism, noise):
        monkeypatch.setattr(owner, "add_gaussian", real)
    exchange(real, len)
    assert mechanism.add_gaussian is noise.add_gaussian is len
    with pytest.raises(LookupError, match="not planted"):
        exchange(object(), len)


def test_a_bug_has_a_name_of_its_own_a_description_and_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_bugs, "BUGS", {})

    def same() -> None:
        """Is described."""

    def silent() -> None:
        pass

    planted("test_x.py::test_it")(same)
    for tests, plant in ((("test_x.py::test_it",), same), ((), same), (("test_x.py::test_it",), silent)):
        with pytest.raises(ValueError, match="there already, or has no description"):
            planted(*tests)(plant)
