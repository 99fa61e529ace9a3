"""`get_dataset`: from a name to arrays, by the first source that answers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from .dataset import DataError, Dataset, group

if TYPE_CHECKING:
    from .cards import Card, Source

log = logging.getLogger(__name__)


def get_dataset(name: str, *, offline: bool = False, progress: bool = True) -> Dataset:
    """A data set by name; `offline` uses only what is on this machine already.

    A file in the user's own folder is tried first, then what was prepared before, then the card's sources in order.
    Raises UnknownName, or DataError where no source gives the published users, items and events.
    """
    return _load(name, offline, progress, strict=True)


def verify(name: str, *, offline: bool = False) -> list[str]:
    """What differs from the published counts in the data that answer first; empty where nothing does."""
    return _differences(_load(name, offline, progress=True, strict=False))


def stats(name: str, *, offline: bool = False) -> dict[str, Any]:
    """Size and history lengths of a data set; lengths in events, shares of users in 0..1."""
    dataset = get_dataset(name, offline=offline)
    lengths = np.diff(dataset.offsets)
    quantiles = {f"length_p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
    return {
        "users": dataset.n_users,
        "items": dataset.n_items,
        "events": dataset.n_events,
        "density": dataset.n_events / (dataset.n_users * dataset.n_items),
        "length_min": int(lengths.min()),
        "length_mean": float(lengths.mean()),
        **quantiles,
        "length_max": int(lengths.max()),
        **{f"users_from_{n}": float((lengths >= n).mean()) for n in (200, 500, 1000)},
        "has_time": dataset.has_time,
        "source": dataset.source,
        "hash": dataset.hash,
    }


def _load(name: str, offline: bool, progress: bool, strict: bool) -> Dataset:
    from .cards import load_card

    card = load_card(name)
    if card.parameters is not None:
        from .synthetic import generate

        return group(card, generate(card.parameters), f"generated from seed {card.parameters.seed}")
    failures: list[str] = []
    for source in sorted(card.sources, key=lambda source: _effort(card, source)):
        try:
            dataset = _from_source(card, source, offline, progress)
            if strict and (differences := _differences(dataset)):
                raise DataError("; ".join(differences))
        except DataError as error:
            failures.append(f"{source} ({error})")
        else:
            if failures:
                log.warning("%s: taken from %s, because of %s", name, dataset.source, "; ".join(failures))
            return dataset
    without = "suites/smoke.yaml runs on synthetic data: nothing to download"
    raise DataError(f"{name}: no source answered: {'; '.join(failures)}. {without}")


def _effort(card: Card, source: Source) -> int:
    """0 the user's own file, 1 prepared before, 2 the rest: of equal ones the card's order decides."""
    from . import cache
    from .cards import LocalSource

    try:
        target = cache.path(card, source)
    except DataError:  # no such local file: its turn comes only to say so
        return 2
    return 0 if isinstance(source, LocalSource) else 1 if target.exists() else 2


def _from_source(card: Card, source: Source, offline: bool, progress: bool) -> Dataset:
    from . import cache, formats, sources
    from .cards import LocalSource

    label = f"local {sources.local_file(source)}" if isinstance(source, LocalSource) else str(source)
    target = cache.path(card, source)
    if target.exists():
        try:
            return cache.read(card, target, label)
        except Exception as error:  # whatever is wrong with a cache, the source mends it
            log.warning("%s is damaged and will be made again: %s", target, " ".join(str(error).split()))
    data = sources.read(source, card.name, offline=offline, progress=progress)
    dataset = group(card, formats.parse(source.format or card.format, data, source.file), label)
    log.info("%s: %d repeated (user, item, time) rows kept", card.name, _repeats(dataset))
    try:
        cache.write(dataset, target)
    except OSError as error:
        log.warning("%s is not cached: %s", card.name, error)
    return dataset


def _differences(dataset: Dataset) -> list[str]:
    published = dataset.card.published
    found = {"users": dataset.n_users, "items": dataset.n_items, "events": dataset.n_events}
    expected = published.model_dump() if published else found
    return [f"{found[key]} {key} where {expected[key]} are published" for key in found if found[key] != expected[key]]


def _repeats(dataset: Dataset) -> int:
    if dataset.times is None:
        return 0
    users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    rows = np.stack((users, dataset.times, dataset.items))
    rows = rows[:, np.lexsort(rows)]
    return int((rows[:, 1:] == rows[:, :-1]).all(axis=0).sum())
