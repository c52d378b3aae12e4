"""The rules about who may import whom, and that what is in the repository is in the wheel."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("common", "client", "server", "simulations", "configs")
ALLOWED = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "simulations": {"common", "client", "server", "simulations", "configs"},
    "configs": set(),
}
FLOWER_MODULES = {
    "common/codec.py",
    "client/app.py",
    "client/link.py",
    "common/secure_primitives.py",
    "server/app.py",
    "server/deployment.py",
    "server/exchange.py",
    "server/joining.py",
    "server/link.py",
    "simulations/flower.py",
    "simulations/run.py",
}
FLOWER_INTERNALS = {"client/link.py", "common/secure_primitives.py", "server/link.py", "simulations/flower.py"}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_sides(path: Path) -> None:
    side = path.parent.name
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "xfed" and len(parts) > 1:
            assert parts[1] in ALLOWED[side], f"{side} must not import {name}"
        assert parts[0] not in FOLDERS, f"bare import of {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_flower_is_met_in_few_places(path: Path) -> None:
    uses = {name for name in _imports(path) if name.split(".")[0] == "flwr"}
    where = str(path.relative_to(ROOT))
    assert not uses or where in FLOWER_MODULES or where.startswith("simulations/benchmarks"), (where, uses)
    internals = {
        n for n in uses if n.split(".")[1:2] and n.split(".")[1] not in ("app", "clientapp", "serverapp", "simulation")
    }
    assert not internals or where in FLOWER_INTERNALS, (where, internals)


def test_every_folder_with_code_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        "xfed." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert on_disk == set(settings["packages"])
    for package, folder in settings["package-dir"].items():
        assert package == "xfed." + folder.replace("/", ".")


def test_no_file_has_outgrown_its_shape() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_nothing_loads_pickles_or_swallows_errors() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except in {path}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {
                    ("torch", "load"),
                    ("pickle", "load"),
                    ("pickle", "loads"),
                    ("yaml", "load"),
                }, path
