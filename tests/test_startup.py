"""The command lines answer at once: what takes seconds to load is loaded by the commands that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "xfed.client.cli",
    "xfed.client.agent",
    "xfed.client.worker",
    "xfed.client.check",
    "xfed.server.cli",
    "xfed.server.gate",
)
SLOW = ("torch", "matplotlib", "pydicom", "opacus", "ray")
CLIENT, SERVER = "xfed.client.cli", "xfed.server.cli"


def loaded_after(code: str, folder: Path) -> list[str]:
    """The slow packages that are loaded after `code` in a fresh process, which ends well."""
    tell = f"import sys; print('LOADED', *[name for name in {SLOW!r} if name in sys.modules])"
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    return line.split()[1:]


def running(module: str, *arguments: str) -> str:
    return f"""
import sys
from {module} import app
sys.argv = ["xfed", *{list(arguments)!r}]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("module", MODULES)
def test_a_module_loads_without_what_is_slow(module: str, tmp_path: Path) -> None:
    assert loaded_after(f"import {module}", tmp_path) == []


def test_the_measure_sees_torch(tmp_path: Path) -> None:
    assert "torch" in loaded_after("import xfed.client.site", tmp_path)


def test_joining_a_federation_needs_no_torch(tmp_path: Path) -> None:
    site, request = ("--dir", "site"), "site/request.json"
    for module, arguments in (
        (CLIENT, ("--help",)),
        (SERVER, ("--help",)),
        (SERVER, ("init", "--name", "tests", "--address", "127.0.0.1:9092")),
        (CLIENT, ("enroll", "--name", "site-01", *site)),
        (SERVER, ("approve", request, "--yes")),
        (CLIENT, ("enroll", "--kit", "federation/kits/site-01.kit.json", *site)),
        (CLIENT, ("status", *site)),
        (SERVER, ("members",)),
    ):
        assert loaded_after(running(module, *arguments), tmp_path) == [], arguments
