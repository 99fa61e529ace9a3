"""A made-up world with planted structure: every event is made from an earlier one, or drawn by popularity.

Kinds of events: call-backs (the event L steps back says which item comes), followers (the last event says it),
repeats, interests and sessions (an earlier event says the cluster, popularity the item). Which kind an event is, and
from which earlier one it is made, depends on no item: that is what makes the ceilings in `ceilings.py` computable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.dataset import Rows

if TYPE_CHECKING:
    from malloc_bench.data.worlds.world import SyntheticWorld

START = 1_700_000_000  # unix seconds of the first possible event
SPAN = 180 * 86_400  # users join over half a year, so that one cut in time finds early and late users
WITHIN, BETWEEN = 120, 86_400  # mean seconds between events of a session, and between sessions
BREAK = 3600  # a longer gap opens a session, a shorter one never does
BLOCK = 1024  # users generated at a time

CALL_BACK, FOLLOW, REPEAT, INTEREST, SESSION, POPULAR = range(6)


@dataclass(frozen=True)
class Catalogue:
    """Items by code = cluster * size + place in the cluster's round."""

    popularity: np.ndarray  # (items,), sums to 1
    size: int  # items of a cluster
    numbers: np.ndarray  # (items,) the item's number in the data

    @cached_property
    def edges(self) -> np.ndarray:
        """(items + 1,) cumulated popularity."""
        return np.concatenate(([0.0], np.cumsum(self.popularity)))

    def moved(self, items: np.ndarray, places: np.ndarray | int) -> np.ndarray:
        """The items so many places on in the rounds of their clusters."""
        return items // self.size * self.size + (items % self.size + places) % self.size

    def draw(self, cluster: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Items by popularity from numbers in [0, 1); within a cluster where one is given, -1 for none."""
        first = np.where(cluster < 0, 0, cluster * self.size)
        end = np.where(cluster < 0, len(self.popularity), first + self.size)
        at = self.edges[first] + uniform * (self.edges[end] - self.edges[first])
        return (np.searchsorted(self.edges, at, side="right") - 1).clip(first, end - 1)


@dataclass(frozen=True)
class Histories:
    """How the events of B users came about, S steps each; what lies beyond a user's length is drawn but not kept."""

    users: np.ndarray  # (B,) numbers in the data
    length: np.ndarray  # (B,)
    items: np.ndarray  # (B, S) codes
    parent: np.ndarray  # (B, S) the step that an event is made from, -1 where it is drawn by popularity alone
    places: np.ndarray  # (B, S) how many places on from its parent the item lies, -1 where it only shares the cluster
    first: np.ndarray  # (B, S) the step that opened the session
    times: np.ndarray  # (B, S) unix seconds


def catalogue(world: SyntheticWorld) -> Catalogue:
    """Zipf popularity over the items in random order, and random numbers for them."""
    rng = np.random.default_rng(world.seed)
    weights = rng.permutation(np.arange(1, world.items + 1.0) ** -world.zipf)
    return Catalogue(weights / weights.sum(), world.items // world.clusters, rng.permutation(world.items) + 1)


def histories(world: SyntheticWorld) -> Iterator[Histories]:
    """All users in blocks of like length, longest first; each block draws from its own seed."""
    items, rng = catalogue(world), np.random.default_rng([world.seed, 0])
    lengths = np.exp(rng.normal(np.log(world.median), 0.9, world.users)).astype(np.int64)
    lengths = -np.sort(-lengths.clip(world.shortest, world.longest))
    numbers = rng.permutation(world.users) + 1  # a user's number says nothing of the length
    for start in range(0, world.users, BLOCK):
        rows = slice(start, start + BLOCK)
        yield _block(world, items, np.random.default_rng([world.seed, 1, start]), numbers[rows], lengths[rows])


def _block(
    world: SyntheticWorld, items: Catalogue, rng: np.random.Generator, users: np.ndarray, length: np.ndarray
) -> Histories:
    shape = len(length), int(length.max())
    steps = np.arange(shape[1])
    opens = (rng.random(shape) < 1 / world.session_length) | (steps == 0)
    first = np.maximum.accumulate(np.where(opens, steps, 0), axis=1)
    kind = np.searchsorted(np.cumsum(world.shares), rng.random(shape), side="right")
    kind = np.where((kind == SESSION) & opens, INTEREST, kind)  # nothing has opened the session yet
    lags = np.array([*world.lags] or [1])
    ages: dict[int, Any] = {
        CALL_BACK: rng.choice(lags, shape, p=[*world.lags.values()] or None),
        FOLLOW: 1,
        REPEAT: 1 + np.floor(rng.random(shape) * steps).astype(np.int64),
        INTEREST: rng.geometric(world.drift, shape),
        SESSION: steps - first,
    }
    parent = np.maximum(steps - np.select([kind == k for k in ages], [*ages.values()], shape[1]), -1)
    places = np.select([kind == CALL_BACK, kind == FOLLOW, kind == REPEAT], [world.jump, 1, 0], -1)

    codes, uniform, rows = np.zeros(shape, np.int64), rng.random(shape), np.arange(shape[0])
    for step in steps:
        source, made = codes[rows, parent[:, step]], parent[:, step] >= 0
        drawn = items.draw(np.where(made, source // items.size, -1), uniform[:, step])
        codes[:, step] = np.where(
            made & (places[:, step] >= 0), items.moved(source, places[:, step].clip(min=0)), drawn
        )

    gaps = np.where(opens, BREAK + rng.exponential(BETWEEN, shape), rng.exponential(WITHIN, shape).clip(max=BREAK - 1))
    times = START + rng.integers(SPAN, size=(shape[0], 1)) + np.cumsum(gaps.astype(np.int64), axis=1)
    return Histories(users, length, codes, parent, places, first, times)


def generate(world: SyntheticWorld) -> Rows:
    """The events of `world.users` users, rows by user then time."""
    numbers = catalogue(world).numbers
    columns = []
    for block in histories(world):
        real = np.arange(block.items.shape[1]) < block.length[:, None]
        columns.append((np.repeat(block.users, block.length), numbers[block.items[real]], block.times[real]))
    users, items, times = map(np.concatenate, zip(*columns))
    return Rows(users=users, items=items, order=times, has_time=True)
