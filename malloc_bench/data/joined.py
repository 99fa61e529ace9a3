"""Several data sets as one: each user's events of all of them in time order, items apart by the set they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.dataset import Dataset, Rows, group
from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.ids import plain
from malloc_bench.data.formats.policies import Judge
from malloc_bench.registry import UnknownName, clipped, suggest

if TYPE_CHECKING:
    import polars as pl

    from malloc_bench.data.sources.cards import Card

FINE = ("ms", "us", "ns", "iso")  # units of times that may order events within a second


def parts_of(name: str, known: Sequence[str]) -> list[str]:
    """The names of `a+b`, which is short for one data set of both; empty where the name is that of one by itself.

    Raises UnknownName, DataError where a part is there twice.
    """
    found = name.split("+")
    if len(found) < 2 or name in known:
        return []
    for each in found:
        if each not in known:
            raise UnknownName(f"no dataset is named '{clipped(each)}'.{suggest(each, known)}")
    if len(set(found)) < len(found):
        raise DataError(f"{clipped(name)}: a data set is there twice; join different ones")
    return found


def join(parts: Sequence[Dataset]) -> Dataset:
    """One data set of several, whose items know which of them they are of (`Dataset.domains`).

    A user whom two sets tell by the same text is one user; numbers name nobody outside of their set, so users who have
    only a number stay apart, whoever else is there. Feedback and label stay where all have them. Raises DataError where
    the times of some are known and of others are not, where users of two sets are the same and there are no times to
    mix them by, or where their cards have ties in different orders.
    """
    name = "+".join(data.name for data in parts)
    ties = {data.name: Judge(data.card.on_bad).answer("ties") for data in parts}
    if len(set(ties.values())) > 1:
        told = ", ".join(f"{each} has {answer}" for each, answer in ties.items())
        raise DataError(f"{name}: on_bad.ties must be the same in all of them, and {told}")
    timed = {data.name: data.has_time for data in parts}
    if len(set(timed.values())) > 1:
        without = ", ".join(each for each, has in timed.items() if not has)
        raise DataError(f"{name}: {without} has no times, so its events have no place among the others'")
    users = [_named(data, data.user_ids, data.user_names) for data in parts]
    names = _sorted(users)
    if not parts[0].has_time and len(names) < sum(map(len, users)):
        raise DataError(f"{name}: users are in several of them, and without times nothing says what came first")
    kept = set.intersection(*(set(data.feedback) for data in parts))
    within = [_within_a_second(data) for data in parts]
    finer = max(int(each.max(initial=0)) for each in within) + 1
    rows = Rows(
        users=np.concatenate([np.repeat(_places(u, names), np.diff(d.offsets)) for u, d in zip(users, parts)]),
        items=np.concatenate([d.items + n for d, n in zip(parts, _before([d.n_items for d in parts]))]).astype(
            np.int64
        ),
        order=np.concatenate([_clock(data) * finer + each for data, each in zip(parts, within)]),
        has_time=parts[0].has_time,
        feedback={each: np.concatenate([data.feedback[each] for data in parts]) for each in kept},
    )
    made = group(_card(name, [data.card for data in parts], kept), rows, " and ".join(data.source for data in parts))
    domains = np.repeat(np.arange(len(parts), dtype=np.int16), [data.n_items for data in parts])
    item_names = [_named(data, data.item_ids, data.item_names, apart=True) for data in parts]
    of = "\n".join([made.hash, *(f"{data.name} {data.hash}" for data in parts)])
    return replace(
        made,
        times=None if made.times is None else made.times // finer,
        hash=hashlib.sha256(of.encode()).hexdigest(),
        notes={f"{data.name}: {what}": n for data in parts for what, n in data.notes.items()},
        user_names=names,
        item_names=_concat(item_names),
        domains=domains,
        domain_names=tuple(data.name for data in parts),
    )


def _card(name: str, cards: Sequence[Card], kept: set[str]) -> Card:
    """The first one's, of what all have alike."""
    first, labels = cards[0], [card.label for card in cards]
    label = first.label if first.label and first.label.column in kept and labels == [first.label] * len(cards) else None
    told = {
        "title": " + ".join(card.title for card in cards),
        "licence": "; ".join({card.licence: 0 for card in cards}),
    }
    none: dict[str, object] = {"published": None, "categories": [], "parameters": None, "keep": None}
    return first.model_copy(update={"name": name, "family": name, "label": label, **told, **none})


def _named(data: Dataset, ids: np.ndarray, names: pl.Series | None, apart: bool = False) -> pl.Series:
    """Text that is the same in two sets where the user is; apart: never."""
    import polars as pl

    texts = pl.Series(ids if names is None else names).cast(pl.String)
    own = pl.select(pl.lit(f"{data.name}:") + texts).to_series()
    return own if names is None or apart else own.zip_with(plain(names), names)


def _sorted(series: Sequence[pl.Series]) -> pl.Series:
    return _concat(series).unique().sort()


def _concat(series: Sequence[pl.Series]) -> pl.Series:
    import polars as pl

    return pl.concat([each.alias("name") for each in series])


def _places(names: pl.Series, among: pl.Series) -> np.ndarray:
    """Where each of the names [N] stands among sorted ones, int64."""
    return among.search_sorted(names).to_numpy().astype(np.int64)


def _before(sizes: Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes)[:-1]))


def _within_a_second(data: Dataset) -> np.ndarray:
    """(E,) how many events of its user and second each comes after, where times were finer than data keep them."""
    fine = data.times is not None and data.card.parameters is None and data.card.layout().unit in FINE
    if data.times is None or not fine:
        return np.zeros(data.n_events, np.int64)
    new = np.ones(data.n_events, bool)
    new[1:] = data.times[1:] != data.times[:-1]
    new[data.offsets[:-1]] = True
    at = np.arange(data.n_events)
    return at - np.maximum.accumulate(np.where(new, at, 0))


def _clock(data: Dataset) -> np.ndarray:
    """(E,) times, or what orders each user's events."""
    if data.times is not None:
        return data.times
    return np.arange(data.n_events) if data.order is None else data.order
