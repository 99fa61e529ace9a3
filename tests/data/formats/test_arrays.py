"""Numpy arrays: only what the header truly says is read, and nothing is held that the file has not."""

import io
import tracemalloc

import numpy as np
import pytest

from malloc_bench.data import DataError
from malloc_bench.data.formats.formats import LAYOUTS
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import Part

GOOD = np.array([[1, 698, 99366], [1, 3601, 5743], [2, 698, 5743]])


def read(data, **on_bad):
    [frame] = Reader(LAYOUTS["foursquare-npy"], Judge(on_bad)).frames([Part("f", lambda: io.BytesIO(data))])
    return frame.select("user", "item", "order").rows()


def saved(array, save=np.save):
    save(stream := io.BytesIO(), array)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<u8", ">i8", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_way_to_write_whole_numbers(dtype, order):
    rows = GOOD % 60_000
    assert read(saved(np.asarray(rows.astype(dtype), order=order))) == [(u, i, 60 * t) for u, i, t in rows.tolist()]


def test_ids_beyond_63_bits_meet_their_policy():
    data = saved(np.array([[1, 2**63 + 5, 7], [1, 2, 7]], np.uint64))
    with pytest.raises(DataError, match="f: row 1: item_id is 9223372036854775813, beyond 63 bits"):
        read(data)
    assert read(data, huge_id="drop") == [(1, 2, 420)]


def test_minutes_that_would_wrap_are_no_times():
    data = saved(np.array([[1, 2, 2**63 // 60 + 30_000_000], [1, 2, 7]]))
    with pytest.raises(DataError, match=r"f: row 1: minute is \d+, not a time between 1970 and 2099"):
        read(data)
    assert read(data, bad_time="drop") == [(1, 2, 420)]


def header(text):
    told = text.encode("latin-1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told


@pytest.mark.parametrize(
    "data, message",
    [
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 3)}"), "holds the shape"),
        (
            header("{'descr': '<i8', 'fortran_order': False, 'shape': (True, 3)}") + bytes(24),
            "holds the shape (True, 3)",
        ),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 3)}") + bytes(24), "holds the shape (-1, 3)"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3)}") + bytes(24), "24 bytes of values where"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 3)}") + bytes(48), "48 bytes of values where"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 3)}") + bytes(24), "holds objects"),
        (header("{'descr': '<i8', 'fortran_order': " + "[" * 60), ""),
        (header("{'descr': '<i8'\0"), ""),
        (b"\x93NUMPY\x01\x00\xff\xff{", ""),
        (b"\x93NUMPY\x09\x00", "version (9, 0)"),
        (saved(GOOD)[:-9], "63 bytes of values where"),
        (saved(GOOD)[:20], ""),
        (saved(GOOD, np.savez), "it is a .npz, several in a zip"),
        (saved(np.array([{"a": 1}], object)), "holds objects"),
        (b"no array", ""),
    ],
)
def test_a_header_that_says_more_than_there_is(data, message):
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        read(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(f"f: no readable numpy array: {message}") and most < 2**24


@pytest.mark.parametrize("array", [GOOD[:, :2], GOOD[0], GOOD.astype(float), GOOD[None]])
def test_arrays_of_another_shape_or_type(array):
    with pytest.raises(DataError, match=r"^f: holds (int|float)64\[.*\], not rows of user_id, item_id, minute"):
        read(saved(array))
