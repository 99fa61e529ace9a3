"""The ids of a stream of events: which there are, how often, and the place of each among them.

An id is text, so that 007 is not 7. Whole numbers as everyone writes them (7, -7, not 007 or +7) are held as numbers,
which is fast; where a column has nothing else, its ids are those numbers. Else they are places among the sorted texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

TABLE = 1 << 27  # codes below it are counted in a table, larger ones in a sorted list
LOWEST, WORDS = -(1 << 63), 1 << 33  # the codes from LOWEST on are of words: no number in a file is that low


def plain(words: pl.Series) -> pl.Series:
    """Bool: which are whole numbers of 64 bits, written as everyone does; words that are not there are not."""
    import polars as pl

    padded = words.str.starts_with("0") & (words.str.len_bytes() > 1)
    odd = padded | words.str.starts_with("-0") | words.str.starts_with("+")
    numbers = words.cast(pl.Int64, strict=False)
    return (numbers.is_not_null() & ~odd & (numbers >= LOWEST + WORDS)).fill_null(False)


def as_numbers(words: pl.Series) -> pl.Series:
    """Int64 where every word is plain, which needs no dictionary; else the words."""
    import polars as pl

    return words.cast(pl.Int64) if plain(words.head(1)).all() and plain(words).all() else words


class Ids:
    """The distinct ids of one column: numbers ascending, or places among the sorted texts and `names`.

    So they are the same on every machine, whatever the order in which a file was read.
    """

    def __init__(self, counted: bool = True) -> None:
        self.numbers, self.words = _Counts(counted), _Counts(counted)
        self.categories: Any = None
        self.held: pl.Series | None = None
        self.names: pl.Series | None = None  # the texts, where ids are places among them; after `close`
        self.ids = np.zeros(0, np.int64)
        self.events = np.zeros(0, np.int64)  # how many events each of `ids` has; means nothing unless counted

    def add(self, column: pl.Series) -> np.ndarray:
        """Count a column's ids, whole numbers or texts; gives int64 codes for `index`."""
        codes = self._codes(column)
        self.again(codes)
        return codes

    def again(self, codes: np.ndarray) -> None:
        """Count codes that `add` has given."""
        words = codes < LOWEST + WORDS
        if words.any():
            self.words.add(codes[words] - LOWEST)
            codes = codes[~words]
        if len(codes):
            self.numbers.add(codes)

    def recount(self) -> None:
        """Forget the counts, not the texts, to add again what is left of the events."""
        self.numbers.clear()
        self.words.clear()

    def _codes(self, column: pl.Series) -> np.ndarray:
        import polars as pl

        if column.dtype != pl.String:
            return column.to_numpy()
        if self.categories is None:
            self.categories = pl.Categories.random()  # one numbering for all blocks of this column
        easy = plain(column)
        words = column.filter(~easy) if easy.any() else column
        cast = words.cast(pl.Categorical(self.categories))
        if self.held is None:
            self.held = cast  # the numbering is forgotten with the last column that has it
        codes = cast.to_physical().cast(pl.Int64).to_numpy() + LOWEST
        if len(words) == len(column):
            return codes
        found = column.cast(pl.Int64, strict=False).fill_null(0).to_numpy(writable=True)
        found[~easy.to_numpy()] = codes
        return found

    def close(self) -> None:
        """All has been added: number the ids."""
        import polars as pl

        numbers, words = self.numbers.close(), self.words.close()
        if not len(words):
            self.ids, self.events, self.names = numbers, self.numbers.events, None
            return
        texts = pl.Series(words, dtype=pl.UInt32).cat.to(pl.Categorical(self.categories)).cast(pl.String)
        texts = pl.concat([pl.Series(numbers, dtype=pl.Int64).cast(pl.String), texts])
        ranked = texts.arg_sort().to_numpy()
        self.names, self.ids = texts.gather(ranked), np.arange(len(texts))
        self.events = np.concatenate([self.numbers.events, self.words.events])[ranked]
        places = np.empty(len(ranked), np.int64)
        places[ranked] = self.ids
        self.places = places[: len(numbers)], places[len(numbers) :]

    def index(self, codes: np.ndarray) -> np.ndarray:
        """The places of codes among `ids`, from 0; after `close`."""
        if self.names is None:
            return self.numbers.index(codes)
        words = codes < LOWEST + WORDS
        found = np.empty(len(codes), np.int64)
        found[words] = self.places[1][self.words.index(codes[words] - LOWEST)]
        found[~words] = self.places[0][self.numbers.index(codes[~words])]
        return found

    def name(self, place: int) -> int | str:
        """The id at a place, as it stands in the file."""
        return int(self.ids[place]) if self.names is None else str(self.names[int(place)])


class _Counts:
    """How often each of some int64 codes was met."""

    def __init__(self, counted: bool) -> None:
        self.counted = counted  # else only which codes there are
        self.counts = np.zeros(1 << 10, np.int32)  # by code, for small codes
        self.sparse: list[tuple[np.ndarray, np.ndarray]] = []  # (codes, counts), for the others
        self.codes, self.events = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.table: np.ndarray | None = None

    def clear(self) -> None:
        self.counts[:] = 0
        self.sparse = []

    def add(self, codes: np.ndarray) -> None:
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
            return
        self.sparse.append(np.unique(codes, return_counts=True))
        if sum(len(each) for each, _ in self.sparse[1:]) > len(self.sparse[0][0]) + (1 << 22):
            self._merge()

    def _merge(self) -> None:
        codes, back = np.unique(np.concatenate([each for each, _ in self.sparse]), return_inverse=True)
        counts = np.bincount(back, np.concatenate([counts for _, counts in self.sparse])).astype(np.int64)
        self.sparse = [(codes, counts)]

    def close(self) -> np.ndarray:
        """The codes, ascending; `events` has how often each was met."""
        present = np.flatnonzero(self.counts)
        self.codes, self.events = present, self.counts[present].astype(np.int64)
        if self.sparse:
            self.sparse.append((self.codes, self.events))
            self._merge()
            [(self.codes, self.events)] = self.sparse
            self.table = None
        else:
            self.table = np.zeros(len(self.counts), np.int32)
            self.table[present] = np.arange(len(present), dtype=np.int32)
        return self.codes

    def index(self, codes: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.codes, codes) if self.table is None else self.table[codes]
