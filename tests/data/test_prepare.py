"""Preparation in bounded memory, against the plain way to group rows, at every size of its pieces."""

import io

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import get_dataset, load_card, prepare
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
