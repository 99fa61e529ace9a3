"""What ranking by popularity alone is worth: the floor that needs no model."""

from __future__ import annotations

import numpy as np

from malloc_bench.data.tasks.splits import Split, between
from malloc_bench.data.tasks.trained import trained
from malloc_bench.evaluation import metrics

RECENT = 7 * 86_400  # seconds before the newest training event
_AT_ONCE = 1 << 14  # targets


def popularity(split: Split, filter_seen: bool = True) -> dict[str, float | None]:
    """HR@10 and NDCG@10 of the items with the most training events (`popular_...`), and, where there are times, with
    the most in their last seven days (`popular_7d_...`). Seen items and ties as everywhere."""
    data = split.dataset
    counts = {"popular": trained(split)}
    if data.times is not None and counts["popular"].any():
        newest = data.times[counts["popular"]].max()
        counts["popular_7d"] = counts["popular"] & (data.times > newest - RECENT)
    found: dict[str, float | None] = {}
    for name, events in counts.items():
        summary = metrics.summary(
            _ranks(split, np.bincount(data.items[events], minlength=data.n_items + 1), filter_seen), split.test.users
        )
        found |= {f"{name}_{metric}": summary[metric] for metric in ("hr@10", "ndcg@10")}
    return found


def about_items(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of the targets in rows [N] the `quarter` by popularity, whether it is `tied`, of the time (or order) of the

    event before, where any are, and of joined data the name of the `domain`.
    """
    at = split.test.at[rows]
    items = split.dataset.items[at]
    known = {"quarter": quarters(split)[items]}
    if split.dataset.tied:
        known["tied"] = split.dataset.first_of_time[at] < at
    if split.dataset.domains is not None:
        known["domain"] = np.array(split.dataset.domain_names)[split.dataset.domains[items - 1]]
    return known


def quarters(split: Split) -> np.ndarray:
    """[n_items + 1] int8, 1 to 4, of each item by popularity: the most popular items that have a quarter of the

    training events, those of the next quarter, and so on; what never trains is in the last. Of equally popular ones
    lower ids come first.
    """
    count = np.bincount(split.dataset.items[trained(split)], minlength=split.dataset.n_items + 1)
    order = np.argsort(-count, kind="stable")
    before = np.cumsum(count[order]) - count[order]
    found = np.empty(len(count), dtype=np.int8)
    found[order] = np.minimum(1 + 4 * before // max(count.sum(), 1), 4)
    return found


def _ranks(split: Split, score: np.ndarray, filter_seen: bool) -> np.ndarray:
    """0-based ranks [N] of the test's targets by score [n_items + 1] of items that may rank, ties against them."""
    data, users, at = split.dataset, split.test.users, split.test.at
    target = data.items[at]
    domain = np.zeros(data.n_items, np.int16) if data.domains is None else data.domains
    ranks = np.empty(len(at), dtype=np.int64)
    for one in np.unique(domain):
        own, ordered = domain[target - 1] == one, np.sort(score[1:][domain == one])
        ranks[own] = len(ordered) - np.searchsorted(ordered, score[target[own]]) - 1
    if filter_seen:
        for begin in range(0, len(at), _AT_ONCE):
            rows = slice(begin, begin + _AT_ONCE)
            row, place = between(data.offsets[users[rows]], at[rows])
            seen, asked = data.items[place], target[rows][row]
            ahead = (score[seen] >= score[asked]) & (seen != asked) & (domain[seen - 1] == domain[asked - 1])
            pairs = np.unique(row[ahead] * (data.n_items + 1) + seen[ahead])  # an item counts once
            ranks[rows] -= np.bincount(pairs // (data.n_items + 1), minlength=len(at[rows]))
    return ranks
