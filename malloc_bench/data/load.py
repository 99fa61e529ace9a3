"""`get_dataset`: from a name to arrays, by the first source that answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malloc_bench.data.dataset import Dataset, group
from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.policies import Judge, dropped
from malloc_bench.registry import clipped

if TYPE_CHECKING:
    from malloc_bench.data.sources.cards import Card, Source

log = logging.getLogger(__name__)


def get_dataset(data: Any, *, offline: bool = False, progress: bool = True, **columns: Any) -> Dataset:
    """A data set by name, several as one (`a+b`, see `joined`), by the path of a card of your own, or from a frame of

    polars or pandas.

    offline: use only what is on this machine already. columns: of a frame, `user=`, `item=` and, where there are,
    `time=` (dates, or numbers of `unit=`: s, ms, us, ns, order), `rating=` and `feedback=[...]`; `name=` it if
    "frame" will not do, and `label={"column": "rating", "at_least": 4}` says what counts as liked, `on_bad={"bad_row":
    "drop"}` what becomes of bad rows.

    A file in the user's own folder is tried first, then what was prepared before, then the card's sources in order.
    Raises UnknownName, or DataError where no source gives the published users, items and events.
    """
    if isinstance(data, str | Path):
        if columns:
            raise TypeError(f"{', '.join(columns)}: only a frame is told its columns; {clipped(str(data))} has a card")
        return _load(data, offline, progress, strict=True)
    from malloc_bench.data.frames import from_frame

    return from_frame(data, **columns)


def verify(name: str | Path, *, offline: bool = False) -> list[str]:
    """What differs from the published counts in the data that answer first; empty where nothing does."""
    return _differences(_load(name, offline, progress=True, strict=False))


def _load(name: str | Path, offline: bool, progress: bool, strict: bool) -> Dataset:
    from malloc_bench.data.joined import join, parts_of
    from malloc_bench.data.sources.cards import is_path, list_datasets, load_card

    if not is_path(name) and (parts := parts_of(str(name), list_datasets())):
        return join([_load(part, offline, progress, strict) for part in parts])
    card = load_card(name)
    if card.parameters is not None:
        from malloc_bench.data.worlds.synthetic import generate

        return group(card, generate(card.parameters), f"generated from seed {card.parameters.seed}")
    failures: list[str] = []
    for source, target in _by_effort(card):
        try:
            dataset = _from_source(card, source, target, offline, progress)
            if strict and (differences := _differences(dataset)):
                raise DataError("; ".join(differences))
        except DataError as error:
            failures.append(f"{source} ({error})")
        else:
            if failures:
                log.warning("%s: taken from %s, because of %s", card.name, dataset.source, "; ".join(failures))
            if dataset.notes:
                told = ", ".join(f"{count:,} {what}" for what, count in dataset.notes.items())
                log.log(logging.WARNING if dropped(dataset.notes) else logging.INFO, "%s: %s", card.name, told)
            return dataset
    local = all(str(source).startswith("local ") for source in card.sources)
    without = "" if local else ". suites/smoke.yaml runs on synthetic data: nothing to download"
    raise DataError(f"{card.name}: no source answered: {'; '.join(failures)}{without}")


def _by_effort(card: Card) -> list[tuple[Source, Path | DataError]]:
    """The sources, each with where its prepared data belong, or why it cannot answer.

    The user's own file comes first, then what was prepared before, then the rest: of equal ones the card's order
    decides.
    """
    from malloc_bench.data import cache
    from malloc_bench.data.sources.cards import LocalSource

    found: list[tuple[int, Source, Path | DataError]] = []
    for source in card.sources:
        try:
            target = cache.path(card, source)
        except DataError as error:  # no such local file: its turn comes only to say so
            found.append((2, source, error))
        else:
            found.append((0 if isinstance(source, LocalSource) else 1 if target.exists() else 2, source, target))
    return [(source, target) for _, source, target in sorted(found, key=lambda each: each[0])]


def _from_source(card: Card, source: Source, target: Path | DataError, offline: bool, progress: bool) -> Dataset:
    from malloc_bench.data import cache
    from malloc_bench.data.formats.parse import Reader
    from malloc_bench.data.prepare import prepare
    from malloc_bench.data.sources import fetch as sources

    if isinstance(target, DataError):
        raise target
    label = _label(card, source)
    if target.exists():
        try:
            return cache.read(card, target, target, label)
        except Exception as error:  # whatever is wrong with a cache, the source mends it
            log.warning("%s is damaged and will be made again: %s", target, " ".join(str(error).split()))
    with sources.opened(source, card.family, offline=offline, progress=progress) as parts:
        reader = Reader(card.layout(source), Judge(card.on_bad), card.keep)

        def write(folder: Path) -> tuple[str, dict[str, int]]:
            return prepare(reader.frames(parts), reader, folder)

        return cache.make(card, target, _label(card, source), write)


def _label(card: Card, source: Source) -> str:
    """Which source answered, as the manifest has it: with the hash that nobody but this machine vouches for."""
    from malloc_bench.data.sources import fetch as sources
    from malloc_bench.data.sources.cards import LocalSource, UrlSource

    if isinstance(source, LocalSource):
        files = sources.local_files(source)
        return f"local {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    trusted = sources.trusted_hash(source, card.family) if isinstance(source, UrlSource) else None
    return f"{source} (sha256 {trusted}, none published)" if trusted else str(source)


def _differences(dataset: Dataset) -> list[str]:
    """Of the published counts, those that are not met; dropped rows count as events, for they were in the files."""
    published = dataset.card.published
    found = {
        "users": dataset.n_users,
        "items": dataset.n_items,
        "events": dataset.n_events + dropped(dataset.notes),
    }
    expected = {key: count for key, count in published.model_dump().items() if count} if published else {}
    return [f"{found[key]} {key} where {count} are published" for key, count in expected.items() if found[key] != count]
