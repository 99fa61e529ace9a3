"""Data sets as one: users by their text ids, mixed in time, items apart, and targets among their own."""

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import DataError, get_dataset
from malloc_bench.data.joined import join, parts_of
from malloc_bench.data.tasks.splits import get_split
from malloc_bench.evaluation.popularity import popularity
from malloc_bench.evaluation.ranking import question
from malloc_bench.registry import UnknownName


def made(name, rows, **columns):
    users, items, times = zip(*rows)
    data = pl.DataFrame({"user": users, "item": items, "time": times, "rating": [3.0] * len(rows)})
    asked = {"user": "user", "item": "item", "time": "time", "feedback": ["rating"], "name": name} | columns
    return get_dataset(data, **{key: value for key, value in asked.items() if value is not None})


BOOKS = made("books", [("ann", "x", 10), ("ann", "y", 30), ("bob", "y", 5), ("bob", "x", 9), ("bob", "z", 70)])
SHOES = made("shoes", [("ann", "x", 20), ("ann", "w", 40), ("cat", "x", 1), ("cat", "w", 2), ("cat", "v", 3)])


def events(data, user):
    (row,) = np.flatnonzero(np.array(data.original_user(slice(None)).to_list()) == user)
    return [data.item_names[int(i) - 1] for i in data.items[data.offsets[row] : data.offsets[row + 1]]]


def test_a_user_of_both_has_one_history_in_time_order_and_no_two_items_are_one():
    both = join([BOOKS, SHOES])
    assert both.name == "books+shoes" and both.n_users == 3 and both.n_items == 6 and both.n_events == 10
    assert events(both, "ann") == ["books:x", "shoes:x", "books:y", "shoes:w"]
    assert events(both, "cat") == ["shoes:x", "shoes:w", "shoes:v"]
    assert [both.domain_names[d] for d in both.domains] == ["books"] * 3 + ["shoes"] * 3
    for row in range(both.n_users):
        assert (np.diff(both.times[both.offsets[row] : both.offsets[row + 1]]) >= 0).all()
    assert both.hash != join([SHOES, BOOKS]).hash != BOOKS.hash and join([BOOKS, SHOES]).hash == both.hash


def test_nothing_of_later_trains_or_is_known_whichever_set_it_is_of():
    both = join([BOOKS, SHOES])
    split = get_split("leave_one_out", both)
    for user, at in zip(split.test.users, split.test.at):
        known = slice(both.offsets[user], at)
        assert (both.times[known] <= both.times[at]).all() and split.train_end[user] < at


def test_numbers_name_nobody_in_two_sets():
    one, two = (made(name, [(1, 7, 10), (1, 8, 20), (2, 7, 5)]) for name in ("one", "two"))
    both = join([one, two])
    assert both.n_users == 4 and sorted(both.user_names) == ["one:1", "one:2", "two:1", "two:2"]
    assert both.item_names.to_list() == ["one:7", "one:8", "two:7", "two:8"]


def test_a_number_names_nobody_whoever_else_is_there():
    """With a word among them, ids are texts: 7 of one set was 7 of the other then, and not without."""
    joined = join([made("a", [("7", "x", 1), ("ann", "y", 2)]), made("b", [("7", "z", 3), ("ann", "w", 4)])])
    assert joined.user_names.to_list() == ["a:7", "ann", "b:7"] and np.diff(joined.offsets).tolist() == [1, 2, 1]


def test_sets_that_cannot_be_mixed_are_refused_in_a_line():
    untimed = made("untimed", [("ann", "x", 1), ("ann", "y", 2)], time=None)
    with pytest.raises(DataError, match=r"books\+untimed: untimed has no times, so its events have no place"):
        join([BOOKS, untimed])
    with pytest.raises(DataError, match="users are in several of them, and without times nothing says what came first"):
        join([untimed, made("more", [("ann", "x", 1), ("eve", "y", 2)], time=None)])
    known = ["books", "shoes", "a+b"]
    assert parts_of("books+shoes", known) == ["books", "shoes"] and not parts_of("a+b", known)
    with pytest.raises(UnknownName, match=r"no dataset is named 'shoe'\. Did you mean 'shoes'"):
        parts_of("books+shoe", known)
    with pytest.raises(DataError, match="twice"):
        parts_of("books+books", known)


@pytest.mark.parametrize("ties", ["keep", "by_item"])
def test_ties_of_a_joined_set_are_as_the_cards_have_them(ties):
    rows = [(f"u{user}", f"i{item}", 7) for user in range(9) for item in (3, 1, 2)]
    parts = [made(name, rows, on_bad={"ties": ties}) for name in ("books", "shoes")]
    order = ["i3", "i1", "i2"] if ties == "keep" else ["i1", "i2", "i3"]
    both = join(parts)
    for user in range(9):
        assert events(both, f"u{user}") == [f"{part}:{item}" for part in ("books", "shoes") for item in order]
    with pytest.raises(DataError, match=f"on_bad.ties must be the same.*books has {ties}, shoes has shuffle"):
        join([parts[0], SHOES])


def test_targets_rank_among_their_own():
    both = join([BOOKS, SHOES])
    split = get_split("leave_one_out", both)
    asked = question(both, split.test.users, split.test.at)
    for row, target in enumerate(asked.target):
        can = np.flatnonzero(asked.penalty[row].numpy() == 0)
        assert int(target) in can and (both.domains[can] == both.domains[int(target)]).all()
    alone = popularity(get_split("leave_one_out", made("cats", [("cat", "x", 1), ("cat", "w", 2), ("cat", "v", 3)])))
    assert popularity(split)["popular_hr@10"] == alone["popular_hr@10"] == 1.0
    core = get_split({"leave_one_out": {"k_core": 2}}, both).dataset
    assert [core.item_names[i].partition(":")[0] for i in range(core.n_items)] == [
        core.domain_names[d] for d in core.domains
    ]


def test_what_came_first_within_a_second_is_still_first():
    at = 1_387_670_400_000
    own = made("own", [("al", each, at + n) for n, each in enumerate("hgfedc")], unit="ms")
    other = made("other", [("al", each, at + n) for n, each in enumerate("zyx")], unit="ms")
    both = join([own, other])
    kept = events(both, "al")
    assert [each for each in kept if each.startswith("own")] == [f"own:{each}" for each in "hgfedc"]
    assert [each for each in kept if each.startswith("other")] == [f"other:{each}" for each in "zyx"]
    assert set(both.times.tolist()) == {at // 1000}
