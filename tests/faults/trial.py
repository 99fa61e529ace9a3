"""One tiny suite in a fork of this process, with `shim.c` between it and its files."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nodes import Nodes

from malloc_bench.cli import commands as cli

HANGS = 120.0  # seconds: no tiny suite takes a tenth of it
OPS = ("write", "sync", "rename", "other", "any")
FAULT = ("FAULT", "FAULT_ROOT", "FAULT_PAGE", "FAULT_JOURNAL")  # what tells shim.c


def shim(folder: Path) -> Path | None:
    """`shim.c`, compiled; None where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    source, made = Path(__file__).with_name("shim.c"), folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: None where it hung, below 0 by a signal; fired: whether it was hurt before; run: where;
    spoilt: names of files that are no longer what they were."""

    code: int | None
    said: str
    fired: bool = True
    run: str = "run"
    spoilt: Sequence[str] = ()


@dataclass
class Trial:
    """One tiny suite in `base/trial`, to be hurt once.

    events: file events by kind, seconds: wall time, of the run that nobody hurts; turn: how often the same has been
    done to the same suite before; whole: the folder that it left; nodes: of a cluster that it runs on.
    """

    base: Path
    commands: Sequence[Sequence[str]]
    draw: random.Random = field(default_factory=random.Random)
    events: dict[str, int] = field(default_factory=dict)
    seconds: float = 1.0
    seed: int = 0
    turn: int = 0
    whole: Path | None = None
    more: dict[str, str] = field(default_factory=dict)  # of its environment
    nodes: Nodes | None = None

    @property
    def folder(self) -> Path:
        return self.base / "trial"

    def run(self, plan: str = "any 0 count -", **options: str) -> Ended:
        return self.end(self.start(plan, **options))

    def start(self, plan: str = "any 0 count -", out: str = "run", told: str = "", **more: str) -> int:
        """The commands in a fork; its process id. told: where what it says goes; more: of its environment."""
        with contextlib.suppress(FileNotFoundError):
            (self.base / "page").unlink()
        (self.folder / "tmp").mkdir(exist_ok=True)
        (log := self.base / f"said-{told or out}").write_bytes(b"")
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            os.chdir(self.folder)
            said = os.open(log, os.O_WRONLY | os.O_APPEND)
            for descriptor, to in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
                os.dup2(descriptor, to)
            places = {"FAULT_ROOT": self.folder, "FAULT_PAGE": self.base / "page", "TMPDIR": self.folder / "tmp"}
            os.environ.update({name: str(path) for name, path in places.items()} | {"FAULT": plan} | self.more | more)
            os.environ["MALLOC_BENCH_HOME"] = str(self.folder / "home")
            tempfile.tempdir = None
            faulthandler.dump_traceback_later(HANGS - 5)
            _arm()
            code = 0
            for words in self.commands:
                if code := cli.main([word.replace("{out}", out) for word in words]):
                    break
        except BaseException:
            traceback.print_exc()
            code = 70
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def end(self, pid: int, out: str = "run") -> Ended:
        until = time.monotonic() + HANGS
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Ended(None, self.said(out))
            time.sleep(0.005)
        return Ended(os.waitstatus_to_exitcode(found[1]), self.said(out), self.counted()[-1] > 0)

    def said(self, out: str = "run") -> str:
        return (self.base / f"said-{out}").read_text(errors="replace")

    def counted(self) -> list[int]:
        """Events by kind, and those that were hurt, of the run before."""
        page = self.base / "page"
        data = page.read_bytes() if page.exists() else b""
        return [int.from_bytes(data[i : i + 8], "little") for i in range(0, 48, 8)]

    def nth(self, op: str) -> int:
        """Every event of the undisturbed run in turn, in an order drawn once."""
        many = max(self.events[op], 1)
        return random.Random(f"{self.seed} {op} {self.turn // many}").sample(range(1, many + 1), many)[self.turn % many]


def _arm() -> None:
    import ctypes

    with contextlib.suppress(AttributeError):  # without the shim
        ctypes.CDLL(None).fault_arm()


def processes(folder: Path) -> list[int]:
    """Those that were started below a trial, however far."""
    mark, found = f"FAULT_ROOT={folder}\0".encode(), []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdecimal() and mark in (each / "environ").read_bytes():
                found.append(int(each.name))
    return found
