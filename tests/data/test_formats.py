"""Parsers: the official layouts, and every way to break them with file, row and value in the message."""

import io

import polars as pl
import pytest

from malloc_bench.data import DataError
from malloc_bench.data.archive import Part
from malloc_bench.data.formats import LAYOUTS
from malloc_bench.data.parse import Reader
from malloc_bench.data.policies import Judge

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def parse(format, *files, on_bad=None, keep=None):
    """One frame of the events in files given as bytes, named f, f2 ..."""
    parts = [Part("f" if i == 0 else f"f{i + 1}", lambda data=data: io.BytesIO(data)) for i, data in enumerate(files)]
    return pl.concat(Reader(LAYOUTS[format], Judge(on_bad or {}), keep).frames(parts))


def columns(events):
    return [events[name].to_list() for name in ("user", "item", "rating", "order")]


EXPECTED = [[1, 2, 1], [1193, 661, 914], [5.0, 3.5, 3.0], [978300760, 978302109, 978301968]]


@pytest.mark.parametrize(
    "format, text",
    [
        ("movielens-udata", "1\t1193\t5\t978300760\n2\t661\t3.5\t978302109\n1\t914\t3\t978301968\n"),
        ("movielens-udata", "1\t1193\t5\t978300760\r\n2\t661\t3.5\t978302109\r\n1\t914\t3\t978301968"),
        ("movielens-dat", "1::1193::5::978300760\n2::661::3.5::978302109\n1::914::3::978301968\n"),
        ("recbole-inter", HEADER + "1\t1193\t5\t978300760\n2\t661\t3.5\t978302109\n1\t914\t3\t978301968\n"),
        (
            "recbole-inter",
            "timestamp:float\tx:token\titem_id:token\tuser_id:token\trating:float\n"
            "978300760\t-\t1193\t1\t5\n978302109\t-\t661\t2\t3.5\n978301968\t-\t914\t1\t3\n",
        ),
    ],
)
def test_rows_come_in_file_order(format, text):
    events = parse(format, text.encode())
    assert columns(events) == EXPECTED
    assert events.select("user", "item", "rating", "order").dtypes == [pl.Int64, pl.Int64, pl.Float32, pl.Int64]


@pytest.mark.parametrize(
    "format, text, message",
    [
        ("movielens-udata", "", "f: the file is empty"),
        ("movielens-dat", "\n\n", "f: the file is empty"),
        ("movielens-udata", "1\t2\t3\t4\n1\ttwo\t3\t4\n", "f: row 2: item_id is 'two', not a number"),
        ("movielens-udata", "1\t2\tnan\t4\n", "f: row 1: rating is 'nan', not a number"),
        ("movielens-udata", "1\t2\t3\t4\n1\t2\t3\t4.5\n", "f: row 2: timestamp is '4.5', not a number"),
        (
            "movielens-udata",
            "1\t99999999999999999999\t3\t4\n",
            "f: row 1: item_id is '99999999999999999999', beyond 63 bits",
        ),
        ("movielens-udata", "1\t2\t3\t4\n\n1\t2\t3\t4\n", "f: row 2: '' has not 4 columns"),
        ("movielens-udata", "1\t2\t3\t4\n1\t2\t3\n", "f: row 2: '1\\t2\\t3' has not 4 columns"),
        ("movielens-udata", "1\t2\t3\t4\n1\t2\t3\t4\t5\t6\n", "f: row 2: '1\\t2\\t3\\t4\\t5\\t6' has not 4 columns"),
        ("movielens-dat", "1\t2\t3\t4\n", "f: row 1: '1\\t2\\t3\\t4' has not 4 columns: user_id, item_id"),
        ("movielens-dat", "1::2::3::4\n1::2:::3::4\n", "f: row 2: rating is ':3', not a number"),
        ("recbole-inter", "user_id:token\titem_id:token\trating:float\n1\t2\t3\n", "f: row 1: no column 'timestamp'"),
        ("recbole-inter", HEADER + "1\t2\t3\t4\nx\t2\t3\t4\n", "f: row 3: user_id is 'x', not a number"),
        ("parquet-ordered", "no parquet at all", "f: no readable parquet"),
    ],
)
def test_a_bad_file_names_row_and_value(format, text, message):
    with pytest.raises(DataError) as caught:
        parse(format, text.encode())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, row", [("1\t2\t3\t4\n1\té\t3\t4\n".encode("latin-1"), 2), ("1\t2".encode("utf-16"), 1)])
def test_a_wrong_encoding(text, row):
    with pytest.raises(DataError, match=rf"f: row {row}: byte 0x.. is no plain text"):
        parse("movielens-udata", text)


def parquet(**columns):
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def test_ordered_parquet_has_no_time():
    events = parse("parquet-ordered", parquet(user_id=[1, 1, 2], item_id=[7, 8, 7], position=[1, 0, 0], x=["a"] * 3))
    assert events.to_dict(as_series=False) == {"user": [1, 1, 2], "item": [7, 8, 7], "order": [1, 0, 0]}


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"user_id": [1], "item_id": [1]}, "f: no column 'position' among user_id, item_id"),
        ({"user_id": [1], "item_id": ["a"], "position": [0]}, "f: item_id holds String"),
        ({"user_id": [1], "item_id": [1], "position": [0.5]}, "f: position holds Float64"),
        ({"user_id": [1, None], "item_id": [1, 1], "position": [0, 1]}, "f: row 2: user_id is missing"),
    ],
)
def test_a_bad_parquet(columns, message):
    with pytest.raises(DataError) as caught:
        parse("parquet-ordered", parquet(**columns))
    assert str(caught.value).startswith(message)


def test_an_empty_parquet():
    empty = pl.DataFrame(schema={"user_id": pl.Int32, "item_id": pl.Int32, "position": pl.Int32})
    buffer = io.BytesIO()
    empty.write_parquet(buffer)
    with pytest.raises(DataError, match="empty"):
        parse("parquet-ordered", buffer.getvalue())
