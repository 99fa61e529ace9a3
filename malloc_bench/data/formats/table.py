"""Any table of events that a user has, as a card describes it: which columns, what times, how it is written."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from malloc_bench.data.formats.formats import Layout, Unit

SEPARATORS = {"tab": "\t", "space": " ", "comma": ","}
MOST_COLUMNS = 10_000  # of a file: what has more is no table of events

Column = Annotated[str, Field(min_length=1)]
Columns = Annotated[list[Column], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Table(BaseModel):
    """The settings under a card's key `table`, for format: table; only `user` and `item` must be there.

    Ids are text, so that 007 is not 7, unless `ids: number` says that anything else is a bad row. Without `time` the
    order of the rows is the order of events. Raises ValidationError where the settings contradict one another.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    user: Column
    item: Column
    time: Column | None = None
    unit: Literal["s", "ms", "us", "ns", "iso", "order"] = "s"  # order: comparable numbers, but no times
    rating: Column | None = None
    feedback: Columns = []  # more columns of numbers: clicks, seconds watched
    separator: str = "auto"  # or tab, space, comma, or the characters themselves: one or two
    header: bool | None = None  # None: there is one unless `columns` names the fields
    columns: Annotated[list[Column], Field(min_length=1, max_length=MOST_COLUMNS)] | None = None
    encoding: str = "utf-8"
    files: Literal["auto", "csv", "parquet", "arrow", "jsonl"] = "auto"
    ids: Literal["text", "number"] = "text"

    @field_validator("separator")
    @classmethod
    def _separator(cls, name: str) -> str:
        found = SEPARATORS.get(name, name)
        if found != "auto" and (len(found) not in (1, 2) or not found.isascii() or set(found) & set('"\r\n\0')):
            raise ValueError("must be auto, tab, space, comma, or one or two characters that are no quote or line end")
        if len(set(found)) > 1 and found != "auto":
            raise ValueError("of two characters must be the same one twice, as in '::'")
        return found

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, name: str) -> str:
        try:
            "a".encode(codecs.lookup(name).name)
        except (LookupError, ValueError):
            raise ValueError(f"no text encoding is named {name!r}: utf-8, latin-1, utf-16 are") from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Table:
        names = [name for name in (self.user, self.item, self.time, self.rating, *self.feedback) if name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column '{twice[0]}' is named for two things")
        if self.time is None and self.unit != "s":
            raise ValueError(f"unit: {self.unit} needs time, the column it is of")
        if self.rating and "rating" in self.feedback:
            raise ValueError(f"feedback has a column 'rating', and so is '{self.rating}' called here")
        taken = sorted({"user", "item", "order", "time", "row"} & set(self.feedback))
        if taken:
            raise ValueError(f"feedback: '{taken[0]}' is a word of our own: rename the column in the file")
        if self.columns is None and self.header is False:
            raise ValueError("header: false needs columns, the names of the fields in their order")
        if self.columns is not None:
            if self.header:
                raise ValueError("columns are for files without a header: leave one of the two out")
            if len(set(self.columns)) < len(self.columns):
                raise ValueError("columns: a name stands there twice")
            for name in names:
                if name not in self.columns:
                    raise ValueError(f"columns: '{name}' is not among them")
        return self

    def layout(self) -> Layout:
        """How the reader of all formats is told."""
        units: dict[str, Unit] = {"s": "s.fraction"}  # 1387670400.5 is a time
        feedback = {self.rating: "rating"} if self.rating else {}
        return Layout(
            lines={"csv": "table", "jsonl": "json"}.get(self.files, self.files),  # type: ignore[arg-type]
            user=self.user,
            item=self.item,
            time=self.time,
            unit=units.get(self.unit, self.unit),  # type: ignore[arg-type]
            feedback=feedback | {name: name for name in self.feedback},
            text=(self.user, self.item) if self.ids == "text" else (),
            columns=None if self.columns is None else tuple(self.columns),
            separator=self.separator,
            encoding=codecs.lookup(self.encoding).name,
        )
