"""Which events train, validate and test."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from malloc_bench.data.dataset import Dataset, mixed
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.options import Option, Whole, pick

Share = Annotated[float, Field(gt=0, lt=1)]


class Rule(Option, ABC):
    """How a data set is cut: each user's events train first, then validate, then are tested.

    k_core: only users and items with so many events, counted over all events as published k-cores are. The others say
    what is asked for, in validation and test: min_history, max_history: where so many events stand before (at least
    1); long: users with so many events in all. train_users: the share of the users whose events train, by lot, a larger
    share's among them; repeats: so often in every epoch, for as many steps as more users would be. valid_users,
    test_users: so many users are asked at most, by lot.
    """

    k_core: Whole | None = None
    min_history: Whole | None = None
    max_history: Whole | None = None
    long: Whole | None = None
    train_users: Share | None = None
    repeats: Whole | None = None
    valid_users: Whole | None = None
    test_users: Whole | None = None
    kind: ClassVar[str] = "split"

    @model_validator(mode="after")
    def _someone_is_asked(self) -> Rule:
        least, most = self.min_history or 1, self.max_history
        if most is not None and most < least:
            raise ValueError(f"max_history must be min_history ({least}) or more, not {most}")
        return self

    @property
    def trained(self) -> Rule:
        """The rule as training knows it: whoever is tested."""
        return self.model_copy(update={"test_users": None})

    @property
    def passes(self) -> float:
        """Of an epoch, over all users."""
        return (self.train_users or 1) * (self.repeats or 1)

    def check(self, dataset: Dataset) -> None:
        """Raises DataError where the data set has not what the rule needs."""

    @abstractmethod
    def bounds(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """(end of training, end of validation), flat places [U] each. Raises DataError where it cannot cut."""

    def test_end(self, dataset: Dataset, valid_end: np.ndarray) -> np.ndarray:
        """Flat places [U] behind what retrieval's test asks of each user."""
        return dataset.offsets[1:]

    def kept(self, users: np.ndarray, history: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Rows [K] of what is asked: users [N] in order, events before each [N], events of each user in all [U]."""
        asked = (history >= (self.min_history or 1)) & (total[users] >= (self.long or 0))
        return np.flatnonzero(asked if self.max_history is None else asked & (history <= self.max_history))

    def training(self, dataset: Dataset, train_end: np.ndarray) -> np.ndarray:
        """`train_end` [U] where only `train_users` train: nothing of the others does."""
        if self.train_users is None:
            return train_end
        lot = by_lot(dataset, np.arange(dataset.n_users))
        idle = lot[max(1, round(self.train_users * len(lot))) :]
        return np.where(np.isin(np.arange(len(lot)), idle), dataset.offsets[:-1], train_end)


class LeaveOneOut(Rule):
    """Each user's last event is tested, the one before validates; users with fewer than 3 events only train.

    protocol: "published": nothing validates, all but the last event train, for a fixed number of epochs (the tables of
    HSTU, arXiv 2402.17152). last: so many of each user's last events are held out, and retrieval asks for the first of
    them; the one before validates. None: 1.
    """

    protocol: Literal["published"] | None = None
    last: Whole | None = None
    name: ClassVar[str] = "leave_one_out"

    def bounds(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        end, last = dataset.offsets[1:], self.last or 1
        enough = np.diff(dataset.offsets) >= last + 2
        return end - (last + (self.protocol is None)) * enough, end - last * enough

    def test_end(self, dataset: Dataset, valid_end: np.ndarray) -> np.ndarray:
        return np.minimum(valid_end + 1, dataset.offsets[1:])


class Shares(Rule):
    """valid, test: shares of the events; max_targets_per_user: so many, evenly spaced, of a user's are asked for."""

    valid: Share = 0.1
    test: Share = 0.1
    max_targets_per_user: Whole | None = None

    @model_validator(mode="after")
    def _some_training(self) -> Shares:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test must leave something to train on, not {self.valid} + {self.test}")
        return self

    def kept(self, users: np.ndarray, history: np.ndarray, total: np.ndarray) -> np.ndarray:
        rows = super().kept(users, history, total)
        return rows if self.max_targets_per_user is None else rows[spread(users[rows], self.max_targets_per_user)]


class Temporal(Shares):
    """Two cuts in time for all users: what happens before the first trains, what happens after the second is tested.

    Events of the same second stay together.
    """

    name: ClassVar[str] = "temporal"

    def check(self, dataset: Dataset) -> None:
        if dataset.times is None:
            why = f"{dataset.name} has no times (from {dataset.source}), so temporal cannot cut it"
            raise DataError(f"{why}: name the split leave_one_out or ratio")

    def bounds(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        self.check(dataset)
        assert dataset.times is not None
        last = dataset.n_events - 1
        places = [
            min(int(dataset.n_events * share + 1e-9), last) for share in (1 - self.valid - self.test, 1 - self.test)
        ]
        ends = [dataset.offsets[:-1] + _earlier(dataset, cut) for cut in np.partition(dataset.times, places)[places]]
        if not (ends[0] > dataset.offsets[:-1]).any():
            raise DataError(f"{dataset.name}: no event is before the cut, all happen at one time; name another split")
        return ends[0], ends[1]


class Ratio(Shares):
    """Each user's own events in time order: 70 % train, 10 % validate, 20 % are tested (MALLOC, arXiv 2601.20234)."""

    name: ClassVar[str] = "ratio"
    test: Share = 0.2

    def bounds(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        count, end = np.diff(dataset.offsets), dataset.offsets[1:]
        test, valid = (np.floor(count * share + 1e-9).astype(np.int64) for share in (self.test, self.valid))
        return end - test - valid, end - test


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Temporal, LeaveOneOut, Ratio)}


@dataclass(frozen=True)
class Targets:
    """Events to be predicted: users [N] rows of the dataset, at [N] places in its flat arrays."""

    users: np.ndarray
    at: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Known:
    """Histories that requests are made of, in place of what users did; training has nothing of it.

    histories: the known events of the same users. before: [E] int64, flat places in them at which the history of each
    place of the split's own events ends. most: so many of the newest are known; None: all.
    """

    histories: Dataset
    before: np.ndarray
    most: int | None = None


@dataclass(frozen=True)
class Split:
    """A dataset cut up. train_end [U]: user u trains on events [offsets[u], train_end[u]).

    known: what is known of users who are asked; None: all that they did before. steps: items of a user that are asked
    for one after the other, from the target on. repeats: an epoch of training is so many.
    """

    name: str
    dataset: Dataset
    train_end: np.ndarray
    valid: Targets
    test: Targets
    known: Known | None = None
    steps: int = 1
    repeats: int = 1


def get_split(rule: Rule | str | dict[str, Any], dataset: Dataset) -> Split:
    """A dataset cut by a rule, or by the one that `pick` finds; raises UnknownName or DataError."""
    rule = pick(rule, RULES)
    dataset = k_core(dataset, rule.k_core or 1)
    train_end, valid_end = rule.bounds(dataset)
    valid = _targets(rule, dataset, train_end, valid_end, rule.valid_users)
    test = _targets(rule, dataset, valid_end, rule.test_end(dataset, valid_end), rule.test_users)
    return Split(rule.name, dataset, rule.training(dataset, train_end), valid, test, repeats=rule.repeats or 1)


def by_lot(dataset: Dataset, users: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows of the dataset, [N], in an order that hangs on each user's id alone, whoever else is in the data."""
    lot = mixed(dataset.user_ids[users].astype(np.uint64) + mixed(np.full(len(users), seed, np.uint64)))
    return users[np.argsort(lot, kind="stable")]


def some(dataset: Dataset, users: np.ndarray, most: int | None) -> np.ndarray:
    """Rows [K] of what at most so many users, by lot, are asked; users [N]."""
    if most is None:
        return np.arange(len(users))
    return np.flatnonzero(np.isin(users, by_lot(dataset, np.unique(users))[:most]))


def default_rule(dataset: Dataset) -> Rule:
    """Temporal where there are times, else leave one out."""
    return Temporal() if dataset.has_time else LeaveOneOut()


def leave_one_out(dataset: Dataset) -> Split:
    """The split of most published tables."""
    return get_split("leave_one_out", dataset)


def only(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """The events of `keep` [E] bool; users and items stay, those without any event too."""
    if keep.all():
        return dataset
    offsets = np.concatenate(([0], np.cumsum(keep)))[dataset.offsets]
    times, order = (None if column is None else column[keep] for column in (dataset.times, dataset.order))
    feedback = {name: column[keep] for name, column in dataset.feedback.items()}
    return replace(dataset, offsets=offsets, items=dataset.items[keep], times=times, order=order, feedback=feedback)


def k_core(dataset: Dataset, k: int) -> Dataset:
    """The largest part in which every user and every item has k events; ids are dense again. Raises DataError."""
    if k <= 1:
        return dataset
    users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    sizes = ((users, dataset.n_users), (dataset.items, dataset.n_items + 1))
    keep, before = np.ones(dataset.n_events, dtype=bool), -1
    while before != keep.sum():
        before = int(keep.sum())
        enough = [np.bincount(ids[keep], minlength=size) >= k for ids, size in sizes]
        keep = enough[0][users] & enough[1][dataset.items]
    if not keep.any():
        raise DataError(f"{dataset.name} has no {k}-core: no event is left; choose a smaller k_core")
    core = only(dataset, keep)
    stay = np.diff(core.offsets) > 0
    items = np.flatnonzero(np.bincount(core.items, minlength=dataset.n_items + 1))
    return replace(
        core,
        user_ids=core.user_ids[stay],
        item_ids=core.item_ids[items - 1],
        user_names=None if core.user_names is None else core.user_names.filter(stay),
        item_names=None if core.item_names is None else core.item_names[items - 1],
        domains=None if core.domains is None else core.domains[items - 1],
        offsets=np.concatenate(([0], core.offsets[1:][stay])),
        items=(np.searchsorted(items, core.items) + 1).astype(np.int32),
        hash=hashlib.sha256(f"{dataset.hash} {k}-core".encode()).hexdigest(),
    )


def between(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, number) of every whole number in [start, end), rows in order: start, end [U] -> [N] each."""
    count = end - start
    rows = np.repeat(np.arange(len(count)), count)
    return rows, np.arange(len(rows)) + np.repeat(start - np.cumsum(count) + count, count)


def spread(users: np.ndarray, most: int) -> np.ndarray:
    """Rows [K] of at most `most` entries a user, evenly spaced; users [N] in ascending runs."""
    _, first, count = np.unique(users, return_index=True, return_counts=True)
    run = np.repeat(np.arange(len(first)), count)
    number, size = np.arange(len(users)) - first[run], count[run]
    return np.flatnonzero((number + 1) * most // size > number * most // size) if len(users) else run


def _targets(rule: Rule, dataset: Dataset, start: np.ndarray, end: np.ndarray, most: int | None) -> Targets:
    users, at = between(start, end)
    rows = rule.kept(users, at - dataset.offsets[users], np.diff(dataset.offsets))
    rows = rows[some(dataset, users[rows], most)]
    return Targets(users[rows], at[rows])


def _earlier(dataset: Dataset, cut: int) -> np.ndarray:
    """Events [U] of each user before a moment."""
    assert dataset.times is not None
    return np.diff(np.concatenate(([0], np.cumsum(dataset.times < cut)))[dataset.offsets])
