"""Parsers: the official layouts, and every way to break them with file, row and value in the message."""

import io

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import DataError
from malloc_bench.data.formats.formats import LAYOUTS
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import Part

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
    expected = [*EXPECTED[:3], [time * LAYOUTS[format].per_second for time in EXPECTED[3]]]
    assert columns(events) == expected
    assert events.select("user", "item", "rating", "order").dtypes == [pl.Int64, pl.Int64, pl.Float32, pl.Int64]


@pytest.mark.parametrize(
    "format, text, message",
    [
        ("movielens-udata", "", "f: the file is empty"),
        ("movielens-dat", "\n\n", "f: the file is empty"),
        ("movielens-udata", "1\t2\t3\t4\n1\ttwo\t3\t4\n", "f: row 2: item_id is 'two', not a number"),
        ("movielens-udata", "1\t2\tnan\t4\n", "f: row 1: rating is nan, not a number"),
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
        ("recbole-inter", HEADER + "1\t2\t3\t4\n\t2\t3\t4\n", "f: row 3: user_id is '', empty"),
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
        ({"user_id": [1], "item_id": ["a"], "position": [0]}, "f: row 1: item_id is 'a', not a number"),
        ({"user_id": [1], "item_id": [1], "position": ["x"]}, "f: row 1: position is 'x', not a number"),
        (
            {"user_id": [1.5], "item_id": [1], "position": [0]},
            "f: row 1: user_id is 1.5, not a whole number below 2^53",
        ),
        ({"user_id": [[1]], "item_id": [1], "position": [0]}, "f: user_id holds large_list"),
        ({"user_id": [2**63], "item_id": [1], "position": [0]}, "f: row 1: user_id is 9223372036854775808, beyond 63"),
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


KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
LIKEHATE = (
    "user_id\tvideo_id\tdate\thourmin\ttime_ms\tis_click\tis_follow\tis_comment\tis_forward\tlong_view\tplay_time_ms\t"
    "duration_ms\tcomment_stay_time\tis_profile_enter\tlabel\ttimestamp\n"
)
REVIEW_2014 = (
    '{"reviewerID": "A2SU", "asin": "0000013714", "reviewerName": "J. \\"Mc\\" D", "helpful": [2, 3], "reviewText": '
    '"a\\nb, c", "overall": 5.0, "summary": "caf\\u00e9", "unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"}\n'
)
REVIEW_2018 = (
    '{"overall": 4.0, "vote": "2", "verified": true, "reviewTime": "10 20, 2014", "reviewerID": "A1YJ", "asin": '
    '"B00E", "style": {"Size:": " 7"}, "unixReviewTime": 1413763200}\n'
)
REVIEW_2023 = (
    '{"rating": 5.0, "title": "é", "text": "t", "images": [], "asin": "B00Y", "parent_asin": "B00P", "user_id": '
    '"AGKH", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}\n'
)
CHECK_IN = "470\t49bb\t4bf5\tCaf\xe9\t40.71\t-74.00\t-240\tTue Apr 03 18:00:09 +0000 2012\n".encode("latin-1")
DIN = "label,user_id,item_id,cate_id,item_history,cate_history\n1,5,30,7,10^20,7^7\n0,5,99,7,10^20,7^7\n1,6,10,7,20,7\n"
NPY = io.BytesIO()
np.save(NPY, np.array([[1, 698, 99366], [1, 3601, 5743]], np.int32))

#: format -> (a file as its publisher writes it, user, item, order, feedback)
OFFICIAL = {
    "movielens-csv": ("userId,movieId,rating,timestamp\r\n1,31,2.5,1260759144\r\n", 1, 31, 1260759144, {"rating": 2.5}),
    "amazon-json": (REVIEW_2014, "A2SU", "0000013714", 1252800000, {"rating": 5}),
    "amazon-json 2018": (REVIEW_2018, "A1YJ", "B00E", 1413763200, {"rating": 4}),
    "amazon-2014-ratings": ("A39H,0205616461,5.0,1369699200\n", "A39H", "0205616461", 1369699200, {"rating": 5}),
    "amazon-2018-ratings": ("0143026860,A1V6,1.0,1424304000\n", "A1V6", "0143026860", 1424304000, {"rating": 1}),
    "amazon-2023-ratings": (
        "user_id,parent_asin,rating,timestamp\nAGKA,B006,3.0,1452647382000\n", "AGKA", "B006", 1452647382000,
        {"rating": 3},
    ),
    "amazon-2023-json": (REVIEW_2023, "AGKH", "B00P", 1588687728923, {"rating": 5}),
    "kuairand-log": (
        KUAIRAND + "0,7,20220408,1400,1649399023374,1,0,1,0,0,0,1,31000,29000,5,6,1,0,4\n", 0, 7, 1649399023374,
        {"is_click": 1, "is_like": 0, "is_follow": 1, "long_view": 1, "play_time_ms": 31000, "duration_ms": 29000,
         "profile_stay_time": 5, "comment_stay_time": 6, "is_profile_enter": 1, "is_rand": 0, "tab": 4},
    ),
    "kuairand-likehate": (
        LIKEHATE + "111\t3892024\t20220410\t1700\t1649581149287\t1\t0\t0\t0\t1\t46186\t45916\t7639\t0\t1\t"
        "2022-04-10 08:59:09\n",
        111, 3892024, 1649581149287, {"is_click": 1, "is_like": 1, "play_time_ms": 46186},
    ),
    "kuairec-matrix": (
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
        "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.273397\n", 0, 3649, 1593878903438000,
        {"play_duration": 13838, "video_duration": 10867, "watch_ratio": pytest.approx(1.273397)},
    ),
    "reczoo-microvideo": (
        "user_id,item_id,cate_id,timestamp,is_click,clicked_items,clicked_categories\n3,4,5,17,1,1^2,5^5\n", 3, 4, None,
        {"is_click": 1},
    ),
    "reczoo-kuaivideo": (
        "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items\n17,3,4,1,0,0,,\n", 3, 4, None,
        {"is_click": 1, "is_like": 0, "is_follow": 0},
    ),
    "taobao-userbehavior": ("1,2268318,2520377,cart,1511544070\n", 1, 2268318, 1511544070, {"behavior": 3}),
    "foursquare-tsmc": (CHECK_IN, 470, "49bb", 1333476009, {}),
    "foursquare-npy": (NPY.getvalue(), 1, 698, 99366 * 60, {}),
    "user-item": ("1 6393\n1 13504\n", 1, 6393, 0, {}),
    "user-items": ("7 10 20 30 \n8 20\n", 7, 10, 0, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_layouts(name):
    data, user, item, order, feedback = OFFICIAL[name]
    first = parse(name.split()[0], data.encode() if isinstance(data, str) else data).row(0, named=True)
    assert (first["user"], first["item"]) == (user, item)
    assert first["order"] == order if order is not None else True
    assert {key: first[key] for key in feedback} == feedback


def test_every_layout_is_tested():
    tested = {name.split()[0] for name in OFFICIAL} | {"movielens-udata", "movielens-dat", "recbole-inter"}
    about_items = {name for name, layout in LAYOUTS.items() if layout.category}  # in test_categories.py
    assert tested | about_items | {"parquet-ordered", "reczoo-din", "user-items-times"} == set(LAYOUTS)


def test_histories_become_events_in_their_order():
    events = parse("user-items", b"7 10 20 30\n8 20\n")
    assert events.to_dict(as_series=False) == {"user": [7, 7, 7, 8], "item": [10, 20, 30, 20], "order": [0, 1, 2, 3]}
    events = parse("user-items-times", b"7 10 20\n8 20\n", b"7 100 90\n8 80\n")
    assert events.to_dict(as_series=False) == {"user": [7, 7, 8], "item": [10, 20, 20], "order": [100, 90, 80]}


@pytest.mark.parametrize(
    "files, message",
    [
        ([b"7 10 20\n8 x\n", b"7 1 2\n8 3\n"], "f: row 2: '8 x' is not a user and its items"),
        (
            [b"7 10 20\n", b"7 1\n"],
            "f: row 1: '7 10 20' is not a user and its items as whole numbers, with as many times",
        ),
        ([b"7 10\n8 1\n", b"7 1\n"], "f: row 2: '8 1' is not"),
        ([b"7 10\n", b"8 1\n"], "f: row 1: '7 10' is not"),
        ([b"7 10\n", b"7 -5\n"], "f: row 1: timestamp is -5, not a time between 1970 and 2099"),
        ([b"7 10\n", b"7 5\n8 5\n"], "f2: row 2: has more lines than f"),
        ([b"7 10\n7 9\n", b"7 5\n7 99999999999999999999\n"], "f: row 2: timestamp is '99999999999999999999', not"),
        ([b"", b""], "f: the file is empty"),
        ([b"7 10\n"], "format user-items-times needs the files of items and of times, found 1"),
    ],
)
def test_bad_histories(files, message):
    with pytest.raises(DataError) as caught:
        parse("user-items-times", *files)
    assert str(caught.value).startswith(message)


def test_din_gives_back_the_histories_behind_its_samples():
    events = parse("reczoo-din", DIN.encode())
    assert events.select("user", "item").rows() == [(5, 10), (5, 20), (5, 30), (6, 20), (6, 10)]
    assert events["order"].to_list() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"f: row 3: item_history is '10\^x', not numbers joined by \^"):
        parse("reczoo-din", DIN.replace("0,5,99,7,10^20", "0,5,99,7,10^x").encode())


def test_feedback_that_one_of_several_files_lacks_is_missed_in_any_order():
    """Where none has it, it is not there."""
    plain = b"user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n"
    rated = HEADER.encode() + b"1\t3\t5\t4\n"
    for files, name in (((plain, rated), "f"), ((rated, plain), "f2")):
        with pytest.raises(DataError, match=rf"^{name}: row 1: no column 'rating'"):
            parse("recbole-inter", *files)
    assert "rating" not in parse("recbole-inter", plain, plain).columns


def test_order_without_times_compares_as_the_numbers_do():
    head = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items\n"
    times = ["3", "0.5", "1512345678901", "20", "0"]
    order = parse("reczoo-kuaivideo", (head + "".join(f"{t},1,2,0,0,0,1^2,\n" for t in times)).encode())["order"]
    assert np.argsort(order.to_numpy()).tolist() == np.argsort([float(t) for t in times]).tolist()
    with pytest.raises(DataError, match=r"row 2: timestamp is -1, not a number from 0 to 4e"):
        parse("reczoo-kuaivideo", (head + "-1,1,2,0,0,0,1,1\n").encode())


def test_only_the_feedback_that_is_kept_is_read():
    bad = KUAIRAND + "0,7,20220408,1400,1649399023374,1,0,1,0,0,0,1,never,29000,5,6,1,0,4\n"
    assert parse("kuairand-log", bad.encode(), keep=["is_click", "tab"]).columns == [
        "user",
        "item",
        "order",
        "is_click",
        "tab",
    ]
    with pytest.raises(DataError, match="play_time_ms is 'never'"):
        parse("kuairand-log", bad.encode())


@pytest.mark.parametrize(
    "format, text, message",
    [
        ("kuairand-log", KUAIRAND + "0,7,20220408,1400,1649399023374,1,0\n", "f: row 2: '0,7,20220408,1400"),
        ("kuairand-log", KUAIRAND, "f: the file is empty but for its header"),
        (
            "kuairand-log",
            KUAIRAND.replace("time_ms", "time", 1),
            "f: row 1: no column 'time_ms' among user_id, video_id",
        ),
        (
            "taobao-userbehavior",
            "1,2,3,pv,4\n1,2,3,pw,5\n",
            "f: row 2: behavior is 'pw', not one of pv, fav, cart, buy",
        ),
        ("amazon-json", REVIEW_2014 + "{}\n", "f: row 2: reviewerID is missing"),
        ("amazon-json", REVIEW_2014 + REVIEW_2014[:60] + "\n", 'f: row 2: \'{"reviewerID": "A2SU"'),
        (
            "amazon-json",
            REVIEW_2014.replace("1252800000", '"soon"'),
            "f: row 1: unixReviewTime is 'soon', not a number",
        ),
        ("amazon-2014-ratings", "A39H,,5.0,1369699200\n", "f: row 1: item_id is '', empty"),
        (
            "amazon-2023-ratings",
            "user_id,parent_asin,rating,timestamp\nA,B,3,\n",
            "f: row 2: timestamp is '', not a number",
        ),
        (
            "foursquare-tsmc",
            CHECK_IN.decode("latin-1").replace("Apr 03", "Apr 33"),
            "f: row 1: utc_time is 'Tue Apr 33",
        ),
        ("foursquare-npy", "no array", "f: no readable numpy array"),
    ],
)
def test_a_bad_row_of_other_layouts(format, text, message):
    with pytest.raises(DataError) as caught:
        parse(format, text.encode(LAYOUTS[format].encoding))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_arrays_that_would_run_code_are_refused():
    evil = io.BytesIO()
    np.save(evil, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="f: no readable numpy array"):
        parse("foursquare-npy", evil.getvalue())


def test_blocks_of_any_size_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    lines = [
        f"{u},{v},20220408,1400,{1649399023374 + t},{c},0,1,0,0,0,1,3,4,5,6,1,0,4"
        for u, v, t, c in rng.integers(0, 99, (300, 4))
    ]
    text = (KUAIRAND + "\n".join(lines)).encode()  # the last line ends with the file
    whole = parse("kuairand-log", text)
    for size in (997, 20_000):
        monkeypatch.setattr("malloc_bench.data.formats.parse.BLOCK", size)
        assert parse("kuairand-log", text, text).equals(pl.concat([whole, whole]))
    with pytest.raises(DataError, match=r"f2: row 5: user_id is 'x', not a number"):
        monkeypatch.setattr("malloc_bench.data.formats.parse.BLOCK", 999)
        parse(
            "kuairand-log",
            text,
            KUAIRAND.encode() + "\n".join([*lines[:3], lines[3].replace(lines[3].split(",")[0], "x", 1)]).encode(),
        )


def test_what_is_no_text_is_not_held_for_ever(monkeypatch):
    monkeypatch.setattr("malloc_bench.data.formats.parse.BLOCK", 1000)
    with pytest.raises(DataError, match=r"f: row 1: no line ends in \d+ bytes: no text file\?"):
        parse("movielens-udata", b"1" * 10_000)
