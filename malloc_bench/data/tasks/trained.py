"""What may be learned from a cut data set by something other than training: nothing of it is after training's end, or

validation's where parameters are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from malloc_bench.data.dataset import mixed
from malloc_bench.data.tasks.batches import by_length, split_newest, window
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.state import Events, Named, Stats

_CHUNK = 64  # users


def ends(split: Split | Impressions) -> np.ndarray:
    """[U] places in `split.dataset` behind the last event of each user that trained anything."""
    first = split.dataset.offsets[:-1]
    if isinstance(split, Split):
        return split.train_end
    some = split.train_end > split.shown.offsets[:-1]
    last = split.before[np.where(some, split.train_end - 1, 0)] if len(split.before) else first
    return np.where(some, last, first)


def validating(split: Split | Impressions) -> Split | Impressions:
    """The same data asked for what validates, in place of the test."""
    return replace(split, test=split.valid)


def sampled(split: Split | Impressions, most: int, seed: int = 0) -> np.ndarray:
    """Up to `most` users [N] with two training events or more, by lot: the same ones whoever else is in the data."""
    data = split.dataset
    users = np.flatnonzero(ends(split) - data.offsets[:-1] > 1)
    lot = mixed(data.user_ids[users].astype(np.uint64) + mixed(np.full(len(users), seed, np.uint64)))
    return np.sort(users[np.argsort(lot, kind="stable")[:most]])


def histories(split: Split | Impressions, users: np.ndarray, max_length: int) -> Iterator[tuple[torch.Tensor, Events]]:
    """Ids and histories of users [N] as they are when the newest training event reads them, by like length."""
    targets = Targets(users, ends(split)[users])
    for rows in by_length(targets, split.dataset, max_length, _CHUNK):
        history, _ = split_newest(window(split.dataset, targets.users[rows], targets.at[rows], max_length))
        yield torch.from_numpy(split.dataset.user_ids[targets.users[rows]]), history


def facts(split: Split | Impressions, needs: Stats) -> Named | None:
    """Of each item what `needs` asks for, as `Prefill.items` has it; what nobody knows is not in it."""
    known: dict[str, torch.Tensor] = {}
    data = split.dataset
    if needs.categories and data.categories is not None:
        known["categories"] = torch.from_numpy(data.categories.copy())
    if needs.popularity:
        trained = np.arange(data.n_events) < np.repeat(ends(split), np.diff(data.offsets))
        known["popularity"] = torch.from_numpy(np.bincount(data.items[trained], minlength=data.n_items + 1)[1:])
    return Named(known) if known else None
