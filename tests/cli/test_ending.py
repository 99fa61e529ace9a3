"""A signal that asks to end is not lost where Python drops what is raised."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time
from malloc_bench.cli.ending import end_as_by_ctrl_c
asks = int(sys.argv[1])
once = [asks]
os.register_at_fork(after_in_parent=lambda: once and os.kill(os.getpid(), once.pop()))  # raised there, and dropped
end_as_by_ctrl_c(ended := [])
try:
    if not os.fork():
        os._exit(0)
    time.sleep(20)
except KeyboardInterrupt:
    print("ended by", ended[-1] if ended else 2)
"""


@pytest.mark.parametrize("asks", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_beside_a_fork_comes_again(asks: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(int(asks))], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"ended by {int(asks)}\n", "")


def test_what_else_is_dropped_is_told_as_ever() -> None:
    script = "from malloc_bench.cli.ending import end_as_by_ctrl_c\nend_as_by_ctrl_c([])\n"
    script += "class Odd:\n    def __del__(self):\n        raise ValueError('odd')\nOdd()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "Exception ignored in: <function Odd.__del__" in done.stderr and "ValueError: odd" in done.stderr
