"""A first card of any log, from a look at it: what is guessed reads as the log's maker meant it."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import zipfile

import numpy as np
import polars as pl
import pytest

from malloc_bench.data import DataError, get_dataset, load_card
from malloc_bench.data.draft import draft

N = 300
RNG = np.random.default_rng(0)
USERS = [f"u{i:03d}" for i in RNG.integers(0, 20, N)]
ITEMS = [f"{i:05d}" for i in RNG.integers(0, 40, N)]
TIMES = RNG.integers(1_500_000_000, 1_600_000_000, N).tolist()
STARS = RNG.integers(1, 6, N).tolist()
CLICKS = RNG.integers(0, 2, N).tolist()
DATES = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in TIMES]


def parquet_of(when):
    stream = io.BytesIO()
    pl.DataFrame({"user": ["a"], "item": ["b"], "when": when}).write_parquet(stream)
    return stream.getvalue()


def lines(head, pattern, *columns):
    return head + "".join(pattern.format(*row) + "\n" for row in zip(*columns))


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)


def zip_of(members):
    zipped(stream := io.BytesIO(), **members)
    return stream.getvalue()


def write(folder, name):
    """One log in many shapes; what its card must say of it."""
    path = folder / name
    table = lines("userId,movieId,title,rating,timestamp\n", '{0},{1},"A, the {1}",{2},{3}', USERS, ITEMS, STARS, TIMES)
    texts = {
        "plain.csv": table,
        "headless.tsv": lines("", "{}\t{}\t{}\t{}", USERS, ITEMS, STARS, TIMES),
        "old.dat": lines("", "{}::{}::{}::{}", USERS, ITEMS, STARS, TIMES),
        "toy.inter": lines(
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n",
            "{}\t{}\t{}\t{}.0",
            USERS,
            ITEMS,
            STARS,
            TIMES,
        ),
        "shop.jsonl": lines(
            "", '{{"customer": "{}", "sku": "{}", "stars": {}, "ts": {}000, "tags": [1]}}', USERS, ITEMS, STARS, TIMES
        ),
        "semicolons.csv": lines(
            "\ufeffCustomer ID;Product;Stars;Date\r\n", "{};{};{};{:%Y-%m-%d %H:%M:%S}\r", USERS, ITEMS, STARS, DATES
        ),
    }
    if name in texts:
        path.write_text(texts[name], newline="")
    elif name == "clicks.tsv.gz":
        text = lines(
            "visitor\tproduct_id\trating\tevent_time\n",
            "{}\t{}\t{}\t{}",
            USERS,
            ITEMS,
            STARS,
            [t * 10**6 for t in TIMES],
        )
        path.write_bytes(gzip.compress(text.encode()))
    elif name == "pack.zip":
        zipped(path, **{"README.txt": "hello", "a/log.csv": table})
    elif name == "wide.csv":
        path.write_text(table, encoding="utf-16")
    else:
        frame = pl.DataFrame({"uid": USERS, "item": ITEMS, "score": STARS, "when": DATES})
        frame.write_parquet(path) if name.endswith("parquet") else frame.write_ipc(path)
    return path


SHAPES = [
    "plain.csv", "headless.tsv", "old.dat", "toy.inter", "shop.jsonl", "semicolons.csv", "clicks.tsv.gz", "pack.zip",
    "wide.csv", "events.parquet", "events.arrow",
]  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_one_log_in_any_shape_is_the_same_data(name, tmp_path):
    card, _ = draft(write(tmp_path, name))
    assert card == tmp_path / f"{name.partition('.')[0]}.yaml"
    data = get_dataset(card)
    assert sorted(data.original_user(slice(None)).to_list()) == sorted(set(USERS))
    assert sorted(data.item_names.to_list()) == sorted(set(ITEMS))
    assert sorted(data.times.tolist()) == sorted(TIMES)
    assert data.feedback.keys() == {"rating"} and sorted(data.feedback["rating"].tolist()) == sorted(STARS)
    assert (data.labels() == (data.feedback["rating"] >= 4)).all()
    of_first = sorted((t, i) for u, i, t in zip(USERS, ITEMS, TIMES) if u == min(USERS))
    assert data.item_names[data.items[: data.offsets[1]] - 1].to_list() == [i for _, i in of_first]


def test_what_could_not_be_told_is_said_and_written_down(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text(lines("who;what\n", "{};thing {}", USERS, ITEMS))
    card, doubts = draft(path)
    told = " ".join(doubts)
    assert "user is a guess: who" in told and "item is a guess: what" in told and "no time was found" in told
    assert all(f"# to be looked at: {doubt}" in card.read_text() for doubt in doubts)
    data = get_dataset(card)
    assert (data.n_users, data.n_events, data.has_time) == (len(set(USERS)), N, False)


@pytest.mark.parametrize(
    "names, guesses",
    [
        ("user,title,rating,timestamp", ["item: title"]),
        ("user_name_2,item_description,stars,ts", ["item: item_description", "user: user_name_2"]),
        ("UserID,item,my_rating,event_date", ["rating: my_rating", "time: event_date"]),
        ("author,isbn,Rating,When", ["time: When", "user: author"]),
        ("user_id:token,item_id:token,rating:float,timestamp:float", []),
    ],
)
def test_a_column_found_by_a_part_of_its_name_is_said_to_be_a_guess(names, guesses, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(lines(f"{names}\n", "{},{},{},{}", USERS, ITEMS, STARS, TIMES))
    _, doubts = draft(path)
    start, part = "which column is the ", " is a guess, by its name"
    assert sorted(each.removeprefix(start).replace(part, "") for each in doubts if part in each) == guesses
    assert len(doubts) == len(guesses)


def test_hidden_files_of_a_zip_are_passed_over(tmp_path):
    path = tmp_path / "pack.zip"
    table = write(tmp_path, "plain.csv").read_text()
    zipped(path, **{"a/log.csv": table, "a/.DS_Store": "x" * 10**6, ".git/config": "", "__MACOSX/a/._log.csv": ""})
    card, doubts = draft(path)
    assert not doubts and get_dataset(card).n_events == N


def test_clicks_are_feedback_and_numbers_that_are_no_time_give_the_order(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text(lines("user,item,is_click,time\n", "{},{},{},{}", USERS, ITEMS, CLICKS, range(N)))
    card, doubts = draft(path)
    data = get_dataset(card)
    assert data.feedback.keys() == {"is_click"} and data.card.label.column == "is_click"
    assert not data.has_time and any("no time since 1970" in doubt for doubt in doubts)


def test_where_a_card_goes(tmp_path, monkeypatch):
    log = write(tmp_path, "plain.csv")
    elsewhere, _ = draft(log, tmp_path / "cards" / "mine.yaml")
    assert load_card(elsewhere).name == "mine" and get_dataset(elsewhere).n_events == N
    log.rename(tmp_path / "ml-100k.csv")
    card, _ = draft(tmp_path / "ml-100k.csv")
    assert card.name == "my-ml-100k.yaml"  # a shipped data set has the other name
    with pytest.raises(DataError, match="is there already"):
        draft(tmp_path / "ml-100k.csv")
    (tmp_path / "my log (2).csv").write_text((tmp_path / "ml-100k.csv").read_text())
    assert draft(tmp_path / "my log (2).csv")[0].name == "my-log-2.yaml"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\xef\xbb\xbf", "the file is empty"),
        ("a.csv", b"\xef\xbb\xbf\r\n \n", "the file is empty"),
        ("a.csv", b"\xff\xfe", "the file is empty"),
        ("a.zip", zip_of({".DS_Store": b"x", "__MACOSX/a": b"y"}), "no plain file is in it"),
        ("a.csv", b"a\nb\nc\n", "no separator of columns"),
        ("a.csv", b"user,user\n1,2\n", "a.csv: row 1: 'user', the user, names columns 1 and 2: each needs a name"),
        ("a.csv", b"user,item,time,x,time\n1,2,3,4,5\n", "row 1: 'time', the time, names columns 3 and 5"),
        ("a.csv", b",item,time\n1,2,1600000000\n", "no column of item, time is left to be the user: name column 1 in"),
        ("a.csv", b",,\n,,\n", "no separator of columns"),
        ("a.csv", b"\n\nuser,item\n1,2\n", "row 1 is blank, neither the names of the 2 columns that the rows below"),
        ("a.csv", b" \r\nu1,i1,3\r\n", "row 1 is blank, neither"),
        ("a.csv", b"sep=;\nuser;item;time\n1;2;3\n", "row 1 is 'sep=;', neither the names of the 3 columns"),
        ("a.csv", b"# exported\nuser,item\n1,2\n", "row 1 is '# exported', neither"),
        ("a.csv", b"# by, me, at, noon\nuser,item\n1,2\n2,3\n", "row 1 is '# by, me, at, noon', neither"),
        ("a.csv", b"u1,i1,3\nu1,i2,4,\nu1,i3,5,\n", "row 1 is 'u1,i1,3', neither the names of the 4 columns"),
        ("a.csv", b"user,item\n1,2,3\n1,3,4\n", "row 1 is 'user,item', neither the names of the 3 columns"),
        ("a.bin", bytes(range(256)) * 9, "neither text nor a table"),
        ("a.json", b"[1]\n", "a JSON object on every line"),
        ("a.json", b"{" * 9000, "a JSON object on every line"),
        ("a.npy", b"\x93NUMPY\1\0", "arrays of numpy"),
        ("a.parquet", b"PAR1" * 9, "a.parquet: "),
        ("a.csv.gz", gzip.compress(b"user,item\n" * 9999, mtime=0)[:-20], "a.csv.gz: "),
        ("a.zip", b"PK\3\4" + b"x" * 50, "a.zip: "),
        ("a.csv", gzip.compress(b"user,item\n1,2\n", mtime=0), "packed by gzip"),
        ("a.parquet", parquet_of(pl.Series([2**31 - 1], dtype=pl.Int32).cast(pl.Date)), "out-of-range date"),
        ("none.csv", None, "No such file"),
    ],
)
def test_what_no_card_can_be_made_of_is_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        draft(path)
    assert message in str(caught.value) and "\n" not in str(caught.value) and name in str(caught.value)
    assert not list(tmp_path.glob("*.yaml"))


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    for path in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(DataError, match="a folder or a device, not a file"):
            draft(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"user": "a\u2028b", "item": "\x85", "when": "2020-1-1"}\n'.encode()),  # JSON escapes neither
        ("a.jsonl", '{"user": "é", "item": "1", "when": "2020-01-01"}\n'.encode("utf-16")),
        ("A.CSV.GZ", gzip.compress(b"user,item,when\ra,1,2020-1-1\r", mtime=0)),
    ],
)
def test_what_a_look_takes_is_read(name, content, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    (tmp_path / name).write_bytes(content)
    card, _ = draft(tmp_path / name)
    assert get_dataset(card).times == [1_577_836_800]


def test_names_that_yaml_would_misread(tmp_path):
    path = tmp_path / "a.csv"
    names = ["user: no", "item #1", "yes", "null"]
    path.write_text(lines(",".join(names) + "\n", "{},{},{},{}", USERS, ITEMS, CLICKS, TIMES))
    data = get_dataset(draft(path)[0])
    assert (data.n_users, data.n_events) == (len(set(USERS)), N)
    json.dumps(data.card.table.model_dump())


def test_one_odd_time_does_not_hide_the_column_and_its_row_is_named(tmp_path):
    lines = [f"u{i % 4},i{i},2024-01-{i + 1:02d}T10:00:00Z" for i in range(20)]
    lines[6] = "u2,i6,yesterday"
    (tmp_path / "log.csv").write_text("\n".join(["who,sku,watched at", *lines]) + "\n")
    path, doubts = draft(tmp_path / "log.csv")
    written = path.read_text()
    assert 'time: "watched at"' in written and "unit: iso" in written
    assert any("row 8: watched at is 'yesterday', which is no time" in doubt for doubt in doubts)


@pytest.mark.parametrize(
    ("head", "pattern", "doubts"),
    [
        (",user,item,time", "{3},{0},{1},{2}", ["column 1 has no name in row 1 and is not read"]),  # pandas' to_csv()
        ("user,item,time,x,x", "{0},{1},{2},{3},{3}", []),
        (
            "user,,item,time,",
            "{0},{3},{1},{2},{3}",
            [f"column {i} has no name in row 1 and is not read" for i in (2, 5)],
        ),
        ("user,item,time,", "{0},{1},{2},", []),
        ("user,item,time", "{0},{1},{2},", []),
        ("user::item::time", "{0}::{1}::{2}::", []),
        ('"user","item","time"\r', '"{0}","{1}",{2},\r', []),
        (" user , item , time ", " {0} , {1} , {2} ", []),
        ("user, item, time, place", "{0}, {1}, {2}, a b c d e", []),
        ("user item time", "{0} {1} {2}", []),
    ],
)
def test_columns_that_are_not_needed_and_blanks_keep_no_log_from_being_read(head, pattern, doubts, tmp_path):
    (tmp_path / "a.csv").write_text(lines(f"{head}\n", pattern, USERS, ITEMS, TIMES, STARS), newline="")
    card, told = draft(tmp_path / "a.csv")
    data = get_dataset(card)
    assert told == doubts
    assert sorted(data.item_names.str.strip_chars()) == sorted(set(ITEMS)) and data.n_users == len(set(USERS))
    assert sorted(data.times.tolist()) == sorted(TIMES)


def test_rows_of_words_that_end_with_a_separator_keep_their_header(tmp_path):
    (tmp_path / "a.csv").write_text(lines("who,what\n", "{},thing {},", USERS, ITEMS))
    card, _ = draft(tmp_path / "a.csv")
    assert get_dataset(card).n_events == N and "user: who" in card.read_text()
