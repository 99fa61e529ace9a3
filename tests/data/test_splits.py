"""Who trains, validates and tests, against a loop over users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.data import Dataset
from malloc_bench.data.splits import get_split, leave_one_out
from malloc_bench.registry import UnknownName


def toy(lengths):
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
    items = np.ones(offsets[-1], np.int32)
    return Dataset("toy", None, "test", np.arange(len(lengths)), np.arange(3), offsets, items, None, None, "")


@given(st.lists(st.integers(0, 8), max_size=12))
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


@given(st.lists(st.integers(0, 8), max_size=12))
def test_every_event_has_one_use(lengths):
    dataset = toy(lengths)
    split = leave_one_out(dataset)
    uses = np.zeros(dataset.n_events, int)
    for user in range(dataset.n_users):
        uses[dataset.offsets[user] : split.train_end[user]] += 1
    for targets in (split.valid, split.test):
        np.add.at(uses, targets.at, 1)
        assert (
            (dataset.offsets[targets.users] <= targets.at) & (targets.at < dataset.offsets[targets.users + 1])
        ).all()
    assert (uses == 1).all()
    assert (split.train_end <= split.dataset.offsets[1:]).all()


def test_the_data_set_is_left_alone():
    dataset = toy([5, 2, 3])
    leave_one_out(dataset)
    assert dataset.offsets.tolist() == [0, 5, 7, 10]


def test_names():
    split = get_split("leave_one_out", toy([4]))
    assert split.name == "leave_one_out" and len(split.test) == 1
    with pytest.raises(UnknownName, match="leave_one_out"):
        get_split("leave_one_ot", toy([4]))
