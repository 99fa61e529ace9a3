"""What category an item is of, from a publisher's file about items."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.formats import LAYOUTS, Layout
from malloc_bench.data.sources.archive import Part, blocks
from malloc_bench.data.sources.card_sources import LocalSource
from malloc_bench.data.sources.fetch import opened

if TYPE_CHECKING:
    from malloc_bench.data.sources.cards import Card

_MB = 1 << 20


def read_categories(card: Card, item_ids: np.ndarray) -> np.ndarray:
    """(n_items,) int64: the place of each item's category among the sorted names, from 1; 0: the file names none.

    Of several categories the first counts. The user's own files are tried first, then the card's other sources in
    order. Raises DataError where none answers.
    """
    failures: list[str] = []
    for source in sorted(card.categories, key=lambda each: not isinstance(each, LocalSource)):
        assert source.format is not None, "the card is validated"
        try:
            with opened(source, card.family, offline=False, progress=True) as parts:
                found = [_columns(part, LAYOUTS[source.format]) for part in parts]
        except DataError as error:
            failures.append(f"{source} ({error})")
            continue
        ids, names = (np.concatenate(columns) for columns in zip(*found))
        known, codes = np.unique(names, return_inverse=True)
        codes += known[0] != ""  # 0 is for no name
        order = np.argsort(ids, kind="stable")
        at = order[np.minimum(np.searchsorted(ids, item_ids, sorter=order), len(ids) - 1)]
        return np.where(ids[at] == item_ids, codes[at], 0)
    raise DataError(f"{card.name}: no source of its items' categories answered: {'; '.join(failures)}")


def _columns(part: Part, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64) and first categories ("" where there is none) of all lines of a file."""
    import polars as pl

    text = b"".join(lines for lines, _ in blocks(part, _MB)).decode(layout.encoding, "replace")
    one = layout.separator if len(layout.separator) == 1 else "\x1f"  # polars takes no longer ones
    try:
        frame = pl.read_csv(
            io.StringIO(text.replace(layout.separator, one)),
            separator=one,
            has_header=layout.columns is None,
            new_columns=layout.columns,
            quote_char='"' if one == "," else None,
            infer_schema=False,
        )
        frame = frame.rename(lambda name: name.partition(":")[0])  # recbole's are name:type
        first = pl.col(layout.category).str.split(layout.many).list.first().fill_null("")
        found = frame.select(pl.col(layout.item).cast(pl.Int64), first)
    except pl.exceptions.PolarsError as error:
        wanted = f"lines with {layout.item} (a number) and {layout.category}"
        raise DataError(f"{part.name}: expected {wanted}, found: {str(error).splitlines()[0]}") from None
    if not len(found):
        raise DataError(f"{part.name}: no item is in it")
    return found[layout.item].to_numpy(), found[layout.category].to_numpy().astype(str)
