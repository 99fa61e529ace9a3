"""What may be learned from a cut data set by something other than training: nothing of it is after training's end, or

validation's where parameters are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from malloc_bench.data.tasks.batches import by_length, split_newest, window
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split, Targets, by_lot
from malloc_bench.state import Events, Named, Stats

_CHUNK = 64  # users
_DRAWS = 1 << 16  # of training events, of which the first distinct items are probes


def ends(split: Split | Impressions) -> np.ndarray:
    """[U] places in `split.dataset` behind the last event of each user that trained anything."""
    first = split.dataset.offsets[:-1]
    if isinstance(split, Split):
        return split.train_end
    some = split.train_end > split.shown.offsets[:-1]
    last = split.before[np.where(some, split.train_end - 1, 0)] if len(split.before) else first
    return np.where(some, last, first)


def train_events(split: Split | Impressions) -> int:
    """How many events train; in ranking how many that were shown."""
    data = split.dataset if isinstance(split, Split) else split.shown
    return int((split.train_end - data.offsets[:-1]).sum())


def trained(split: Split | Impressions) -> np.ndarray:
    """Which events of `split.dataset` train, [E] bool."""
    data = split.dataset
    return np.arange(data.n_events) < np.repeat(ends(split), np.diff(data.offsets))


def validating(split: Split | Impressions) -> Split | Impressions:
    """The same data asked for what validates, in place of the test."""
    if isinstance(split, Split):
        return replace(split, test=split.valid)
    return replace(split, test=split.valid)


def sampled(split: Split | Impressions, most: int, seed: int = 0) -> np.ndarray:
    """Up to `most` users [N] with two training events or more, by lot: the same ones whoever else is in the data."""
    data = split.dataset
    users = np.flatnonzero(ends(split) - data.offsets[:-1] > 1)
    return np.sort(by_lot(data, users, seed)[:most])


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
    if needs.popularity or needs.asks:
        places = trained(split)
        popularity = np.bincount(data.items[places], minlength=data.n_items + 1)[1:]
    if needs.popularity:
        known["popularity"] = torch.from_numpy(popularity)
    if needs.asks:
        most = max(ask.number for ask in needs.asks)
        known |= _probes(split, np.flatnonzero(places), popularity, most)
    return Named(known) if known else None


def _probes(
    split: Split | Impressions, trained: np.ndarray, popularity: np.ndarray, most: int
) -> dict[str, torch.Tensor]:
    """Distinct items drawn by training events, those of training in any order, the most popular ones, and seconds
    between two training events of a user, `most` of each or as many as there are. trained: places of training events.
    """
    data, rng = split.dataset, np.random.default_rng(0)
    drawn = data.items[trained[rng.integers(0, max(len(trained), 1), _DRAWS if len(trained) else 0)]]
    _, first = np.unique(drawn, return_index=True)  # one draw for all: fewer probes are the first of more
    found = {
        "probes": torch.from_numpy(drawn[np.sort(first)][:most].astype(np.int64)),
        "even": torch.from_numpy(np.random.default_rng(1).permutation(np.flatnonzero(popularity) + 1)[:most]),
        "popular": torch.from_numpy(np.argsort(-popularity, kind="stable")[:most] + 1),
    }
    if data.times is not None:
        later = trained[~np.isin(trained, data.offsets)]  # not a user's first
        at = later[rng.integers(0, max(len(later), 1), _DRAWS if len(later) else 0)]
        found["gaps"] = torch.from_numpy((data.times[at] - data.times[at - 1]).clip(min=0)[:most].astype(np.int64))
    return found
