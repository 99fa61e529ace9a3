"""What category an item is of, from a publisher's file about items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.batch import row_of
from malloc_bench.data.formats.columns import WHOLE, short
from malloc_bench.data.formats.delimited import table
from malloc_bench.data.formats.formats import LAYOUTS, Layout
from malloc_bench.data.sources.archive import Part
from malloc_bench.data.sources.card_sources import LocalSource
from malloc_bench.data.sources.fetch import opened

if TYPE_CHECKING:
    import polars as pl

    from malloc_bench.data.sources.cards import Card

_MB = 1 << 20


def read_categories(card: Card, items: np.ndarray | pl.Series) -> np.ndarray:
    """(n_items,) int64: the place of each item's category among the sorted names, from 1; 0: the file names none.

    `items` are ids as the source has them. Of several categories the first counts. The user's own files are tried
    first, then the card's other sources in order. Raises DataError where none answers.
    """
    import polars as pl

    failures: list[str] = []
    for source in sorted(card.categories, key=lambda each: not isinstance(each, LocalSource)):
        assert source.format is not None, "the card is validated"
        try:
            with opened(source, card.family, offline=False, progress=True) as parts:
                found = first_categories(parts, LAYOUTS[source.format])
        except DataError as error:
            failures.append(f"{source} ({error})")
            continue
        known = found["category"].unique().sort().to_list()
        places = {name: at + (known[0] != "") for at, name in enumerate(known)}  # 0 is for no name
        of_item = found.unique("item", keep="first").with_columns(
            pl.col("category").replace_strict(places, return_dtype=pl.Int64)
        )
        asked = pl.DataFrame({"item": pl.Series(items).cast(pl.String)})
        placed = asked.join(of_item, "item", how="left", maintain_order="left")["category"]
        if placed.null_count() < len(placed):
            return placed.fill_null(0).to_numpy()
        failures.append(f"{source} (has none of the data's items, not {short(asked[0, 0])}, but {short(found[0, 0])})")
    raise DataError(f"{card.name}: no source of its items' categories answered: {'; '.join(failures)}")


def first_categories(parts: Sequence[Part], layout: Layout) -> pl.DataFrame:
    """`item` and its first `category` ("" where there is none) of all lines of files about items, as text."""
    import polars as pl

    return pl.concat([_columns(part, layout) for part in parts])


def _columns(part: Part, layout: Layout) -> pl.DataFrame:
    import polars as pl

    found = []
    for batch in table(part, layout, dict.fromkeys((layout.item, layout.category), pl.String), _MB):
        items = batch.columns[layout.item]
        broken = np.zeros(len(items), bool) if batch.broken is None else batch.broken
        must = "." if layout.item in layout.text else WHOLE
        wrong = broken | ~items.str.contains(must).fill_null(False).to_numpy()
        if wrong.any():
            at = int(wrong.argmax())
            why = batch.why(at) if broken[at] else f"{layout.item} is {short(items[at])}, not an id"
            raise DataError(f"{part.name}: row {row_of(batch.rows, at)}: {why}")
        first = batch.columns[layout.category].str.split(layout.many).list.first().fill_null("")
        found.append(pl.DataFrame({"item": items, "category": first}))
    if not found:
        raise DataError(f"{part.name}: no item is in it")
    return pl.concat(found)
