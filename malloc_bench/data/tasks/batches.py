"""From flat arrays to padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.state import Batch, Events


def _places(dataset: Dataset, users: np.ndarray, end: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat places [B, S] of the newest `length` events before `end` [B], left-aligned, and their counts [B]."""
    start = np.maximum(dataset.offsets[users], end - length)
    count = end - start
    index = start[:, None] + np.arange(int(count.max()) if len(count) else 0)
    return np.minimum(index, dataset.offsets[users + 1][:, None] - 1), count


def window(
    dataset: Dataset, users: np.ndarray, end: np.ndarray, length: int, asked: np.ndarray | None = None
) -> Events:
    """The newest `length` events of each user before the flat place `end` [B], left-aligned.

    `next_times` of the last event is the moment at which the prediction is asked for: `asked` [B], by default the time
    of the event at `end`.
    """
    index, count = _places(dataset, users, end, length)
    real = np.arange(index.shape[1]) < count[:, None]
    times = following = None
    if dataset.times is not None:
        last = dataset.offsets[users + 1][:, None] - 1
        times = torch.from_numpy(np.where(real, dataset.times[index], 0))
        following = torch.from_numpy(np.where(real, dataset.times[np.minimum(index + 1, last)], 0))
        if asked is not None:
            some = torch.from_numpy(np.flatnonzero(count))
            following[some, torch.from_numpy(count)[some] - 1] = torch.from_numpy(asked)[some]
    items = np.where(real, dataset.items[index], 0).astype(np.int32)
    kinds = None if dataset.kinds is None else torch.from_numpy(np.where(real, dataset.kinds[index], np.uint8(0)))
    return Events(torch.from_numpy(items), torch.from_numpy(count.astype(np.int32)), times, following, kinds)


def split_newest(events: Events) -> tuple[Events, Events]:
    """(history without the newest event, the newest event as the token that reads it); counts must be >= 1."""
    last = (events.count.long() - 1)[:, None]
    width = max(events.items.shape[1] - 1, 0)
    history = events.each(lambda x: x[:, :width], events.count - 1)
    return history, events.take(last, torch.ones_like(events.count))


def training_batches(
    split: Split,
    max_length: int,
    batch_size: int,
    seed: int,
    epoch: int,
    negatives: int | None = None,
    stochastic_length: float | None = None,
    newest: bool = False,
    logq: bool = False,
) -> Iterator[Batch]:
    """One epoch: max_length consecutive training steps of every user, all of those who have no more.

    A longer history shows another window each epoch, so that no event is left unlearned; or always its newest one.
    negatives: items drawn uniformly for each user; logq: they stand for all items but the target.

    stochastic_length: alpha of HSTU (arXiv 2402.17152, section 3.2): of n > N^(alpha/2) events, N = max_length, only
    N^(alpha/2) stay, in order, but for a share N^alpha / n^2 of the users, who keep all. Ours: which ones stay is drawn
    uniformly, and each is followed by the event that truly followed it.
    """
    dataset = split.dataset
    rng = np.random.default_rng([seed, epoch])
    everything = split.train_end - dataset.offsets[:-1] - 1
    steps = np.minimum(everything, max_length)
    skipped = rng.integers(0, np.maximum(everything - steps, 0) + 1) * (not newest)  # steps behind this epoch's window
    users = rng.permutation(np.flatnonzero(steps > 0))
    if stochastic_length is not None:
        few = int(max_length ** (stochastic_length / 2))
        whole = rng.random(len(steps)) * np.square(steps) < max_length**stochastic_length
        steps = np.where(whole, steps, np.minimum(steps, few))
    for rows in alike(rng, users, steps, batch_size):
        end = split.train_end[rows] - skipped[rows]
        events = window(dataset, rows, end - 1, max_length)
        index, _ = _places(dataset, rows, end - 1, max_length)
        following = dataset.items[np.minimum(index + 1, end[:, None] - 1)]
        targets = torch.where(events.mask(), torch.from_numpy(following), 0)
        batch = Batch(events, targets, users=torch.from_numpy(rows))
        if stochastic_length is not None:
            batch = thin(rng, batch, steps[rows])
        if negatives is not None:
            drawn = rng.integers(1, dataset.n_items + 1, (len(rows), negatives), dtype=np.int32)
            each = (dataset.n_items - 1) / negatives if logq else 1.0
            batch = replace(batch, negatives=torch.from_numpy(drawn), each=each)
        yield batch


def thin(rng: np.random.Generator, batch: Batch, keep: np.ndarray) -> Batch:
    """The batch with keep [B] of each user's events and their targets, drawn uniformly, in order."""
    keys = np.where(batch.events.mask().numpy(), rng.random(batch.targets.shape), 2.0)
    drawn = np.argsort(keys, axis=1)[:, : keep.max(initial=0)]
    unused = np.arange(drawn.shape[1]) >= keep[:, None]
    index = torch.from_numpy(np.sort(np.where(unused, batch.targets.shape[1], drawn), axis=1))

    def pick(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1).gather(1, index)

    few = batch.events.each(pick, torch.from_numpy(keep.astype(np.int32)))
    return replace(batch, events=few, targets=pick(batch.targets))


def alike(rng: np.random.Generator, rows: np.ndarray, length: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Shuffled rows in batches of like length [of any row]: sorted within 8 batches, then the batches are shuffled."""
    batches: list[np.ndarray] = []
    for start in range(0, len(rows), 8 * size):
        chunk = rows[start : start + 8 * size]
        chunk = chunk[np.argsort(length[chunk], kind="stable")]
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def by_length(targets: Targets, dataset: Dataset, max_length: int, size: int) -> Iterator[np.ndarray]:
    """Rows of `targets` in batches of users of like history length, longest last; who has no history is left out."""
    length = np.minimum(targets.at - dataset.offsets[targets.users], max_length)
    order = np.argsort(length, kind="stable")
    order = order[length[order] > 0]
    for start in range(0, len(order), size):
        yield order[start : start + size]
