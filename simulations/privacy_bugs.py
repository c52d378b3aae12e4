"""`python -m xfed.simulations.privacy_bugs`: plants privacy bugs one by one, and sees whether the tests notice each.

::

    tests of all bugs, nothing planted --one child--> all must pass                      else: the bench itself is broken
    planted_bugs.all_bugs --one child per bug: plant, then pytest on its tests--> each of these must fail
    child --JSON over a pipe--> outcome of every test      its output --> a temporary file, shown when a bug is missed
    --markdown --> the table of docs/privacy-bench.md

The parent imports everything once (seconds) and computes nothing: children are forked from it before any thread of torch runs.
A failure counts when a test ran and failed. A module that cannot be collected, a fixture that breaks, or a bug that ends in an
error of the language (a wrong name or argument) shows that the planting is wrong, not that a test sees the bug.
A checkout with tests/ and pytest are needed; nothing is written there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xfed.common.console import print_result, run_app
from xfed.common.errors import ConfigError, FederationError
from xfed.simulations.planted_bugs import Bug, all_bugs

__all__ = ["Outcome", "main", "markdown", "run_tests"]

ROOT = Path(__file__).resolve().parent.parent
_WARM = (
    "hypothesis",
    "opacus.grad_sample",
    "opacus.accountants",
    "dp_accounting.pld",
    "scipy.stats",
    "sklearn.metrics",
    "typer.testing",
    "xfed.client.site",
    "xfed.common.auditor.cli",
    "xfed.server.ledgers",
    "xfed.simulations.neighbours",
    "xfed.simulations.run",
)
_OF_THE_PLANTING = (
    "AttributeError",
    "ImportError",
    "LookupError",
    "ModuleNotFoundError",
    "NameError",
    "TypeError",
    "UnboundLocalError",
)
_LIMIT = 200  # seconds for one test: a bug may make it hang


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a child's pytest said: `failed` maps test ids to the names of what was raised; `broken` are errors beside tests."""

    code: int
    passed: tuple[str, ...]
    failed: dict[str, str]
    broken: tuple[str, ...]
    seconds: float
    output: str

    def misses(self, tests: Sequence[str]) -> list[str]:
        """Why this does not show that `tests`, each of them, see the bug; empty when it does."""
        reasons = [f"error beside the tests: {one}" for one in self.broken]
        if self.code != 1 and not self.broken:
            reasons.append(f"pytest ended with {self.code}")
        for test in tests:
            own = [raised for name, raised in self.failed.items() if name == test or name.startswith(f"{test}[")]
            if not own:
                reasons.append(f"{test} did not fail")
            elif all(raised in _OF_THE_PLANTING for raised in own):
                reasons.append(f"{test} failed with {own[0]}: the planting is wrong")
        return reasons


class _Watch:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}
        self.broken: list[str] = []
        self._raised: dict[str, str] = {}

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Note what was raised; pytest makes the report."""
        if call.excinfo is not None:
            self._raised[item.nodeid] = call.excinfo.type.__name__

    def pytest_collectreport(self, report: Any) -> None:
        """Modules that cannot be collected."""
        if report.failed:
            self.broken.append(f"{report.nodeid} cannot be collected")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test, its fixtures before it, or after it."""
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)
        elif report.when == "call" and report.failed:
            self.failed[report.nodeid] = self._raised.get(report.nodeid, "?")
        elif report.failed:
            self.broken.append(f"{report.when} of {report.nodeid}")


def _pytest(tests: Sequence[str], bug: Bug | None) -> dict[str, Any]:
    """In the child: plant, run, tell."""
    hypothesis: Any = importlib.import_module("hypothesis")
    pytest: Any = importlib.import_module("pytest")
    # nothing is kept, and what fails need not be made small
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("planted", database=None, derandomize=True, deadline=None, phases=phases)
    hypothesis.settings.load_profile("planted")
    if bug is not None:
        bug.plant()
    watch = _Watch()
    options = ["-q", "--tb=short", f"--rootdir={ROOT}", f"--timeout={_LIMIT}", "-p", "no:warnings"]
    code = pytest.main([*options, *tests], plugins=[watch])
    return {"code": int(code), "passed": watch.passed, "failed": watch.failed, "broken": watch.broken}


def run_tests(tests: Sequence[str], bug: Bug | None = None) -> Outcome:
    """Run `tests` (pytest ids below the checkout) in a forked child with `bug` planted; None: without any."""
    started = time.monotonic()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _as_child(read, write, output.fileno(), tests, bug)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read()
        os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    try:
        found = json.loads(told)
    except ValueError:
        found = {"code": -1, "passed": [], "failed": {}, "broken": ["the child ended early"]}
    return Outcome(
        code=found["code"],
        passed=tuple(found["passed"]),
        failed=found["failed"],
        broken=tuple(found["broken"]),
        seconds=time.monotonic() - started,
        output=text,
    )


def _as_child(read: int, write: int, output: int, tests: Sequence[str], bug: Bug | None) -> None:
    """Never returns."""
    try:
        os.close(read)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        os.write(write, json.dumps(_pytest(tests, bug)).encode())
    except BaseException:
        importlib.import_module("traceback").print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _warm_up() -> None:
    """Import what the tests import, without a thread. Raises `ConfigError` outside a checkout."""
    if not (ROOT / "tests" / "test_noise.py").is_file():
        raise ConfigError(
            f"{ROOT} holds no tests/: run the bench in a checkout of the repository, installed with pip -e"
        )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    try:
        importlib.import_module("pytest")
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)
        for name in _WARM:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install -e '.[dev]'") from error


def markdown() -> str:
    """The table of all bugs: name, what is done wrong, which tests see it."""
    rows = ["| | bug | what is done wrong | caught by |", "|---|---|---|---|"]
    for number, bug in enumerate(all_bugs().values(), 1):
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`".replace("|", "\\|") for test in bug.tests)
        rows.append(f"| {number} | {bug.name} | {bug.description} | {tests} |")
    return "\n".join(rows) + "\n"


def _chosen(only: Sequence[str]) -> list[Bug]:
    bugs = all_bugs()
    unknown = [name for name in only if name not in bugs]
    if unknown:
        raise ConfigError(f"no bug is called {', '.join(unknown)}: --list names all {len(bugs)}")
    return [bug for name, bug in bugs.items() if not only or name in only]


app = typer.Typer(add_completion=False)


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Plant this bug; may be repeated.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Say which bugs there are, and plant none.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="With --list: the table of docs/privacy-bench.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
) -> None:
    """Plant each bug, run its tests, and end with code 7 when one of them is not noticed."""
    bugs = _chosen(only or [])
    if listed:
        _tell(bugs, as_markdown, as_json)
        return
    _warm_up()
    aside = Console(stderr=True, highlight=False, soft_wrap=True)
    started = time.monotonic()
    tests = sorted({test for bug in bugs for test in bug.tests})
    honest = run_tests(tests)
    if honest.code != 0:
        aside.print(honest.output, markup=False)
        raise FederationError(
            "tests fail with nothing planted: see above, and repair them before the bench says anything"
        )
    aside.print(f"{len(honest.passed)} tests pass with nothing planted ({honest.seconds:.0f} s)")
    results = []
    for bug in bugs:
        outcome = run_tests(bug.tests, bug)
        missed = outcome.misses(bug.tests)
        aside.print(f"{'MISSED' if missed else 'caught'}  {bug.name}  ({outcome.seconds:.1f} s)", markup=False)
        if missed:
            aside.print(outcome.output[-4000:], *missed, sep="\n", markup=False)
        results.append(
            {
                "bug": bug.name,
                "tests": list(bug.tests),
                "caught": not missed,
                "why_not": missed,
                "raised": sorted(set(outcome.failed.values())),
                "seconds": round(outcome.seconds, 1),
            }
        )
    caught = sum(one["caught"] is True for one in results)
    values = {
        "bugs": len(results),
        "caught": caught,
        "tests": len(tests),
        "seconds": round(time.monotonic() - started, 1),
        "results": results,
    }
    print_result(as_json, values, _table(results), f"{caught} of {len(results)} bugs are caught.")
    if caught < len(results):
        raise FederationError(
            f"{len(results) - caught} planted bugs were not noticed: write a test that fails with each"
        )


def _tell(bugs: Sequence[Bug], as_markdown: bool, as_json: bool) -> None:
    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    values = {bug.name: {"description": bug.description, "tests": list(bug.tests)} for bug in bugs}
    print_result(as_json, values, *[f"{bug.name}: {bug.description}" for bug in bugs])


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("bug", "tests", "caught", box=None)
    for one in results:
        table.add_row(one["bug"], "\n".join(one["tests"]), "yes" if one["caught"] else "NO")
    return table


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
