"""What a run shows while it works: training with loss, validation and time left, then chunks of users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from malloc_bench.training import fit as training


class Watch(Protocol):
    """Told what a run is doing."""

    def group(self, text: str) -> None: ...

    def fit(self, step: training.Progress) -> None: ...

    def chunk(self, done: int, total: int) -> None: ...

    def measure(self, cells: int) -> None: ...


class Quiet:
    """Shows nothing."""

    def group(self, text: str) -> None: ...

    def fit(self, step: training.Progress) -> None: ...

    def chunk(self, done: int, total: int) -> None: ...

    def measure(self, cells: int) -> None: ...


@contextlib.contextmanager
def bars(quiet: bool) -> Iterator[Watch]:
    """Bars on standard error, or nothing."""
    if quiet:
        yield Quiet()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(console, progress)


class _Bars:
    def __init__(self, console, progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", visible=False)

    def group(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def fit(self, step: training.Progress) -> None:
        best = "" if step.best is None else f", best validation {step.metric} {step.best:.4f}"
        done = step.epoch * step.steps + step.step
        text = f"  train: epoch {step.epoch + 1}/{step.epochs}, loss {step.loss:.3f}{best}"
        self._show(text, done, step.epochs * step.steps)

    def chunk(self, done: int, total: int) -> None:
        self._show(f"  evaluate: users, chunk {done}/{total}", done, total)

    def measure(self, cells: int) -> None:
        self._show(f"  measure: latency and FLOPs of {cells} cells", None, None)

    def _show(self, text: str, done: int | None, total: int | None) -> None:
        fresh = total != self._progress.tasks[0].total
        if fresh:
            self._progress.reset(self._task, total=total)
        self._progress.update(self._task, description=text, completed=done or 0, visible=True)
