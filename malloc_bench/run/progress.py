"""What a run shows while it works: how far it is in all, how long it will take, and what it is at."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from malloc_bench.registry import shown
from malloc_bench.suite.plan import Cost
from malloc_bench.training import fit as training

EVERY = 30.0  # seconds between two lines where there is no terminal
PHASES = ("train", "evaluate", "drift", "measure")


class Watch(Protocol):
    """Told what a run is doing."""

    def group(self, text: str, cost: Cost | None) -> None: ...

    def fit(self, step: training.Progress) -> None: ...

    def chunk(self, done: int, total: int) -> None: ...

    def drift(self, done: int, total: int) -> None: ...

    def measure(self, cells: int) -> None: ...


class Track:
    """How far a run is, in seconds of its plan's rough costs, and the wall-clock seconds of each phase.

    A group goes through training (of one backbone or of several), chunks of users, drift, and measuring; what a phase
    had left when the next begins was not needed.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.started = self.since = clock()
        self.phase, self.doing, self.before = "train", "", 0.0
        self.cost: Cost | None = None
        self.part = 0.0  # of the phase that is going on
        self.epochs = self.earlier = 0.0  # of the training that is going on, and of the group's before it
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.lanes: dict[Hashable, Track] = {}  # of what workers do at the same time

    def group(self, text: str, cost: Cost | None) -> None:
        self.before += self.cost.total if self.cost else 0.0
        self.cost, self.doing = cost, text
        self.epochs = self.earlier = 0.0
        self._to("train", 0.0)

    def fit(self, step: training.Progress) -> None:
        now, planned = step.epoch + step.step / step.steps, self.cost.epochs if self.cost else 0
        if now < self.epochs:  # another one began
            self.earlier += self.epochs
        self.epochs = now
        best = "" if step.best is None else f", best validation {step.metric} {step.best:.4f}"
        self.doing = f"train: epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}{best}"
        self._to("train", min(1.0, (self.earlier + now) / planned) if planned else 0.0)

    def chunk(self, done: int, total: int) -> None:
        self.doing = f"evaluate: users, chunk {done}/{total}"
        self._to("evaluate", done / total)

    def drift(self, done: int, total: int) -> None:
        self.doing = f"drift: appended events, part {done}/{total}"
        self._to("drift", done / total)

    def measure(self, cells: int) -> None:
        self.doing = f"measure: latency and FLOPs of {cells} cells"
        self._to("measure", 0.0)

    def lane(self, key: Hashable, text: str, cost: Cost | None) -> Track:
        """Of a group that a worker begins, or begins again; its parts are told to the lane."""
        self.lanes[key] = lane = Track(cost.total if cost else 0.0, self.clock)
        lane.group(text, cost)
        return lane

    def end(self) -> None:
        """All of it is done."""
        self._to(self.phase, 1.0)
        self.before, self.cost, self.since, self.doing = self.total, None, math.inf, ""

    def _to(self, phase: str, part: float) -> None:
        now = self.clock()
        self.spent[self.phase] += max(0.0, now - self.since)
        self.phase, self.part, self.since = phase, part, now

    @property
    def done(self) -> float:
        """Of `total`."""
        if self.lanes:
            return sum(lane.done for lane in self.lanes.values())
        if self.cost is None:
            return self.before
        sizes = [getattr(self.cost, phase) for phase in PHASES]
        at = PHASES.index(self.phase)
        return self.before + sum(sizes[:at]) + sizes[at] * self.part

    def left(self) -> float | None:
        """Seconds, by the pace so far; None where too little is done to tell."""
        gone, done = self.clock() - self.started, self.done
        return None if done < 0.01 * self.total or done <= 0 else gone * max(self.total - done, 0.0) / done

    def __str__(self) -> str:
        left = self.left()
        share = self.done / self.total if self.total else 1.0
        ahead = "" if left is None else f", about {duration(left)} left"
        return f"{share:.0%} after {duration(self.clock() - self.started)}{ahead}"

    def now(self) -> str:
        """What is done, by each worker."""
        return "; ".join(filter(None, (lane.doing for lane in self.lanes.values()))) or self.doing

    def times(self) -> dict[str, float]:
        """Wall-clock seconds of each phase until now, those of several workers added up."""
        if self.lanes:
            lanes = [lane.times() for lane in self.lanes.values()]
            return {phase: sum(each[phase] for each in lanes) for phase in PHASES}
        self._to(self.phase, self.part)
        return dict(self.spent)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Shown:
    """A track whose every change is told to `show`."""

    def __init__(self, track: Track, say: Callable[[str], None], show: Callable[[Track], None]) -> None:
        self.track, self.say, self.show = track, say, show

    def lane(self, key: Hashable, text: str, cost: Cost | None) -> Shown:
        """Of a worker: what it is told shows among what the others do."""
        own = self.track.lane(key, text, cost)
        self.say(text)
        return Shown(own, self.say, lambda _: self.show(self.track))

    def end(self) -> None:
        self.track.end()
        self.show(self.track)

    def group(self, text: str, cost: Cost | None) -> None:
        self.track.group(text, cost)
        self.say(text)
        self.show(self.track)

    def fit(self, step: training.Progress) -> None:
        self.track.fit(step)
        self.show(self.track)

    def chunk(self, done: int, total: int) -> None:
        self.track.chunk(done, total)
        self.show(self.track)

    def drift(self, done: int, total: int) -> None:
        self.track.drift(done, total)
        self.show(self.track)

    def measure(self, cells: int) -> None:
        self.track.measure(cells)
        self.show(self.track)


@contextlib.contextmanager
def watching(quiet: bool, total: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Shown]:
    """A bar over all and what is done now below it; without a terminal a line each half minute; or nothing.

    On standard error. total: seconds of all groups' rough costs.
    """
    track = Track(total, clock)
    if quiet:
        yield Shown(track, lambda text: None, lambda track: None)
        return
    from rich.console import Console

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(shown(text), highlight=False, markup=False)

    if not console.is_terminal:
        show, ended = _lines(say, clock), threading.Event()

        def beat() -> None:  # what takes long says nothing by itself: the same line comes again
            while not ended.wait(EVERY):
                show(track)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield Shown(track, say, show)
        finally:
            ended.set()
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns: tuple[Any, ...] = (BarColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=max(total, 1e-9))
        now = progress.add_task("", total=1.0)

        def show(track: Track) -> None:
            progress.update(bar, completed=min(track.done, total), description=str(track))
            progress.update(now, completed=track.part, description=f"  {shown(track.now())}")

        yield Shown(track, say, show)


def _lines(say: Callable[[str], None], clock: Callable[[], float]) -> Callable[[Track], None]:
    last = clock()

    def show(track: Track) -> None:
        nonlocal last
        if (now := clock()) - last >= EVERY:
            last = now
            say(f"{track}; {track.now()}")

    return show
