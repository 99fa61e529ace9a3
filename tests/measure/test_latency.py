import gc
import json
import sys
from dataclasses import asdict, dataclass

import pytest
import torch

from malloc_bench.backbones.sasrec import SASRec
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.eviction.knorm import KNorm
from malloc_bench.measure import Samples, Workload, interleaved, latency, summary, threads
from malloc_bench.results import COLUMNS
from malloc_bench.state import Stats

PLAIN = Stats()
SMALL = Workload(users=2, history=20, candidates=3, appended=2)


class Clock:
    """Stands in for `time`: moves a little at every look, and as told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    process_time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sys.modules["malloc_bench.measure.latency"], "time", clock)  # the module, not the function
    return clock


def make(max_length):
    return SASRec(SASRec.Config(dim=8, layers=1, max_length=max_length), 30)


def cells(*names):
    methods = {name: get_compressor(name) for name in names}
    return {name: (m, Budget(0.5) if m.takes_budget else None) for name, m in methods.items()}


# ---- sampling


def test_calls_take_turns_and_each_round_begins_with_another():
    order = []
    samples = interleaved({x: lambda x=x: order.append(x) for x in "abc"}, seconds=0, repeats=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert {len(s) for s in samples.values()} == {4}


def test_sampling_goes_on_for_the_time_given_and_no_longer(clock):
    def slow():
        clock.now += 1.0

    assert 5 <= len(interleaved({"a": slow}, seconds=10, repeats=5)["a"]) <= 10
    assert len(interleaved({"a": slow}, seconds=10, repeats=30)["a"]) == 30  # repeats win
    assert len(interleaved({"a": lambda: None}, seconds=1e9, repeats=5, most=40)["a"]) == 40


def test_samples_are_raw_seconds_in_order(clock):
    waits = iter([9.0, 1.0, 5.0, 3.0])

    def call():
        clock.now += next(waits)

    samples = interleaved({"a": call}, seconds=0, repeats=3)["a"]
    assert samples.wall == pytest.approx([1.0, 5.0, 3.0], abs=0.01)
    assert samples.cpu == pytest.approx([1.0, 5.0, 3.0], abs=0.01)


def test_the_garbage_collector_rests_only_meanwhile():
    seen = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, seconds=0, repeats=3)
    assert seen == [True, False, False, False] and gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interleaved({"a": fail}, seconds=0)
    assert gc.isenabled()
    gc.disable()
    try:
        interleaved({"a": lambda: None}, seconds=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_come_back_even_after_an_exception():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_summary_is_milliseconds_per_user_and_p99_needs_500_samples():
    samples = [0.001 * x for x in range(1, 500)]
    found = summary(samples, users=2)
    assert found["p50"] == pytest.approx(125.0) and found["p95"] == pytest.approx(237.05, abs=0.1)
    assert found["p99"] is None
    assert summary([*samples, 0.5])["p99"] == pytest.approx(495.01)
    assert summary([]) == {"p50": None, "p95": None, "p99": None}


# ---- workloads


def test_a_workload_is_made_of_its_seed():
    a, b, other = (Workload(seed=s).events(50) for s in (1, 1, 2))
    for x, y, z in zip(a, b, other):
        assert x.items.equal(y.items) and x.times.equal(y.times) and not x.items.equal(z.items)
    history, tokens, new = SMALL.events(50)
    assert history.items.shape == (2, 20) and tokens.items.shape == (2, 3) and new.items.shape == (2, 2)
    assert int(history.items.min()) >= 1 and int(history.items.max()) <= 50
    assert (history.times.diff() > 0).all() and (history.next_times > history.times).all()
    assert (history.times[:, -1:] < tokens.times).all() and (tokens.times == tokens.times[:, :1]).all()
    assert new.times[:, :1].equal(history.next_times[:, -1:])


def test_an_impossible_workload_is_refused():
    for wrong in ({"users": 0}, {"history": -1}, {"candidates": 0}, {"appended": 0}):
        with pytest.raises(ValueError, match="workload"):
            Workload(**wrong)


# ---- cells


@pytest.mark.parametrize("history", [0, 1, 20])
def test_every_step_of_every_cell_is_measured(history):
    names = ("full", "none", "recent", "h2o", "snapkv", "kivi", "svd", "recompute", "truncate")
    work = Workload(users=2, history=history)
    found = latency(make, cells(*names), work, seconds=0, repeats=5)
    assert list(found) == list(names)
    for name, timing in found.items():
        steps = [timing.compress, timing.read, timing.full_append, timing.full_read]
        assert {len(x.wall) for x in steps} == {len(x.cpu) for x in steps} == {5}
        assert min(timing.read.wall) > 0
        assert timing.prefill is found["full"].prefill and len(timing.prefill) >= 5
        assert (timing.append is None) == (name in ("recompute", "truncate"))
        assert (timing.statistics is None) == (name not in ("h2o", "snapkv"))
        assert timing.threads == 1 and timing.load >= 0 and timing.users == 2 and timing.device == "cpu"
        columns = timing.columns()
        assert columns.keys() <= COLUMNS.keys() and len(columns) == 12
        assert (columns["append_ms_p50"] is None) == (timing.append is None)
        assert columns["read_ms_p50"] > 0 and columns["read_ms_p99"] is None
        json.dumps(asdict(timing))


def test_500_repeats_give_a_p99():
    columns = latency(make, cells("recent"), SMALL, seconds=0, repeats=500)["recent"].columns()
    assert all(value is not None for value in columns.values())


def test_a_method_pays_for_its_own_statistics(clock):
    class Slow(SASRec):
        def prefill(self, events, users=None, stats=PLAIN, seed=0):
            clock.now += 1.0 + 2.0 * stats.column_sum + 0.5 * (stats.window == 16)
            return super().prefill(events, users, stats, seed)

    def slow(max_length):
        return Slow(Slow.Config(dim=8, layers=1, max_length=max_length), 30)

    found = latency(slow, cells("h2o", "snapkv", "knorm"), SMALL, seconds=0.01)
    assert found["knorm"].prefill.wall == pytest.approx([1.0] * len(found["knorm"].prefill), abs=0.01)
    for name, extra in (("h2o", 2.0), ("snapkv", 0.5)):
        timing = found[name]
        assert timing.statistics.wall == pytest.approx([extra] * len(timing.statistics), abs=0.01)
        assert max(timing.compress.wall) < 0.1  # stays raw
        assert min(timing.charged.wall) > extra - 0.01 and len(timing.charged) == len(timing.compress)
        assert timing.columns()["compress_ms_p50"] == pytest.approx(extra * 1000 / 2, rel=0.05)
    assert found["knorm"].charged is found["knorm"].compress


def test_noise_never_makes_statistics_a_gain():
    timing = latency(make, cells("h2o"), SMALL, seconds=0)["h2o"]
    gain = Samples([-5.0, -1.0, 1.0], [-5.0, 1.0, 1.0])
    timing = type(timing)(**{**vars(timing), "statistics": gain})
    assert timing.charged.wall == timing.compress.wall
    assert timing.charged.cpu == [x + 1.0 for x in timing.compress.cpu]


def test_nothing_is_remembered_between_samples():
    calls = []

    @dataclass(frozen=True)
    class Counting(KNorm):
        def scores(self, prefill, layer):
            calls.append(layer)
            return super().scores(prefill, layer)

    timing = latency(make, {"a": (Counting(), Budget(0.5))}, SMALL, seconds=0, repeats=7)["a"]
    assert len(calls) == len(timing.compress) + 2  # the state that is read, and the warm-up


def test_a_cell_that_fails_leaves_the_others(caplog):
    @dataclass(frozen=True)
    class Broken(KNorm):
        def scores(self, prefill, layer):
            raise RuntimeError("no scores today")

    before = torch.get_num_threads()
    found = latency(make, {"broken": (Broken(), Budget(0.5)), **cells("recent")}, SMALL, seconds=0)
    assert list(found) == ["recent"]
    assert "no scores today" in caplog.text and "broken" in caplog.text
    assert torch.get_num_threads() == before and not torch.is_inference_mode_enabled()


def test_threads_come_back_when_the_backbone_fails():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        latency(lambda length: 1 / 0, cells("full"), SMALL, n_threads=before + 1)
    assert torch.get_num_threads() == before


def test_the_backbone_is_as_long_as_the_workload_asks():
    asked = []

    def remember(max_length):
        asked.append(max_length)
        return make(max_length)

    latency(remember, cells("full"), SMALL, seconds=0)
    assert asked == [22]
