"""From flat arrays to padded batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.splits import Split, Targets
from malloc_bench.state import Batch, Events


def _places(dataset: Dataset, users: np.ndarray, end: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat places [B, S] of the newest `length` events before `end` [B], left-aligned, and their counts [B]."""
    start = np.maximum(dataset.offsets[users], end - length)
    count = end - start
    index = start[:, None] + np.arange(int(count.max()) if len(count) else 0)
    return np.minimum(index, dataset.offsets[users + 1][:, None] - 1), count


def window(dataset: Dataset, users: np.ndarray, end: np.ndarray, length: int) -> Events:
    """The newest `length` events of each user before the flat place `end` [B], left-aligned.

    `next_times` of the last event is the time of the event at `end`: the moment at which the prediction is asked for.
    """
    index, count = _places(dataset, users, end, length)
    real = np.arange(index.shape[1]) < count[:, None]
    times = following = None
    if dataset.times is not None:
        last = dataset.offsets[users + 1][:, None] - 1
        times = torch.from_numpy(np.where(real, dataset.times[index], 0))
        following = torch.from_numpy(np.where(real, dataset.times[np.minimum(index + 1, last)], 0))
    items = np.where(real, dataset.items[index], 0).astype(np.int32)
    return Events(torch.from_numpy(items), torch.from_numpy(count.astype(np.int32)), times, following)


def split_newest(events: Events) -> tuple[Events, Events]:
    """(history without the newest event, the newest event as the token that reads it); counts must be >= 1."""
    last = (events.count.long() - 1)[:, None]
    one = torch.ones_like(events.count)

    def at(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.gather(1, last)

    token = Events(events.items.gather(1, last), one, at(events.times), at(events.next_times))
    width = max(events.items.shape[1] - 1, 0)

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:, :width]

    history = Events(events.items[:, :width], events.count - 1, cut(events.times), cut(events.next_times))
    return history, token


def training_batches(split: Split, max_length: int, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch: max_length consecutive training steps of every user, all of those who have no more.

    A longer history shows another window each epoch, so that no event is left unlearned. Users are shuffled, sorted by
    length within 8 batches (little padding), then the batches are shuffled.
    """
    dataset = split.dataset
    rng = np.random.default_rng([seed, epoch])
    everything = split.train_end - dataset.offsets[:-1] - 1
    steps = np.minimum(everything, max_length)
    skipped = rng.integers(0, np.maximum(everything - steps, 0) + 1)  # newest steps behind this epoch's window
    users = rng.permutation(np.flatnonzero(steps > 0))
    batches: list[np.ndarray] = []
    for start in range(0, len(users), 8 * batch_size):
        chunk = users[start : start + 8 * batch_size]
        chunk = chunk[np.argsort(steps[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    for i in rng.permutation(len(batches)):
        batch = batches[i]
        end = split.train_end[batch] - skipped[batch]
        events = window(dataset, batch, end - 1, max_length)
        index, _ = _places(dataset, batch, end - 1, max_length)
        following = dataset.items[np.minimum(index + 1, end[:, None] - 1)]
        yield Batch(events, torch.where(events.mask(), torch.from_numpy(following), 0))


def by_length(targets: Targets, dataset: Dataset, max_length: int, size: int) -> Iterator[np.ndarray]:
    """Rows of `targets` in batches of users of like history length, longest last; who has no history is left out."""
    length = np.minimum(targets.at - dataset.offsets[targets.users], max_length)
    order = np.argsort(length, kind="stable")
    order = order[length[order] > 0]
    for start in range(0, len(order), size):
        yield order[start : start + size]
