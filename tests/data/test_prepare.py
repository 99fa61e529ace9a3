"""Preparation in bounded memory, against the plain way to group rows, at every size of its pieces."""

import io

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import DataError, get_dataset, load_card, prepare
from malloc_bench.data.dataset import Rows, group
from malloc_bench.data.formats.formats import LAYOUTS
from malloc_bench.data.formats.ids import Ids
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.sources.archive import Part

rng = np.random.default_rng(1)


@pytest.mark.parametrize(
    "keys",
    [
        [rng.integers(0, 5, 1000), rng.integers(0, 9, 1000)],
        [rng.integers(-(2**62), 2**62, 1000), rng.integers(0, 2**40, 1000)],
        [np.array([2**63 - 1, -(2**63), 0, -1]), np.array([0, 0, 0, 0])],
        [rng.integers(0, 100_000, 1000) * 7, rng.integers(0, 3, 1000)],
        [np.zeros(0, np.int64), np.zeros(0, np.int64)],
    ],
)
def test_stable_order_is_lexsort(keys):
    assert prepare.stable_order(*keys).tolist() == np.lexsort(keys[::-1]).tolist()


@pytest.fixture
def small(monkeypatch, request):
    """Pieces so small that every seam is crossed many times."""
    for name, size in zip(("prepare.BUCKET", "prepare.CHUNK", "formats.parse.BLOCK"), request.param):
        monkeypatch.setattr(f"malloc_bench.data.{name}", size)


@pytest.mark.parametrize("small", [(10**6, 10**6, 10**6), (50, 37, 300), (1, 11, 100)], indirect=True)
@pytest.mark.parametrize("span", [40, 2**31, 2**62])
def test_it_is_as_grouping_all_rows_at_once(make_card, tmp_path, monkeypatch, small, span):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    users, items = rng.choice(rng.integers(0, span, 30), 700), rng.choice(rng.integers(-5, span, 90), 700)
    times, ratings = rng.integers(0, 200, 700), rng.integers(1, 11, 700) / 2
    lines = [f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in zip(users, items, ratings, times)]
    (tmp_path / "a").write_text("".join(lines[:333]))
    (tmp_path / "b").write_text("".join(lines[333:]))
    name = make_card(sources=[{"local": ["a", "b"]}])
    data = get_dataset(name)
    expected = group(load_card(name), Rows(users, items, times, True, {"rating": ratings.astype(np.float32)}), "")
    assert data.hash == expected.hash
    for column in ("user_ids", "item_ids", "offsets", "items", "times"):
        found, right = getattr(data, column), getattr(expected, column)
        assert found.dtype == right.dtype and found.tolist() == right.tolist()
    assert data.feedback["rating"].tolist() == expected.feedback["rating"].tolist()
    assert data.source == f"local {tmp_path / 'a'} and 1 more"


@pytest.mark.parametrize("small", [(10**6, 10**6, 10**6), (1, 11, 100)], indirect=True)
@pytest.mark.parametrize("format, suffix", [("reczoo-microvideo", "csv"), ("parquet-ordered", "parquet")])
def test_events_of_equal_order_are_in_an_order_that_says_nothing(
    make_card, tmp_path, monkeypatch, small, format, suffix
):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    users, items, order = rng.integers(0, 9, 700), rng.integers(0, 90, 700), rng.integers(0, 40, 700)
    clock = "timestamp" if suffix == "csv" else "position"

    def read(order, on_bad=None, name="a"):
        frame = pl.DataFrame({"user_id": users, "item_id": items, clock: order, "is_click": np.ones(700, int)})
        getattr(frame, f"write_{suffix}")(tmp_path / name)
        return get_dataset(make_card(sources=[{"local": name}], format=format, on_bad=on_bad or {}))

    data = read(order)
    expected = group(load_card("toy"), Rows(users, items, order, False, data.feedback), "")
    assert data.hash == expected.hash and data.times is None and data.order.dtype == np.int64
    assert (data.items.tolist(), data.order.tolist()) == (expected.items.tolist(), expected.order.tolist())
    for user in range(9):
        rows = slice(*data.offsets[user : user + 2])
        places = np.unique(order[users == user], return_inverse=True)[1]
        assert data.order[rows].tolist() == sorted(places)
        found = sorted(zip(data.order[rows].tolist(), (data.items[rows] - 1).tolist()))
        assert found == sorted(zip(places.tolist(), np.searchsorted(data.item_ids, items[users == user]).tolist()))
    again = read(order)  # from what was prepared
    assert again.hash == data.hash and again.order.tolist() == data.order.tolist() and again.tied == data.tied > 0.3
    assert read(3 * order + 1, name="b").hash == data.hash  # whatever it counts by
    kept = read(order, {"ties": "keep"})
    by_file = np.lexsort((order, users))
    assert data.item_ids[kept.items - 1].tolist() == items[by_file].tolist() != data.item_ids[data.items - 1].tolist()
    listed = read(order, {"ties": "by_item"})
    by_item = np.lexsort((items, order, users))
    assert data.item_ids[listed.items - 1].tolist() == items[by_item].tolist() != items[by_file].tolist()
    assert kept.order.tolist() == listed.order.tolist() == data.order.tolist()


@pytest.mark.parametrize("small", [(10**6, 10**6, 10**6), (1, 11, 100)], indirect=True)
def test_an_order_without_ties_is_the_order_of_the_rows_and_no_more(make_card, tmp_path, monkeypatch, small):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    users, items, order = rng.integers(0, 9, 300), rng.integers(0, 90, 300), rng.permutation(300)
    frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": order, "is_click": items % 2})
    frame.write_csv(tmp_path / "a")
    frame.sort("timestamp").select("user_id", "item_id", "is_click").write_csv(tmp_path / "b")
    data = get_dataset(make_card(sources=[{"local": "a"}], format="reczoo-microvideo"))
    table = {"user": "user_id", "item": "item_id", "feedback": "is_click", "ids": "number"}
    rows = get_dataset(make_card(sources=[{"local": "b"}], format="table", table=table))
    assert data.hash == rows.hash and data.order is None and data.tied == 0


@pytest.mark.parametrize("small", [(50, 37, 300)], indirect=True)
def test_string_ids_are_their_places_among_the_sorted_strings(make_card, tmp_path, monkeypatch, small):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    names = np.array([f"A{n:x}é" for n in rng.integers(0, 2**40, 60)])
    users, items, times = rng.choice(names, 400), rng.choice(names, 400), rng.integers(0, 50, 400)
    lines = [f"{u},{i},5.0,{t}\n" for u, i, t in zip(users, items, times)]
    results = []
    for order in (np.arange(400), np.argsort(times, kind="stable")):  # another order of lines, the same events
        (tmp_path / "r.csv").write_text("".join(lines[i] for i in order))
        results.append(
            get_dataset(make_card(sources=[{"local": "r.csv"}], format="amazon-2014-ratings", on_bad={"ties": "keep"}))
        )
    assert results[0].hash == results[1].hash
    found = results[0]
    by = [np.unique(column, return_inverse=True)[1] for column in (users, items)]
    expected = np.lexsort((times, by[0]))
    assert np.repeat(found.user_ids, np.diff(found.offsets)).tolist() == by[0][expected].tolist()
    assert found.item_ids[found.items - 1].tolist() == by[1][expected].tolist()


WORDS = ["7", "007", "07", "+7", "-7", "-0", "0", "A", "é", "a,b", str(2**63 - 1), str(2**63), "-9223372036854775808"]


@pytest.mark.parametrize("size", [1, 3, 400])
def test_whole_numbers_and_texts_are_told_apart(size):
    column = pl.Series(rng.choice(np.array(WORDS, object), 400).tolist() + WORDS, dtype=pl.String)
    ids = Ids()
    codes = np.concatenate([ids.add(column.slice(at, size)) for at in range(0, len(column), size)])
    ids.close()
    assert ids.names.to_list() == sorted(WORDS, key=str.encode) and ids.ids.tolist() == list(range(len(WORDS)))
    assert [ids.name(place) for place in ids.index(codes)] == column.to_list()
    assert ids.events.tolist() == [int((column == name).sum()) for name in ids.names]


def test_text_that_is_whole_numbers_is_those_numbers():
    ids = Ids()
    codes = np.concatenate([ids.add(pl.Series(["7", "-3"])), ids.add(pl.Series([10, 7]))])
    ids.close()
    assert ids.names is None and ids.ids.tolist() == [-3, 7, 10] and ids.index(codes).tolist() == [1, 0, 2, 1]
    assert ids.name(1) == 7


def test_numbers_that_are_the_codes_of_texts_are_texts():
    ids = Ids()
    codes = ids.add(pl.Series([-(2**63), 7, -(2**63) + 1]))
    ids.close()
    assert [ids.name(place) for place in ids.index(codes)] == ["-9223372036854775808", "7", "-9223372036854775807"]


@pytest.mark.parametrize(
    "format, text",
    [
        ("movielens-csv", "userId,movieId,rating,timestamp\n{},1,3,4\n{},2,3,4\n"),
        ("movielens-csv", 'userId,movieId,rating,timestamp\n"{}","1",3,4\n"{}","2","3",4\n'),
        ("movielens-udata", "{}\t1\t3\t4\n{}\t2\t3\t4\n"),
        ("movielens-dat", "{}::1::3::4\n{}::2::3::4\n"),
        ("recbole-inter", "item_id:token\tuser_id:token\trating:float\ttimestamp:float\n1\t{}\t3\t4.0\n2\t{}\t3\t4\n"),
        ("recbole-inter", "item_id:token,user_id:token,rating:float,timestamp:float\n1,{},3,4.0\n2,{},3,4\n"),
        ("amazon-json", '{{"reviewerID": "{}", "asin": "1", "overall": 3, "unixReviewTime": 4, "x": NaN}}\n' * 2),
        ("user-item", "{} 1\n{} 2\n"),
        ("user-items", "{} 1\n{} 2 3\n"),
        ("reczoo-din", "user_id,item_id,item_history,label\n{},1,5^6,1\n{},2,5^6,1\n"),
    ],
)
def test_a_leading_zero_makes_another_id_in_every_layout(make_card, tmp_path, monkeypatch, format, text):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    for one, two, users in (("007", "7", ["007", "7"]), ("7", "7", [7])):
        (tmp_path / "f").write_text(text.format(one, two))
        data = get_dataset(make_card(sources=[{"local": "f"}], format=format))
        assert list(data.original_user(slice(None))) == users
        assert data.user_ids.tolist() == ([0, 1] if one == "007" else [7])
        again = get_dataset(make_card(sources=[{"local": "f"}], format=format))  # from what was prepared
        assert list(again.original_user(np.array([0]))) == users[:1] and again.hash == data.hash
        assert data.item_names is None


def test_a_rating_that_an_inter_file_has_not_is_not_missed(make_card, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    (tmp_path / "f").write_text("timestamp:float\titem_id:token\tuser_id:token\n1.5e9\tA\tU\n1.6e9\tB\tU\n")
    data = get_dataset(make_card(sources=[{"local": "f"}], format="recbole-inter"))
    assert data.feedback == {} and data.times.tolist() == [1_500_000_000, 1_600_000_000]
    assert data.item_names.to_list() == ["A", "B"] and data.user_names.to_list() == ["U"]
    (tmp_path / "g").write_text("item_id:token\tuser_id:token\ttimestamp:float\trating:float\nA\tV\t1.5e9\t3\n")
    with pytest.raises(DataError, match=r"f: row 1: no column 'rating' among timestamp, item_id, user_id"):
        get_dataset(make_card(sources=[{"local": ["g", "f"]}], format="recbole-inter"))


def test_a_repeated_event_is_told_with_its_time_as_the_file_has_it(make_card, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    (tmp_path / "f").write_text("user_id:token\titem_id:token\ttimestamp:float\nU\tA\t1.5e9\nU\tA\t1.5e9\n")
    card = make_card(sources=[{"local": "f"}], format="recbole-inter", on_bad={"duplicates": "reject"})
    with pytest.raises(DataError, match=r"f: row 3: user U has the same item at the same time 1500000000\.0 twice"):
        get_dataset(card)


def test_policies_name_text_ids_and_the_rows_of_records_with_line_breaks(make_card, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    head = "user_id,parent_asin,rating,timestamp\n"
    (tmp_path / "f").write_text(head + '"a\nb",1,3,4000\nc,1,3,\nd,1,3,4000\nd,1,3,4000\n')
    card = {"sources": [{"local": "f"}], "format": "amazon-2023-ratings"}
    drop = {"bad_row": "drop"}
    with pytest.raises(DataError, match=r"f: row 4: timestamp is '', not a number"):
        get_dataset(make_card(**card))
    with pytest.raises(DataError, match=r"f: row 6: user d has the same item at the same time 4000 twice"):
        get_dataset(make_card(**card, on_bad=drop | {"duplicates": "reject"}))
    with pytest.raises(DataError, match=r"f: row 2: user a b has one event only"):
        get_dataset(make_card(**card, on_bad=drop | {"single_event_users": "reject"}))


def test_milliseconds_order_events_within_a_second_that_is_kept(make_card, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    head = "user_id,parent_asin,rating,timestamp\n"
    (tmp_path / "r.csv").write_text(head + "U,A,1,1452647382900\nU,B,2,1452647382100\nU,A,3,1452647382500\n")
    data = get_dataset(make_card(sources=[{"local": "r.csv"}], format="amazon-2023-ratings"))
    assert data.items.tolist() == [2, 1, 1] and data.times.tolist() == [1452647382] * 3
    assert data.feedback["rating"].tolist() == [2, 3, 1]
    assert data.notes == {"single_event_users (kept)": 1} or data.notes == {}


@pytest.mark.parametrize("small", [(10**6, 10**6, 10**6), (5, 7, 60)], indirect=True)
def test_duplicates_and_single_events_by_brute_force(make_card, tmp_path, monkeypatch, small):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    rows = [tuple(map(int, row)) for row in rng.integers(0, [25, 6, 2], (60, 3))]
    (tmp_path / "u").write_text("".join(f"{u}\t{i}\t{n}\t{t}\n" for n, (u, i, t) in enumerate(rows)))
    alone = {u for u in {u for u, _, _ in rows} if sum(u == row[0] for row in rows) == 1}
    kept = [(n, *row) for n, row in enumerate(rows) if row not in rows[:n] and row[0] not in alone]
    expected = [n for n, *_ in sorted(kept, key=lambda row: (row[1], row[3], row[0]))]
    on_bad = {"duplicates": "drop", "single_event_users": "drop", "ties": "keep"}
    data = get_dataset(make_card(sources=[{"local": "u"}], on_bad=on_bad))
    assert alone and data.feedback["rating"].tolist() == expected
    repeated = len(rows) - len(set(rows))
    assert data.notes == {"duplicates (dropped)": repeated, "single_event_users (dropped)": len(alone)}
    assert sorted(set(data.items)) == list(range(1, data.n_items + 1))


@pytest.mark.parametrize("low, high", [(0, 50), (-50, 50), (2**40, 2**62), (0, 2**31)])
def test_ids_are_counted_and_placed(low, high, monkeypatch):
    batches = [rng.integers(low, high, 100) for _ in range(40)]
    ids = Ids()
    codes = [ids.add(pl.Series(batch)) for batch in batches]
    ids.close()
    expected, counts = np.unique(np.concatenate(batches), return_counts=True)
    assert ids.ids.tolist() == expected.tolist() and ids.events.tolist() == counts.tolist()
    for code, batch in zip(codes, batches):
        assert ids.ids[ids.index(code)].tolist() == batch.tolist()


def test_memory_does_not_grow_with_the_events(tmp_path):
    """What a reader holds at once is a block and what comes of it, however long the file."""
    line = b"1\t2\t3\t4\n"
    text = line * 400_000
    reader = Reader(LAYOUTS["movielens-udata"], Judge({}))
    frames = reader.frames([Part("f", lambda: io.BytesIO(text))])
    import malloc_bench.data.formats.parse as parse

    largest = max(len(frame) for frame in frames)
    assert largest <= parse.BLOCK // len(line) + 1 and reader.events == 400_000
