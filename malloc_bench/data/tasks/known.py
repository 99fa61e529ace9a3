"""What is known of users when they are asked: all that they did, or less, or something else in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from malloc_bench.data.dataset import Dataset, mixed
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Known, Split, Targets, between, only
from malloc_bench.data.tasks.trained import trained


def knowing(split: Split, history: int | None = None, deleted: float = 0.0, replaced: float = 0.0) -> Split:
    """The split with other histories when users are asked; what trains, the targets and what cannot rank stay.

    history: the newest so many events are known, the one that reads among them. deleted: the share of the events that
    are not there (a user's first always is). replaced: the share in whose place another item stands, drawn as often as
    it trains; one that the user meets later is not put there. By a hash of user and place: what is gone at a share is
    gone at each larger one. Raises DataError where nothing trains that could be drawn.
    """
    data = split.dataset
    keep, lot = np.ones(data.n_events, dtype=bool), _lots(data)
    chance = (lot >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if deleted:
        keep = chance >= deleted
        keep[data.offsets[:-1][np.diff(data.offsets) > 0]] = True
    if replaced:
        data = replace(data, items=np.where(chance < replaced, _others(split, mixed(lot)), data.items))
    return replace(split, known=Known(only(data, keep), np.cumsum(keep) - keep, history))


def heard(split: Split | Impressions, max_length: int) -> tuple[Dataset, Targets, int]:
    """The histories of which the states of test requests are made, where in them each ends, and how many of its newest

    events are read at most. Raises ValueError where a backbone of max_length has no room for the steps to come.
    """
    if isinstance(split, Impressions):
        return split.dataset, split.test, max_length
    most = max_length - split.steps + 1
    if most < 1:
        raise ValueError(f"steps={split.steps} need a backbone with max_length={split.steps} or more, not {max_length}")
    if split.known is None:
        return split.dataset, split.test, most
    ends = Targets(split.test.users, split.known.before[split.test.at])
    return split.known.histories, ends, min(most, split.known.most or most)


def lengths(split: Split | Impressions, max_length: int) -> np.ndarray:
    """Events [N] of which each test request's state and reading token are made."""
    data, ends, most = heard(split, max_length)
    return np.minimum(ends.at - data.offsets[ends.users], most)


def _lots(dataset: Dataset) -> np.ndarray:
    """[E] uint64 of each event, by its user's id and its place in the history."""
    users, at = between(dataset.offsets[:-1], dataset.offsets[1:])
    return mixed(mixed(dataset.user_ids[users].astype(np.uint64)) ^ (at - dataset.offsets[users]).astype(np.uint64))


def _others(split: Split, lot: np.ndarray) -> np.ndarray:
    """An item [E] for each event, drawn by lot [E] from those that train; its own where the drawn one is held out."""
    data, base, learned = split.dataset, split.dataset.n_items + 1, trained(split)
    pool = data.items[learned]
    if not len(pool):
        raise DataError(f"{data.name}: with this split nothing trains, so no item can be drawn as often as it does")
    drawn = pool[lot % np.uint64(len(pool))]
    users = np.repeat(np.arange(data.n_users), np.diff(data.offsets)) * base
    return np.where(np.isin(users + drawn, (users + data.items)[~learned]), data.items, drawn)
