"""What is told of a data set, by brute force; the histogram; and the real files that are at hand."""

import itertools
import json
from collections import Counter

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import Dataset, get_dataset, load_card, stats, verify
from malloc_bench.data import summary as module

# name -> users, items, events, shares of users with 200, 500, 1000 (of the folder's readme), and notes
SHARED = {
    "ml-100k": (943, 1682, 100_000, (149, 5, 0), {}),
    "ml-1m": (6040, 3706, 1_000_209, (1589, 399, 41), {}),
    "ml-latest-small": (610, 9724, 100_836, (134, 44, 12), {}),
    "kuairand-27k-likehate-subset": (664, 9359, 41_828, (25, 1, 0), {"duplicates (kept)": 124}),
    "foursquare-nyc-stan": (1083, 5135, 147_938, (155, 32, 4), None),
    "taobao-userbehavior-head": (43, 3276, 4321, (4, 0, 0), {}),
    "amazon-2014-beauty": (22_363, 12_101, 198_502, (1, 0, 0), {}),
    "amazon-2014-sports": (35_598, 18_357, 296_337, (1, 0, 0), {}),
    "amazon-2014-home": (66_519, 28_237, 551_682, (3, 0, 0), {}),
    "amazon-2014-toys": (19_412, 11_924, 167_597, (1, 1, 0), {}),
    "amazon-2014-video-games-sasrec": (31_013, 23_715, 287_107, (15, 4, 0), None),
}
PARQUET = {"foursquare-nyc-stan": "foursquare-nyc", "amazon-2014-video-games-sasrec": "amazon-2014-video-games"}


@pytest.mark.parametrize("name", SHARED)
def test_real_files_are_as_their_readme_says(real_data, name):
    users, items, events, long, notes = SHARED[name]
    try:
        data = get_dataset(name, offline=True)
    except RuntimeError as error:
        pytest.skip(f"not in {real_data}: {error}")
    assert (data.n_users, data.n_items, data.n_events) == (users, items, events)
    lengths = np.diff(data.offsets)
    assert tuple((lengths >= n).sum() for n in (200, 500, 1000)) == long
    assert notes is None or data.notes == notes
    assert verify(name, offline=True) == []
    if name == "ml-1m":
        return  # its parquet is the source
    prepared = PARQUET.get(name, name)
    order = ["user_id", "timestamp", "time_ms", "position", "file_row"]
    other = pl.read_parquet(real_data / prepared / f"{prepared}.parquet")
    if name == "taobao-userbehavior-head":
        other = other.with_row_index("file_row")
    if name != "kuairand-27k-likehate-subset":  # there the order of repeated milliseconds is not told
        found = data.item_ids[data.items - 1]
        if data.has_time:  # the order of events at one time is ours
            order[2:] = ["item_id"]
            found = found[np.lexsort((found, data.times, np.repeat(np.arange(data.n_users), lengths)))]
        other = other.sort([key for key in order if key in other.columns], maintain_order=True)
        assert found.tolist() == other["item_id"].to_list()
        assert np.repeat(data.user_ids, lengths).tolist() == other["user_id"].to_list()
    if data.has_time:
        assert data.times.tolist() == other.sort("user_id", "timestamp")["timestamp"].to_list()


def toy(users, items, times=None):
    """A data set of rows that are sorted already."""
    ids, places = np.unique(users, return_inverse=True)
    offsets = np.r_[0, np.cumsum(np.bincount(places))]
    item_ids, items = np.unique(items, return_inverse=True)
    return Dataset(
        "toy", load_card("synthetic"), "x", ids, item_ids, offsets, items.astype(np.int32) + 1, times, {}, ""
    )


@pytest.mark.parametrize("chunk", [1, 10, 10**6])
def test_against_brute_force(monkeypatch, chunk):
    rng = np.random.default_rng(0)
    users, items = np.sort(rng.choice(40, 500)), rng.integers(0, 30, 500)
    monkeypatch.setattr(module, "CHUNK", chunk)
    told = module.describe(toy(users, items, np.arange(500) * 1000))
    lengths = sorted(Counter(users.tolist()).values())
    seen = {(u, i) for u, i in zip(users.tolist(), items.tolist())}
    assert told["repeat_rate"] == pytest.approx(1 - len(seen) / 500)
    assert told["density"] == pytest.approx(500 / 40 / 30)
    assert (told["length_min"], told["length_max"]) == (lengths[0], lengths[-1])
    assert told["length_mean"] == pytest.approx(np.mean(lengths)) and told["length_p50"] == np.median(lengths)
    assert (told["first"], told["last"]) == ("1970-01-01 00:00:00", "1970-01-06 18:36:40")
    json.dumps(told)


@pytest.mark.parametrize("n, share", [(199, 0), (200, 0.5), (5000, 0.5)])
def test_shares_of_long_histories(n, share):
    told = module.describe(toy(np.r_[np.zeros(n, int), 1], np.arange(n + 1)))
    assert told["users_from_200"] == share and told["users_from_5000"] == (0.5 if n == 5000 else 0)
    assert told["first"] is None and told["last"] is None and not told["has_time"]


@pytest.mark.parametrize("lengths", [[1], [3, 3], [1, 10, 500]])
def test_the_histogram_is_a_picture_of_every_user(tmp_path, lengths, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plain = Axes.hist

    def hist(self, values, bins, **keys):
        found = plain(self, values, bins=bins, **keys)
        drawn["users"] = sum(found[0])
        return found

    monkeypatch.setattr(Axes, "hist", hist)
    data = toy(np.repeat(np.arange(len(lengths)), lengths), np.arange(sum(lengths)))
    path = module.histogram(data, tmp_path / "deep" / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG") and drawn["users"] == len(lengths)
    assert module.histogram(data) == tmp_path / "home" / "figures" / "toy-lengths.png"


def test_stats_by_name(real_data):
    told = stats("ml-100k", offline=True)
    assert told["users_from_200"] == 149 / 943 and told["length_p50"] == 65 and told["notes"] == {}


@pytest.mark.parametrize("times", [None, "tied"])
def test_same_direction_against_brute_force(times):
    rng = np.random.default_rng(1)
    users, items = np.sort(rng.choice(30, 600)), rng.integers(0, 8, 600)
    clock = (
        None if times is None else np.concatenate([np.sort(rng.integers(0, 9, (users == u).sum())) for u in range(30)])
    )
    data = toy(users, items, clock)
    places = [
        (int(data.items[i - 1]), int(data.items[i]), clock is not None and clock[i] == clock[i - 1])
        for i in range(1, 600)
        if users[i] == users[i - 1]
    ]

    def share(which):
        both = [(p, q) for p, q in itertools.combinations(which, 2) if p[0] != p[1] and set(p[:2]) == set(q[:2])]
        return sum(p[:2] == q[:2] for p, q in both) / len(both)

    want = {"same_direction": share(places)}
    if times:
        want |= {f"same_direction_{n}": share([p for p in places if p[2] == t]) for n, t in (("tied", 1), ("apart", 0))}
    assert module.same_direction(data) == pytest.approx(want)


def test_same_direction_is_one_where_ties_are_listed_by_item(make_card, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    users, times = rng.integers(0, 300, 9000), rng.integers(0, 9, 9000)
    lines = [f"{u}\t{i}\t5\t{t}\n" for u, i, t in zip(users, rng.integers(1, 30, 9000), times)]
    (tmp_path / "u.data").write_text("".join(lines))
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path))
    source = {"sources": [{"local": "u.data"}], "on_bad": {"duplicates": "drop"}}
    shuffled, by_item = (
        module.describe(get_dataset(make_card(**source | {"on_bad": source["on_bad"] | {"ties": answer}})))
        for answer in ("shuffle", "by_item")
    )
    assert by_item["same_direction_tied"] == 1
    assert "same_direction_tied" not in shuffled and shuffled["same_direction"] == pytest.approx(0.5, abs=0.02)
    assert by_item["tied_in_time"] == shuffled["tied_in_time"] > 0.5


def test_one_event_a_user_has_no_direction():
    assert module.same_direction(toy(np.arange(3), np.arange(3))) == {"same_direction": None}
