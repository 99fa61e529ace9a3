"""Ways to hurt a run: each in a fork of this process, with `shim.c` between it and its files."""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from malloc_bench.cli import commands as cli

HANGS = 120.0  # seconds: no tiny suite takes a tenth of it
OPS = ("write", "sync", "rename", "other", "any")
DERIVED = ("results.parquet", "leaderboard", "report.html", "figures", "lock")  # made anew by every run, or empty


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
    """How a run ended. code: None where it hung, below 0 by a signal; fired: whether it was hurt before; run: where."""

    code: int | None
    said: str
    fired: bool = True
    run: str = "run"


@dataclass
class Trial:
    """One tiny suite in `base/trial`, to be hurt once.

    events: file events by kind, seconds: wall time, of the run that nobody hurts; turn: how often the same has been
    done to the same suite before; whole: the folder that it left.
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


# ---- ways to hurt


Hurt = Callable[[Trial], list[Ended]]


def at(op: str, action: str, argument: object = "-", stay: bool = False) -> Hurt:
    """At the n-th event of a kind, and with `stay` at all that follow."""

    def hurt(trial: Trial) -> list[Ended]:
        to = trial.folder / str(argument) if action == "away" else argument
        return [trial.run(f"{op} {trial.nth(op)}{'+' * stay} {action} {to}")]

    return hurt


def power_cut(trial: Trial) -> list[Ended]:
    """Killed, and of what was not synced the disk has half, zeros or nothing."""
    journal = trial.base / "journal"
    journal.unlink(missing_ok=True)
    ended = trial.run(f"any {trial.nth('any')} kill -", FAULT_JOURNAL=str(journal))
    loose: set[str] = set()
    for line in journal.read_text(errors="replace").splitlines() if journal.exists() else ():
        op, path, to = line.split("\t")
        if op == "write":
            loose.add(path)
        elif op == "sync":
            loose.discard(path)
        elif op == "rename":
            loose = {to + each.removeprefix(path) if each == path or each.startswith(f"{path}/") else each
                     for each in loose if each != to}  # fmt: skip
    for path in sorted(map(Path, loose)):
        if path.is_file() and path.name != "lock":
            spoil(path, [], trial.draw, ("cut", "zero", "empty"))
    return [ended]


def later(sign: signal.Signals) -> Hurt:
    """At a random time."""

    def hurt(trial: Trial) -> list[Ended]:
        pid = trial.start()
        time.sleep(trial.draw.uniform(0, trial.seconds))
        os.kill(pid, sign)
        ended = trial.end(pid)
        return [replace(ended, fired=ended.code != 0)]  # or it had just ended

    return hurt


def worker_killed(trial: Trial) -> list[Ended]:
    """One of its workers, at a random time."""
    pid = trial.start()
    time.sleep(trial.draw.uniform(0, trial.seconds))
    if workers := [each for each in processes(trial.folder) if each != pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(trial.draw.choice(workers), signal.SIGKILL)
    return [replace(trial.end(pid), fired=bool(workers))]


def two_writers(trial: Trial) -> list[Ended]:
    """Two runs of one folder at once."""
    one = trial.start()
    time.sleep(trial.draw.uniform(0, trial.seconds / 2))
    other = trial.start(told="second")
    ended = [trial.end(one), trial.end(other, "second")]
    return [replace(each, fired=each.code == 2) for each in ended]


def one_cache(trial: Trial) -> list[Ended]:
    """Two runs of two folders that train the same at once, one of which is killed."""
    one, other = trial.start(), trial.start(out="second")
    time.sleep(trial.draw.uniform(0, trial.seconds))
    os.kill(one, signal.SIGKILL)
    ended = [trial.end(one), replace(trial.end(other, "second"), run="second")]
    return [replace(each, fired=ended[0].code != 0) for each in ended]


def rot(trial: Trial) -> list[Ended]:
    """A file of the product's own is spoilt, of a run that is finished but for some rows, or was killed."""
    if trial.draw.random() < 0.5 and trial.whole is not None:
        shutil.copytree(trial.whole, trial.folder, dirs_exist_ok=True)
        rows = sorted((trial.folder / "run" / "rows").glob("*.json"))
        for path in rows[trial.draw.randrange(3) :: 3]:
            path.unlink()
        if trial.draw.random() < 0.5:
            shutil.rmtree(trial.folder / "run" / "checkpoints")  # or the cache would not be read
    else:
        trial.run(f"any {trial.nth('any')} kill -")
    files = [path for path in trial.folder.rglob("*") if path.is_file() and path.parent != trial.folder]
    done = spoil_one([path for path in files if not derived(path)], trial.draw)
    return [Ended(-signal.SIGKILL, done, fired=bool(done))]


def bad_input(trial: Trial) -> list[Ended]:
    """A suite, card or log of the user's is spoilt, and whole again for the next run."""
    files = [path for path in trial.folder.iterdir() if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    spoil_one(files, trial.draw)
    ended = trial.run()
    for path, data in whole.items():
        path.write_bytes(data)
    return [replace(ended, fired=True)]


def derived(path: Path) -> bool:
    return any(part.startswith(DERIVED) for part in path.parts) or path.suffix in (".part", ".tmp")


def spoil_one(files: Iterable[Path], draw: random.Random) -> str:
    """One file of a kind that is drawn first, so that rare kinds have their turn; what was done."""
    files = sorted(path for path in files if path.stat().st_size)
    if not files:
        return ""
    wanted = draw.choice(sorted({kind(path) for path in files}))
    path = draw.choice([each for each in files if kind(each) == wanted])
    return f"{spoil(path, files, draw)} of {path}"


def kind(path: Path) -> str:
    """Files of one kind could be taken for one another."""
    name = path.name.split("-")[0] if path.suffix == ".safetensors" else path.name
    known = name if path.suffix in (".safetensors", ".yaml", ".csv") or name.startswith(("fit.", "resume.")) else ""
    return f"{'cache' if 'home' in path.parts else 'own'} {known or path.parent.name}"


WAYS = ("flip", "cut", "zero", "empty", "swap", "double")


def spoil(path: Path, files: list[Path], draw: random.Random, ways: Sequence[str] = WAYS) -> str:
    """Spoil a file in one way; which one."""
    way, whole = draw.choice(ways), bytearray(path.read_bytes())
    alike = [other for other in files if other != path and kind(other) == kind(path)]
    if way in ("swap", "double") and not alike:
        way = "flip"
    if not whole:
        return "nothing"
    if way == "flip":
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del whole[draw.randrange(len(whole)) :]
    elif way == "zero":
        start = draw.randrange(len(whole))
        stop = min(len(whole), start + draw.randint(1, 512))
        whole[start:stop] = bytes(stop - start)
    elif way == "empty":
        whole.clear()
    elif way == "swap":
        other = draw.choice(alike)
        mine, whole = bytes(whole), bytearray(other.read_bytes())
        other.write_bytes(mine)
    else:
        whole = bytearray(draw.choice(alike).read_bytes())
    path.write_bytes(whole)
    return way


def store(how: str) -> Hurt:
    """The server of a store does as said after some answers."""

    def hurt(trial: Trial) -> list[Ended]:
        answers = str(trial.draw.choice((0, 1, 2, 3, 10, 12, 20, 50, 200)))
        ended = trial.run(SERVER_ANSWERS=answers, SERVER_THEN=how)
        return [replace(ended, fired="could not be measured" in ended.said)]

    return hurt


def processes(folder: Path) -> list[int]:
    """Those that were started below a trial, however far."""
    mark, found = f"FAULT_ROOT={folder}\0".encode(), []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdecimal() and mark in (each / "environ").read_bytes():
                found.append(int(each.name))
    return found


@dataclass(frozen=True)
class Fault:
    """What is done to a run, in `often` turns of every `seldom`-th round.

    lasting: rows that it leaves whole stay as they are; heals: the run itself ends well; another: the hurt run is of
    another suite or log; suites: those it is for, all where it names none.
    """

    name: str
    hurt: Hurt
    lasting: bool = True
    heals: bool = False
    another: bool = False
    suites: tuple[str, ...] = ()
    seldom: int = 1
    often: int = 1


YEARS = 10 * 365 * 86400
WITH_WORKERS = ("workers", "limits")
FAULTS = (
    *(Fault(f"killed at the n-th {op}", at(op, "kill")) for op in ("write", "sync", "rename", "other")),
    Fault("half written, then killed", at("write", "torn")),
    Fault("power cut: what was not synced is torn", power_cut),
    Fault("killed at a random time", later(signal.SIGKILL)),
    Fault("asked to end at a random time", later(signal.SIGTERM)),
    Fault("a worker is killed", worker_killed, heals=True, suites=WITH_WORKERS, seldom=6),
    Fault("disk full from the n-th write on", at("write", "errno", errno.ENOSPC, stay=True)),
    Fault("disk full at the n-th write", at("write", "errno", errno.ENOSPC)),
    *(Fault(f"EIO at the n-th {op}", at(op, "errno", errno.EIO)) for op in ("write", "sync", "rename")),
    Fault("read-only from the n-th change on", at("any", "errno", errno.EROFS, stay=True)),
    Fault("every write is half of what was asked", at("write", "short", stay=True), heals=True),
    Fault("the run folder goes away", at("any", "away", "run"), lasting=False),
    Fault("the cache goes away", at("any", "away", "home")),
    Fault("the clock jumps 10 years on", at("any", "clock", YEARS), heals=True),
    Fault("the clock jumps 10 years back", at("any", "clock", -YEARS), heals=True),
    Fault("two writers on one folder", two_writers),
    Fault("two runs, one cache, one is killed", one_cache),
    Fault("a file that it reads is spoilt", rot, lasting=False, often=6),
    Fault("a suite, card or log is spoilt", bad_input, another=True, often=2),
    *(Fault(f"the store {how}", store(how), suites=("redis",), seldom=3)
      for how in ("hangs", "closes", "talks nonsense")),
)  # fmt: skip
