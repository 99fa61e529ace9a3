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


def _ranks(split: Split, score: np.ndarray, filter_seen: bool) -> np.ndarray:
    """0-based ranks [N] of the test's targets by score [n_items + 1] of items that may rank, ties against them."""
    data, users, at = split.dataset, split.test.users, split.test.at
    target = data.items[at]
    ordered = np.sort(score[1:])
    ranks = len(ordered) - np.searchsorted(ordered, score[target]) - 1
    if filter_seen:
        for begin in range(0, len(at), _AT_ONCE):
            rows = slice(begin, begin + _AT_ONCE)
            row, place = between(data.offsets[users[rows]], at[rows])
            seen = data.items[place]
            ahead = (score[seen] >= score[target[rows]][row]) & (seen != target[rows][row])
            pairs = np.unique(row[ahead] * (data.n_items + 1) + seen[ahead])  # an item counts once
            ranks[rows] -= np.bincount(pairs // (data.n_items + 1), minlength=len(at[rows]))
    return ranks
