"""What every loader ends in: events as flat numpy columns, grouped by user and in time order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.formats.policies import Judge

if TYPE_CHECKING:
    import polars as pl

    from malloc_bench.data.sources.cards import Card

GRADES = ("rating", "behavior")  # feedback that is a grade: its largest value is the top of the scale
BEHAVIOURS = ("is_click", "long_view", "is_like", "is_comment", "is_forward", "is_follow")  # weak to strong


@dataclass(frozen=True)
class Rows:
    """A source's rows as they stand in the file, E of them."""

    users: np.ndarray  # (E,) int64, original ids
    items: np.ndarray  # (E,) int64, original ids
    order: np.ndarray  # (E,) int64: unix seconds, or without has_time any numbers that order a user's events
    has_time: bool
    feedback: dict[str, np.ndarray] = field(default_factory=dict)  # by column name, (E,) float32


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Histories of U users over n_items items, E events in all; user u's are [offsets[u]:offsets[u + 1]]."""

    name: str
    card: Card
    source: str  # which source answered
    user_ids: np.ndarray  # (U,) int64, ascending: original ids, or their places among the sorted `user_names`
    item_ids: np.ndarray  # (n_items,) int64, likewise; item i below is item_ids[i - 1]
    offsets: np.ndarray  # (U + 1,) int64
    items: np.ndarray  # (E,) int32, 1..n_items (0 is padding), in time order within the user
    times: np.ndarray | None  # (E,) int64, unix seconds; None where the source knows only the order
    feedback: dict[str, np.ndarray]  # what users did, by column name (`rating`, `is_click` ...), (E,) float32
    hash: str  # sha256 of the columns above: the same on every machine and from every source with the same rows
    notes: Mapping[str, int] = field(default_factory=dict)  # bad input that was kept or dropped, by policy
    user_names: pl.Series | None = None  # (U,) text, sorted; None where the ids are the numbers above
    item_names: pl.Series | None = None  # (n_items,)
    order: np.ndarray | None = None  # (E,) int64, `ranks`; only without times, where a column of the source has ties
    domains: np.ndarray | None = None  # (n_items,) int16, which of `domain_names` each item is of; None: of one set
    domain_names: tuple[str, ...] = ()

    def original_user(self, index: np.ndarray | slice) -> np.ndarray | pl.Series:
        """The ids of users as their source has them, int64 or text; `index` counts users from 0."""
        return (self.user_ids if self.user_names is None else self.user_names)[index]

    def __repr__(self) -> str:
        return f"<Dataset {self.name}: {self.n_users:,} users, {self.n_items:,} items, {self.n_events:,} events>"

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_events(self) -> int:
        return len(self.items)

    def labels(self) -> np.ndarray | None:
        """(E,) bool: which events the card counts as liked; None where it, or the source, has no such column."""
        rule = self.card.label
        column = None if rule is None else self.feedback.get(rule.column)
        return None if rule is None or column is None else column >= rule.at_least

    @cached_property
    def kinds(self) -> np.ndarray | None:
        """(E,) uint8: how strongly the user of each event answered, 0 (not at all) to 255; None where nothing says so.

        Ours, to partition events by (`climber`). A grade (stars, Taobao's pv < fav < cart < buy) is a share of the
        highest in the data, which is the scale's top; of behaviours the strongest counts, as a share of how many of
        `BEHAVIOURS` the data knows. Seconds watched and their ratios have no scale and are not looked at.
        """
        for name in GRADES:
            if name in self.feedback:
                grade = self.feedback[name].clip(0)
                return (grade * 255 / (grade.max(initial=0) or 1)).astype(np.uint8)
        known = [self.feedback[name] for name in BEHAVIOURS if name in self.feedback]
        kinds = np.zeros(self.n_events, np.uint8)
        for rank, done in enumerate(known, 1):
            kinds[done > 0] = 255 * rank // len(known)
        return kinds if known else None

    @cached_property
    def categories(self) -> np.ndarray | None:
        """(n_items,) int64 from 0, as `read_categories` has them; None where the card names no file about items.

        Read when first asked for. Raises DataError where no source answers.
        """
        from malloc_bench.data.formats.categories import read_categories

        items = self.item_ids if self.item_names is None else self.item_names
        return read_categories(self.card, items) if self.card.categories else None

    @property
    def has_time(self) -> bool:
        return self.times is not None

    @cached_property
    def first_of_time(self) -> np.ndarray:
        """(E,) int64: the place of the first event of the same user and time (or order): itself where none ties."""
        place = np.arange(self.n_events)
        clock = self.order if self.times is None else self.times
        if clock is None:
            return place
        new = np.ones(self.n_events, dtype=bool)
        new[1:] = clock[1:] != clock[:-1]
        new[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        return np.maximum.accumulate(np.where(new, place, 0))

    @property
    def tied(self) -> float:
        """The share of events, but each user's first, of the time (or order) of the one before: in no known order."""
        pairs = self.n_events - np.count_nonzero(np.diff(self.offsets))
        return float((self.first_of_time < np.arange(self.n_events)).sum() / max(pairs, 1))

    def identity(self) -> dict[str, Any]:
        """What a number computed from the data depends on: their content, and what the card says of its meaning."""
        card = self.card
        rule, parameters = getattr(card, "label", None), getattr(card, "parameters", None)
        return {
            "hash": self.hash,
            "label": rule and rule.model_dump(mode="json"),
            "keep": getattr(card, "keep", None),
            "on_bad": dict(getattr(card, "on_bad", {})),
            "ties": getattr(card, "ties", None),
            "parameters": parameters and parameters.model_dump(mode="json"),  # the ceilings of generated data
        }


def group(card: Card, rows: Rows, source: str) -> Dataset:
    """Group rows by user, each in time order, ties as the card has them but for generated events, whose order

    is known; ids become dense by ascending original id.
    """
    user_ids, users = _dense(rows.users)
    item_ids, items = _dense(rows.items)
    by_time = np.lexsort((rows.order, users))  # stable: without times, rows keep their file order
    clock = rows.order[by_time] if rows.has_time else ranks(users[by_time], rows.order[by_time])
    tied = np.zeros(0, np.int64)
    if card.parameters is None:
        answer = Judge(card.on_bad).answer("ties")
        felt = [column[by_time] for _, column in sorted(rows.feedback.items())]
        tied, again = settled_ties(answer, users[by_time], items[by_time] + 1, clock, feedback=felt)
        by_time[tied] = by_time[tied[again]]
    columns: dict[str, np.ndarray | None] = {
        "user_ids": user_ids,
        "item_ids": item_ids,
        "offsets": np.concatenate(([0], np.cumsum(np.bincount(users, minlength=len(user_ids))))).astype(np.int64),
        "items": (items[by_time] + 1).astype(np.int32),
        "times": clock if rows.has_time else None,
        "order": clock if len(tied) and not rows.has_time else None,
    }
    feedback = {name: column[by_time] for name, column in sorted(rows.feedback.items())}
    found = {name: column for name, column in {**columns, **feedback}.items() if column is not None}
    digest = content_hash((name, _little(column), len(column), [column]) for name, column in found.items())
    return Dataset(card.name, card, source, hash=digest, feedback=feedback, **columns)  # type: ignore[arg-type]


def ranks(users: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(E,) int64: how many smaller values its user has before each event; users, order: [E], sorted by both.

    The same whatever numbers a source counts by.
    """
    first = np.ones(len(users), dtype=bool)
    first[1:] = users[1:] != users[:-1]
    new = first.copy()
    new[1:] |= order[1:] != order[:-1]
    count = np.cumsum(new)
    return count - np.maximum.accumulate(np.where(first, count, 0))


def settled_ties(
    answer: str,
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    per_second: int = 1,
    feedback: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The events of a user at one time in the order that the policy `ties` answers: (places [K] of tied events, which
    [K] of these goes to each).

    users, items, times: [E] integers, sorted by user and time. "shuffle": an order that says nothing, for sources often
    sort such events by item, and a model would learn from that what no request knows; by a hash of user, item and
    second, so every file with the same events gives the same order, in whatever unit. "by_item": by item. What is alike
    in all of that: by its feedback, [E] each, the largest first. "keep", and what is alike in this too: as it stands.
    """
    same = np.zeros(len(users) + 1, dtype=bool)
    same[1:-1] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.flatnonzero(same[1:] | same[:-1])
    if answer == "keep":
        return tied, np.arange(len(tied))
    users, items, times = users[tied], items[tied], times[tied]
    key = items
    if answer == "shuffle":
        key = np.zeros(len(tied), np.uint64)
        for each in (users, items, times // per_second):
            key = mixed(key ^ each.astype(np.uint64))
    return tied, np.lexsort((*(-x[tied] for x in reversed(feedback)), key, times, users))


def mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _dense(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ids, ascending, and each row's index among them."""
    low, high = int(ids.min()), int(ids.max())
    if high - low > 8 * len(ids):  # sparse ids: a table over their range would not fit
        return np.unique(ids, return_inverse=True)
    seen = np.bincount(ids - low) > 0  # 40 times faster than np.unique's sort, which a cached load would feel
    return np.flatnonzero(seen) + low, (np.cumsum(seen) - 1)[ids - low]


def content_hash(columns: Iterable[tuple[str, str, int, Iterable[np.ndarray]]]) -> str:
    """sha256 of (name, little-endian dtype, length, the column in pieces), in the order of `Dataset`."""
    digest = hashlib.sha256()
    for name, dtype, length, pieces in columns:
        digest.update(f"{name} {dtype} {length}\n".encode())
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece, dtype=dtype).data)
    return digest.hexdigest()


def _little(column: np.ndarray) -> str:
    return column.dtype.newbyteorder("<").str
