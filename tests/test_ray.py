"""The same ServerApp and ClientApp under Flower's own simulation engine: the same bits as over threads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, tiny
from xfed.common.weights import digest_of, load_arrays
from xfed.simulations.run import run_study

SMALL = {
    "gan": {"rounds": 2, "steps_per_round": 1},
    "classifier": {"rounds": 2, "arms": ["DS1", "DS3"]},
    "federation": {"time_limit_s": 120},
}
# in a process of its own: Ray starts servers and installs signal handlers
RAY = """
import sys
from pathlib import Path
from tests.conftest import tiny
from tests.test_ray import SMALL
from xfed.simulations.run import run_study
run_study(tiny(**SMALL, runtime={"backend": "ray", "workers": 2}), Path(sys.argv[1]))
"""


@pytest.mark.timeout(400)
def test_ray_gives_the_same_bits_as_threads(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'xfed[ray]'")
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(tmp_path / "ray")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_study(tiny(**SMALL), tmp_path / "local")

    def digests(folder: Path) -> dict[str, str]:
        found = {path.name: digest_of(load_arrays(path)[0]) for path in (folder / "models").iterdir()}
        found["archive"] = json.loads((folder / "archive" / "manifest.json").read_text())["root_sha256"]
        return found

    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfed.common.errors import ConfigError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"xfed\[ray\]"):
        run_study(tiny(runtime={"backend": "ray"}), tmp_path / "out")
