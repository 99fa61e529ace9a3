"""get_dataset: which source answers, what is said of the others, what is kept; and the real files."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import DataError, get_dataset, load, stats, verify
from malloc_bench.data.sources import fetch as sources


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "mine"))
    return tmp_path / "mine"


def prepared(tmp_path):
    return list((tmp_path / "home" / "prepared").iterdir())


def test_events_are_grouped_by_user_in_time_order(make_card, data_folder, udata):
    put(data_folder, "u.data", udata)
    data = get_dataset(make_card(sources=[{"local": "u.data"}], on_bad={"ties": "keep"}))
    assert data.user_ids.tolist() == [1, 2] and data.item_ids.tolist() == [10, 20, 30]
    assert data.offsets.tolist() == [0, 2, 4]
    assert data.items.tolist() == [3, 1, 2, 1]  # user 1 by time; user 2's two events share a second
    assert data.times.tolist() == [200, 300, 100, 100] and data.feedback["rating"].tolist() == [4, 5, 3, 1]
    assert (data.items.dtype, data.times.dtype, data.offsets.dtype) == (np.int32, np.int64, np.int64)
    assert (data.feedback["rating"].dtype, data.user_ids.dtype, data.item_ids.dtype) == (np.float32, np.int64, np.int64)


def test_events_at_one_time_are_in_an_order_that_says_nothing(make_card, data_folder):
    """Whatever the file's own order is, which often is that of the items."""
    lines = [f"{u}\t{i}\t{i % 5}\t{7 if i < 50 else i}\n".encode() for u in range(40) for i in range(60)]
    for name, order in (("sorted", lines), ("reversed", lines[::-1])):
        put(data_folder, name, b"".join(order))
    ordered, backwards = (get_dataset(make_card(sources=[{"local": name}])) for name in ("sorted", "reversed"))
    assert ordered.hash == backwards.hash
    items, times = ordered.items.reshape(40, 60), ordered.times.reshape(40, 60)
    assert (np.sort(items[:, :50]) == np.arange(1, 51)).all() and (items[:, 50:] == np.arange(51, 61)).all()
    assert (ordered.feedback["rating"] == (ordered.items - 1) % 5).all() and (np.diff(times) >= 0).all()
    rising = (np.diff(items[:, :50]) > 0).mean()
    assert (
        0.45 < rising < 0.55 and len({tuple(row) for row in items.tolist()}) == 40
    )  # to each user an order of their own
    assert ordered.tied == pytest.approx(49 / 59)
    fine = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + b"".join(lines)  # read in milliseconds
    put(data_folder, "fine.inter", fine)
    assert get_dataset(make_card(sources=[{"local": "fine.inter", "format": "recbole-inter"}])).hash == ordered.hash
    kept = get_dataset(make_card(sources=[{"local": "sorted"}], on_bad={"ties": "keep"}))
    assert (kept.items.reshape(40, 60) == np.arange(1, 61)).all() and kept.tied == ordered.tied


def test_ids_far_apart(make_card, data_folder):
    put(data_folder, "u.data", b"9000000000000\t-5\t1\t1\n3\t4000000000000000000\t1\t2\n")
    data = get_dataset(make_card(sources=[{"local": "u.data"}]))
    assert data.user_ids.tolist() == [3, 9000000000000] and data.item_ids.tolist() == [-5, 4000000000000000000]
    assert data.items.tolist() == [2, 1]


def test_the_hash_is_of_the_content(make_card, data_folder, udata):
    put(data_folder, "u.data", udata)
    put(data_folder, "r.dat", udata.replace(b"\t", b"::"))
    put(data_folder, "other", udata.replace(b"300", b"301"))
    first = get_dataset(make_card(sources=[{"local": "u.data"}]))
    second = get_dataset(make_card(sources=[{"local": "r.dat", "format": "movielens-dat"}]))
    third = get_dataset(make_card(sources=[{"local": "other"}]))
    assert first.hash == second.hash != third.hash
    assert len(first.hash) == 64


def test_the_next_source_answers_and_the_failures_are_told(make_card, server, make_zip, udata, caplog):
    good = server.serve("good.zip", make_zip(**{"a/u.data": udata}))
    name = make_card(
        sources=[
            {**server.serve("cut.zip", b"x", declared=9), "member": "a/u.data"},
            {**server.serve("other.zip", make_zip(**{"b/u.data": udata})), "member": "a/u.data"},
            {**good, "sha256": "1" * 64, "member": "a/u.data"},
            {"local": "u.data"},
            {**good, "member": "a/u.data"},
        ]
    )
    data = get_dataset(name, progress=False)
    assert data.source == good["url"] and data.n_events == 4
    [line] = [record.getMessage() for record in caplog.records if record.name == "malloc_bench.data.load"]
    for reason in ("truncated", "no member", "wrong sha256", "MALLOC_BENCH_DATA is not set", f"{server.url}/cut.zip"):
        assert reason in line


def test_a_bomb_and_an_escaping_archive_end_nowhere(make_card, server, make_zip, udata, tmp_path):
    evil = {"../evil": b"evil", "u.data": udata}
    name = make_card(
        sources=[
            {**server.serve("bomb.zip", make_zip(**{"u.data": bytes(5_000_000)})), "member": "u.data"},
            {**server.serve("evil.zip", make_zip(**evil)), "member": "u.data"},
        ]
    )
    with pytest.raises(DataError, match=r"bomb.zip .*a zip bomb.*evil.zip .*outside its folder"):
        get_dataset(name, progress=False)
    assert not list(tmp_path.rglob("evil"))


def test_where_nothing_answers_one_line_says_all(make_card, server):
    name = make_card(
        sources=[
            {"url": f"{server.url}/gone", "md5": "0" * 32},
            {"url": "http://example.com/x", "md5": "0" * 32},
            {"local": "u.data"},
        ]
    )
    with pytest.raises(DataError) as caught:
        get_dataset(name, progress=False)
    line = str(caught.value)
    assert "\n" not in line
    for part in (f"{server.url}/gone (HTTP 404", "x (only https", "local u.data (MALLOC_", "suites/smoke.yaml"):
        assert part in line


def test_what_was_prepared_is_used_before_an_earlier_source_is_asked(make_card, server, udata, caplog):
    name = make_card(sources=[{"url": f"{server.url}/gone", "md5": "0" * 32}, server.serve("u.data", udata)])
    first = get_dataset(name, progress=False)
    server.asked.clear()
    caplog.clear()
    assert get_dataset(name, progress=False).hash == first.hash
    assert server.asked == [] and not caplog.text


def test_the_users_own_file_comes_first(make_card, server, data_folder, udata):
    put(data_folder, "u.data", udata)
    name = make_card(sources=[server.serve("u.data", udata), {"local": "u.data"}])
    assert get_dataset(name).source == f"local {data_folder / 'u.data'}"
    assert server.asked == []


def test_a_bad_local_file_is_passed_over(make_card, server, data_folder, udata, caplog):
    put(data_folder, "u.data", udata + b"1\tx\t1\t1\n")
    name = make_card(sources=[{"local": "u.data"}, server.serve("u.data", udata)])
    assert get_dataset(name, progress=False).source == f"{server.url}/u.data"
    assert "u.data: row 5: item_id is 'x', not a number" in caplog.text


def test_other_counts_than_published_are_refused_but_can_be_looked_at(make_card, data_folder, udata):
    put(data_folder, "u.data", udata)
    name = make_card(sources=[{"local": "u.data"}], published={"users": 2, "items": 4, "events": 5})
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match="3 items where 4 are published; 4 events where 5 are published"):
            get_dataset(name)
    assert verify(name) == ["3 items where 4 are published", "4 events where 5 are published"]
    assert verify(make_card(sources=[{"local": "u.data"}], published={"users": 2, "items": 3, "events": 4})) == []


def test_offline_never_touches_the_network(make_card, no_network):
    source = {"url": "https://example.com/u.data", "md5": "0" * 32}
    wheel = {"pip": "x==1", "member": "a", "sha256": "0" * 64}
    with pytest.raises(DataError, match=r"u.data \(not downloaded before, and offline\); pip x==1 \(not downloaded"):
        get_dataset(make_card(sources=[source, wheel]), offline=True)


def test_what_is_here_already_answers_offline(make_card, server, udata, tmp_path, request):
    name = make_card(sources=[server.serve("u.data", udata)])
    first = get_dataset(name, progress=False)
    request.getfixturevalue("no_network")
    assert get_dataset(name, offline=True).hash == first.hash
    for path in prepared(tmp_path):
        shutil.rmtree(path)
    assert get_dataset(name, offline=True).hash == first.hash  # from the kept download
    for path in prepared(tmp_path):
        shutil.rmtree(path)
    (tmp_path / "home" / "downloads" / name / "u.data").write_bytes(udata + b"1\t1\t1\t1\n")
    with pytest.raises(DataError, match="not downloaded before"):  # tampered with: its hash is wrong
        get_dataset(name, offline=True)


@pytest.mark.parametrize("with_time", [True, False])
def test_the_second_time_no_source_is_read(make_card, data_folder, udata, monkeypatch, with_time):
    if with_time:
        put(data_folder, "f", udata)
    else:
        data_folder.mkdir()
        frame = pl.DataFrame({"user_id": [2, 1, 1], "item_id": [5, 6, 7], "position": [0, 1, 0]})
        frame.write_parquet(data_folder / "f")
    name = make_card(sources=[{"local": "f"}], format="movielens-udata" if with_time else "parquet-ordered")
    first = get_dataset(name)
    monkeypatch.setattr(sources, "opened", None)
    second = get_dataset(name)
    assert second.hash == first.hash and second.source == first.source
    assert second.has_time == first.has_time == with_time
    for column in ("user_ids", "item_ids", "offsets", "items", "times"):
        a, b = getattr(first, column), getattr(second, column)
        assert (a is None and b is None) or (a.dtype == b.dtype and (a == b).all())
    assert first.feedback.keys() == second.feedback.keys() == ({"rating"} if with_time else set())
    for name, a in first.feedback.items():
        assert a.dtype == second.feedback[name].dtype and (a == second.feedback[name]).all()


def test_a_changed_local_file_or_card_is_prepared_again(make_card, data_folder, udata):
    put(data_folder, "u.data", udata)
    first = get_dataset(make_card(sources=[{"local": "u.data"}]))
    put(data_folder, "u.data", udata.replace(b"300", b"3000"))
    assert get_dataset("toy").times.max() == 3000 and first.times.max() == 300
    with pytest.raises(DataError, match="has not 4 columns"):
        get_dataset(make_card(sources=[{"local": "u.data"}], format="movielens-dat"))


def damage_cut(path):
    events = path / "events.parquet"
    events.write_bytes(events.read_bytes()[:-20])


def damage_empty(path):
    (path / "users.parquet").write_bytes(b"")


def damage_content(path):
    frame = pl.read_parquet(path / "events.parquet").with_columns(pl.col("rating") + 1)
    frame.write_parquet(path / "events.parquet")


def damage_about(path):
    (path / "about.json").write_text("{}")


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_content, damage_about])
def test_a_damaged_cache_is_made_again(make_card, data_folder, udata, tmp_path, caplog, damage):
    put(data_folder, "u.data", udata)
    name = make_card(sources=[{"local": "u.data"}])
    first = get_dataset(name)
    [path] = prepared(tmp_path)
    damage(path)
    assert get_dataset(name).hash == first.hash
    assert "is damaged and will be made again" in caplog.text
    caplog.clear()
    assert get_dataset(name).hash == first.hash and not caplog.text


def test_an_unwritable_cache_costs_a_warning_only(make_card, data_folder, udata, tmp_path, caplog):
    put(data_folder, "u.data", udata)
    put(tmp_path, "home", b"a file where a folder should be")
    assert get_dataset(make_card(sources=[{"local": "u.data"}])).n_events == 4
    assert "toy is not cached" in caplog.text and "MALLOC_BENCH_HOME names" in caplog.text


def test_a_full_disk_names_the_cache_folder(make_card, data_folder, udata, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    put(data_folder, "u.data", udata)
    monkeypatch.setattr("malloc_bench.data.prepare.prepare", full)
    with pytest.raises(DataError, match=r"prepared: No space left on device; free some .* \(MALLOC_BENCH_HOME\)"):
        get_dataset(make_card(sources=[{"local": "u.data"}]))
    assert not list((tmp_path / "home" / "prepared").iterdir())


def test_a_download_that_cannot_be_kept_names_the_cache_folder(make_card, server, udata, tmp_path):
    put(tmp_path, "home/downloads", b"a file where a folder should be")
    with pytest.raises(DataError, match="MALLOC_BENCH_HOME names"):
        get_dataset(make_card(sources=[server.serve("u.data", udata)]), progress=False)


@pytest.fixture
def wheel(tmp_path, monkeypatch, udata):
    """A wheel in a folder that pip looks into, and the source that names its member."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    inter = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + udata
    with zipfile.ZipFile(folder / "toydata-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toydata/toy.inter", inter)
        archive.writestr("toydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n")
        archive.writestr("toydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toydata-1.0.dist-info/RECORD", "")
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    member = {"member": "toydata/toy.inter", "sha256": hashlib.sha256(inter).hexdigest(), "format": "recbole-inter"}
    return {"pip": "toydata==1.0", **member}


def test_a_wheel_member(make_card, wheel, tmp_path, monkeypatch):
    data = get_dataset(make_card(sources=[wheel]))
    assert data.source == "pip toydata==1.0" and data.n_events == 4
    assert [path.name for path in (tmp_path / "home" / "downloads" / "toy").iterdir()] == ["toy.inter"]
    monkeypatch.setattr(subprocess, "run", None)
    assert get_dataset("toy").hash == data.hash


def test_what_pip_says_is_the_reason(make_card, wheel):
    name = make_card(sources=[{**wheel, "pip": "toydata==2.0"}, {**wheel, "sha256": "0" * 64}])
    with pytest.raises(
        DataError, match=r"toydata==2.0 \(ERROR: No matching .*toydata==1.0 \(wrong sha256 of toydata/toy"
    ):
        get_dataset(name)


def test_pip_that_hangs(make_card, wheel, monkeypatch):
    monkeypatch.setattr(sources, "PIP_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"pip did not finish in 0.01 s"):
        get_dataset(make_card(sources=[wheel]))


def test_importing_the_package_needs_neither_polars_nor_pydantic():
    code = (
        "import sys, malloc_bench.data as data; data.get_dataset\n"
        "print(sorted({'polars', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ml_100k_from_u_data(real_data):
    data = get_dataset("ml-100k", offline=True)
    assert (data.n_users, data.n_items, data.n_events, data.has_time) == (943, 1682, 100_000, True)
    expected = pl.read_parquet(real_data / "ml-100k/ml-100k.parquet").sort("user_id", "timestamp", "item_id")
    users, items = np.repeat(data.user_ids, np.diff(data.offsets)), data.item_ids[data.items - 1]
    order = np.lexsort((items, data.times, users))
    found = {"user_id": users, "item_id": items, "timestamp": data.times, "rating": data.feedback["rating"]}
    assert (users == users[order]).all() and (data.times == data.times[order]).all()
    for name, column in found.items():
        assert (column[order] == expected[name].to_numpy()).all()
    assert data.tied == pytest.approx(0.5104, abs=1e-4)


def test_ml_1m_by_order_alone(real_data):
    data = get_dataset("ml-1m", offline=True)
    assert (data.n_users, data.n_items, data.n_events) == (6040, 3706, 1_000_209)
    assert not data.has_time and data.times is None and not data.feedback
    expected = pl.read_parquet(real_data / "ml-1m/ml-1m_time_ordered.parquet").sort("user_id", "position")
    assert (data.item_ids[data.items - 1] == expected["item_id"].to_numpy()).all()
    assert (np.repeat(data.user_ids, np.diff(data.offsets)) == expected["user_id"].to_numpy()).all()
    begun = time.monotonic()
    assert get_dataset("ml-1m", offline=True).hash == data.hash
    assert time.monotonic() - begun < 1


def test_stats_are_those_published(real_data):
    told = stats("ml-100k", offline=True)
    assert told["users_from_200"] == 149 / 943 and told["users_from_500"] == 5 / 943 and told["users_from_1000"] == 0
    assert (told["length_min"], told["length_p50"], told["length_max"]) == (20, 65, 737)
    assert told["density"] == pytest.approx(100_000 / 943 / 1682)
    json.dumps(told)


@pytest.mark.slow
def test_ml_100k_from_the_package_index_is_the_same(real_data, monkeypatch):
    local = get_dataset("ml-100k")
    monkeypatch.delenv("MALLOC_BENCH_DATA")
    ordered = load._by_effort
    monkeypatch.setattr(load, "_by_effort", lambda card: [pair for pair in ordered(card) if "pip" in str(pair[0])])
    data = get_dataset("ml-100k")
    assert data.source == "pip recbole==1.2.1" and data.hash == local.hash
