import gc
import math

import numpy as np
import pytest
import torch

from malloc_bench.measure import in_rounds, interleaved, ratio, summary, threads


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


def binomial(n, drop):
    """P(the true median lies below the drop-th or above the last but drop-th of n values)."""
    return 2 * sum(math.comb(n, k) for k in range(drop + 1)) / 2**n


@pytest.mark.parametrize("n", [6, 7, 12, 40, 101, 1000])
def test_the_interval_of_a_ratio_is_the_narrowest_that_holds_its_median(n):
    ours = np.random.default_rng(n).permutation(n) + 1.0
    found = ratio(ours, [2.0] * n)
    drop = round(2 * found.lo) - 1
    assert (found.lo, found.hi) == ((drop + 1) / 2, (n - drop) / 2) and found.value == (n + 1) / 4
    assert binomial(n, drop) <= 0.05 < binomial(n, drop + 1)


def test_below_six_rounds_the_interval_is_the_range():
    assert ratio([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == (2, 1, 3)
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5) and ratio([3.0], [2.0]).tight


def test_the_interval_covers_the_median_in_95_of_100():
    rng = np.random.default_rng(0)
    held = [
        lo <= 1 <= hi
        for _, lo, hi in (ratio(2 * rng.exponential(1 / math.log(2), 25), [2.0] * 25) for _ in range(2000))
    ]
    assert 0.94 <= np.mean(held) <= 0.98


def test_rounds_visit_all_groups_until_each_has_enough():
    order = []

    def calls(*names):
        return {name: lambda name=name: order.append(name) for name in names}

    def enough(group, samples, spent):
        assert spent >= 0
        return len(samples[group]) >= {"a": 2, "c": 3}[group]

    found = in_rounds({"a": calls("a", "b"), "c": calls("c")}, enough, repeats=1)
    assert "".join(order) == "abc" + "abc" + "bac" + "c"
    assert {key: {name: len(x) for name, x in own.items()} for key, own in found.items()} == {
        "a": {"a": 2, "b": 2}, "c": {"c": 3},
    }  # fmt: skip


@pytest.mark.parametrize("when", [0, 2])
def test_a_group_that_fails_leaves_the_others(when):
    left, told = iter(range(when)), []

    def fail():
        next(left)

    found = in_rounds({"bad": {"x": fail}, "good": {"y": int}}, lambda *_: True, repeats=4, failed=told.append)
    assert told == ["bad"] and found.keys() == {"good"} and len(found["good"]["y"]) == 4
    with pytest.raises(StopIteration):
        in_rounds({"bad": {"x": lambda: next(iter([]))}}, lambda *_: True)
