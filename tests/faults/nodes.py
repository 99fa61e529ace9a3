"""Nodes of a Ray cluster on loopback, which can go away as a machine does: at once, with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path


class Nodes:
    """`start` makes a head first, then nodes beside it, of one CPU each; what a node has started carries its mark.

    folder: where the head keeps what is its own, None: where Ray would.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.marks: list[str] = []
        self.address = ""
        self.folder = folder

    def start(self) -> str:
        """Another node; its mark. Raises AssertionError with what Ray says where it does not come up."""
        mark = uuid.uuid4().hex
        if self.address:
            where = [f"--address={self.address}"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.address = f"127.0.0.1:{port}"
            where = ["--head", f"--port={port}", "--include-dashboard=false"]
            where += [f"--temp-dir={self.folder}"] if self.folder else []
        where += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"]
        environment = {**os.environ, "MARK_OF_NODE": mark}
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *where]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        self.marks.append(mark)
        return mark

    def kill(self, mark: str) -> None:
        self.marks.remove(mark)
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"MARK_OF_NODE={mark}".encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)

    def close(self) -> None:
        for mark in list(self.marks):
            self.kill(mark)
