"""Ranking: what users were shown, what they liked of it, and the requests in which candidates are scored together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.batches import alike, window
from malloc_bench.data.tasks.splits import Rule, Targets, between, k_core, only, some
from malloc_bench.state import Events


@dataclass(frozen=True)
class Requests(Targets):
    """N requests: `at` [N] is the place in the histories before which a request's state ends, its candidates are the
    shown events [start, stop), [N] each, with their negatives."""

    start: np.ndarray
    stop: np.ndarray

    def rows(self, rows: np.ndarray) -> Requests:
        return Requests(self.users[rows], self.at[rows], self.start[rows], self.stop[rows])


@dataclass(frozen=True)
class Impressions:
    """What users were shown, cut up for ranking: histories, candidates with labels, and requests that score them.

    dataset: histories, the events that users liked. shown: the E events that the split cuts: all of them where labels
    tell liked from not, else the liked ones, each with `negatives` [E, n] int32, items that the user has not liked.
    liked: [E] bool. before: [E] places in `dataset` behind the last liked event that is strictly older. run: shown
    events in a request, at most. train_end [U]: user u trains on shown events [offsets[u], train_end[u]). repeats: an
    epoch of training is so many.
    """

    name: str
    dataset: Dataset
    shown: Dataset
    liked: np.ndarray
    before: np.ndarray
    negatives: np.ndarray
    run: int
    train_end: np.ndarray
    valid: Requests
    test: Requests
    repeats: int = 1

    @property
    def width(self) -> int:
        """Candidates of the longest test request."""
        return int((self.test.stop - self.test.start).max(initial=0)) * (1 + self.negatives.shape[1])

    def candidates(self, asked: Requests) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Items (0 is padding), labels and times of the candidates of N requests, [N, M] each, left-aligned."""
        place = asked.start[:, None] + np.arange(int((asked.stop - asked.start).max(initial=0)))
        real = place < asked.stop[:, None]
        place = np.minimum(place, self.shown.n_events - 1)
        n, each = len(asked), 1 + self.negatives.shape[1]
        items = np.concatenate([self.shown.items[place][..., None], self.negatives[place]], axis=2)
        labels = np.zeros_like(items, dtype=bool)
        labels[..., 0] = self.liked[place]
        times = (
            None if self.shown.times is None else np.repeat(np.where(real, self.shown.times[place], 0), each, axis=1)
        )
        real = real[..., None]
        shape = n, place.shape[1] * each
        return np.where(real, items, 0).reshape(shape), np.where(real, labels, False).reshape(shape), times


def expose(dataset: Dataset, rule: Rule, negatives: int, candidates: int, seed: int) -> Impressions:
    """A data set cut by a rule; requests of at most `candidates`, `negatives` sampled ones for each liked event (0: the
    card's labels).

    A negative is uniform among the items that the user has not liked until the end of its part (training, validation,
    test), as in DIN (arXiv 1706.06978) but for the part: what trains knows nothing of later events.
    """
    dataset = k_core(dataset, rule.k_core or 1)
    labels = dataset.labels()
    history = dataset if labels is None else only(dataset, labels)
    shown = history if negatives else dataset
    liked = np.ones(shown.n_events, dtype=bool) if negatives or labels is None else labels
    before = (np.cumsum(liked) - liked)[shown.first_of_time]  # a state knows nothing of the second it is asked in
    first, last = shown.offsets[:-1], shown.offsets[1:]
    train_end, valid_end = rule.bounds(shown)
    drawn = np.zeros((shown.n_events, negatives), np.int32)
    if negatives:
        for part, (start, end) in enumerate(((first, train_end), (train_end, valid_end), (valid_end, last))):
            users, at = between(start, end)
            drawn[at] = _unliked(shown, users, end, negatives, np.random.default_rng([seed, part]))
    run = candidates // (1 + negatives)

    def asked(start: np.ndarray, end: np.ndarray, most: int | None) -> Requests:
        requests = _runs(before, start, start, end, run)
        total = np.diff(history.offsets)
        kept = requests.rows(rule.kept(requests.users, requests.at - history.offsets[requests.users], total))
        return kept.rows(some(history, kept.users, most))

    valid, test = asked(train_end, valid_end, rule.valid_users), asked(valid_end, last, rule.test_users)
    trained = rule.training(shown, train_end)
    return Impressions(rule.name, history, shown, liked, before, drawn, run, trained, valid, test, rule.repeats or 1)


def ask(data: Impressions, asked: Requests, max_length: int) -> tuple[Events, Events, Tensor]:
    """What N requests are about: histories, candidates as tokens, and their labels [N, M] bool (False is padding too).

    A state ends where its request begins; each candidate is scored at the time at which it was shown.
    """
    when = None if data.shown.times is None else data.shown.times[asked.start]
    history = window(data.dataset, asked.users, asked.at, max_length, when)
    items, labels, times = data.candidates(asked)
    moments = None if times is None else torch.from_numpy(times)
    count = torch.from_numpy((items > 0).sum(1).astype(np.int32))
    return history, Events(torch.from_numpy(items), count, moments, moments), torch.from_numpy(labels)


def ranking_batches(
    data: Impressions, max_length: int, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Events, Events, Tensor]]:
    """One epoch, as `ask` gives it: every shown training event once, in requests that begin elsewhere each epoch."""
    rng = np.random.default_rng([seed, epoch])
    first = data.shown.offsets[:-1]
    early = first - rng.integers(0, data.run, len(first))
    requests = _runs(data.before, early, first, data.train_end, data.run)
    order = rng.permutation(len(requests))
    length = np.minimum(requests.at - data.dataset.offsets[requests.users], max_length)
    for rows in alike(rng, order, length, batch_size):
        yield ask(data, requests.rows(rows), max_length)


def _runs(before: np.ndarray, begin: np.ndarray, first: np.ndarray, end: np.ndarray, run: int) -> Requests:
    """Requests over the shown events [first, end) of each user, in runs counted from `begin` <= first; [U] each."""
    count = np.where(end > first, -(-(end - begin) // run), 0)
    users, number = between(np.zeros_like(count), count)
    start = begin[users] + run * number
    stop = np.minimum(start + run, end[users])
    start = np.maximum(start, first[users])
    real = start < stop
    users, start, stop = users[real], start[real], stop[real]
    return Requests(users, before[start], start, stop)


def _unliked(liked: Dataset, users: np.ndarray, end: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Items [K, n] int32 for users [K], uniform among those that a user has not liked before the place end [U].

    The r-th such item is 1 + r + the number of liked ones below it; a liked item, j-th of its user's, has item - j
    others below. Raises DataError where a user has liked everything.
    """
    base = liked.n_items + 1
    owner, at = between(liked.offsets[:-1], end)
    met = np.unique(owner * base + liked.items[at])
    owner = met // base
    count = np.bincount(owner, minlength=liked.n_users)
    first = np.cumsum(count) - count
    others_below = met % base - (np.arange(len(met)) - first[owner] + 1)
    free = liked.n_items - count[users]
    if (free == 0).any():
        who = liked.original_user(users[[np.argmin(free)]])[0]
        raise DataError(f"{liked.name}: user {who} has liked every item, so no negative can be drawn; use its labels")
    r = (rng.random((len(users), n)) * free[:, None]).astype(np.int64)
    below = np.searchsorted(owner * base + others_below, users[:, None] * base + r, side="right")
    return (1 + r + below - first[users][:, None]).astype(np.int32)
