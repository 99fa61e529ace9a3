"""What a request costs that loads a user's state from a store and writes it back, step by step and end to end."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.evaluation.trial import MEASURING, Begin, nobody
from malloc_bench.measure.clients import rate
from malloc_bench.measure.environment import cores, load
from malloc_bench.measure.latency import Method, Models, prefilled
from malloc_bench.measure.sampling import ENOUGH, MOST, Ratio, Samples, in_rounds, ratio, summary, threads
from malloc_bench.measure.stores import STORES, Store, StoreError
from malloc_bench.measure.workload import Workload
from malloc_bench.registry import in_a_line, told
from malloc_bench.results import CLIENTS, REQUEST_STEPS
from malloc_bench.state import Events, UserState
from malloc_bench.training.fit import tune_malloc

log = logging.getLogger(__name__)

PATIENCE = 30  # times the seconds that are asked for, until the slowest 1 % is known and the ratio is sure


@dataclass(eq=False)
class Request:
    """One user's request, each call the next user's: load, unpack, read, append, pack, write.

    What is written goes beside what is loaded, so that every request finds the same history. template: a state of the
    same make, of one user; tokens, new: [users, C] that read and [users, 1] that are appended. taken: seconds of the
    six steps, a row a call.
    """

    store: Store
    name: str
    users: int
    backbone: Backbone
    template: UserState
    tokens: Events
    new: Events
    wait: Callable[[], None]
    taken: list[list[float]] = field(default_factory=list)
    at: int = 0

    def __call__(self) -> object:
        """Made objects, so that freeing them is not timed; raises StoreError."""
        user, marks = self.at % self.users, [time.perf_counter()]
        self.at += 1
        blob = self.store.get(key(self.name, user))
        marks.append(time.perf_counter())
        state = self.template.unpack([blob])
        self._mark(marks)
        hidden = self.backbone.read(row(self.tokens, user), state)
        self._mark(marks)
        grown = appended(self.backbone, state, row(self.new, user))
        self._mark(marks)
        again = grown.pack(0)
        self._mark(marks)
        self.store.put(key(f"{self.name}+", user), again)
        self._mark(marks)
        self.taken.append([b - a for a, b in pairwise(marks)])
        return hidden, state, grown, blob, again

    def _mark(self, marks: list[float]) -> None:
        self.wait()
        marks.append(time.perf_counter())


@dataclass(frozen=True)
class Served:
    """Requests of one cell and C candidates: seconds of each step [N, 6] and the full state's in the same rounds;

    a second: requests, of so many client processes at once; empty where there can be none. load: the highest 1-minute
    load average when sampling began and ended.
    """

    taken: np.ndarray
    full: np.ndarray
    a_second: Mapping[int, float]
    load: float

    @property
    def ratio(self) -> Ratio:
        """End to end over the full state's, in wall time: a store's work is not all in this process."""
        return ratio(self.taken.sum(1).tolist(), self.full.sum(1).tolist())

    def columns(self) -> dict[str, Any]:
        """request_ms_{p50, p95, p99}, of each step too; request_ratio with its interval, how good it is, and rates."""
        columns: dict[str, Any] = {f"request_ms_{p}": x for p, x in summary(self.taken.sum(1).tolist()).items()}
        for step, seconds in zip(REQUEST_STEPS, self.taken.T.tolist()):
            columns |= {f"request_{step}_ms_{p}": x for p, x in summary(seconds).items()}
        value, lo, hi = self.ratio
        wrong = {"noisy": not self.ratio.tight, "busy": self.load > cores()}
        good = ", ".join(word for word, holds in wrong.items() if holds) or "ok"
        columns |= {"request_ratio": value, "request_ratio_lo": lo, "request_ratio_hi": hi, "request_timing": good}
        return columns | {f"requests_per_s_{n}": self.a_second.get(n) for n in CLIENTS}


def requests(
    models: Models,
    methods: Mapping[str, Method],
    workload: Workload,
    candidates: Sequence[int],
    store: str,
    *,
    seconds: float = 0.3,
    repeats: int = 5,
    n_threads: int = 1,
    begin: Begin = nobody,
) -> tuple[dict[str, dict[int, Served]], dict[str, str]]:
    """Requests of every cell by C of candidates, through a store of STORES that is started for it and ended after it;

    and why a cell has none, in one line, where its state or the store failed.

    In rounds over all cells, beside the full state's requests; then each cell's rate at 1 and 2 client processes, on a
    CPU. Everything is warm: what is read was written just before. seconds: of sampling for each cell and C, up to
    PATIENCE times as many until there is a p99 and the ratio is tight; repeats: samples at least.
    """
    tune_malloc()
    failed: dict[str, str] = {}
    found: dict[str, dict[int, Served]] = {name: {} for name in methods}
    with threads(n_threads), torch.no_grad():
        try:
            with STORES[store]() as opened:
                states = _stored(models, methods, workload, opened, failed, begin)
                for c in candidates:
                    work = replace(workload, candidates=c)
                    for name, served in _served(models, methods, work, opened, states, failed, seconds, repeats, begin):
                        found[name][c] = served
        except StoreError as error:  # it did not start, or take what it was given
            failed |= dict.fromkeys(methods, str(error))
    for reason, n in Counter(failed.values()).items():
        log.warning("requests of %d cells could not be measured: %s", n, reason)
    return {name: each for name, each in found.items() if name not in failed}, failed


def _stored(
    models: Models,
    methods: Mapping[str, Method],
    workload: Workload,
    store: Store,
    failed: dict[str, str],
    begin: Begin,
) -> dict[str, UserState]:
    """Templates by cell, "" of the full state; every user's state is in the store."""
    filled = prefilled(models, [method[0] for method in methods.values()], workload)
    templates: dict[str, UserState] = {}
    for name, method in {"": None, **methods}.items():
        begin(MEASURING, name)
        try:
            if method is None:
                state = filled[None].state
            else:
                compressor, *sized = method
                state = compressor.compress(replace(filled[compressor.structural], memo={}), *sized)
            blobs = state.packed(range(workload.users))
        except (Exception, SystemExit):
            failed[name] = _reason()
            continue
        store.put_many({key(name, user): blob for user, blob in enumerate(blobs)})
        templates[name] = state.take(torch.zeros(1, dtype=torch.long))
    return templates


def _served(
    models: Models,
    methods: Mapping[str, Method],
    work: Workload,
    store: Store,
    states: Mapping[str, UserState],
    failed: dict[str, str],
    seconds: float,
    repeats: int,
    begin: Begin,
) -> list[tuple[str, Served]]:
    device = next(models[None].parameters()).device
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    _, tokens, new = work.events(models[None].n_items, device)

    def request(name: str, whose: str) -> Request:
        model = models[methods[name][0].structural] if whose else models[None]
        return Request(store, whose, work.users, model, states[whose], tokens, new, wait)

    pairs = {name: {"": request(name, ""), "own": request(name, name)} for name in methods if name not in failed}

    def enough(name: str, samples: Mapping[str, Samples], spent: float) -> bool:
        if spent >= PATIENCE * seconds or len(samples[""]) >= MOST:
            return True
        many = spent >= seconds and len(samples[""]) >= ENOUGH
        return many and ratio(samples["own"].wall, samples[""].wall).tight

    def fails(name: str) -> None:
        failed[name] = _reason()

    began = load()
    in_rounds(pairs, enough, device, repeats, fails, partial(begin, MEASURING))
    begin("", "")
    ended, served = load(), []
    for name in (each for each in pairs if each not in failed):
        own, full = (np.array(pairs[name][whose].taken[1:]) for whose in ("own", ""))  # the first was to warm up
        try:
            rates = {n: rate(pairs[name]["own"], n, seconds) for n in CLIENTS} if device.type == "cpu" else {}
        except StoreError as error:
            failed[name] = str(error)
            continue
        served.append((name, Served(own, full, rates, max(began, ended))))
    return served


def appended(backbone: Backbone, state: UserState, new: Events) -> UserState:
    """The state with new events in it; of raw events, these behind the others."""
    if state.events is None:
        return backbone.append(state, new)
    return replace(state, length=state.length + new.count, events=state.events.then(new))


def row(events: Events, user: int) -> Events:
    """Those of one user of the batch."""
    return events.each(lambda x: x[user : user + 1], events.count[user : user + 1])


def key(name: str, user: int) -> bytes:
    return f"{name}/{user}".encode()


def _reason() -> str:
    """One line about the exception that is being handled."""
    error = sys.exc_info()[1]
    assert error is not None
    return in_a_line(error) if isinstance(error, StoreError) else told(error)


def _nothing() -> None:
    return None
