"""What cells cost is measured on the weights that were judged, at the lengths that were judged."""

import numpy as np
import pytest
import torch

from malloc_bench import measure
from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.evaluation.evaluate import Job
from malloc_bench.results import COLUMNS
from malloc_bench.run.resources import histories, resources
from malloc_bench.suite.file import Measure

LENGTHS = np.array([0, 3, 9, 9, 12, 50, 0, 30])
JOBS = [
    Job("full", get_compressor("full")),
    Job("mine", get_compressor("recent"), Budget(0.5)),
    Job("raw", get_compressor("recompute")),
    Job("narrow", get_compressor("mqa")),
]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    plain, part = get_backbone("sasrec", 30, heads=2, dim=8, layers=1, max_length=60), JOBS[3].compressor
    return {None: plain, part: part.adapted(plain)}


def never(length):
    raise AssertionError("the trained weights serve")


def unkept(job, samples):
    """Raw times that nobody looks at."""


@pytest.mark.parametrize(
    ("lengths", "most", "own", "want"),
    [
        (LENGTHS, 60, None, [10, 50]),
        (LENGTHS, 50, None, [10, 49]),  # one is appended
        (LENGTHS, 5, None, [4]),
        (np.zeros(3, int), 60, None, [1]),
        (np.zeros(0, int), 60, None, [1]),
        (LENGTHS, 60, 1000, [1000]),
    ],
)
def test_the_lengths_are_those_of_the_data_or_the_suites_own(lengths, most, own, want, models):
    backbone = get_backbone("sasrec", 30, max_length=most, dim=8)
    assert histories(Measure(history=own), lengths, backbone) == want


def test_a_row_is_measured_at_the_median_and_the_longest_history_on_trained_weights(models, monkeypatch):
    seen = []
    for model in models.values():
        prefill = model.prefill
        monkeypatch.setattr(
            model, "prefill", lambda e, *a, p=prefill, **k: seen.append(e.items.shape[1]) or p(e, *a, **k)
        )
    told, kept = [], {}
    settings = Measure(seconds=0.01, users=2)
    rows = resources(settings, JOBS, models, never, LENGTHS, kept.__setitem__, told.append)
    assert told == [4] and set(seen) >= {10, 50} and rows.keys() == {"full", "mine", "raw", "narrow"}
    long = [name for name in COLUMNS if name.endswith("_long")]
    for name, row in rows.items():
        assert row.keys() <= COLUMNS.keys() and row["measured_weights"] == "trained"
        assert (row["measured_history"], row["measured_history_long"]) == (10, 50)
        assert row["read_flops_long"] > row["read_flops"] > 0
        assert row["peak_bytes_long"] >= row["peak_bytes"] > 0  # a read in one pass needs next to no room
        empty = {each for each in long if row[each] is None}
        assert empty == ({"append_ms_p50_long", "append_flops_long"} if name == "raw" else set())
        saved = kept[name]
        assert saved["history"] == 10 and saved["longest"]["history"] == 50
    assert rows["full"]["read_ratio"] == 1 and rows["raw"]["read_ratio"] > 1
    assert rows["narrow"]["prefill_flops"] < rows["full"]["prefill_flops"]


def test_one_length_fills_both_places(models):
    settings = Measure(seconds=0, users=1)
    (row,) = resources(settings, JOBS[1:2], models, never, np.full(4, 7), unkept, lambda n: None).values()
    assert row["measured_history"] == row["measured_history_long"] == 7
    assert row["read_ms_p50"] == row["read_ms_p50_long"] and row["read_flops"] == row["read_flops_long"]


def test_a_suites_own_length_beyond_the_weights_takes_fresh_ones_and_says_so(models):
    asked = []

    def fresh(length):
        asked.append(length)
        return get_backbone("sasrec", 30, heads=2, dim=8, layers=1, max_length=length)

    settings = Measure(seconds=0, users=1, history=99)
    rows = resources(settings, JOBS, models, fresh, LENGTHS, unkept, lambda n: None)
    assert asked == [100]
    assert {row["measured_weights"] for row in rows.values()} == {"fresh"}
    assert {row["measured_history"] for row in rows.values()} == {99}
    within = resources(Measure(seconds=0, users=1, history=59), JOBS, models, never, LENGTHS, unkept, lambda n: None)
    assert {row["measured_weights"] for row in within.values()} == {"trained"}


@pytest.mark.parametrize("what", ["latency", "flops"])
def test_only_what_is_asked_for_is_measured(models, what):
    settings = Measure(latency=what == "latency", flops=what == "flops", seconds=0, users=1)
    (row,) = resources(settings, JOBS[:1], models, never, LENGTHS, unkept, lambda n: None).values()
    assert ("read_ms_p50" in row) == (what == "latency") and ("read_flops" in row) == (what == "flops")
    nothing = Measure(latency=False, flops=False)
    assert resources(nothing, JOBS, models, never, LENGTHS, unkept, never) == {}
    assert resources(settings, [], models, never, LENGTHS, unkept, never) == {}


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_job_that_cannot_be_measured_costs_only_its_own_columns(models, caplog, error):
    class Broken(type(JOBS[1].compressor)):
        def compress(self, prefill, budget=None, fitted=None):
            raise error("not here")

    jobs = [JOBS[0], Job("broken", Broken(), Budget(0.5)), JOBS[2]]
    rows = resources(Measure(seconds=0, users=1), jobs, models, never, LENGTHS, unkept, lambda n: None)
    assert rows["full"]["read_flops"] > 0 and rows["raw"]["read_flops_long"] > 0
    assert "read_ms_p50" not in rows["broken"] and "read_flops" not in rows["broken"]
    assert caplog.text.count("not here") >= 4 and "latency of broken" in caplog.text


@pytest.mark.parametrize(("most", "known"), [(10, True), (0, False)])
def test_a_workload_that_memory_is_too_small_for_costs_no_accuracy(models, caplog, monkeypatch, most, known):
    """The longest cannot be made: the median's columns stay. Where no state can, there are none."""
    made = measure.Workload.events

    def events(self, *given):
        if self.history > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(self, *given)

    monkeypatch.setattr(measure.Workload, "events", events)
    rows = resources(Measure(seconds=0, users=1), JOBS, models, never, LENGTHS, unkept, lambda n: None)
    assert all(row["read_flops"] > 0 and "read_flops_long" not in row for row in rows.values())
    assert bool(rows) == known
    assert "1 users of" in caplog.text and "(measure: users, history)" in caplog.text


def test_requests_have_columns_of_their_own(models, caplog):
    class Broken(type(JOBS[1].compressor)):
        def compress(self, prefill, budget=None, fitted=None):
            raise RuntimeError("not here")

    settings = Measure(latency=False, flops=False, seconds=0.01, users=2, store="dict", candidates=(3, 1))
    jobs = [*JOBS, Job("broken", Broken(), Budget(0.5))]
    kept = {}
    rows = resources(settings, jobs, models, never, LENGTHS, kept.__setitem__, lambda n: None)
    assert kept.keys() == {"full", "mine", "raw", "narrow"}
    assert kept["raw"]["requests"]["3"]["steps"].shape == kept["raw"]["requests"]["3"]["full"].shape
    for name, found in rows.items():
        assert found.keys() <= COLUMNS.keys() and found["store"] == "dict" and found["measured_candidates"] == 3
        if name == "broken":
            assert found["request_timing"] == "failed: RuntimeError: not here" and "request_ms_p50" not in found
        else:
            assert list(found["requests"]) == [3, 1] and found["requests"][3].items() <= found.items()
    assert rows["full"]["measured_history"] == 10


@pytest.mark.parametrize("own", [None, 0, 12, 10**6])
def test_what_others_build_is_counted_where_they_say_nothing_or_less(models, own):
    """That of ours knows nothing of it: no work at all was written down; and nobody's word is taken for less."""

    class Compares(type(get_compressor("knorm"))):
        def scores(self, prefill, layer):
            keys = prefill.keys(layer)
            return (keys @ keys.mT).sum(-1)

    if own is not None:
        Compares.flops = lambda self, state, of: own
    jobs = [
        Job("alone", Compares(), Budget(0.5)),
        Job("in a chain", get_compressor("compose", steps=(Compares(), "int8")), Budget(0.5)),
        Job("ours", get_compressor("knorm"), Budget(0.5)),
    ]
    settings = Measure(latency=False, seconds=0, users=3)
    rows = resources(settings, jobs, models, never, np.full(4, 10), unkept, lambda n: None)
    assert [row["compress_flops"] for row in rows.values()] == [max(2 * 2 * 10 * 10 * 4, own or 0)] * 2 + [0]
