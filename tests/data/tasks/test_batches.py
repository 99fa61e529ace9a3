"""Windows and training batches against loops over users; nothing of validation and test leaks into training."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench.data import Dataset
from malloc_bench.data.tasks.batches import by_length, split_newest, training_batches, window
from malloc_bench.data.tasks.splits import Targets, leave_one_out

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def toy(lengths, timed=True, shift=0):
    """Every event has an item of its own, a time of its own: 10 x item, and a rating."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    items = np.arange(1, offsets[-1] + 1).astype(np.int32)
    times = 10 * items.astype(np.int64) + shift if timed else None
    feedback = {"rating": (items * 7 % 6).astype(np.float32)}
    ids = np.arange(len(lengths)), np.arange(len(items))
    return Dataset("toy", None, "test", *ids, offsets, items, times, feedback, "")


def many(users=700, longest=120, seed=0):
    rng = np.random.default_rng(seed)
    return toy(np.exp(rng.normal(2.8, 0.9, users)).astype(int).clip(1, longest))


def rows_of(events):
    """Each user's real (items, times, next_times), and that padding is zero."""
    for row, n in enumerate(events.count.tolist()):
        columns = [None if x is None else x[row] for x in (events.items, events.times, events.next_times)]
        assert all(x is None or not x[n:].any() for x in columns)
        yield [None if x is None else x[:n].tolist() for x in columns]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 10), st.booleans(), st.data())
def test_window_user_by_user(lengths, length, timed, data):
    dataset = toy(lengths, timed)
    users = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    end = np.array([dataset.offsets[u] + data.draw(st.integers(0, lengths[u])) for u in users])
    events = window(dataset, users, end, length)
    assert events.items.dtype == events.count.dtype == torch.int32
    assert events.items.shape[1] == int(events.count.max())
    for user, stop, (items, times, following) in zip(users, end, rows_of(events)):
        places = list(range(dataset.offsets[user], stop))[-length:]
        assert items == dataset.items[places].tolist()
        if not timed:
            assert times is None and following is None
            continue
        assert times == dataset.times[places].tolist()
        last = dataset.offsets[user + 1] - 1  # behind the user's very last event nothing is known: its own time
        assert following == [dataset.times[min(place + 1, last)] for place in places]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 10), st.sampled_from([None, 1.2]))
def test_what_users_did_stays_with_their_events(lengths, length, alpha):
    dataset = toy([n + 1 for n in lengths])
    kind = torch.from_numpy(np.r_[np.uint8(0), dataset.kinds])  # of an item; 0 is padding
    users = np.arange(len(lengths))
    whole = window(dataset, users, dataset.offsets[1:], length)
    batches = [batch.events for batch in training_batches(leave_one_out(dataset), length, 5, 0, 0, None, alpha)]
    for events in (whole, *split_newest(whole), whole.last(torch.full((len(users),), 3)), *batches):
        assert events.kinds.dtype == torch.uint8 and torch.equal(events.kinds, kind[events.items.long()])
    assert window(replace(dataset, feedback={}), users, dataset.offsets[1:], length).kinds is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans())
def test_split_newest_user_by_user(lengths, timed):
    dataset = toy([n + 1 for n in lengths], timed)
    users = np.arange(len(lengths))
    events = window(dataset, users, dataset.offsets[1:] - 1, 100)
    history, token = split_newest(events)
    assert history.count.tolist() == [n - 1 for n in lengths] and token.count.tolist() == [1] * len(lengths)
    for whole, past, new in zip(rows_of(events), _until(history), rows_of(token)):
        assert [None if x is None else x[:-1] for x in whole] == past
        assert [None if x is None else x[-1:] for x in whole] == new
        if timed:
            assert new[2] == [new[1][0] + 10]  # asked for when the event to be predicted happens


def _until(events):
    """As rows_of, but padding may hold anything."""
    for row, n in enumerate(events.count.tolist()):
        columns = (events.items, events.times, events.next_times)
        yield [None if x is None else x[row, :n].tolist() for x in columns]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 10), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_user_s_steps_once(lengths, max_length, size, epoch, timed):
    """All of them, or a run of max_length of them."""
    dataset = toy(lengths, timed)
    split = leave_one_out(dataset)
    seen: set[int] = set()
    users = 0
    for batch in training_batches(split, max_length, size, 0, epoch):
        assert 1 <= len(batch.targets) <= size and batch.targets.shape == batch.events.items.shape
        assert torch.equal(batch.targets > 0, batch.events.mask())
        for (items, times, following), targets in zip(rows_of(batch.events), batch.targets.tolist()):
            targets = targets[: len(items)]
            assert [item + 1 for item in items] == targets  # the very next event of the same user
            if timed:
                assert times == [10 * x for x in items] and following == [10 * x for x in targets]
            assert not seen & set(targets)
            seen |= set(targets)
            users += 1
    trained = [set(dataset.items[first + 1 : end].tolist()) for first, end in zip(dataset.offsets, split.train_end)]
    assert users == sum(map(bool, trained)) and seen <= set().union(*trained)
    for steps in trained:
        assert len(steps & seen) == min(len(steps), max_length)


def test_a_long_history_is_learned_from_whole_over_epochs():
    dataset = toy([40], False)
    split = leave_one_out(dataset)
    seen = Counter()
    for epoch in range(200):
        for batch in training_batches(split, 10, 4, 0, epoch):
            seen.update(batch.targets.flatten().tolist())
    assert set(seen) == set(dataset.items[1 : split.train_end[0]].tolist())


def test_nothing_of_validation_and_test_is_in_any_batch():
    dataset = many()
    split = leave_one_out(dataset)
    held_out = set(dataset.items[np.concatenate([split.valid.at, split.test.at])].tolist())
    held_times = {10 * item for item in held_out}
    assert len(held_out) == 2 * (np.diff(dataset.offsets) >= 3).sum()
    touched, moments = set(), set()
    for epoch in range(2):
        for batch in training_batches(split, 50, 32, 1, epoch):
            touched |= set(batch.events.items.flatten().tolist()) | set(batch.targets.flatten().tolist())
            moments |= set(batch.events.times.flatten().tolist()) | set(batch.events.next_times.flatten().tolist())
    assert not touched & held_out and not moments & held_times
    short = (split.train_end - dataset.offsets[:-1] >= 2) & (split.train_end - dataset.offsets[:-1] <= 51)
    assert set(dataset.items[split.train_end[short] - 1].tolist()) <= touched  # all but what is held out


def test_validation_sees_no_test_event():
    dataset = many(200)
    split = leave_one_out(dataset)
    events = window(dataset, split.valid.users, split.valid.at, 50)
    tests = set(dataset.items[split.test.at].tolist())
    for items, times, following in rows_of(events):
        assert not set(items) & tests and not {x // 10 for x in times + following} & tests


def test_deterministic_and_every_epoch_another():
    split = leave_one_out(many(150))

    def first_items(seed, epoch):
        return [b.events.items[:, 0].tolist() for b in training_batches(split, 20, 16, seed, epoch)]

    assert first_items(0, 3) == first_items(0, 3)
    assert len({str(first_items(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_sorting_leaves_little_padding():
    split = leave_one_out(many(2000))

    def padding(batches):
        cells, real = zip(*((b.targets.numel(), int((b.targets > 0).sum())) for b in batches))
        return 1 - sum(real) / sum(cells)

    batches = list(training_batches(split, 100, 32, 0, 0))
    sizes = {len(batch.targets) for batch in batches}
    users = np.flatnonzero(split.train_end - split.dataset.offsets[:-1] > 1)
    random = np.random.default_rng(0).permutation(users)
    steps = np.minimum(split.train_end - split.dataset.offsets[:-1] - 1, 100)
    lengths = [steps[rows] for rows in np.split(random, range(32, len(random), 32))]
    unsorted = 1 - sum(map(sum, lengths)) / sum(len(x) * max(x) for x in lengths)
    assert max(sizes) == 32 and 2.2 * padding(batches) < unsorted, (padding(batches), unsorted)


def test_batches_come_in_no_order_of_length():
    widths = [batch.targets.shape[1] for batch in training_batches(leave_one_out(many(2000)), 100, 32, 0, 0)]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.4
    assert np.mean(np.diff(widths) < 0) > 0.3


@pytest.mark.parametrize("size", [1, 3, 100])
def test_by_length_has_every_target_with_a_history_once(size):
    dataset = many(80)
    at = dataset.offsets[:-1] + np.random.default_rng(0).integers(0, np.diff(dataset.offsets))
    targets = Targets(np.arange(80), at)
    batches = list(by_length(targets, dataset, 20, size))
    assert all(0 < len(rows) <= size for rows in batches)
    order = np.concatenate(batches)
    length = np.minimum(at - dataset.offsets[:-1], 20)
    assert sorted(order.tolist()) == np.flatnonzero(length > 0).tolist()
    assert (np.diff(length[order]) >= 0).all()
    assert list(by_length(Targets(at[:0], at[:0]), dataset, 20, size)) == []


# --- stochastic length and negatives ------------------------------------------------------------------------------


def test_stochastic_length_keeps_some_events_and_what_follows_each():
    """Items and times number the events, so order and successors can be read off the batch."""
    data, longest, alpha = many(), 64, 1.5
    split, few = leave_one_out(data), int(64 ** (1.5 / 2))
    first, seen, whole, long = data.offsets[:-1], Counter(), 0, 0
    for batch in training_batches(split, longest, 32, 3, 0, stochastic_length=alpha):
        for row, (items, times, following) in enumerate(rows_of(batch.events)):
            (user,) = set((np.searchsorted(first, np.array(items) - 1, side="right") - 1).tolist())
            seen[user] += 1
            all_steps = min(split.train_end[user] - first[user] - 1, longest)
            assert items == sorted(set(items)) and times == [10 * item for item in items]
            assert batch.targets[row, : len(items)].tolist() == [item + 1 for item in items]
            assert following == [10 * item + 10 for item in items] and not batch.targets[row, len(items) :].any()
            assert len(items) == all_steps if all_steps <= few else len(items) in (few, all_steps)
            if all_steps > few:
                whole, long = whole + (len(items) == all_steps), long + 1
    assert set(seen.values()) == {1} and len(seen) == int((split.train_end - first > 1).sum())
    assert 0.02 < whole / long < 0.9


def test_the_share_of_whole_histories_is_the_paper_s():
    """N^alpha / n^2 of those that are as long as N: here 20^1.2 / 20^2 = 9.1 %, and they keep int(20^0.6) = 6 else."""
    split = leave_one_out(toy([60] * 4000))
    counts = [batch.events.count for batch in training_batches(split, 20, 500, 0, 0, stochastic_length=1.2)]
    sizes = Counter(torch.cat(counts).tolist())
    assert sizes.keys() == {6, 20}
    assert sizes[20] / 4000 == pytest.approx(20**1.2 / 400, abs=0.015)


def test_stochastic_length_keeps_every_place_alike():
    split = leave_one_out(toy([23] * 6000))
    kept = np.zeros(20)
    for batch in training_batches(split, 20, 500, 0, 0, stochastic_length=1.2):
        some = batch.events.items[batch.events.count == 6]
        kept += np.bincount((some.numpy().ravel() - 1) % 23, minlength=20)[:20]
    assert kept / kept.sum() == pytest.approx(np.full(20, 1 / 20), rel=0.1)


def test_alpha_2_leaves_nothing_out():
    split = leave_one_out(many(longest=64))
    found = [
        sorted(row for batch in batches for row in map(tuple, (items for items, *_ in rows_of(batch.events))))
        for batches in (
            training_batches(split, 64, 32, 3, 0),
            training_batches(split, 64, 32, 3, 0, stochastic_length=2.0),
        )
    ]
    assert found[0] == found[1]


def test_negatives_are_drawn_from_the_catalogue_for_each_batch():
    split = leave_one_out(many(users=200))
    plain = list(training_batches(split, 64, 32, 3, 0))
    drawn = list(training_batches(split, 64, 32, 3, 0, negatives=5000))
    again = list(training_batches(split, 64, 32, 3, 0, negatives=5000))
    assert all(batch.negatives is None for batch in plain)
    assert not torch.equal(drawn[0].negatives, drawn[1].negatives)
    for batch, same in zip(drawn, again, strict=True):
        assert batch.negatives.shape == (len(batch.targets), 5000)
        assert torch.equal(batch.negatives, same.negatives)
        assert int(batch.negatives.min()) >= 1 and int(batch.negatives.max()) <= split.dataset.n_items
    every = torch.cat([batch.negatives.flatten() for batch in drawn])
    assert len(every.unique()) == split.dataset.n_items


def test_the_newest_window_is_the_same_every_epoch():
    split = leave_one_out(toy([3, 9, 40]))  # items 1-3, 4-12 and 13-52: nothing, 4-10 and 13-50 train
    for epoch in range(3):
        (batch,) = training_batches(split, 10, 8, 0, epoch, newest=True)
        assert sorted(items for items, *_ in rows_of(batch.events)) == [[*range(4, 10)], [*range(40, 50)]]
