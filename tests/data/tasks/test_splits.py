"""Who trains, validates and tests, against loops over users; what comes after a cut cannot be seen before it."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from malloc_bench.data import DataError, Dataset, get_dataset
from malloc_bench.data.tasks.batches import training_batches, window
from malloc_bench.data.tasks.options import pick
from malloc_bench.data.tasks.splits import (
    RULES,
    LeaveOneOut,
    Ratio,
    Temporal,
    default_rule,
    get_split,
    k_core,
    leave_one_out,
    spread,
)
from malloc_bench.registry import UnknownName

LENGTHS = st.lists(st.integers(0, 8), max_size=12)


def toy(lengths, times=None, items=None, n_items=3):
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
    items = np.ones(offsets[-1], np.int32) if items is None else np.array(items, np.int32)
    ids = np.arange(len(lengths)), np.arange(n_items)
    return Dataset("toy", None, "test", *ids, offsets, items, times, {"rating": items / 2}, "")


def world(seed=0, users=60, n_items=40):
    """Users who join at different moments, with ties in time."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, users)
    times = np.concatenate([np.sort(rng.integers(0, 500) + rng.integers(0, 300, n)) for n in lengths])
    return toy(lengths, times, rng.integers(1, n_items + 1, len(times)), n_items)


def by_user(dataset, targets):
    return {(user, at - dataset.offsets[user]) for user, at in zip(targets.users.tolist(), targets.at.tolist())}


@given(LENGTHS)
def test_leave_one_out_user_by_user(lengths):
    split = leave_one_out(toy(lengths))
    train, valid, test, first = [], [], [], 0
    for user, length in enumerate(lengths):
        events = list(range(first, first + length))
        if length >= 3:
            test.append((user, events.pop()))
            valid.append((user, events.pop()))
        train.append(first + len(events))
        first += length
    assert split.train_end.tolist() == train
    for targets, want in ((split.valid, valid), (split.test, test)):
        assert list(zip(targets.users.tolist(), targets.at.tolist())) == want and len(targets) == len(want)


@given(LENGTHS)
def test_the_published_protocol_trains_on_what_would_validate(lengths):
    data = toy(lengths)
    split, ours = get_split({"leave_one_out": {"protocol": "published"}}, data), leave_one_out(data)
    assert len(split.valid) == 0
    assert by_user(data, split.test) == by_user(data, ours.test)
    assert (split.train_end - ours.train_end).tolist() == [int(length >= 3) for length in lengths]


@given(st.lists(st.integers(0, 25), max_size=12))
def test_ratio_user_by_user(lengths):
    split = get_split("ratio", toy(lengths))
    for user, length in enumerate(lengths):
        test, valid = length * 2 // 10, length // 10
        train = length - test - valid
        assert split.train_end[user] - split.dataset.offsets[user] == train
        asked = range(max(train, 1), length)
        own = [{at for u, at in by_user(split.dataset, t) if u == user} for t in (split.valid, split.test)]
        assert own == [{n for n in asked if n < length - test}, {n for n in asked if n >= length - test}]


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25]), st.sampled_from([0.1, 0.3]))
def test_temporal_event_by_event(seed, valid, test):
    dataset = world(seed)
    split = get_split({"temporal": {"valid": valid, "test": test}}, dataset)
    ordered, n = sorted(dataset.times.tolist()), dataset.n_events
    first, second = (ordered[int(n * share + 1e-9)] for share in (1 - valid - test, 1 - test))
    want = ([], [])
    for user in range(dataset.n_users):
        own = dataset.times[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        assert split.train_end[user] - dataset.offsets[user] == sum(time < first for time in own)
        for at, time in enumerate(own):
            if at and time >= first:
                want[time >= second].append((user, at))
    assert [by_user(dataset, t) for t in (split.valid, split.test)] == [set(w) for w in want]
    assert (np.diff(split.test.users) >= 0).all()


@given(LENGTHS, st.sampled_from(list(RULES)))
def test_no_event_has_two_uses(lengths, rule):
    assume(sum(lengths) > 1)  # a lone event has nothing before the cut
    dataset = toy(lengths, np.arange(sum(lengths)))
    split = get_split(rule, dataset)
    uses = np.zeros(dataset.n_events, int)
    for user in range(dataset.n_users):
        uses[dataset.offsets[user] : split.train_end[user]] += 1
    first = set(dataset.offsets[:-1].tolist())
    for targets in (split.valid, split.test):
        np.add.at(uses, targets.at, 1)
        assert (
            (dataset.offsets[targets.users] <= targets.at) & (targets.at < dataset.offsets[targets.users + 1])
        ).all()
    # each event is used once; only one that nothing stands before cannot be asked for
    assert all(use == 1 or (use == 0 and at in first) for at, use in enumerate(uses.tolist()))
    assert (split.train_end <= split.dataset.offsets[1:]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [5, 100])
def test_nothing_behind_a_cut_reaches_what_stands_before_it(rule, length):
    """Other items, other times of what comes later: the same training batches, the same histories, the same targets."""
    dataset = world(3)
    split = get_split(rule, dataset)
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    for targets, ends in ((None, split.train_end), (split.valid, None), (split.test, None)):
        if targets is None:
            late = np.arange(dataset.n_events) >= ends[users]
        else:  # of each user one target, and all that comes after it
            one = [rng.choice(targets.at[targets.users == user]) for user in np.unique(targets.users)]
            late = np.zeros(dataset.n_events, bool)
            for at in one:
                late[at : dataset.offsets[users[at] + 1]] = True
            targets = type(targets)(users[one], np.array(one))
        assert late.any() and not late.all()
        items = np.where(late, rng.permutation(dataset.items), dataset.items)
        # later, but in the same order and still behind the same cuts; the moment of asking itself may be known
        times = (
            np.where(late, dataset.times + 10_000, dataset.times)
            if rule != "temporal" or targets is None
            else dataset.times
        )
        other = get_split(rule, replace(dataset, items=items, times=times))
        assert (other.train_end == split.train_end).all()
        if targets is None:
            batches = [list(training_batches(s, length, 8, 0, 1)) for s in (split, other)]
            assert len(batches[0]) == len(batches[1]) > 3
            for a, b in zip(*batches):
                for x, y in (
                    (a.targets, b.targets),
                    *((getattr(a.events, k), getattr(b.events, k)) for k in vars(a.events)),
                ):
                    assert (x == y).all()
            continue
        a, b = (window(s.dataset, targets.users, targets.at, length) for s in (split, other))
        assert (a.items == b.items).all() and (a.times == b.times).all() and (a.count == b.count).all()


def test_a_temporal_history_is_older_than_its_target_and_training_than_all_targets():
    dataset = world(5)
    split = get_split("temporal", dataset)
    cut = dataset.times[np.concatenate([split.valid.at, split.test.at])].min()
    for user, end in enumerate(split.train_end):
        assert (dataset.times[dataset.offsets[user] : end] < cut).all()
    assert dataset.times[split.valid.at].max() < dataset.times[split.test.at].min()


@pytest.mark.parametrize(
    "settings", [{"long": 20}, {"min_history": 20}, {"max_history": 19}, {"min_history": 12, "max_history": 25}]
)
@pytest.mark.parametrize("rule", RULES)
def test_filters_say_who_is_asked_and_leave_training_alone(rule, settings):
    dataset = world(2)
    plain, some = get_split(rule, dataset), get_split({rule: settings}, dataset)
    assert (plain.train_end == some.train_end).all()
    low, high = settings.get("min_history", 0), settings.get("max_history", 10**9)
    for before, after in ((plain.valid, some.valid), (plain.test, some.test)):
        want = {
            (user, at) for user, at in by_user(dataset, before)
            if low <= at <= high and np.diff(dataset.offsets)[user] >= settings.get("long", 0)
        }  # fmt: skip
        assert by_user(dataset, after) == want and 0 < len(want) < len(before)


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 6))
def test_spread_keeps_evenly_spaced_ones(counts, most):
    users = np.repeat(np.arange(len(counts)) * 3, counts)
    rows = spread(users, most)
    for user, count in enumerate(counts):
        own = rows[users[rows] == user * 3] - sum(counts[:user])
        assert len(own) == min(count, most)
        gaps = np.diff(own)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_share_of_users_trains_and_a_number_of_them_is_asked():
    dataset = world(4)
    whole = get_split("ratio", dataset)

    def trains(split):
        return set(np.flatnonzero(split.train_end > split.dataset.offsets[:-1]).tolist())

    some, more = (get_split({"ratio": {"train_users": share}}, dataset) for share in (0.2, 0.5))
    assert len(trains(whole)) > 2 * len(trains(some)) > 0 and trains(some) < trains(more) < trains(whole)
    for split in (some, more):  # what is asked stays, and so do the events of those who train
        assert split.test.at.tolist() == whole.test.at.tolist() and split.valid.at.tolist() == whole.valid.at.tolist()
        own = sorted(trains(split))
        assert (split.train_end[own] == whole.train_end[own]).all()
    assert [pick({"ratio": each}, RULES).passes for each in ({}, {"train_users": 0.25, "repeats": 4})] == [1, 1]
    few = get_split({"ratio": {"test_users": 7, "valid_users": 3}}, dataset)
    assert (len(set(few.test.users)), len(set(few.valid.users))) == (7, 3)
    own = np.isin(whole.test.users, few.test.users)
    assert few.test.at.tolist() == whole.test.at[own].tolist()  # all that a user is asked
    assert (few.train_end == whole.train_end).all()


def test_a_user_is_asked_a_bounded_number_of_times():
    dataset = world(4)
    few = get_split({"ratio": {"max_targets_per_user": 2}}, dataset)
    all_ = get_split("ratio", dataset)
    assert by_user(dataset, few.test) < by_user(dataset, all_.test)
    want = np.minimum(np.bincount(all_.test.users, minlength=60), 2)
    assert (np.bincount(few.test.users, minlength=60) == want).all()


@given(st.lists(st.lists(st.integers(1, 6), max_size=9), max_size=9), st.integers(2, 3))
def test_k_core_equals_the_loop_that_takes_one_at_a_time(histories, k):
    dataset = toy([len(h) for h in histories], None, [x for h in histories for x in h], 6)
    pairs = {(u, n): x for u, h in enumerate(histories) for n, x in enumerate(h)}
    while True:
        few = [
            key for key, item in pairs.items()
            if sum(u == key[0] for u, _ in pairs) < k or sum(x == item for x in pairs.values()) < k
        ]  # fmt: skip
        if not few:
            break
        del pairs[few[0]]
    if not pairs:
        with pytest.raises(DataError, match=f"toy has no {k}-core"):
            k_core(dataset, k)
        return
    core = k_core(dataset, k)
    rows = np.repeat(core.user_ids, np.diff(core.offsets))
    left = sorted((user, n, item) for (user, n), item in pairs.items())
    assert list(zip(rows.tolist(), (core.item_ids[core.items - 1] + 1).tolist())) == [(u, x) for u, _, x in left]
    assert core.feedback["rating"].tolist() == [x / 2 for *_, x in left]
    assert core.hash != dataset.hash and set(core.items.tolist()) == set(range(1, core.n_items + 1))


def test_the_names_of_a_k_core_are_of_those_who_stay():
    events = [(f"u{user}", f"i{item}", item) for user in range(6) for item in range(user + 1)]
    dataset = get_dataset(
        pl.DataFrame(events, schema=["user", "item", "time"], orient="row"),
        user="user", item="item", time="time", unit="order",
    )  # fmt: skip
    core = k_core(dataset, 3)
    assert list(core.original_user(slice(None))) == ["u2", "u3", "u4", "u5"] and core.item_names is not None
    assert list(core.item_names) == [f"i{place}" for place in core.item_ids] and core.n_items == 4


def test_the_data_set_is_left_alone():
    dataset = toy([5, 2, 3])
    leave_one_out(dataset)
    assert dataset.offsets.tolist() == [0, 5, 7, 10]
    assert get_split("leave_one_out", dataset).dataset is dataset


def test_names():
    split = get_split("leave_one_out", toy([4]))
    assert split.name == "leave_one_out" and len(split.test) == 1
    with pytest.raises(UnknownName, match="leave_one_out"):
        get_split("leave_one_ot", toy([4]))
    assert str(Temporal(long=200, valid=0.1)) == "temporal(long=200)" and str(Ratio()) == "ratio"


def test_data_without_times_or_with_one_moment_only():
    assert default_rule(toy([3])) == LeaveOneOut() and default_rule(toy([3], np.arange(3))) == Temporal()
    with pytest.raises(DataError, match=r"^toy has no times \(from test\), .*: name the split leave_one_out or ratio$"):
        get_split("temporal", toy([3]))
    with pytest.raises(DataError, match="all happen at one time"):
        get_split("temporal", toy([3, 2], np.zeros(5, np.int64)))
