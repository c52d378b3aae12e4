"""What is in the repository is in the wheel, the wheel runs without the repository, and every dependency is pinned."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, tiny

FOLDERS = ("common", "client", "server", "simulations", "configs")
COMMANDS = ("xfed-sim", "xfed-client", "xfed-server")
CONSTRAINTS = ROOT / "constraints.txt"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed copy. -S leaves out .pth files, through which an editable install would reach the checkout."""
    places = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return subprocess.run(
        [sys.executable, "-S", "-P", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _shipped() -> set[str]:
    """What must be in the wheel, by the folders on disk."""
    suffixes = ("*.py", "*.yaml", "*.j2", "*.html", "*.js", "*.css", "py.typed")
    found = [path for folder in FOLDERS for suffix in suffixes for path in (ROOT / folder).rglob(suffix)]
    return {"xfed/" + path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    wanted = _shipped()
    assert {"xfed/server/report.html.j2", "xfed/configs/demo.yaml", "xfed/common/py.typed"} <= wanted
    assert "xfed/simulations/benchmarks/speed.py" in wanted
    assert names == wanted
    assert not any("test" in name for name in names)
    for command in COMMANDS:
        assert f"{command} = " in entry_points


def test_every_installed_module_is_imported_from_the_installed_copy(installed: Path, tmp_path: Path) -> None:
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in _shipped()
        if name.endswith(".py")
    )
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )  # fmt: skip
    done = _run(installed, tmp_path, "-c", code, *modules)
    assert done.returncode == 0, done.stderr[-3000:]
    files = done.stdout.split("\n")[:-1]
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(installed) for file in files), files


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_commands_answer(installed: Path, tmp_path: Path, command: str) -> None:
    done = _run(installed, tmp_path, str(installed / "bin" / command), "--help")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Usage" in done.stdout


def test_the_installed_copy_runs_a_study_and_writes_its_report(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(gan={"rounds": 1}, classifier={"rounds": 1}).resolved()))
    done = _run(installed, tmp_path, str(installed / "bin" / "xfed-sim"), "run", "tiny.yaml", "--out", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    page = tmp_path / "out" / "report.html"
    before = page.read_bytes()
    assert b"DS3" in before
    page.unlink()
    again = _run(installed, tmp_path, str(installed / "bin" / "xfed-server"), "report", "out")
    assert again.returncode == 0, again.stderr[-3000:]
    assert page.read_bytes() == before


def _pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    return {_normal(name): version for name, version in pins.items()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_exact_versions_and_name_no_place() -> None:
    for line in CONSTRAINTS.read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9]+(\.[0-9]+)*((a|b|rc|\.post)[0-9]+)?", line), line
        assert not re.search(r"://|@|\+|/", line), line
    assert _pins()["torch"] == "2.13.0"


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    pins = _pins()
    missing = [one for one in wanted if _normal(re.match(r"[A-Za-z0-9._-]+", one)[0]) not in pins]  # type: ignore[index]
    assert not missing


def test_pins_are_within_what_pyproject_allows() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = _pins()
    for extra in ([], *project["optional-dependencies"].values()):
        for text in (*project["dependencies"], *extra):
            one = requirements.Requirement(text)
            assert one.specifier.contains(pins[_normal(one.name)]), (text, pins[_normal(one.name)])
