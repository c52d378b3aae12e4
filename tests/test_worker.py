"""The worker: frames through pipes, a process that stays warm, and what happens when either side is killed."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.joined import joined_site
from xfed.client.worker import Worker, WorkerLostError, read_frame, write_frame
from xfed.common.messages import Describe, Refusal
from xfed.common.packing import pack, unpack_reply


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), st.binary(max_size=200))
def test_frames_come_out_as_they_went_in(header: str, data: bytes) -> None:
    stream = io.BytesIO()
    write_frame(stream, header, data)
    whole = stream.getvalue()
    assert read_frame(io.BytesIO(whole)) == (header, data)
    for cut in {0, 1, 39, len(whole) - 1}:
        assert cut >= len(whole) or read_frame(io.BytesIO(whole[:cut])) is None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    made = Worker(joined_site(tmp_path).folder, tmp_path / "worker.log")
    yield made
    made.stop()


def test_it_stays_warm_and_is_replaced_when_it_was_killed(worker: Worker) -> None:
    pids: list[int] = []
    worker._on_start = pids.append
    question = pack(Describe(study="0" * 64))
    for _ in range(2):
        reply = unpack_reply(*worker.ask({"run": "1"}, *question))
        assert isinstance(reply, Refusal)
        assert "never proposed" in reply.reason
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
    assert isinstance(unpack_reply(*worker.ask({}, *question)), Refusal)
    assert len(pids) == 2


def test_a_worker_killed_over_a_question_is_said_to_be_lost(worker: Worker) -> None:
    """It is stopped in its tracks, so that the question is certainly not answered when the kill comes."""
    pids: list[int] = []
    worker._on_start = pids.append
    question = pack(Describe(study="0" * 64))
    worker.ask({}, *question)
    os.kill(pids[0], signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (pids[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerLostError, match=r"exit code -9|the worker died"):
        worker.ask({}, *question)
    killer.join()
    assert isinstance(unpack_reply(*worker.ask({}, *question)), Refusal)
    assert len(pids) == 2


def test_it_dies_with_its_agent(tmp_path: Path) -> None:
    """The lifeline: nobody else may train on the site's state, so an orphan must not live on."""
    home = joined_site(tmp_path)
    told, tell = os.pipe()
    agent = os.fork()
    if agent == 0:  # the agent: starts a worker, says which, and is killed
        try:
            made = Worker(home.folder, tmp_path / "worker.log", lambda pid: os.write(tell, str(pid).encode()) and None)
            made.start()
            signal.pause()
        finally:
            os._exit(0)
    pid = int(os.read(told, 20))
    time.sleep(0.3)
    assert _alive(pid)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    deadline = time.monotonic() + 20
    while _alive(pid):
        assert time.monotonic() < deadline, "the worker outlived its agent"
        time.sleep(0.05)
