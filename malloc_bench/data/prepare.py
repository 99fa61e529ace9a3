"""A source's events, however many, as prepared files sorted by user and time, in bounded memory.

First the frames are written down as they come, and users and items counted. Then the rows are dealt into buckets of
consecutive users, which are sorted one after the other. No more than a bucket and the ids are ever held.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from malloc_bench.data.dataset import content_hash, ranks, settled_ties
from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.ids import Ids
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.times import shown

if TYPE_CHECKING:
    import polars as pl

BUCKET = 1_000_000  # events sorted at once, few enough to lie in a cache; a user with more has a bucket of its own
CHUNK = 200_000  # events dealt at once


def prepare(frames: Iterable[pl.DataFrame], reader: Reader, folder: Path) -> tuple[str, dict[str, int]]:
    """Write `events.parquet`, `users.parquet` and `items.parquet` into `folder`; the content's hash and the notes.

    Raises DataError where a file is bad and the card's policy is to reject that, OSError where there is no room.
    """
    judge, frames = reader.judge, iter(frames)
    first = next(frames, None)  # the reader knows its feedback once it has seen a file
    rejects = "reject" in (judge.answer("duplicates"), judge.answer("single_event_users"))
    record = np.dtype(
        [("user", "<i8"), ("item", "<i8"), ("order", "<i8")]
        + [(name, "<f4") for name in sorted(reader.feedback.values())]
        + [("row", "<i8")] * rejects  # only to say where it stood
    )
    users, items = Ids(), Ids(counted=False)
    with tempfile.TemporaryDirectory(prefix="spill-", dir=folder) as temporary:
        spill = Path(temporary) / "all"
        with spill.open("wb") as file:
            for frame in chain([] if first is None else [first], frames):
                _records(frame, record, users, items, reader).tofile(file)
        if not spill.stat().st_size:
            raise _nothing(reader)
        users.close()
        if _without_single(users, items, spill, record, reader):
            users.close()
        items.close()
        if not len(users.ids):
            raise _nothing(reader)
        _write_ids(folder / "items.parquet", items.names, id=items.ids)
        buckets = _deal(spill, record, users, items)
        counts, ordered = _sort(buckets, record, users, reader, folder / "events.parquet")
        if reader.layout.ranked and not ordered:
            _drop(folder / "events.parquet", "order")
    users.events = counts
    _write_ids(folder / "users.parquet", users.names, id=users.ids, events=counts)
    return _hash(folder, users, items, reader, ordered), judge.notes


def _nothing(reader: Reader) -> DataError:
    return DataError(f"{reader.starts[0][1]}: no event is left of it: {reader.judge.notes}")


def _records(frame: pl.DataFrame, record: np.dtype, users: Ids, items: Ids, reader: Reader) -> np.ndarray:
    rows = np.empty(len(frame), record)
    rows["user"], rows["item"] = users.add(frame["user"]), items.add(frame["item"])
    for name in (record.names or ())[2:]:
        last = reader.events
        rows[name] = np.arange(last - len(frame), last) if name == "row" else frame[name].to_numpy()
    return rows


def _chunks(path: Path, record: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(rows := np.fromfile(file, record, CHUNK)):
            yield rows


def _without_single(users: Ids, items: Ids, spill: Path, record: np.dtype, reader: Reader) -> bool:
    """Meet the policy for users with one event; True where they were dropped, and all was counted again."""
    single = users.events == 1
    if not single.any():
        return False
    judge, message = reader.judge, ""
    if judge.answer("single_event_users") == "reject":
        rows = next(rows for rows in _chunks(spill, record) if single[users.index(rows["user"])].any())
        first = rows[single[users.index(rows["user"])]][0]
        user = users.name(users.index(first[None]["user"])[0])
        message = f"{reader.place(int(first['row']))}: user {user} has one event only"
    if judge.meet("single_event_users", int(single.sum()), message) == "keep":
        return False
    kept = spill.with_name("kept")
    users_before = users.index
    items.recount()
    codes: list[np.ndarray] = []
    with kept.open("wb") as file:
        for rows in _chunks(spill, record):
            left = rows[~single[users_before(rows["user"])]]
            left.tofile(file)
            codes.append(np.ascontiguousarray(left["user"]))
            if len(left):
                items.again(np.ascontiguousarray(left["item"]))
    users.recount()
    for each in codes:
        if len(each):
            users.again(each)
    kept.replace(spill)
    return True


def _deal(spill: Path, record: np.dtype, users: Ids, items: Ids) -> list[tuple[Path, int, int]]:
    """(file, first user, end) of buckets of consecutive users, their rows in file order; ids are places now."""
    bucket = ((np.cumsum(users.events) - 1) // BUCKET).astype(np.uint16)
    bucket = np.unique(bucket, return_inverse=True)[1].astype(np.uint16)
    bounds = np.searchsorted(bucket, np.arange(int(bucket[-1]) + 2))
    files = [spill.with_name(f"bucket-{i}") for i in range(len(bounds) - 1)]
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in files]
        for rows in _chunks(spill, record):
            user = users.index(rows["user"])
            rows["user"], rows["item"] = user, items.index(rows["item"]) + 1
            into = bucket[user]
            rows = rows[np.argsort(into, kind="stable")]
            ends = np.cumsum(np.bincount(into, minlength=len(files)))
            for file, start, end in zip(opened, [0, *ends], ends):
                rows[start:end].tofile(file)
    spill.unlink()
    return [(path, int(bounds[i]), int(bounds[i + 1])) for i, path in enumerate(files)]


def _sort(
    buckets: list[tuple[Path, int, int]], record: np.dtype, users: Ids, reader: Reader, target: Path
) -> tuple[np.ndarray, bool]:
    """Write the buckets sorted by user and time, ties by their policy; how many events each user has then, and

    whether, without times, some of a user have the same order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    timed, ranked = reader.layout.has_time, reader.layout.ranked
    clock = ["time"] if timed else ["order"] if ranked else []
    names = ["item", *clock, *sorted(reader.feedback.values())]
    types = {"item": pa.int32(), "time": pa.int64(), "order": pa.int64()}
    schema = pa.schema([(name, types.get(name, pa.float32())) for name in names])
    counts, ordered = np.zeros(len(users.ids), np.int64), False
    with pq.ParquetWriter(target, schema, compression="lz4", use_dictionary=False, write_statistics=False) as writer:
        for path, first, end in buckets:
            rows = np.fromfile(path, record)
            path.unlink()
            rows = rows[stable_order(rows["user"], rows["order"])]
            if ranked:
                rows["order"] = ranks(rows["user"], rows["order"])
                same = (rows["user"][1:] == rows["user"][:-1]) & (rows["order"][1:] == rows["order"][:-1])
                ordered |= bool(same.any())
            if clock:
                rows = _ties(rows, reader)
                rows = _without_duplicates(rows, reader, users)
            counts[first:end] = np.bincount(rows["user"] - first, minlength=end - first)
            held = {name: rows[name] for name in names if name != "time"}
            if timed:
                held["time"] = rows["order"] // reader.layout.per_second
            arrays = [pa.array(np.ascontiguousarray(held[each.name]), each.type) for each in schema]
            writer.write_table(pa.table(arrays, schema=schema))
    return counts, ordered


def _drop(path: Path, name: str) -> None:
    """Leave a column out of a file of events."""
    import pyarrow.parquet as pq

    less = path.with_name("less")
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow.remove(file.schema_arrow.get_field_index(name))
        with pq.ParquetWriter(less, schema, compression="lz4", use_dictionary=False, write_statistics=False) as writer:
            for i in range(file.metadata.num_row_groups):
                writer.write_table(file.read_row_group(i, columns=schema.names))
    less.replace(path)


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """As np.lexsort(reversed(keys)), for integers: by 16 bits at a time, which numpy sorts in linear time."""
    order = np.arange(len(keys[0]))
    for key in reversed(keys) if len(order) else ():
        left = (key - key.min()).astype(np.uint64)  # the difference is right also where it wraps
        high = int(left.max())
        for shift in range(0, max(high.bit_length(), 1), 16):
            digit = (left >> np.uint64(shift)).astype(np.uint16)[order]
            order = order[np.argsort(digit, kind="stable")]
    return order


def _ties(rows: np.ndarray, reader: Reader) -> np.ndarray:
    """Events of a user at one time or order, in the order that the policy says; `Dataset.tied` counts them."""
    columns = rows["user"], rows["item"], rows["order"]
    felt = [rows[name] for name in sorted(reader.feedback.values())]
    tied, again = settled_ties(reader.judge.answer("ties"), *columns, reader.layout.per_second, felt)
    rows[tied] = rows[tied[again]]
    return rows


def _without_duplicates(rows: np.ndarray, reader: Reader, users: Ids) -> np.ndarray:
    """Meet the policy for events that repeat another's user, item and time, or order."""
    same = (rows["user"][1:] == rows["user"][:-1]) & (rows["order"][1:] == rows["order"][:-1])
    tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])  # only they can repeat one another
    ties = rows[tied]
    order = np.lexsort((ties["item"], ties["order"], ties["user"]))
    ties = ties[order]
    keys = [ties[name] for name in ("user", "order", "item")]
    again = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    repeats = tied[order[1:][again]]
    if not len(repeats):
        return rows
    message = ""
    if reader.judge.answer("duplicates") == "reject":
        alike = np.logical_and.reduce([key == key[1:][again][0] for key in keys])
        one = max(ties[alike], key=lambda each: each["row"])
        user = users.name(one["user"])
        when = shown(one["order"] / 10**6 if reader.layout.unit == "s.fraction" else one["order"], reader.layout)
        when = f"at the same time {when}" if reader.layout.has_time else "of the same order"
        message = f"{reader.place(int(one['row']))}: user {user} has the same item {when} twice"
    if reader.judge.meet("duplicates", len(repeats), message) == "keep":
        return rows
    return np.delete(rows, repeats)


def _write_ids(path: Path, names: pl.Series | None, **columns: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(column, pa.int64()) for name, column in columns.items()})
    if names is not None:
        table = table.append_column("name", names.to_arrow())
    pq.write_table(table, path, compression="lz4", use_dictionary=False)


def _hash(folder: Path, users: Ids, items: Ids, reader: Reader, ordered: bool) -> str:
    """As `group` would have it, column after column from the file."""
    import pyarrow.parquet as pq

    offsets = np.r_[0, np.cumsum(users.events)]
    with pq.ParquetFile(folder / "events.parquet") as file:
        groups = range(file.metadata.num_row_groups)

        def column(name: str) -> Iterator[np.ndarray]:
            return (file.read_row_group(i, columns=[name]).column(0).to_numpy() for i in groups)

        def columns() -> Iterator[tuple[str, str, int, Iterable[np.ndarray]]]:
            for name, ids in (("user_ids", users.ids), ("item_ids", items.ids), ("offsets", offsets)):
                yield name, "<i8", len(ids), [ids.astype("<i8")]
            yield "items", "<i4", int(offsets[-1]), column("item")
            if reader.layout.has_time:
                yield "times", "<i8", int(offsets[-1]), column("time")
            if ordered:
                yield "order", "<i8", int(offsets[-1]), column("order")
            for name in sorted(reader.feedback.values()):
                yield name, "<f4", int(offsets[-1]), column(name)

        return content_hash(columns())
