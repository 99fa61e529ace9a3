"""The ids of a stream of events: which there are, how often, and the place of each among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

TABLE = 1 << 27  # ids below it are counted in a table, larger ones in a sorted list


class Ids:
    """Distinct ids of one column, ascending at the end; strings get their place among the sorted strings as id.

    So the numbers are the same on every machine, whatever the order in which a file was read.
    """

    def __init__(self, counted: bool = True) -> None:
        self.counted = counted  # else only which ids there are: `events` means nothing then
        self.counts = np.zeros(1 << 10, np.int32)  # by id, for small ids
        self.sparse: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, counts), for the others
        self.categories: Any = None
        self.held: pl.Series | None = None
        self.ids = np.zeros(0, np.int64)
        self.events = np.zeros(0, np.int64)  # how many events each of `ids` has

    def add(self, column: pl.Series) -> np.ndarray:
        """Count a column's ids; gives int64 codes for `index`: the ids themselves, or numbers for strings."""
        codes = self._codes(column)
        low, high = int(codes.min()), int(codes.max())
        if low >= 0 and high < TABLE:
            if high >= len(self.counts):
                grown = np.zeros(min(TABLE, max(2 * len(self.counts), high + 1)), np.int32)
                grown[: len(self.counts)] = self.counts
                self.counts = grown
            if not self.counted:
                self.counts[codes] = 1
            elif high < 4 * len(codes):
                counted = np.bincount(codes)
                self.counts[: len(counted)] += counted.astype(np.int32)
            else:
                np.add.at(self.counts, codes, 1)
        else:
            self.sparse.append(np.unique(codes, return_counts=True))
            if sum(len(ids) for ids, _ in self.sparse[1:]) > len(self.sparse[0][0]) + (1 << 22):
                self._merge()
        return codes

    def _codes(self, column: pl.Series) -> np.ndarray:
        import polars as pl

        if column.dtype != pl.String:
            return column.to_numpy()
        if self.categories is None:
            self.categories = pl.Categories.random()  # one numbering for all blocks of this column
        cast = column.cast(pl.Categorical(self.categories))
        if self.held is None:
            self.held = cast  # the numbering is forgotten with the last column that has it
        return cast.to_physical().cast(pl.Int64).to_numpy()

    def _merge(self) -> None:
        ids, back = np.unique(np.concatenate([ids for ids, _ in self.sparse]), return_inverse=True)
        counts = np.bincount(back, np.concatenate([counts for _, counts in self.sparse])).astype(np.int64)
        self.sparse = [(ids, counts)]

    def close(self) -> None:
        """All has been added (or with `drop`, taken away): number the ids."""
        import polars as pl

        present = np.flatnonzero(self.counts)
        if self.sparse:
            self.sparse.append((present, self.counts[present].astype(np.int64)))
            self._merge()
            [(self.ids, self.events)] = self.sparse
            self.table = None
            return
        self.events = self.counts[present].astype(np.int64)
        self.table = np.zeros(len(self.counts), np.int32)
        if self.categories is None:
            self.ids = present
            self.table[present] = np.arange(len(present), dtype=np.int32)
            return
        words = pl.Series(present, dtype=pl.UInt32).cat.to(pl.Categorical(self.categories)).cast(pl.String)
        ranked = words.arg_sort().to_numpy()
        self.ids, self.events = np.arange(len(present)), self.events[ranked]
        self.table[present[ranked]] = np.arange(len(present), dtype=np.int32)

    def index(self, codes: np.ndarray) -> np.ndarray:
        """The places of codes among `ids`, from 0; after `close`."""
        return np.searchsorted(self.ids, codes) if self.table is None else self.table[codes]

    def recount(self) -> None:
        """Forget the counts, not the strings, to add again what is left of the events."""
        self.counts[:] = 0
        self.sparse = []

    def again(self, codes: np.ndarray) -> None:
        """Count codes that `add` has given."""
        import polars as pl

        categories, self.categories = self.categories, None
        self.add(pl.Series(codes, dtype=pl.Int64))
        self.categories = categories
