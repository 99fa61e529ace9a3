"""How long the steps of every cell take, on trained weights, beside the full state in every round."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor, Structural
from malloc_bench.evaluation.trial import MEASURING, Begin, nobody
from malloc_bench.measure.environment import cores, load
from malloc_bench.measure.sampling import MOST, Call, Ratio, Samples, in_rounds, interleaved, ratio, summary, threads
from malloc_bench.measure.workload import Workload, some_facts
from malloc_bench.state import Events, Fitted, Prefill, Stats, UserState
from malloc_bench.training.fit import tune_malloc

#: structural part -> the backbone that it has adapted; None: the backbone as it is
Models = Mapping[Structural | None, Backbone]
#: a compressor at a budget, and what it has learned of training users
Method = tuple[Compressor, Budget | None] | tuple[Compressor, Budget | None, Fitted | None]

log = logging.getLogger(__name__)

PATIENCE = 3  # times the seconds that are asked for, where the ratio to the full state is not sure before
_PLAIN = Stats()
_PREFILLS = 9  # rounds at least: statistics are small differences of large times
_WAITED = 1.25  # wall over CPU time of one thread above which something else had the core


@dataclass(frozen=True)
class Timing:
    """Raw times of one cell; every call serves the whole batch of `users` histories of `history` events.

    prefill: without statistics, the same for all cells of a backbone, adapted or not. statistics: what gathering this
    method's attention statistics took beyond it, measured in turns with it and round by round (noise can make a round
    negative); None where it needs none. compress: without its statistics. append: None for a state of raw events, whose
    append computes nothing. full_append, full_read: the full state of the backbone as it is, measured in turns with
    this cell's: the fair partners of a ratio.
    load: the highest 1-minute load average when sampling began and ended.
    """

    users: int
    history: int
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
    def read_ratio(self) -> Ratio:
        """Reads over the full state's."""
        return _over(self.read, self.full_read, self.device, self.threads)

    @property
    def quality(self) -> str:
        """`ok`, or what is wrong: `noisy` (the ratio is not known to 10 %), `busy` (other work was on the machine)."""
        waited = self.device == "cpu" and median(self.read.wall) > _WAITED * median(self.read.cpu)
        wrong = {"noisy": not self.read_ratio.tight, "busy": waited or self.load > cores()}
        return ", ".join(word for word, holds in wrong.items() if holds) or "ok"

    @property
    def charged(self) -> Samples:
        """Compress with the method's own statistics: their median cost, if positive, on top of every sample."""
        if self.statistics is None:
            return self.compress
        wall, cpu = (max(0.0, median(x)) for x in (self.statistics.wall, self.statistics.cpu))
        return Samples([x + wall for x in self.compress.wall], [x + cpu for x in self.compress.cpu])

    def columns(self) -> dict[str, Any]:
        """{prefill, compress, append, read}_ms_{p50, p95, p99}: wall milliseconds per user, see `summary`; _cpu_ms_p50;

        read_ratio with its interval, how good they are (`timing`), threads and load.
        """
        steps = {"prefill": self.prefill, "compress": self.charged, "append": self.append, "read": self.read}
        columns: dict[str, Any] = {}
        for step, samples in steps.items():
            found = summary(samples.wall if samples else [], self.users)
            columns |= {f"{step}_ms_{name}": value for name, value in found.items()}
            columns[f"{step}_cpu_ms_p50"] = summary(samples.cpu if samples else [], self.users)["p50"]
        value, lo, hi = self.read_ratio
        columns |= {"read_ratio": value, "read_ratio_lo": lo, "read_ratio_hi": hi, "timing": self.quality}
        return columns | {"threads": self.threads, "load": self.load}


def latency(
    models: Models,
    methods: Mapping[str, Method],
    workload: Workload,
    *,
    seconds: float = 0.3,
    repeats: int = 5,
    n_threads: int = 1,
    begin: Begin = nobody,
) -> dict[str, Timing]:
    """Times of every cell on one workload.

    seconds: of sampling for each cell, up to PATIENCE times as many until the ratio of its reads to the full state's is
    tight, and ten times as many for the prefills; repeats: samples at least (500 for a p99), 9 of the prefills.

    One plain prefill and one with each set of statistics that some cell needs are timed in turns, once for all cells,
    those of adapted backbones among them.
    Then, in rounds over all cells: compress, append and read, and append and read of the full state. Every compress
    starts from a prefill that remembers nothing. Cells whose states are the same bytes share their appends and reads.
    A cell that raises is logged and left out; begin: told of one before each of its turns. Page faults of freshly
    mapped temporaries would be most of some steps: malloc is told to keep its memory, for the rest of the process.
    """
    tune_malloc()
    with threads(n_threads), torch.no_grad():  # not inference mode: methods may fit by gradient
        device = next(models[None].parameters()).device
        history, tokens, new = workload.events(models[None].n_items, device)
        filled = prefilled(models, [method[0] for method in methods.values()], workload)

        items = some_facts(models[None].n_items)

        def prefill(part: Structural | None, stats: Stats) -> Call:
            return lambda: models[part].prepare(history, stats=stats, items=items)

        needs = {(part, _PLAIN) for part in filled} | {(m[0].structural, m[0].needs) for m in methods.values()}
        built = interleaved({each: prefill(*each) for each in needs}, device, 10 * seconds, max(repeats, _PREFILLS))

        began, first = load(), {_make(None, filled[None].state): ""}  # by the make of a state: whose reads are timed
        groups: dict[str, dict[str, Call]] = {}
        shares: dict[str, str] = {}
        raw = set()
        for name, (compressor, budget, *fit) in methods.items():
            part = compressor.structural
            begin(MEASURING, name)
            try:
                state = compressor.compress(replace(filled[part], memo={}), budget, *fit)
                shares[name] = first.setdefault(_make(part, state), name)
            except (Exception, SystemExit):
                _failed(name)
                continue
            groups[name] = {"compress": _compress(compressor, filled[part], budget, *fit)}
            if state.events is not None:
                raw.add(name)
            if shares[name] == name:
                groups[name] |= _reads(models[part], state, tokens, new, "")
                groups[name] |= _reads(models[None], filled[None].state, tokens, new, "full ")
        if "" in shares.values():
            groups[""] = _reads(models[None], filled[None].state, tokens, new, "")

        def enough(name: str, samples: Mapping[str, Samples], spent: float) -> bool:
            alone = "full read" not in samples
            sure = alone or _over(samples["read"], samples["full read"], str(device), n_threads).tight
            return spent >= (seconds if sure else PATIENCE * seconds) or len(next(iter(samples.values()))) >= MOST

        found = in_rounds(groups, enough, device, repeats, _failed, partial(begin, MEASURING))
        begin("", "")
        ended = load()
    timings: dict[str, Timing] = {}
    for name, whose in shares.items():
        if name not in found or whose not in found:
            continue
        compressor, samples = methods[name][0], found[whose]
        plain = built[compressor.structural, _PLAIN]
        none = compressor.needs == _PLAIN
        timings[name] = Timing(
            users=workload.users,
            history=workload.history,
            prefill=plain,
            statistics=None if none else _beyond(built[compressor.structural, compressor.needs], plain),
            compress=found[name]["compress"],
            append=None if name in raw else samples["append"],
            read=samples["read"],
            full_append=samples["full append" if whose else "append"],
            full_read=samples["full read" if whose else "read"],
            threads=n_threads,
            device=str(device),
            load=max(began, ended),
        )
    return timings


def prefilled(
    models: Models, compressors: Iterable[Compressor], workload: Workload
) -> dict[Structural | None, Prefill]:
    """By structural part, None first: the prefill of the workload with the statistics that the part's compressors need.

    Budgets are shares of the un-adapted state's bytes.
    """
    needs: dict[Structural | None, Stats] = {None: _PLAIN}
    for each in compressors:
        needs[each.structural] = needs.get(each.structural, _PLAIN) | each.needs
    prefills = {part: workload.prefill(models[part], stats) for part, stats in needs.items()}
    whole = prefills[None].full_bytes()
    return {part: replace(prefill, whole=whole) for part, prefill in prefills.items()}


def _compress(compressor: Compressor, full: Prefill, *sized: Any) -> Call:
    return lambda: compressor.compress(replace(full, memo={}), *sized)


def _reads(backbone: Backbone, state: UserState, tokens: Events, new: Events, prefix: str) -> dict[str, Call]:
    """Append (unless the state is raw events) and read."""
    read: dict[str, Call] = {f"{prefix}read": lambda: backbone.read(tokens, state)}
    return read if state.events is not None else {f"{prefix}append": lambda: backbone.append(state, new), **read}


def _make(part: Structural | None, state: UserState) -> tuple[Structural | None, str]:
    """Equal for states that are the same bytes, written in the same ways, of the same backbone."""
    found = hashlib.sha256()
    for layer in state.layers:
        found.update(repr([[type(v).__name__ for v in segment.fields.values()] for segment in layer]).encode())
        found.update(repr([segment.lookup and segment.lookup.over(None) for segment in layer]).encode())  # reads part
    for user in range(len(state)):
        found.update(state.pack(user))
    return part, found.hexdigest()


def _over(ours: Samples, theirs: Samples, device: str, n_threads: int) -> Ratio:
    """Of CPU time where one thread does all the work: what waits for a core that is taken costs wall time alone."""
    alone = device == "cpu" and n_threads == 1
    return ratio(ours.cpu, theirs.cpu) if alone else ratio(ours.wall, theirs.wall)


def _failed(name: str) -> None:
    log.warning("latency of %s could not be measured", name, exc_info=True)


def _beyond(samples: Samples, plain: Samples) -> Samples:
    """Differences round by round."""
    return Samples([a - b for a, b in zip(samples.wall, plain.wall)], [a - b for a, b in zip(samples.cpu, plain.cpu)])
