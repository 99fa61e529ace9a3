"""How well anyone can possibly predict a generated world, who knows all of a history, its newest events, or nothing.

Whole history: every event's distribution is a mixture over earlier events, so its k most probable items are known; the
ceiling of HR@k is their mean probability over the targets. AUC: the chance that the next item stands before a random
other one under the best scores.

Part of a history: the predictor is helped by a genie who says from which earlier event each event was made (not which
items these were). Events made from one another without a draw are a *tree*: one of its items tells all of them. What
no known event tells of an item is then its popularity, so the best prediction has a closed form. Whoever has no genie
does no better: the number is an upper bound, `at_most`. `reached` is what a predictor without a genie gets, which
takes what it does not know for popularity: the true ceiling lies between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.splits import Targets
from malloc_bench.data.worlds.synthetic import Catalogue, Histories, catalogue, histories

if TYPE_CHECKING:
    from malloc_bench.data.worlds.world import SyntheticWorld

HITS = (5, 10, 50)
LIMIT = 4096  # targets that the ceilings are averaged over, at most
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # events known, in the table
_CELLS = 1 << 22  # numbers of a chunk, at most

Values = dict[str, np.ndarray]  # metric -> (N,) its expectation for each target


@dataclass(frozen=True)
class Sources:
    """Of N targets, how much the next event owes to each of S earlier ones; with `free`, each row comes to 1."""

    exact: Mapping[int, np.ndarray]  # places on -> (N, S) weight of the item so many places on
    cluster: np.ndarray  # (N, S) weight of the popular items of the event's cluster
    free: np.ndarray  # (N,) weight of popularity alone

    @cached_property
    def weight(self) -> np.ndarray:
        """(N, S) all that an event tells."""
        return sum(self.exact.values(), self.cluster)


def sources(world: SyntheticWorld, opened: np.ndarray, at: np.ndarray, steps: int) -> Sources:
    """What the events at steps `at` (N,) are made from; `opened` (N,): the step that opened their session."""
    rows, age = np.arange(len(at)), at[:, None] - np.arange(steps)
    past = age > 0
    goes_on = opened < at  # times tell: the predictor knows the moment at which it is asked
    call_back = sum((world.call_back * share * (age == lag) for lag, share in world.lags.items()), np.zeros(age.shape))
    interest = world.interest + world.session * ~goes_on
    cluster = past * interest[:, None] * world.drift * (1 - world.drift) ** (age - 1.0).clip(min=0)
    cluster[rows, opened] += world.session * goes_on
    exact: dict[int, np.ndarray] = {}
    for places, weight in (
        (world.jump, call_back), (1, world.follow * (age == 1)), (0, world.repeat * past / at.clip(min=1)[:, None])
    ):  # fmt: skip
        exact[places] = exact.get(places, 0.0) + weight
    return Sources(exact, cluster, 1 - sum(exact.values(), cluster).sum(1))


@dataclass(frozen=True)
class Lineage:
    """What the genie knows of N x S events, step by step: where their trees begin."""

    tree: np.ndarray  # the step whose drawn item tells this one
    places: np.ndarray  # how many places on from there this item lies
    family: np.ndarray  # the step whose drawn cluster is this one's


def lineage(world: SyntheticWorld, history: Histories) -> Lineage:
    """Follow every event to the draws it comes from."""
    shape, size = history.items.shape, world.items // world.clusters
    rows, steps = np.arange(shape[0]), np.arange(shape[1])
    tree, family = (np.tile(steps, (shape[0], 1)) for _ in range(2))
    places = np.zeros(shape, np.int64)
    for step in steps:
        parent, moved = history.parent[:, step], history.places[:, step]
        made, same = parent >= 0, (parent >= 0) & (moved >= 0)
        tree[:, step] = np.where(same, tree[rows, parent], step)
        places[:, step] = np.where(same, (places[rows, parent] + moved) % size, 0)
        family[:, step] = np.where(made, family[rows, parent], step)
    return Lineage(tree, places, family)


class Chunk:
    """Targets of one block of users whose ceilings are computed together."""

    def __init__(self, world: SyntheticWorld, items: Catalogue, history: Histories, at: np.ndarray) -> None:
        self.world, self.catalogue, self.items, self.at = world, items, history.items, at
        self.opened = history.first[np.arange(len(at)), at]  # (N,) the step that opened the target's session
        self.sources = sources(world, self.opened, at, self.items.shape[1])
        self.lineage = lineage(world, history)
        self.past = np.arange(self.items.shape[1]) < at[:, None]

    def newest(self, count: np.ndarray | int) -> np.ndarray:
        """(N, S) which events are among the newest `count`."""
        return self.past & (np.arange(self.items.shape[1]) >= (self.at - count)[:, None])

    def weightiest(self, count: int) -> np.ndarray:
        """(N, S) which events are the `count` that tell most of the next one; newer ones first where they tie."""
        order = np.argsort(-self.sources.weight[:, ::-1], axis=1, kind="stable")[:, :count]
        chosen = np.zeros_like(self.past)
        np.put_along_axis(chosen, self.items.shape[1] - 1 - order, True, axis=1)
        return chosen & self.past

    def told(self, known: np.ndarray) -> np.ndarray:
        """(N, items) what known events say by themselves; the rows come to less than 1 by what they do not say."""
        return self._mix(known, known, others=False)

    def predictive(self, known: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
        """(N, items) probabilities of the next item given the known events and the genie, rows come to 1.

        clusters: events of which the cluster alone is known too.
        """
        families = known if clusters is None else known | clusters
        return self._mix(_reached(self.lineage.tree, known), _reached(self.lineage.family, families), others=True)

    def _mix(self, item_known: np.ndarray, cluster_known: np.ndarray, others: bool) -> np.ndarray:
        n, size, clusters = len(self.at), self.catalogue.size, self.world.clusters
        rows = np.arange(n)[:, None]
        total = np.zeros(n * self.world.items)
        drawn = np.zeros(n * (clusters + 1) * size)  # by cluster (the last: any) and places on from the draw
        cluster = np.where(cluster_known, self.items // size, clusters)
        for places, weight in self.sources.exact.items():
            told, untold = (weight > 0) & item_known, (weight > 0) & ~item_known
            index = (rows * self.world.items + self.catalogue.moved(self.items, places))[told]
            total += np.bincount(index, weight[told], len(total))
            index = ((rows * (clusters + 1) + cluster) * size + (self.lineage.places + places) % size)[untold]
            drawn += np.bincount(index, weight[untold], len(drawn)) * others
        index = (rows * (clusters + 1) + cluster) * size
        drawn += np.bincount(index[self.past], self.sources.cluster[self.past], len(drawn))
        by_cluster = drawn.reshape(n, clusters + 1, size)
        by_cluster[:, -1, 0] += self.sources.free
        by_cluster[:, -1] *= others
        popularity = self.catalogue.popularity.reshape(clusters, size)
        share = popularity.sum(1)
        weights = by_cluster[:, :-1] + by_cluster[:, -1:] * share[:, None]
        on = (np.arange(size) - np.arange(size)[:, None]) % size  # [places on, item] -> the item drawn
        rounds = (popularity / share[:, None])[:, on]  # (clusters, size, size)
        return total.reshape(n, -1) + (weights.transpose(1, 0, 2) @ rounds).transpose(1, 0, 2).reshape(n, -1)

    @cached_property
    def truth(self) -> np.ndarray:
        """(N, items) probabilities of the next item given the whole history."""
        return self.predictive(self.past)

    def trees(self) -> np.ndarray:
        """(N, S) what each tree tells in all, the weightiest first."""
        exact = sum(self.sources.exact.values(), np.zeros(self.past.shape))
        index = np.arange(len(self.at))[:, None] * self.past.shape[1] + self.lineage.tree
        mass = np.bincount(index[self.past], exact[self.past], index.size).reshape(index.shape)
        return -np.sort(-mass, axis=1)


def _reached(root: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N, S) bool: the events that share a root with a known one."""
    roots = np.zeros(known.shape, bool)
    rows, steps = np.nonzero(known)
    roots[rows, root[rows, steps]] = True
    return np.take_along_axis(roots, root, axis=1)


def expected(scores: np.ndarray, truth: np.ndarray, hits: Sequence[int] = HITS) -> Values:
    """What ranking by `scores` (N, items) comes to where items have the probabilities `truth` (N, items)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    mass = np.take_along_axis(truth, order, axis=1)
    first = {f"hr@{k}": mass[:, :k].sum(1) for k in hits}
    behind = np.arange(mass.shape[1])[::-1] / max(mass.shape[1] - 1, 1)
    return {**first, "auc": mass @ behind}


class Ceilings:
    """The ceilings of a generated data set over (at most LIMIT evenly spaced of) some targets.

    `rows` (N,): which of the targets, in the order of all values. Raises DataError where the data set is not a
    generated one, or not what its card generates.
    """

    def __init__(self, dataset: Dataset, targets: Targets, limit: int = LIMIT, hits: Sequence[int] = HITS) -> None:
        if dataset.card.parameters is None:
            raise DataError(
                f"{dataset.name}: only a generated data set (format: synthetic) has ceilings that are known"
            )
        rows = np.linspace(0, len(targets) - 1, min(limit, len(targets))).astype(int)
        chunks = list(_chunks(dataset, targets.users[rows], targets.at[rows]))
        found = np.concatenate([some for some, _ in chunks]) if chunks else np.zeros(0, int)
        if len(found) < len(rows):
            raise DataError(f"{dataset.name}: its events are not those that its card's parameters generate")
        self.rows, self.chunks, self.hits = rows[found], [chunk for _, chunk in chunks], hits

    def full(self) -> Values:
        """With the whole history: exact."""
        return _joined(expected(chunk.truth, chunk.truth, self.hits) for chunk in self.chunks)

    def floor(self) -> Values:
        """With no event at all: the items that are most probable over all targets."""
        return self._reached([np.zeros_like(chunk.past) for chunk in self.chunks])

    def window(self, count: np.ndarray | int) -> Values:
        """With the newest `count` events, one number or one for each of `rows`, and a genie's help: an upper bound."""
        ends = np.cumsum([len(chunk.at) for chunk in self.chunks])[:-1]
        counts = np.split(np.broadcast_to(count, len(self.rows)), ends)
        known = (chunk.predictive(chunk.newest(n)) for chunk, n in zip(self.chunks, counts))
        return _joined(expected(p, p, self.hits) for p in known)

    def window_reached(self, count: int) -> Values:
        """What a predictor gets that knows the newest `count` events: a lower bound."""
        return self._reached([chunk.newest(count) for chunk in self.chunks])

    def oracle(self, count: int) -> Values:
        """With any `count` events, whoever chose them, the clusters of all and a genie's help: an upper bound.

        No more hits than the clusters give and the `count` weightiest trees tell, nor than the whole history gives;
        of AUC only the latter is known. That just these events were chosen is taken to say nothing.
        """
        full, parts = self.full(), []
        for chunk in self.chunks:
            clusters = chunk.predictive(np.zeros_like(chunk.past), chunk.past)
            told = chunk.trees()[:, :count].sum(1)
            parts.append({name: value + told for name, value in expected(clusters, clusters, self.hits).items()})
        bound = _joined(parts)
        return {name: min(bound[name], full[name], key=np.mean) for name in full}

    def oracle_reached(self, count: int) -> Values:
        """What a predictor gets that knows the `count` events of which the process makes most of the next one."""
        return self._reached([chunk.weightiest(count) for chunk in self.chunks])

    def table(self) -> dict[str, Any]:
        """All of the above as [mean, standard error] by metric, for SIZES up to the longest history."""
        longest = max((int(chunk.at.max()) for chunk in self.chunks), default=0)
        sizes = [size for size in SIZES if size <= longest]

        def bounds(at_most: Any, reached: Any) -> dict[str, Any]:
            return {str(n): {"at_most": _summary(at_most(n)), "reached": _summary(reached(n))} for n in sizes}

        return {
            "targets": len(self.rows),
            "none": _summary(self.floor()),
            "full": _summary(self.full()),
            "window": bounds(self.window, self.window_reached),
            "oracle": bounds(self.oracle, self.oracle_reached),
        }

    def _reached(self, known: list[np.ndarray]) -> Values:
        told = [chunk.told(mask) for chunk, mask in zip(self.chunks, known)]
        scores = (each + (1 - each.sum(1, keepdims=True)) * self._unknown for each in told)
        return _joined(expected(p, chunk.truth, self.hits) for p, chunk in zip(scores, self.chunks))

    @cached_property
    def _unknown(self) -> np.ndarray:
        """(items,) how probable each item is before anything is known of the user."""
        return sum(chunk.predictive(np.zeros_like(chunk.past)).sum(0) for chunk in self.chunks) / len(self.rows)


def _chunks(dataset: Dataset, users: np.ndarray, places: np.ndarray) -> Iterator[tuple[np.ndarray, Chunk]]:
    """The targets in chunks, each with their indices, made again block by block; those that come out otherwise not."""
    world = dataset.card.parameters
    assert world is not None
    items = catalogue(world)
    number, at = dataset.user_ids[users], places - dataset.offsets[users]
    target = dataset.item_ids[dataset.items[places] - 1]
    for block in histories(world):
        order = np.argsort(block.users)
        row = order[np.searchsorted(block.users, number, sorter=order).clip(max=len(order) - 1)]
        members = np.flatnonzero((block.users[row] == number) & (at < block.length[row]))
        members = members[items.numbers[block.items[row[members], at[members]]] == target[members]]
        width = int(at[members].max(initial=0)) + 1
        size = max(1, _CELLS // max(world.items + world.clusters, 4 * width))
        for start in range(0, len(members), size):
            some = members[start : start + size]
            cut = {f.name: getattr(block, f.name)[row[some]] for f in fields(block)}
            cut = {name: array[:, :width] if array.ndim > 1 else array for name, array in cut.items()}
            yield some, Chunk(world, items, Histories(**cut), at[some])


def _joined(parts: Iterable[Values]) -> Values:
    every = list(parts)
    return {name: np.concatenate([part[name] for part in every]) for name in every[0]}


def _summary(values: Values) -> dict[str, list[float]]:
    return {name: [float(v.mean()), float(v.std() / max(len(v), 1) ** 0.5)] for name, v in values.items()}
