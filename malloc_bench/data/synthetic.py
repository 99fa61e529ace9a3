"""A small made-up world with something to learn: tastes, clusters and successors over Zipf popularity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .dataset import Rows

if TYPE_CHECKING:
    from .cards import SyntheticWorld

START = 1_700_000_000  # unix seconds of the first possible event
SPAN = 180 * 86_400  # users join over half a year, so that one cut in time finds early and late users
GAP = 6 * 3600  # mean seconds between two events of a user


def generate(world: SyntheticWorld) -> Rows:
    """Histories of `world.users` users that never repeat an item, rows by user then time.

    The next item is the last one's fixed successor with probability `follow`; otherwise it is drawn by popularity x
    the user's taste for its cluster x `stay` where it is in the last item's cluster.
    """
    rng = np.random.default_rng(world.seed)
    U, I = world.users, world.items
    lengths = np.exp(rng.normal(np.log(world.median), 0.9, U)).astype(np.int64)
    lengths = -np.sort(
        -lengths.clip(world.shortest, world.longest)
    )  # longest first: the users still going are a prefix
    cluster = rng.integers(world.clusters, size=I)
    successor = _successors(cluster, rng)
    popularity = rng.permutation(np.arange(1, I + 1.0) ** -world.zipf)
    taste = rng.gamma(0.3, size=(U, world.clusters)) + 1e-3  # few liked clusters per user, none impossible
    weights = popularity * taste[:, cluster]  # (U, I), 0 once seen
    near = np.where(cluster == np.arange(world.clusters)[:, None], world.stay, 1.0)  # (clusters, I)

    histories = np.zeros((U, lengths[0]), np.int64)
    last = rng.integers(I, size=U)
    for step in range(lengths[0]):
        going = np.arange(np.count_nonzero(lengths > step))
        last = last[going]
        chances = weights[going] * near[cluster[last]]
        race = rng.standard_exponential(chances.shape, np.float32) + np.float32(1e-12)
        drawn = (chances / race).argmax(1)  # item i with probability chances[i] / sum(chances)
        follows = (rng.random(len(going)) < world.follow) & (weights[going, successor[last]] > 0)
        last = np.where(follows, successor[last], drawn)
        histories[going, step] = last
        weights[going, last] = 0

    users = np.repeat(np.arange(U), lengths)
    items = histories[np.arange(lengths[0]) < lengths[:, None]]
    waited = np.cumsum(rng.exponential(GAP, len(users)).astype(np.int64))
    firsts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    joined = rng.integers(SPAN, size=U)
    times = START + (joined - waited[firsts])[users] + waited
    number = rng.permutation(U) + 1  # a user's number says nothing of the length
    return Rows(users=number[users], items=items + 1, order=times, has_time=True)


def _successors(cluster: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(I,) each item's successor: the next in a random round through the items of its cluster."""
    round_trip = np.lexsort((rng.random(len(cluster)), cluster))
    successor = np.empty_like(round_trip)
    for members in np.split(round_trip, np.flatnonzero(np.diff(cluster[round_trip])) + 1):
        successor[members] = np.roll(members, -1)
    return successor
