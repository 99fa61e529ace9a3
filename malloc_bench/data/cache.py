"""Prepared data: a folder per card and source, whose parquet files load without sorting or parsing anything."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.formats import formats
from malloc_bench.data.sources.cards import Card, LocalSource, Source
from malloc_bench.data.sources.download import file_hash
from malloc_bench.data.sources.fetch import local_files
from malloc_bench.files import advice, for_polars, new_part, read_sealed, remove_parts, sealed, with_home
from malloc_bench.paths import home

log = logging.getLogger(__name__)

FILES = ("events.parquet", "users.parquet", "items.parquet")
VERSION = 8  # raise it when the order of events or the layout of these files changes


def path(card: Card, source: Source) -> Path:
    """Where the prepared data belong; the name changes with all they depend on: card, code, the content of local files.

    Raises DataError where a local file is not there.
    """
    asked = [card.format, card.table and card.table.model_dump(), card.keep, card.on_bad, source.model_dump()]
    key: list[Any] = [VERSION, formats.VERSION, card.name, *asked]
    if isinstance(source, LocalSource):
        try:
            key += [file_hash(each, "sha256") for each in local_files(source)]  # 0.9 s a GB: no stat is as sure
        except OSError as error:
            raise DataError(str(error)) from None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return home() / "prepared" / f"{card.name}-{digest[:16]}"


def make(card: Card, target: Path, source: str, write: Callable[[Path], tuple[str, dict[str, int]]]) -> Dataset:
    """What `write` puts into a folder and says of it (hash, notes), kept as `target` where that can be written."""
    keep = True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = new_part(target)
        folder.mkdir()
    except OSError as error:
        log.warning("%s is not cached: %s", card.name, with_home(error))
        keep, folder = False, Path(tempfile.mkdtemp())
    try:
        digest, notes = _written(write, folder)
        about = {"for": target.name, "hash": digest, "notes": notes, "crc32": {n: _crc(folder / n) for n in FILES}}
        (folder / "about.json").write_bytes(sealed(about))
        dataset = read(card, folder, target, source)
        if keep:
            shutil.rmtree(target, ignore_errors=True)  # damaged, or another process's, which has the same content
            if target.is_symlink() or target.is_file():
                target.unlink()
            folder.replace(target)
        return dataset
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(write: Callable[[Path], tuple[str, dict[str, int]]], folder: Path) -> tuple[str, dict[str, int]]:
    """What `write` says; raises DataError where there is no room, which is no fault of the source."""
    try:
        return write(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise DataError(f"cannot write {folder.parent}: {os.strerror(error.errno)}; {advice(folder, error)}") from None


def read(card: Card, folder: Path, target: Path, source: str) -> Dataset:
    """The prepared data in `folder`, made to lie at `target`.

    Raises whatever is wrong with the files; DataError where their content is not what was written.
    """
    remove_parts(target)  # of another process, which was killed while this one, or a third, made the same
    about = read_sealed(folder / "about.json")
    if about["for"] != target.name:
        raise DataError("about.json is of another folder")
    for name in FILES:
        if _crc(folder / name) != about["crc32"][name]:
            raise DataError(f"{name} is not what was written")
    return load(card, folder, source, about["hash"], about["notes"])


def load(card: Card, folder: Path, source: str, digest: str, notes: dict[str, int]) -> Dataset:
    """The files of `prepare` in `folder` as arrays, with the hash and the notes that it gave."""
    import polars as pl

    def columns(file: str) -> dict[str, np.ndarray]:  # one after the other: nothing but one column is held twice
        held = for_polars(folder / file)
        numbers = [name for name in pl.read_parquet_schema(held) if name != "name" or file == FILES[0]]
        return {name: pl.read_parquet(held, columns=[name]).to_series().to_numpy(writable=True) for name in numbers}

    def names(file: str) -> pl.Series | None:
        held = for_polars(folder / file)
        return pl.read_parquet(held, columns=["name"])["name"] if "name" in pl.read_parquet_schema(held) else None

    events, users, items = (columns(file) for file in FILES)  # feedback may well be called a name
    return Dataset(
        name=card.name,
        card=card,
        source=source,
        user_ids=users["id"],
        item_ids=items["id"],
        offsets=np.concatenate(([0], np.cumsum(users["events"]))).astype(np.int64),
        items=events.pop("item"),
        times=events.pop("time", None),
        order=events.pop("order", None),
        feedback=events,
        hash=digest,
        notes=notes,
        user_names=names("users.parquet"),
        item_names=names("items.parquet"),
    )


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            crc = zlib.crc32(data, crc)
    return crc
