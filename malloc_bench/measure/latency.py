"""How long the steps take: fixed workloads on made-up histories, everything that is compared measured in turns."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, Structural
from malloc_bench.measure.environment import load
from malloc_bench.state import Events, Prefill, Stats
from malloc_bench.training.fit import tune_malloc

K = TypeVar("K", bound=Hashable)

log = logging.getLogger(__name__)

_ENOUGH = 500  # samples below which a 99th percentile says nothing
_PLAIN = Stats()
_PREFILLS = 9  # rounds at least: statistics are small differences of large times


@dataclass(frozen=True)
class Workload:
    """What is timed: `users` histories of `history` events at once, `candidates` tokens that read each of them, and
    `appended` new events for each. Ids, times (about 6 hours apart) and kinds are drawn from the seed."""

    users: int = 8
    history: int = 1000
    candidates: int = 1
    appended: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.users < 1 or self.history < 0 or self.candidates < 1 or self.appended < 1:
            raise ValueError(f"a workload has users, candidates and appended >= 1 and history >= 0, not {self}")

    @property
    def max_length(self) -> int:
        """What a backbone must keep: the history and what is appended."""
        return self.history + self.appended

    def events(self, n_items: int, device: str | torch.device = "cpu") -> tuple[Events, Events, Events]:
        """The histories, the tokens that read (all asked for at one time), and the new events to append."""
        rng = np.random.default_rng(self.seed)
        total = self.history + max(self.candidates, self.appended)
        items = torch.from_numpy(rng.integers(1, n_items + 1, (self.users, total), np.int32)).to(device)
        gaps = rng.exponential(21_600, (self.users, total + 1)).astype(np.int64) + 1
        times = torch.from_numpy(1_700_000_000 + gaps.cumsum(1)).to(device)
        kinds = torch.from_numpy(rng.integers(0, 256, (self.users, total), np.uint8)).to(device)

        def part(start: int, size: int) -> Events:
            count = torch.full((self.users,), size, dtype=torch.int32, device=device)
            rows, following = slice(start, start + size), slice(start + 1, start + size + 1)
            return Events(items[:, rows], count, times[:, rows], times[:, following], kinds[:, rows])

        now = times[:, self.history : self.history + 1].expand(-1, self.candidates)
        tokens = replace(part(self.history, self.candidates), times=now, next_times=now)
        return part(0, self.history), tokens, part(self.history, self.appended)

    def prefill(self, backbone: Backbone, stats: Stats = _PLAIN) -> Prefill:
        """The workload's histories in a backbone of at least `max_length`."""
        device = next(backbone.parameters()).device
        return backbone.prefill(self.events(backbone.n_items, device)[0], stats=stats)


@dataclass(frozen=True)
class Samples:
    """Seconds per call, in the order in which they were taken: on the wall, and CPU time of the whole process."""

    wall: list[float]
    cpu: list[float]

    def __len__(self) -> int:
        return len(self.wall)


@dataclass(frozen=True)
class Timing:
    """Raw times of one cell; every call serves the whole batch of `users`.

    prefill: without statistics, the same for all cells of a backbone, adapted or not. statistics: what gathering this
    method's attention statistics took beyond it, measured in turns with it and round by round (noise can make a round
    negative); None where it needs none. compress: without its statistics. append: None for a state of raw events, whose
    append computes nothing. full_append, full_read: the full state of the backbone as it is, measured in turns with
    this cell's: the fair partners of a ratio.
    load: 1-minute load average when the cell began.
    """

    users: int
    prefill: Samples
    statistics: Samples | None
    compress: Samples
    append: Samples | None
    read: Samples
    full_append: Samples
    full_read: Samples
    threads: int
    device: str
    load: float

    @property
    def charged(self) -> Samples:
        """Compress with the method's own statistics: their median cost, if positive, on top of every sample."""
        if self.statistics is None:
            return self.compress
        wall, cpu = (max(0.0, median(x)) for x in (self.statistics.wall, self.statistics.cpu))
        return Samples([x + wall for x in self.compress.wall], [x + cpu for x in self.compress.cpu])

    def columns(self) -> dict[str, float | None]:
        """{prefill, compress, append, read}_ms_{p50, p95, p99}: wall milliseconds per user, see `summary`."""
        steps = {"prefill": self.prefill, "compress": self.charged, "append": self.append, "read": self.read}
        columns: dict[str, float | None] = {}
        for step, samples in steps.items():
            found = summary(samples.wall if samples else [], self.users)
            columns |= {f"{step}_ms_{name}": value for name, value in found.items()}
        return columns


def summary(seconds: Sequence[float], users: int = 1) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds per user: a batch's seconds divided by its users.

    So it is what one user's request costs a machine that serves `users` at a time, not how long a user waits; the
    percentiles are over batches. p99 is None below 500 samples, all are None without any.
    """
    if not len(seconds):
        return {"p50": None, "p95": None, "p99": None}
    p50, p95, p99 = (float(x) * 1000 / users for x in np.percentile(seconds, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99 if len(seconds) >= _ENOUGH else None}


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """torch with n threads inside, with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Mapping[K, Callable[[], object]],
    device: str | torch.device = "cpu",
    seconds: float = 0.5,
    repeats: int = 5,
    most: int = 1000,
) -> dict[K, Samples]:
    """Times of several calls taken in turns, each round beginning with another one, after a round that is not counted.

    At least `repeats` rounds, then as many as begin within `seconds` of the first, at most `most` (or `repeats`, if
    that is more). The garbage collector rests meanwhile. Waits for a CUDA device before and after each call.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    samples = {name: Samples([], []) for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < repeats or (rounds < most and time.perf_counter() - start < seconds):
            first = rounds % max(len(names), 1)
            for name in names[first:] + names[:first]:
                wait()
                cpu, wall = time.process_time(), time.perf_counter()
                result = calls[name]()
                wait()
                samples[name].wall.append(time.perf_counter() - wall)
                samples[name].cpu.append(time.process_time() - cpu)
                del result  # freeing is not timed
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def latency(
    make_backbone: Callable[[int], Backbone],
    compressors: Mapping[str, tuple[Compressor, Budget | None]],
    workload: Workload = Workload(),
    device: str | torch.device = "cpu",
    *,
    seconds: float = 0.3,
    repeats: int = 5,
    n_threads: int = 1,
) -> dict[str, Timing]:
    """Times of every cell on one workload, on one backbone, adapted where a compressor is structural.

    make_backbone: max_length -> a backbone; fresh weights will do, they do not change the work.
    seconds: of sampling for each cell, ten times as many for the prefills; repeats: samples at least (500 for a p99),
    9 of the prefills.

    One plain prefill and one with each set of statistics that some cell needs are timed in turns, once for all cells,
    those of adapted backbones among them.
    Then, cell by cell: compress, append and read, in turns with append and read of the full state. Every compress
    starts from a prefill that remembers nothing. A cell that raises is logged and left out. Page faults of freshly
    mapped temporaries would be most of some steps: malloc is told to keep its memory, for the rest of the process.
    """
    tune_malloc()
    gc.collect()
    timings: dict[str, Timing] = {}
    with threads(n_threads), torch.inference_mode():
        backbone = make_backbone(workload.max_length).to(device).eval()
        history, tokens, new = workload.events(backbone.n_items, device)
        models = adapted(backbone, [compressor for compressor, _ in compressors.values()], workload)

        def prefills(part: Structural | None, stats: Stats) -> Callable[[], Prefill]:
            return lambda: models[part][0].prefill(history, stats=stats)

        needs = {(part, _PLAIN) for part in models} | {(c.structural, c.needs) for c, _ in compressors.values()}
        built = interleaved({each: prefills(*each) for each in needs}, device, 10 * seconds, max(repeats, _PREFILLS))
        for name, (compressor, budget) in compressors.items():
            began, part = load(), compressor.structural
            try:
                calls = _calls(compressor, budget, models[part], models[None], tokens, new)
                samples = interleaved(calls, device, seconds, repeats)
            except Exception:
                log.warning("latency of %s could not be measured", name, exc_info=True)
                continue
            plain = built[part, _PLAIN]
            statistics = None if compressor.needs == _PLAIN else _beyond(built[part, compressor.needs], plain)
            timings[name] = Timing(
                users=workload.users,
                prefill=plain,
                statistics=statistics,
                compress=samples["compress"],
                append=samples.get("append"),
                read=samples["read"],
                full_append=samples["full append"],
                full_read=samples["full read"],
                threads=n_threads,
                device=str(device),
                load=began,
            )
    return timings


def adapted(
    backbone: Backbone, compressors: Iterable[Compressor], workload: Workload
) -> dict[Structural | None, tuple[Backbone, Prefill]]:
    """By structural part, None first: the backbone as the part adapts it, and its prefill of the workload.

    The prefill has the statistics that the part's compressors need; budgets are shares of the un-adapted state's bytes.
    """
    needs: dict[Structural | None, Stats] = {None: _PLAIN}
    for each in compressors:
        needs[each.structural] = needs.get(each.structural, _PLAIN) | each.needs
    models = {part: part.adapted(backbone) if part else backbone for part in needs}
    prefills = {part: workload.prefill(models[part], needs[part]) for part in needs}
    whole = prefills[None].full_bytes()
    return {part: (models[part], replace(prefills[part], whole=whole)) for part in needs}


def _calls(
    compressor: Compressor,
    budget: Budget | None,
    own: tuple[Backbone, Prefill],
    plain: tuple[Backbone, Prefill],
    tokens: Events,
    new: Events,
) -> dict[str, Callable[[], object]]:
    """Compress, append (unless the state is raw events) and read, and append and read of the plain full state."""
    (backbone, full), (reference, whole) = own, plain
    state = compressor.compress(replace(full, memo={}), budget)
    calls: dict[str, Callable[[], object]] = {
        "compress": lambda: compressor.compress(replace(full, memo={}), budget),
        "append": lambda: backbone.append(state, new),
        "full append": lambda: reference.append(whole.state, new),
        "read": lambda: backbone.read(tokens, state),
        "full read": lambda: reference.read(tokens, whole.state),
    }
    if state.events is not None:
        del calls["append"]
    return calls


def _beyond(samples: Samples, plain: Samples) -> Samples:
    """Differences round by round."""
    return Samples([a - b for a, b in zip(samples.wall, plain.wall)], [a - b for a, b in zip(samples.cpu, plain.cpu)])


def _nothing() -> None:
    return None
