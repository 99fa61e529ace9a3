"""Times of events: numbers of a unit, dates, or whatever else gives an order; as whole numbers of one unit."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.batch import nulled
from malloc_bench.data.formats.formats import Layout

if TYPE_CHECKING:
    import polars as pl

LATEST = 4_102_444_800  # unix seconds of 2100-01-01: no event is that late
MODERN = 631_152_000  # of 1990-01-01: logs begin later
FIRST_YEAR = 31_536_000  # of 1971-01-01: what has all its times in 1970 counts in another unit
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FARTHEST = 1 << 62
EXACT, LARGEST = 1 << 53, 4 * 10**18  # floats are whole and exact up to the first; beyond the second no key is left
ISO = r"^(\d{4}-\d\d?-\d\d?)(?:[T ](\d\d?:\d\d)(:\d\d(?:[.,]\d{1,9})?)?)?(?: ?(Z|z|UTC|[+-][01]\d(?::?[0-5]\d)?))?$"


def parsed(file: str, name: str, raw: pl.Series, layout: Layout) -> tuple[pl.Series, str]:
    """A column of times as numbers (Int64 or Float64) of the layout's unit, null where one is none; what it must be.

    Dates become numbers too, of the unit that orders events. Raises DataError for columns of anything else.
    """
    import polars as pl

    unit = layout.unit
    if raw.dtype.is_temporal() and raw.dtype in (pl.Date, pl.Datetime):
        return _since(raw, layout), "not a date"
    if raw.dtype == pl.String and unit in {"date", "iso"}:
        if unit == "iso":
            return _iso(raw), "not a date like 2024-02-29 or 2024-02-29T13:05:00.250+01:00"
        moments = raw.str.to_datetime(layout.date, time_unit="ms", strict=False)
        return _since(moments, layout), f"not a date like {layout.date}"
    if raw.dtype == pl.String:
        return _numbers(raw, unit)
    if unit == "iso" or not raw.dtype.is_numeric():
        must = "dates as text" if unit == "iso" else "numbers"
        raise DataError(f"{file}: {name} holds {raw.dtype}, not {must}")
    if not raw.dtype.is_integer():
        return _numbers(raw.cast(pl.Float64, strict=False), unit)
    return raw.cast(pl.Int64, strict=False), "not a number of 63 bits"


def _numbers(raw: pl.Series, unit: str) -> tuple[pl.Series, str]:
    import polars as pl

    must = "not a number"
    whole = raw.cast(pl.Int64, strict=False) if raw.dtype == pl.String else None
    if whole is not None and not whole.null_count():
        return whole, must
    if raw.dtype == pl.String:
        raw = raw.str.strip_chars()
    values = raw.cast(pl.Float64, strict=False)
    values = nulled(values, ~values.is_finite())
    if raw.dtype == pl.String and values.null_count() and raw.filter(values.is_null()).str.contains(ISO).any():
        must = "not a number: unit iso is for dates"
    if unit in {"s.fraction", "order"}:
        return values, must
    values = nulled(values, (values != values.round()) | (values.abs() > FARTHEST))
    values = values.cast(pl.Int64, strict=False)  # 1387670400.0 is whole
    return (values if whole is None else whole.fill_null(values)), must


def _since(moments: pl.Series, layout: Layout) -> pl.Series:
    """Dates and datetimes as numbers of the unit that the layout's times are in."""
    import polars as pl

    count = moments.to_physical().cast(pl.Int64)  # polars' own casts end in a panic where a date is far
    unit = "days" if moments.dtype == pl.Date else moments.dtype.time_unit  # type: ignore[attr-defined]
    if unit == layout.unit == "ns":
        return count
    since = count // 1000 if unit == "ns" else _times(count, {"days": 86_400 * 10**6, "ms": 1000, "us": 1}[unit])
    per_unit = {"minutes": 60_000_000, "s": 10**6, "date": 10**6, "ms": 10**3, "ns": 0}.get(layout.unit, 1)
    if layout.unit in {"s.fraction", "order"}:
        return since / 1e6
    return _times(since, 1000) if per_unit == 0 else since // per_unit


def _times(count: pl.Series, factor: int) -> pl.Series:
    """The product, or what is far beyond any time: it would wrap."""
    return count.clip(-FARTHEST // factor, FARTHEST // factor) * factor


def _iso(raw: pl.Series) -> pl.Series:
    """Microseconds since 1970; without a zone it is UTC."""
    import polars as pl

    field = pl.col("t").struct.field
    date, minute, second, zone = (field(str(i)) for i in range(1, 5))
    text = date + "T" + minute.fill_null("00:00") + second.str.replace(",", ".").fill_null(":00")
    hours = zone.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0)
    minutes = zone.str.extract(r"(\d{2})$").cast(pl.Int64, strict=False)
    minutes = pl.when(zone.str.len_bytes() > 3).then(minutes).fill_null(0)
    offset = (hours * 60 + minutes) * pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    moments = text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    groups = raw.str.strip_chars().str.extract_groups(ISO).alias("t").to_frame()
    return groups.select(moments.dt.epoch("us") - offset * 60_000_000).to_series()


def ordered(raw: pl.Series, layout: Layout) -> tuple[pl.Series, pl.Series, str]:
    """What events are ordered by (Int64), which of it is bad, and what it must be.

    Whole numbers of `layout.per_second` to the second, or integers that compare as the file's numbers do.
    """
    import polars as pl

    if layout.unit == "order":
        if raw.dtype.is_integer() and layout.lines == "parquet":
            return raw, pl.repeat(False, len(raw), eager=True), ""
        value = raw.cast(pl.Float64) + 0.0  # -0.0 is 0; floats from 0 on compare as their bits do
        keys = value.to_numpy().view(np.int64)
        large = (value >= EXACT).to_numpy()
        if large.any():  # nanoseconds, or ids that grow: floats have not so many digits
            whole = raw.clip(EXACT, LARGEST).cast(pl.Int64).to_numpy() - EXACT
            keys = np.where(large, np.float64(EXACT).view(np.int64) + whole, keys)
        return pl.Series(keys), (raw < 0) | (raw > LARGEST), f"a number from 0 to {LARGEST:.0e}"
    must = "a time between 1970 and 2099"
    times = {"s.fraction": 10**6, "minutes": 60}.get(layout.unit, 1)
    unknown = raw == 0
    if not unknown.any() or raw.max() * times < MODERN * layout.per_second:  # type: ignore[operator]
        unknown = pl.repeat(False, len(raw), eager=True)  # what counts from its own first moment
    else:
        must += ", of which 0 is none where others are of today"
    if times == 1 and raw.dtype == pl.Int64:
        return raw, (raw < 0) | (raw >= LATEST * layout.per_second) | unknown, must
    value = raw.cast(pl.Float64) * times
    bad = (value < 0) | (value >= LATEST * layout.per_second)
    far = pl.select(pl.when(raw < 0).then(-FARTHEST).otherwise(FARTHEST)).to_series() if bad.any() else None
    order = raw * times if raw.dtype.is_integer() else value.round().cast(pl.Int64, strict=False)
    if far is not None and (value.abs() > FARTHEST).any():  # beyond 64 bits the product means nothing
        order = nulled(order, value.abs() > FARTHEST).fill_null(far)
    return order, bad | unknown, must


def shown(value: float, layout: Layout) -> str:
    """A time as messages have it."""
    return f"{np.datetime64(int(value), 'us')} UTC" if layout.unit == "iso" else str(value)


def all_in_1970(latest: int, layout: Layout) -> str | None:
    """What is said of a file whose last time (in `ordered`'s unit) is that early: no unit known here fits it."""
    unit = "s" if layout.unit == "s.fraction" else layout.unit
    if unit not in PER_SECOND or not 0 <= latest < FIRST_YEAR * layout.per_second:
        return None
    hint = "Dates as text have unit iso; unit order takes numbers for an order and nothing more"
    return f"as {unit} all times lie in 1970: are they days, or dates as numbers (20240229)? {hint}"


def other_unit(raw: pl.Series, layout: Layout) -> str | None:
    """What is said of times that fit another unit than theirs: seconds as ms are 1970, ms as seconds beyond 2100."""
    unit = "s" if layout.unit == "s.fraction" else layout.unit
    if unit not in PER_SECOND or not len(raw):
        return None
    some = np.sort(raw.gather_every(len(raw) // 1000 + 1).to_numpy())
    middle = float(some[(len(some) - 1) // 2])  # one of them: the mean of two units is neither
    if FIRST_YEAR <= middle / PER_SECOND[unit] < LATEST:
        return None
    for other, per_second in PER_SECOND.items():
        if MODERN <= middle / per_second < LATEST:
            day = datetime.fromtimestamp(middle / per_second, UTC).date()
            far = "beyond 2100" if middle / PER_SECOND[unit] >= LATEST else "in 1970"
            return f"{middle:.0f} as {unit} is {far}, as {other} it is {day}: the unit must be {other}"
    return None
