"""Prepared data: one parquet per card and source, rows in history order with the publisher's ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from malloc_bench.paths import home

from . import formats
from .cards import Card, LocalSource, Source
from .dataset import DataError, Dataset, Rows, group
from .files import whole_file
from .sources import local_file

KEYS = ("user_id", "item_id", "timestamp")
VERSION = 2  # raise it when `group` or this file's layout changes


def path(card: Card, source: Source) -> Path:
    """Where the prepared data belong; the name changes with the card, the code's version and the local file."""
    key = [VERSION, formats.VERSION, card.model_dump(), source.model_dump()]
    if isinstance(source, LocalSource):
        state = local_file(source).stat()
        key += [state.st_size, state.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return home() / "prepared" / f"{card.name}-{digest[:16]}.parquet"


def write(dataset: Dataset, target: Path) -> None:
    """Raises OSError where the cache cannot be written."""
    import polars as pl

    columns = {
        "user_id": np.repeat(dataset.user_ids, np.diff(dataset.offsets)),
        "item_id": dataset.item_ids[dataset.items - 1],
        "timestamp": dataset.times,
        **dataset.feedback,
    }
    frame = pl.DataFrame({name: column for name, column in columns.items() if column is not None})
    with whole_file(target) as file:
        frame.write_parquet(file, metadata={"hash": dataset.hash})


def read(card: Card, target: Path, source: str) -> Dataset:
    """Raises whatever is wrong with the file; DataError where its content is not what was written."""
    import polars as pl

    data = target.read_bytes()
    frame = pl.read_parquet(data)
    has_time = "timestamp" in frame.columns
    rows = Rows(
        users=frame["user_id"].to_numpy(),
        items=frame["item_id"].to_numpy(),
        order=frame["timestamp"].to_numpy() if has_time else np.arange(len(frame)),
        has_time=has_time,
        feedback={name: frame[name].to_numpy() for name in frame.columns if name not in KEYS},
    )
    dataset = group(card, rows, source)
    if dataset.hash != pl.read_parquet_metadata(target).get("hash"):
        raise DataError("its content is not what was written")
    return dataset
