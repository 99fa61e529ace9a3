"""Ways to hurt a run."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trial import Ended, Trial, processes

DERIVED = ("results.parquet", "leaderboard", "report.html", "figures", "lock")  # made anew by every run, or empty

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


def node_gone(trial: Trial) -> list[Ended]:
    """A node of the cluster, at a random time; another comes after it."""
    assert trial.nodes is not None
    pid = trial.start()
    time.sleep(trial.draw.uniform(0, trial.seconds))
    runs = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    trial.nodes.kill(trial.nodes.marks[-1])
    ended = trial.end(pid)
    trial.nodes.start()
    return [replace(ended, fired=runs)]


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
    done, spoilt = spoil_one([path for path in files if not derived(path)], trial.draw)
    return [Ended(-signal.SIGKILL, done, fired=bool(done), spoilt=spoilt)]


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


def spoil_one(files: Iterable[Path], draw: random.Random) -> tuple[str, list[str]]:
    """One file of a kind that is drawn first, so that rare kinds have their turn; what was done, and the names of those
    that it may have been done to."""
    files = sorted(path for path in files if path.stat().st_size)
    if not files:
        return "", []
    wanted = draw.choice(sorted({kind(path) for path in files}))
    alike = [each for each in files if kind(each) == wanted]
    path = draw.choice(alike)
    way = spoil(path, files, draw)
    return f"{way} of {path}", [each.name for each in (alike if way == "swap" else [path])]


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


@dataclass(frozen=True)
class Fault:
    """What is done to a run, in `often` turns of every `seldom`-th round.

    lasting: rows that it leaves whole stay as they are; heals: the run itself ends well; another: the hurt run is of
    another suite or log; kills: a process ends without a word; suites: those it is for, all where it names none.
    """

    name: str
    hurt: Hurt
    lasting: bool = True
    heals: bool = False
    another: bool = False
    kills: bool = False
    suites: tuple[str, ...] = ()
    seldom: int = 1
    often: int = 1


YEARS = 10 * 365 * 86400
WITH_WORKERS = ("workers", "limits")
FAULTS = (
    *(Fault(f"killed at the n-th {op}", at(op, "kill"), kills=True, often=6)
      for op in ("write", "sync", "rename", "other")),
    Fault("half written, then killed", at("write", "torn"), kills=True, often=6),
    Fault("power cut: what was not synced is torn", power_cut, kills=True, often=6),
    Fault("killed at a random time", later(signal.SIGKILL), kills=True, often=6),
    Fault("asked to end at a random time", later(signal.SIGTERM)),
    Fault("a worker is killed", worker_killed, heals=True, kills=True, suites=WITH_WORKERS, seldom=6),
    Fault("a node of its cluster goes away", node_gone, heals=True, kills=True, suites=("ray",), seldom=6),
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
    Fault("two runs, one cache, one is killed", one_cache, kills=True),
    Fault("a file that it reads is spoilt", rot, lasting=False, often=6),
    Fault("a suite, card or log is spoilt", bad_input, another=True, often=2),
    *(Fault(f"the store {how}", store(how), suites=("redis",), seldom=3)
      for how in ("hangs", "closes", "talks nonsense")),
)  # fmt: skip
