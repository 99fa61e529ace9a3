"""Histories that are cut, thinned or spoilt when users are asked: what changes, what stays, and what leaks."""

import numpy as np
import pytest
from pydantic import ValidationError

from malloc_bench.data import DataError, load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.batches import window
from malloc_bench.data.tasks.known import heard, knowing, lengths
from malloc_bench.data.tasks.options import pick
from malloc_bench.data.tasks.splits import get_split
from malloc_bench.data.tasks.tasks import TASKS, Retrieval
from malloc_bench.data.tasks.trained import trained
from malloc_bench.data.worlds.synthetic import generate


@pytest.fixture(scope="module")
def data():
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 400, "items": 300, "median": 30, "longest": 90, "shortest": 3})
    return group(card, generate(small), "test")


@pytest.fixture(scope="module")
def split(data):
    return get_split("leave_one_out", data)


def known(split):
    """Items that are known of each test user, oldest first."""
    histories, ends, most = heard(split, 1000)
    events = window(histories, ends.users, ends.at, most)
    return [row[:n].tolist() for row, n in zip(events.items.numpy(), events.count.numpy())]


def true(split):
    at, first = split.test.at, split.dataset.offsets[split.test.users]
    return [split.dataset.items[a:b].tolist() for a, b in zip(first, at)]


def test_of_a_short_history_the_newest_events_are_known(split):
    assert known(knowing(split, history=5)) == [items[-5:] for items in true(split)]
    assert (lengths(knowing(split, history=5), 3) == 3).sum() > 300, "a backbone's own length is still the most"


def test_what_is_deleted_is_gone_in_order_and_more_of_it_at_a_larger_share(split):
    whole, few, more = true(split), known(knowing(split, deleted=0.2)), known(knowing(split, deleted=0.6))
    for a, b, c in zip(whole, few, more):
        assert a[0] == b[0] == c[0], "somebody of whom nothing is known would not be asked"
        assert subsequence(b, a) and subsequence(c, b)
    gone = 1 - sum(map(len, few)) / sum(map(len, whole))
    assert 0.17 < gone < 0.22 and 0.55 < 1 - sum(map(len, more)) / sum(map(len, whole)) < 0.62


def subsequence(few, many):
    rest = iter(many)
    return all(item in rest for item in few)


def test_what_is_replaced_is_drawn_as_often_as_it_trains_and_is_never_what_is_to_be_found(split):
    data, whole, spoilt = split.dataset, true(split), known(knowing(split, replaced=0.5))
    old, new = np.concatenate(whole), np.concatenate(spoilt)
    changed = old != new
    assert list(map(len, whole)) == list(map(len, spoilt)) and 0.44 < changed.mean() < 0.52
    count = np.bincount(data.items[trained(split)], minlength=data.n_items + 1)
    popular = np.argsort(-count)[:30]
    share = count[popular].sum() / count.sum()
    assert abs(np.isin(new[changed], popular).mean() - share) < 0.05, "as often as they train"
    for items, before, target in zip(spoilt, whole, data.items[split.test.at]):
        assert target in before or target not in items, "the target is not given away"


def test_training_targets_and_users_are_what_they_were(split, data):
    for task in ("retrieval", {"retrieval": {"history": 5}}, {"retrieval": {"replace": 0.5}}):
        cut = pick(task, TASKS).cut(data, pick("leave_one_out", {"leave_one_out": type_of()}))
        assert cut.dataset is data and np.array_equal(cut.train_end, split.train_end)
        assert np.array_equal(cut.test.at, split.test.at) and np.array_equal(cut.valid.at, split.valid.at)
        assert len(known(cut)) == len(split.test) and pick(task, TASKS).trained == Retrieval()


def type_of():
    from malloc_bench.data.tasks.splits import LeaveOneOut

    return LeaveOneOut


def test_times_go_with_the_events_that_are_left_and_the_request_keeps_its_own():
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 50, "items": 60, "median": 20, "longest": 40, "shortest": 3})
    data = group(card, generate(small), "test")
    assert data.times is not None
    split = knowing(get_split("leave_one_out", data), deleted=0.5)
    histories, ends, most = heard(split, 100)
    events = window(histories, ends.users, ends.at, most, data.times[split.test.at])
    for row, n, user, at in zip(range(50), events.count.tolist(), split.test.users, split.test.at):
        times, following = events.times[row, :n], events.next_times[row, :n]
        assert following[:-1].tolist() == times[1:].tolist() and following[-1] == data.times[at]
        own = data.times[data.offsets[user] : at]
        assert np.isin(times.numpy(), own).all()


def test_the_last_events_are_held_out_and_the_first_of_them_is_asked(data):
    split = get_split({"leave_one_out": {"last": 4}}, data)
    enough = np.flatnonzero(np.diff(data.offsets) >= 6)
    assert split.test.users.tolist() == enough.tolist()
    assert (split.test.at == data.offsets[1:][enough] - 4).all() and (split.valid.at == split.test.at - 1).all()
    assert (split.train_end[enough] == split.test.at - 1).all(), "nothing of the last four, nor what validates, trains"
    published = get_split({"leave_one_out": {"last": 4, "protocol": "published"}}, data)
    assert not len(published.valid) and (published.train_end[published.test.users] == published.test.at).all()
    assert len(get_split({"leave_one_out": {"last": 1}}, data).test) == len(get_split("leave_one_out", data).test)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"delete": 0.1, "replace": 0.1}, "two tasks: name each by itself"),
        ({"delete": 1.0}, "less than 1"),
        ({"history": 0}, "greater than or equal to 1"),
        ({"steps": 1}, "greater than or equal to 2"),
        ({"forget": 3}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        pick({"retrieval": settings}, TASKS)


def test_steps_beyond_what_is_held_out_are_refused(data):
    task, rule = Retrieval(steps=5), get_rule({"leave_one_out": {"last": 4}})
    with pytest.raises(DataError, match=r"holds out 4 of a user's events: name it \{leave_one_out: \{last: 5\}\}"):
        task.check(rule, "test")
    with pytest.raises(DataError, match="cannot be asked of validation"):
        task.check(get_rule({"leave_one_out": {"last": 5}}), "validation")
    task.check(get_rule("ratio"), "test")
    with pytest.raises(ValueError, match="max_length=5 or more, not 4"):
        heard(task.cut(data, get_rule({"leave_one_out": {"last": 5}})), 4)


def get_rule(value):
    from malloc_bench.data.tasks.splits import RULES

    return pick(value, RULES)
