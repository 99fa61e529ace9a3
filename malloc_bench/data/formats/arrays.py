"""Tables that are no text: numpy arrays, parquet, and Arrow's files and streams (feather)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from tokenize import TokenError
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.batch import Batch
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.sources.archive import DAMAGE, Part, read_whole

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

ROWS = 1 << 17  # of a batch
MOST_ROWS = 100  # to a byte of a parquet file: what has more was not written by people who interact


def numpy_array(part: Part, layout: Layout, types: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """An .npy file of whole numbers, a column for each of the layout's; read as what its header says, no more."""
    import polars as pl

    data = read_whole(part)
    if not data:
        return
    shape, fortran, dtype, start = _header(data, part.name)
    told = list(layout.columns or types)
    if len(shape) != 2 or shape[1] != len(told) or dtype.kind not in "iu":
        raise DataError(f"{part.name}: holds {dtype}{list(shape)}, not rows of {', '.join(told)}")
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) - start != expected:
        what = f"{len(data) - start} bytes of values where {list(shape)} of {dtype} are {expected}"
        raise DataError(f"{part.name}: no readable numpy array: {what}: is it cut?")
    array = np.frombuffer(data, dtype, shape[0] * shape[1], start).reshape(shape, order="F" if fortran else "C")
    for at in range(0, len(array), ROWS):
        rows = array[at : at + ROWS].astype(dtype.newbyteorder("="))
        yield Batch(part.name, at + 1, {name: pl.Series(name, rows[:, told.index(name)]) for name in types})


def _header(data: bytes, file: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, type, and where the values begin."""
    if data.startswith(b"PK\x03\x04"):
        raise DataError(f"{file}: no readable numpy array: it is a .npz, several in a zip: save the one alone as .npy")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = readers[version](stream)
        if dtype.hasobject or not all(type(n) is int and 0 <= n <= len(data) for n in shape):
            raise ValueError(f"holds {'objects' if dtype.hasobject else f'the shape {str(shape)[:60]}'}")
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError, OverflowError) as error:
        raise DataError(f"{file}: no readable numpy array: {str(error).splitlines()[0][:120]}") from None
    return shape, fortran, dtype, stream.tell()


def parquet(part: Part, layout: Layout, types: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """A parquet file, some rows at a time."""
    with _seekable(part) as stream:
        yield from _guarded(part.name, "parquet", types, lambda: _parquet(stream, types, part.name))


def _parquet(stream: IO[bytes], names: Iterable[str], name: str) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream)
    _has(file.schema_arrow, names, name)
    bytes_ = stream.seek(0, io.SEEK_END)
    if file.metadata.num_rows > MOST_ROWS * bytes_:
        raise DataError(f"{name}: {file.metadata.num_rows} rows from {bytes_} bytes: a bomb?")
    yield from file.iter_batches(ROWS, columns=list(names), use_threads=False)


def arrow(part: Part, layout: Layout, types: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """An Arrow file (feather 2) or stream, batch by batch."""
    with _seekable(part) as stream:
        yield from _guarded(part.name, "Arrow file", types, lambda: _arrow(stream, types, part.name))


def _arrow(stream: IO[bytes], names: Iterable[str], name: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    opened = pa.ipc.open_file(stream, options=options) if is_file else pa.ipc.open_stream(stream, options=options)
    _has(opened.schema, names, name)
    for batch in (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened:
        yield batch.select(list(names))


def _has(schema: pa.Schema, names: Iterable[str], file: str) -> None:
    for name in names:
        found = schema.names.count(name)
        if found != 1:
            what = f"stands there {found} times" if found else f"among {', '.join(schema.names[:30])}"
            raise DataError(f"{file}: {'' if found else 'no '}column '{name}' {what}")


def _guarded(file: str, kind: str, names: Iterable[str], opened: Any) -> Iterator[Batch]:
    """The batches of a reader, each of them checked before anything follows its offsets."""
    import polars as pl
    import pyarrow as pa

    row = 1
    try:
        for batch in opened():
            batch.validate(full=True)
            columns = {name: _series(name, batch.column(name), file) for name in names}
            if batch.num_rows:
                yield Batch(file, row, columns)
            row += batch.num_rows
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError, KeyError, MemoryError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{file}: no readable {kind}: after row {row - 1}: {told}") from None


def _series(name: str, column: pa.Array, file: str) -> pl.Series:
    import polars as pl
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = column.cast(pa.large_string())  # text of older writers
    if pa.types.is_nested(column.type) or pa.types.is_decimal256(column.type):  # polars ends the process at the latter
        raise DataError(f"{file}: {name} holds {column.type}, not one text or number a row")
    return pl.Series(name, pl.from_arrow(column))


def _seekable(part: Part) -> IO[bytes]:
    """The part as a file on disk, or in memory where it is packed."""
    try:
        stream = part.open()
    except DAMAGE as error:
        raise DataError(f"{part.name} cannot be unpacked: {error}") from None
    if isinstance(stream, io.BufferedReader) and part.md5 is None:
        return stream
    stream.close()
    return io.BytesIO(read_whole(part))
