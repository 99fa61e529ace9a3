"""LMDB: a memory-mapped B+ tree on disk, many readers and one writer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from malloc_bench.files import new_part
from malloc_bench.measure.stores.base import Store, StoreError
from malloc_bench.paths import home

_MOST = 1 << 40  # bytes of address space; the file is as large as what is in it


class Lmdb(Store):
    """A folder below MALLOC_BENCH_HOME, of this process alone and removed by `close`; what dead ones left goes too.

    A put is one transaction that is not synced to the disk: a state that is lost can be made again. What was read
    lately comes from the page cache.
    """

    name = "lmdb"

    def __init__(self, folder: Path | None = None) -> None:
        self.owns = folder is None
        with _told():
            self.folder = _made() if folder is None else folder
            self.env = _open(self.folder)

    def get(self, key: bytes) -> bytes:
        with _told(), self.env.begin() as reading:
            found = reading.get(key)
        if found is None:
            raise StoreError(f"lmdb: no key {key!r}")
        return bytes(found)

    def put(self, key: bytes, value: bytes) -> None:
        with _told(), self.env.begin(write=True) as writing:
            writing.put(key, value)

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        with _told(), self.env.begin(write=True) as writing:
            for key, value in values.items():
                writing.put(key, value)

    def at_rest(self) -> int:
        """Of the file, freed pages that will be used again among them."""
        with _told():
            return int((self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"])

    def client(self) -> Lmdb:
        self.env.close()  # the copy that the fork has made: a process may open a folder once
        return Lmdb(self.folder)

    def close(self) -> None:
        self.env.close()
        if self.owns:
            shutil.rmtree(self.folder, ignore_errors=True)


def _made() -> Path:
    folder = new_part(home() / "stores" / "lmdb")
    folder.mkdir(parents=True)
    return folder


def _open(folder: Path) -> Any:
    import lmdb

    return lmdb.open(str(folder), map_size=_MOST, sync=False, metasync=False, readahead=False, max_dbs=0)


@contextmanager
def _told() -> Iterator[None]:
    import lmdb

    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"lmdb: {error}") from None
