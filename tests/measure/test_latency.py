import json
from dataclasses import asdict, dataclass

import pytest
import torch

from malloc_bench.backbones.sasrec import SASRec
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.eviction.knorm import KNorm
from malloc_bench.measure import Samples, Workload, latency
from malloc_bench.results import COLUMNS
from malloc_bench.state import Stats

PLAIN = Stats()
SMALL = Workload(users=2, history=20, candidates=3, appended=2)


def make(max_length=22, cls=SASRec):
    return {None: cls(cls.Config(dim=8, layers=1, max_length=max_length), 30).eval()}


def cells(*names):
    methods = {name: get_compressor(name) for name in names}
    return {name: (m, Budget(0.5) if m.takes_budget else None) for name, m in methods.items()}


# ---- cells


@pytest.mark.parametrize("history", [0, 1, 20])
def test_every_step_of_every_cell_is_measured(history):
    names = ("full", "none", "recent", "h2o", "snapkv", "kivi", "svd", "recompute", "truncate")
    work = Workload(users=2, history=history)
    found = latency(make(history + 1), cells(*names), work, seconds=0, repeats=5)
    assert list(found) == list(names)
    for name, timing in found.items():
        steps = [timing.compress, timing.read, timing.full_append, timing.full_read]
        assert {len(x.wall) for x in steps} == {len(x.cpu) for x in steps} == {5}
        assert min(timing.read.wall) > 0
        assert timing.prefill is found["full"].prefill and len(timing.prefill) >= 5
        assert (timing.append is None) == (name in ("recompute", "truncate"))
        assert (timing.statistics is None) == (name not in ("h2o", "snapkv"))
        assert timing.threads == 1 and timing.load >= 0 and timing.users == 2 and timing.device == "cpu"
        assert timing.history == history
        columns = timing.columns()
        assert columns.keys() <= COLUMNS.keys() and len(columns) == 12 + 4 + 4 + 2
        assert 0 < columns["read_ratio_lo"] <= columns["read_ratio"] <= columns["read_ratio_hi"]
        assert columns["read_cpu_ms_p50"] > 0
        assert (columns["append_ms_p50"] is None) == (timing.append is None)
        assert columns["read_ms_p50"] > 0 and columns["read_ms_p99"] is None
        json.dumps(asdict(timing))


def test_500_repeats_give_a_p99():
    columns = latency(make(), cells("recent"), SMALL, seconds=0, repeats=500)["recent"].columns()
    assert all(value is not None for value in columns.values())


def test_a_method_pays_for_its_own_statistics(clock):
    class Slow(SASRec):
        def prefill(self, events, users=None, stats=PLAIN, seed=0):
            clock.now += 1.0 + 2.0 * stats.column_sum + 0.5 * (stats.window == 16)
            return super().prefill(events, users, stats, seed)

    found = latency(make(cls=Slow), cells("h2o", "snapkv", "knorm"), SMALL, seconds=0.01)
    assert found["knorm"].prefill.wall == pytest.approx([1.0] * len(found["knorm"].prefill), abs=0.01)
    for name, extra in (("h2o", 2.0), ("snapkv", 0.5)):
        timing = found[name]
        assert timing.statistics.wall == pytest.approx([extra] * len(timing.statistics), abs=0.01)
        assert max(timing.compress.wall) < 0.1  # stays raw
        assert min(timing.charged.wall) > extra - 0.01 and len(timing.charged) == len(timing.compress)
        assert timing.columns()["compress_ms_p50"] == pytest.approx(extra * 1000 / 2, rel=0.05)
    assert found["knorm"].charged is found["knorm"].compress


def test_noise_never_makes_statistics_a_gain():
    timing = latency(make(), cells("h2o"), SMALL, seconds=0)["h2o"]
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

    timing = latency(make(), {"a": (Counting(), Budget(0.5))}, SMALL, seconds=0, repeats=7)["a"]
    assert len(calls) == len(timing.compress) + 2  # the state that is read, and the warm-up


def test_a_cell_that_fails_leaves_the_others(caplog):
    @dataclass(frozen=True)
    class Broken(KNorm):
        def scores(self, prefill, layer):
            raise RuntimeError("no scores today")

    before = torch.get_num_threads()
    found = latency(make(), {"broken": (Broken(), Budget(0.5)), **cells("recent")}, SMALL, seconds=0)
    assert list(found) == ["recent"]
    assert "no scores today" in caplog.text and "broken" in caplog.text
    assert torch.get_num_threads() == before and not torch.is_inference_mode_enabled()


def test_threads_come_back_when_the_backbone_fails():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="keeps at most max_length=10"):
        latency(make(10), cells("full"), SMALL, n_threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_method_may_fit_by_gradient():
    @dataclass(frozen=True)
    class Fitting(KNorm):
        def scores(self, prefill, layer):
            with torch.enable_grad():
                weight = torch.ones(8, requires_grad=True)
                (prefill.values(layer) * weight).square().mean().backward()
            return -(prefill.keys(layer) * weight.grad).norm(dim=-1)

    assert len(latency(make(), {"a": (Fitting(), Budget(0.5))}, SMALL, seconds=0)["a"].compress) == 5


def test_states_of_the_same_bytes_share_their_reads():
    """recent, and a window of the same slots under another budget: one measurement; full is its own reference."""
    methods = {name: get_compressor("recent") for name in ("half", "ten slots")}
    pairs = {"half": (methods["half"], Budget(0.5)), "ten slots": (methods["ten slots"], Budget(slots=9))}
    pairs |= {"full": (get_compressor("full"), None), "whole": (get_compressor("knorm"), Budget(1.0))}
    pairs |= cells("recompute", "none")
    reads = []

    class Counting(SASRec):
        def read(self, tokens, state):
            reads.append(id(state))
            return super().read(tokens, state)

    found = latency(make(cls=Counting), pairs, SMALL, seconds=0, repeats=7)
    assert found["half"].read is found["ten slots"].read and found["half"].append is found["ten slots"].append
    assert found["half"].compress is not found["ten slots"].compress
    for name in ("full", "whole"):
        assert found[name].read is found[name].full_read and found[name].read_ratio == (1, 1, 1)
    assert found["recompute"].append is None and found["none"].read is not found["half"].read
    states = 1 + 2 * 3  # full by itself; half, recompute and none, each beside full
    assert len(reads) == states * (7 + 1)


def test_ratios_to_the_full_state_hold_where_the_machine_slows_down(clock):
    """Everything takes three times as long in the second half: ratios do not move, milliseconds do."""
    reads = []

    class Slowing(SASRec):
        def read(self, tokens, state):
            reads.append(sum(segment.width for segment in state.segments()))
            clock.now += (0.1 + 0.01 * reads[-1]) * (3 if len(reads) > 14 else 1)
            return super().read(tokens, state)

    timing = latency(make(cls=Slowing), cells("recent"), SMALL, seconds=8)["recent"]
    assert set(reads) == {20, min(reads)} and min(reads) < 11
    assert timing.read_ratio.value == pytest.approx((0.1 + 0.01 * min(reads)) / 0.3, rel=0.02)
    assert timing.read_ratio.tight and max(timing.read.wall) > 2.9 * min(timing.read.wall)


def test_a_noisy_ratio_is_measured_longer_and_then_said_to_be_noisy(clock):
    def timing(noise):
        waits = iter(range(10**6))

        class Noisy(SASRec):
            def read(self, tokens, state):
                clock.now += 0.1 * (1 + noise * (next(waits) % 3))
                return super().read(tokens, state)

        return latency(make(cls=Noisy), cells("recent"), SMALL, seconds=2)["recent"]

    def spent(timing):
        every = (timing.compress, timing.append, timing.read, timing.full_append, timing.full_read)
        return sum(map(sum, (x.wall for x in every)))

    steady, wild = timing(0), timing(5)
    assert 2 <= spent(steady) < 2.5 and "noisy" not in steady.quality
    assert 6 <= spent(wild) < 8.5 and "noisy" in wild.quality and not wild.read_ratio.tight


@pytest.mark.parametrize(("wall", "load", "busy"), [(1.0, 0.5, False), (1.4, 0.5, True), (1.0, 1e6, True)])
def test_times_of_a_busy_machine_are_flagged(wall, load, busy):
    timing = latency(make(), cells("recent"), SMALL, seconds=0)["recent"]
    read = Samples([wall] * 9, [1.0] * 9)
    timing = type(timing)(**{**vars(timing), "read": read, "full_read": read, "load": load})
    assert timing.quality == ("busy" if busy else "ok")
