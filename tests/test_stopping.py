"""A stop by signal never hangs, wherever the main thread is just then."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from xfed.common.stopping import StopFlag

# waits so shortly that the signal mostly comes between two waits
HAMMER = """
import signal
from xfed.common.stopping import StopFlag
for turn in range(400):
    stop = StopFlag()  # a threading.Event hangs here, within the first turns
    signal.signal(signal.SIGALRM, lambda *_: stop.set())
    signal.setitimer(signal.ITIMER_REAL, 0.0005 + turn % 17 * 1e-5)
    while not stop.is_set():
        stop.wait(1e-6)
print("ended")
"""


def test_a_signal_at_any_moment_ends_the_wait() -> None:
    done = subprocess.run([sys.executable, "-c", HAMMER], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "ended\n", done.stderr


def test_waiting_ends_early_and_only_when_it_was_set() -> None:
    flag = StopFlag()
    began = time.monotonic()
    assert not flag.wait(0.05)
    assert time.monotonic() - began >= 0.05
    threading.Timer(0.05, flag.set).start()
    assert flag.wait(30)
    assert flag.is_set()
    assert flag.wait(30), "it stays set"
    flag.set()
    assert time.monotonic() - began < 10
