"""Methods of a user's file that go wrong in their own ways, for runs that other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from malloc_bench import registry
from malloc_bench.registry import load_part
from malloc_bench.run.executors.local import Local

#: each goes wrong with the whole chunk of a run only, not with the few users that it is tried with before
METHODS = """
import os, signal, sys, time
from dataclasses import dataclass
import torch
from malloc_bench import register
from malloc_bench.compressors import Eviction

@dataclass(frozen=True)
class Base(Eviction):
    family, paper, formula, stores = "eviction", "none", "score = |v|", "k events"
    few = 60  # of 300 users, in chunks of 256 and 44

    def scores(self, prefill, layer):
        if len(prefill.users) > self.few:
            self.work()
        return prefill.values(layer).norm(dim=-1)

    def work(self):
        pass

@register("good")
class Good(Base):
    pass

@register("sleeps")
class Sleeps(Base):
    def work(self):
        time.sleep(3000)

@register("allocates")
class Allocates(Base):
    def work(self):
        held = []
        for _ in range(100):  # up to 6.4 GB
            held.append(torch.ones(1 << 24))
            time.sleep(0.02)

@register("crashes")
class Crashes(Base):
    def work(self):
        os.kill(os.getpid(), signal.SIGSEGV)

@register("leaves")
class Leaves(Base):
    def work(self):
        os._exit(0)

@register("late")
class Late(Base):
    few = 40

    def scores(self, prefill, layer):
        if len(prefill.users) == 44:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().scores(prefill, layer)

@register("counted")
class Counted(Base):
    few = 40

    def scores(self, prefill, layer):
        if len(prefill.users) > self.few:
            with open(os.environ["COUNTS"], "a") as counts:
                print(len(prefill.users), file=counts)
        return super().scores(prefill, layer)

hoard = []

@register("hoards")
class Hoards(Base):
    def work(self):
        hoard.append(torch.ones(21 << 24))

@register("large")
class Large(Base):
    def work(self):
        held = torch.ones(11 << 24)
        time.sleep(1)

@register("is_killed")
class IsKilled(Base):
    def work(self):  # as the system does where memory runs out
        with open(os.environ["KILLS"], "a") as kills:
            kills.write("x")
        if os.path.getsize(os.environ["KILLS"]) <= int(os.environ["TIMES"]):
            os.kill(os.getpid(), signal.SIGKILL)

@register("says")
class Says(Base):
    def work(self):
        open(f"{os.environ['SAYS']}-{os.getpid()}", "w").close()
        time.sleep(3000)

@register("waits")
class Waits(Base):
    few = 40

    def scores(self, prefill, layer):
        if len(prefill.users) > self.few:
            open(f"FOLDER/{prefill.seed}-{len(prefill.users)}-{os.getpid()}", "w").close()
            while len(prefill.users) == 44 and not os.path.exists("FOLDER/go"):
                time.sleep(0.1)
        return prefill.values(layer).norm(dim=-1)

@register("logs")
class Logs(Base):
    few = 0

    def scores(self, prefill, layer):
        with open(os.environ.get("LOGS", os.devnull), "a") as logs:
            print(os.getpid(), len(prefill.users), file=logs)
        return super().scores(prefill, layer)
"""


@pytest.fixture
def methods_file(tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Methods of METHODS are known until the test ends; one cache for all tests of a process."""
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    registry.names("compressors")
    before = dict(registry._parts["compressors"])
    (tmp_path / "waits").mkdir()
    (file := tmp_path / "methods.py").write_text(METHODS.replace("FOLDER", str(tmp_path / "waits")))
    load_part(f"{file}:Good")
    yield file
    registry._parts["compressors"].clear()
    registry._parts["compressors"].update(before)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read in a fresh process first, which takes seconds a method."""
    whole = Local.all

    def trusting(self: Local) -> None:
        self.session.alone |= {each.cell.compressor for each in self.session.result.plan}
        whole(self)

    monkeypatch.setattr(Local, "all", trusting)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """wait_for(holds, seconds): until `holds()`; fails where that takes too long."""

    def wait(holds: Callable[[], object], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.05)

    return wait


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """alive(pid): whether a process is there, and not dead but unburied."""

    def is_alive(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return is_alive
