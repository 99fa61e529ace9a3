"""Requests, candidates and sampled negatives against loops over users; nothing of later events reaches training."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.data import DataError, Dataset, load_card
from malloc_bench.data.tasks.impressions import ask, expose, ranking_batches
from malloc_bench.data.tasks.splits import RULES, LeaveOneOut, Ratio, Temporal
from malloc_bench.data.tasks.tasks import Ranking

CARD = load_card("ml-100k")  # rating >= 4 is liked


def world(seed=0, users=30, n_items=50, stars=True, longest=40):
    """Users who join at different moments; every event has a time of its own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, users)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    n = offsets[-1]
    times = np.concatenate([np.sort(rng.permutation(10_000)[:k]) * users + u for u, k in enumerate(lengths)])
    items = rng.integers(1, n_items + 1, n).astype(np.int32)
    feedback = {"rating": rng.integers(1, 6, n).astype(np.float32)} if stars else {}
    return Dataset("toy", CARD, "test", np.arange(users), np.arange(n_items), offsets, items, times, feedback, "")


def events_of(dataset, user):
    """(item, time, liked) of a user's events."""
    rows = slice(*dataset.offsets[user : user + 2])
    labels = dataset.labels()
    liked = np.ones(dataset.n_events, bool) if labels is None else labels
    return list(zip(dataset.items[rows].tolist(), dataset.times[rows].tolist(), liked[rows].tolist()))


def asked_of(data, asked, length=1000):
    """Each request as (user, [history (item, time)], moment of the last, [(item, time, label) candidates])."""
    history, tokens, labels = ask(data, asked, length)
    assert history.items.shape == history.times.shape and tokens.items.shape == labels.shape
    for row, user in enumerate(asked.users.tolist()):
        n, m = int(history.count[row]), int(tokens.count[row])
        assert not history.items[row, n:].any() and not tokens.items[row, m:].any() and not labels[row, m:].any()
        assert (tokens.times[row] == tokens.next_times[row]).all()
        past = list(zip(history.items[row, :n].tolist(), history.times[row, :n].tolist()))
        shown = list(zip(*(x[row, :m].tolist() for x in (tokens.items, tokens.times, labels))))
        yield user, past, history.next_times[row, n - 1].item() if n else None, shown


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("candidates", [1, 3, 32])
def test_requests_are_the_test_events_in_order_with_the_liked_ones_before(rule, candidates):
    dataset = world()
    data = expose(dataset, RULES[rule](), 0, candidates, 0)
    _, valid_end = RULES[rule]().bounds(dataset)
    found = list(asked_of(data, data.test))
    for user in range(dataset.n_users):
        events = events_of(dataset, user)
        first = int(valid_end[user] - dataset.offsets[user])
        want = []
        for start in range(first, len(events), candidates):
            past = [(item, time) for item, time, liked in events[:start] if liked]
            if past:  # a state of nothing is nothing to compress
                want.append((user, past, events[start][1], events[start : start + candidates]))
        assert [each for each in found if each[0] == user] == want
    assert len(found) > 10


def test_the_newest_of_a_long_history_are_kept():
    data = expose(world(), Ratio(), 0, 8, 0)
    for (_, past, *_), (_, short, *_) in zip(asked_of(data, data.test), asked_of(data, data.test, 4)):
        assert short == past[-4:]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("negatives", [0, 1])
def test_a_state_holds_only_what_is_strictly_older_than_its_candidates(rule, negatives):
    """Ratings of one evening share a second: their order is not known, so none may tell of another."""
    dataset = world()
    dataset = replace(dataset, times=dataset.times // 40_000)
    assert dataset.tied > 0.3
    data = expose(dataset, RULES[rule](), negatives, 8, 0)
    held = 0
    for asked in (data.test, data.valid):
        for user, past, _, shown in asked_of(data, asked):
            first = min(time for _, time, _ in shown)
            assert past == [(item, time) for item, time, liked in events_of(dataset, user) if liked and time < first]
            held += len(past)
    for history, tokens, _ in ranking_batches(data, 1000, 8, 0, 0):
        for row in range(len(history.count)):
            own = history.times[row, : int(history.count[row])]
            assert not len(own) or own.max() < tokens.times[row, : int(tokens.count[row])].min()
    assert held > 100


@pytest.mark.parametrize("rule", [LeaveOneOut, Ratio])
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("core", [1, 3])
def test_so_it_is_of_events_of_equal_order_where_there_are_no_times(rule, negatives, core):
    timed = world(n_items=20)
    timed = replace(timed, times=timed.times // 40_000)
    ordered = replace(timed, times=None, order=timed.times)
    assert ordered.tied == timed.tied > 0.3
    one, other = (expose(data, rule(k_core=core), negatives, 8, 0) for data in (timed, ordered))
    assert other.before.tolist() == one.before.tolist() and len(one.test) > 10
    for name in ("users", "at", "start", "stop"):
        assert getattr(other.test, name).tolist() == getattr(one.test, name).tolist()


@pytest.mark.parametrize("stars", [True, False])
@pytest.mark.parametrize("negatives", [1, 3])
def test_each_liked_event_comes_with_items_that_were_not_liked(stars, negatives):
    dataset = world(stars=stars)
    data = expose(dataset, Ratio(), negatives, 12, 0)
    assert data.shown is data.dataset and data.liked.all()
    for user, past, moment, shown in asked_of(data, data.test):
        liked = [(item, time) for item, time, yes in events_of(dataset, user) if yes]
        mine = {item for item, _ in liked}
        own, sampled = shown[:: 1 + negatives], [s for i, s in enumerate(shown) if i % (1 + negatives)]
        start = len(past)
        assert past == liked[:start] and moment == liked[start][1]
        assert [(item, time) for item, time, _ in own] == liked[start : start + len(own)]
        assert all(label for *_, label in own) and not any(label for *_, label in sampled)
        assert not {item for item, *_ in sampled} & mine
        assert [time for _, time, _ in sampled] == [time for _, time, _ in own for _ in range(negatives)]
        assert len(shown) <= 12


def test_negatives_are_uniform_over_all_that_was_not_liked():
    dataset = world(users=3, n_items=12, stars=False, longest=9)
    dataset = replace(dataset, items=np.minimum(dataset.items, 6))
    data = expose(dataset, LeaveOneOut(), 4000, 4001, 0)
    for user in range(3):
        rows = slice(*data.shown.offsets[user : user + 2])
        for at in range(rows.start, rows.stop):
            end = data.train_end[user] if at < data.train_end[user] else max(at + 1, data.train_end[user])
            free = set(range(1, 13)) - set(dataset.items[rows.start : end].tolist())
            counts = Counter(data.negatives[at].tolist())
            assert set(counts) == free
            assert max(abs(n * len(free) / 4000 - 1) for n in counts.values()) < 0.25


def test_negatives_are_drawn_once_from_the_seed_of_the_task():
    a, b, c = (Ranking(negatives=2, seed=seed).cut(world(), Ratio()) for seed in (0, 0, 1))
    assert (a.negatives == b.negatives).all() and (a.negatives != c.negatives).any()


def test_a_user_who_likes_everything_has_no_negatives():
    dataset = world(users=2, n_items=1, stars=False)
    with pytest.raises(DataError, match="has liked every item, so no negative can be drawn; use its labels"):
        expose(dataset, Ratio(), 1, 32, 0)


@pytest.mark.parametrize("negatives", [0, 2])
def test_an_epoch_shows_every_training_event_once_and_begins_elsewhere_in_the_next(negatives):
    dataset = world()
    data = expose(dataset, Ratio(), negatives, 9, 0)
    starts = []
    for epoch in range(2):
        seen, begun = Counter(), set()
        for batch in ranking_batches(data, 1000, 4, 0, epoch):
            history, tokens, labels = batch
            assert 1 <= len(labels) <= 4 and tokens.items.shape[1] <= 9
            for row in range(len(labels)):
                n, m = int(history.count[row]), int(tokens.count[row])
                times = tokens.times[row, :m].tolist()
                user = times[0] % dataset.n_users
                seen.update(zip(tokens.items[row, :m].tolist(), times, labels[row, :m].tolist()))
                begun.add(times[0])
                past = [(i, t) for i, t, liked in events_of(dataset, user) if liked and t < times[0]]
                assert list(zip(history.items[row, :n].tolist(), history.times[row, :n].tolist())) == past
                assert n == 0 or history.next_times[row, n - 1] == times[0]
        shown, first, last = data.shown, data.shown.offsets[:-1], data.train_end
        want = Counter()
        for user in range(dataset.n_users):
            for at in range(first[user], last[user]):
                want[(int(shown.items[at]), int(shown.times[at]), bool(data.liked[at]))] += 1
                want.update((int(x), int(shown.times[at]), False) for x in data.negatives[at])
        assert seen == want
        starts.append(begun)
    assert starts[0] != starts[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("negatives", [0, 1])
def test_training_knows_nothing_of_what_comes_after_its_cut(rule, negatives):
    """Other items, labels and times behind the cut, and even more or fewer liked events there."""
    dataset = world(3)
    data = expose(dataset, RULES[rule](), negatives, 6, 0)
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(dataset.n_users), np.diff(data.shown.offsets))
    late = np.arange(data.shown.n_events) >= data.train_end[users]
    cut = np.full(dataset.n_users, np.iinfo(np.int64).max)
    np.minimum.at(cut, users[late], data.shown.times[late])
    owner = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    late = dataset.times >= cut[owner]
    assert late.any() and not late.all()
    items = np.where(late, rng.permutation(dataset.items), dataset.items)
    times = np.where(late & (rule != "temporal"), dataset.times + 10**7, dataset.times)
    shuffled = dataset.feedback["rating"].copy()
    if not negatives:  # with negatives the number of liked events is what is cut
        shuffled[late] = rng.permutation(shuffled[late])
    other = expose(
        replace(dataset, items=items, times=times, feedback={"rating": shuffled}), RULES[rule](), negatives, 6, 0
    )
    batches = [list(ranking_batches(each, 5, 4, 0, 1)) for each in (data, other)]
    assert len(batches[0]) == len(batches[1]) > 5
    for (h, t, labels), (h2, t2, labels2) in zip(*batches):
        assert (labels == labels2).all() and (h.next_times == h2.next_times).all()
        for a, b in ((h, h2), (t, t2)):
            assert (a.items == b.items).all() and (a.times == b.times).all() and (a.count == b.count).all()


@pytest.mark.parametrize("negatives", [0, 1])
def test_a_state_holds_only_what_is_older_than_its_candidates(negatives):
    dataset = world(5)
    data = expose(dataset, Temporal(), negatives, 7, 0)
    trained = max(int(batch[1].times.max()) for batch in ranking_batches(data, 50, 4, 0, 0))
    assert trained < data.shown.times[data.valid.start].min() < data.shown.times[data.test.start].min()
    for _, past, moment, shown in [*asked_of(data, data.valid), *asked_of(data, data.test)]:
        assert all(time < moment for _, time in past) and min(time for _, time, _ in shown) == moment


@given(st.integers(0, 10**6), st.sampled_from([{"long": 12}, {"min_history": 8}, {"max_history": 10}]))
def test_filters_count_the_liked_events_that_a_state_can_hold(seed, settings):
    dataset = world(seed)
    plain, some = (expose(dataset, Ratio(**s), 0, 4, 0) for s in ({}, settings))
    liked = [[time for _, time, yes in events_of(dataset, user) if yes] for user in range(dataset.n_users)]
    low, high, total = settings.get("min_history", 1), settings.get("max_history", 10**9), settings.get("long", 0)
    want = [
        each for each in asked_of(plain, plain.test)
        if low <= len(each[1]) <= high and len(liked[each[0]]) >= total
    ]  # fmt: skip
    assert list(asked_of(some, some.test)) == want


def test_data_without_times_have_none_to_show():
    data = expose(replace(world(), times=None), Ratio(), 1, 6, 0)
    history, tokens, _ = ask(data, data.test, 10)
    assert history.times is history.next_times is tokens.times is tokens.next_times is None


def test_a_share_of_users_trains_and_a_number_of_them_is_asked():
    dataset = world(2)
    whole, few = (
        expose(dataset, rule, 0, 8, 0) for rule in (Ratio(), Ratio(train_users=0.4, test_users=5, valid_users=4))
    )
    trained = few.train_end > few.shown.offsets[:-1]
    assert 0 < trained.sum() < 0.5 * len(trained)
    assert (few.train_end[trained] == whole.train_end[trained]).all()
    assert (len(set(few.test.users)), len(set(few.valid.users))) == (5, 4)
    assert set(zip(few.test.start, few.test.stop)) <= set(zip(whole.test.start, whole.test.stop))
