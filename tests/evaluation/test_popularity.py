"""Popularity against a loop over users, and nothing that is asked is counted."""

from dataclasses import replace

import numpy as np
import pytest

from malloc_bench.data import Dataset, load_card
from malloc_bench.data.tasks.splits import get_split
from malloc_bench.evaluation.metrics import target_slices
from malloc_bench.evaluation.popularity import RECENT, about_items, popularity
from malloc_bench.report.tasks import TIES

CARD = load_card("ml-100k")


def world(times, seed=0, users=40, items=30):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 25, users)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    when = np.concatenate([np.sort(rng.integers(0, 40 * 86_400, k)) for k in lengths]) if times else None
    ids = (items * rng.random(offsets[-1]) ** 2).astype(np.int32) + 1  # some are met often, some twice by one user
    return Dataset("toy", CARD, "test", np.arange(users), np.arange(items), offsets, ids, when, {}, "")


def by_loop(split, filter_seen, recent):
    data = split.dataset
    events = [(p, u) for u in range(data.n_users) for p in range(data.offsets[u], split.train_end[u])]
    newest = max(data.times[p] for p, _ in events) if recent else None
    count = np.zeros(data.n_items + 1, int)
    for place, _ in events:
        count[data.items[place]] += recent is False or data.times[place] > newest - RECENT
    gains = {}
    for user, at in zip(split.test.users, split.test.at):
        target, seen = data.items[at], set(data.items[data.offsets[user] : at].tolist()) if filter_seen else set()
        rank = sum(count[i] >= count[target] and i not in seen for i in range(1, data.n_items + 1) if i != target)
        gains.setdefault(user, []).append((rank < 10, 1 / np.log2(rank + 2) if rank < 10 else 0.0))
    return np.mean([np.mean(each, axis=0) for each in gains.values()], axis=0)


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize(
    "rule, times", [("leave_one_out", False), ("leave_one_out", True), ("ratio", True), ("temporal", True)]
)
def test_popularity_is_the_plain_loop(rule, times, filter_seen):
    split = get_split(rule, world(times))
    found = popularity(split, filter_seen)
    assert set(found) == {f"{name}_{m}" for name in ["popular"] + ["popular_7d"] * times for m in ("hr@10", "ndcg@10")}
    for name, recent in (("popular", False), ("popular_7d", True)):
        if not recent or times:
            want = by_loop(split, filter_seen, recent)
            np.testing.assert_allclose([found[f"{name}_hr@10"], found[f"{name}_ndcg@10"]], want)


def test_what_is_asked_is_not_counted():
    split = get_split("leave_one_out", world(False))
    before = popularity(split, False)
    data = split.dataset
    later = data.items.copy()
    later[split.valid.at] = 1  # behind the end of training
    changed = replace(split, dataset=replace(data, items=later))
    assert popularity(changed, False) == before


def test_a_target_ties_with_the_event_before_or_comes_later():
    data = world(True)
    data = replace(data, times=data.times // 86_400)  # whole days, as Amazon has them
    split = get_split("leave_one_out", data)
    rows = np.arange(len(split.test.at))
    about = about_items(split, rows)
    want = [data.times[at] == data.times[at - 1] for at in split.test.at]
    assert about["tied"].tolist() == want and 0 < sum(want) < len(want)
    masks = target_slices(about)
    assert [int(masks[name].sum()) for name in TIES] == [len(want) - sum(want), sum(want)]
    untied = get_split("leave_one_out", world(False))
    assert "tied" not in about_items(untied, rows), "where nothing ties there is nothing to tell apart"
