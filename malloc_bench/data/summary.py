"""What a data set is like: sizes, history lengths, repeats, and a figure of the lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.load import get_dataset
from malloc_bench.paths import home
from malloc_bench.registry import literal

LONG = (200, 500, 1000, 5000)
CHUNK = 4_000_000  # events looked at once for repeats


def stats(name: str, *, offline: bool = False) -> dict[str, Any]:
    """Size and history lengths of a data set; lengths in events, shares of users and of events in 0..1."""
    return describe(get_dataset(name, offline=offline))


def describe(dataset: Dataset) -> dict[str, Any]:
    """`stats` of a data set at hand."""
    lengths = np.diff(dataset.offsets)
    quantiles = {f"length_p{q}": float(np.percentile(lengths, q)) for q in (10, 25, 50, 75, 90, 99)}
    times = dataset.times
    return {
        "users": dataset.n_users,
        "items": dataset.n_items,
        "events": dataset.n_events,
        "density": dataset.n_events / (dataset.n_users * dataset.n_items),
        "length_min": int(lengths.min()),
        "length_mean": float(lengths.mean()),
        **quantiles,
        "length_max": int(lengths.max()),
        **{f"users_from_{n}": float((lengths >= n).mean()) for n in LONG},
        "repeat_rate": repeat_rate(dataset),
        "has_time": dataset.has_time,
        "tied_in_time": dataset.tied if dataset.has_time or dataset.order is not None else None,
        **same_direction(dataset),
        "first": None if times is None else _date(times.min()),
        "last": None if times is None else _date(times.max()),
        "feedback": sorted(dataset.feedback),
        "notes": dict(dataset.notes),
        "source": dataset.source,
        "hash": dataset.hash,
    }


def repeat_rate(dataset: Dataset) -> float:
    """The share of events whose item the same user has met before."""
    new, first = 0, 0
    while first < dataset.n_users:
        after = np.searchsorted(dataset.offsets, dataset.offsets[first] + CHUNK, "right") - 1
        last = max(int(after), first + 1)
        start, end = dataset.offsets[first], dataset.offsets[last]
        users = np.repeat(np.arange(last - first), np.diff(dataset.offsets[first : last + 1]))
        new += len(np.unique(users * (dataset.n_items + 1) + dataset.items[start:end]))
        first = last
    return 1 - new / dataset.n_events


def same_direction(dataset: Dataset) -> dict[str, float | None]:
    """Where two items stand next to each other in more than one history: how often in the same direction.

    A share of the pairs of such places, .5 where the order says nothing; of all, and of ties and of the others where
    times are known. Above .5 among ties, the order is one of its own (products one after the other, say), which models
    learn and no request knows. Of ties that were dealt by lot nothing is said. Ties are of one second: a file of
    milliseconds orders some. Of the first CHUNK events. None: no two items meet twice.
    """
    some = min(dataset.n_events, CHUNK)
    tied = dataset.first_of_time[:some] < np.arange(some)
    follows = np.ones(some, dtype=bool)
    starts = dataset.offsets[:-1]
    follows[starts[starts < some]] = False  # users without an event start where another does, or behind all
    after = np.flatnonzero(follows)
    one, two = dataset.items[after - 1].astype(np.int64), dataset.items[after].astype(np.int64)
    pairs, up = np.minimum(one, two) * (dataset.n_items + 1) + np.maximum(one, two), one < two

    def share(which: np.ndarray) -> float | None:
        which = which & (one != two)
        _, place = np.unique(pairs[which], return_inverse=True)
        ups, all_ = np.bincount(place, up[which]), np.bincount(place)
        met = (all_ * (all_ - 1)).sum()
        return float((ups * (ups - 1) + (all_ - ups) * (all_ - ups - 1)).sum() / met) if met else None

    known = dataset.has_time or dataset.order is not None
    of = {"": np.ones(len(after), dtype=bool)} | ({"_apart": ~tied[after]} if known else {})
    by_lot = dataset.card.parameters is None and Judge(dataset.card.on_bad).answer("ties") == "shuffle"
    if known and not by_lot:
        of["_tied"] = tied[after]
    return {f"same_direction{name}": share(which) for name, which in of.items()}


def _date(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")  # of any year, for bad times may be kept


def histogram(dataset: Dataset, path: Path | None = None) -> Path:
    """Save how many users have how long a history, both axes logarithmic, as PNG; gives the path.

    Without one it is home()/figures/NAME-lengths.png.
    """
    from matplotlib.figure import Figure

    path = path or home() / "figures" / f"{dataset.name}-lengths.png"
    lengths = np.diff(dataset.offsets)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(low, high + 1, 41).round())
    axes.hist(lengths, bins=edges.tolist() if len(edges) > 1 else [low, low + 1], color="tab:blue")
    median = float(np.median(lengths))
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:g}")
    axes.set(xscale="log", yscale="log", xlabel="events of a user", ylabel="users", title=literal(dataset.card.title))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    return path
