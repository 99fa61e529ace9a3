"""Bad input: each case by its name, with every answer a card may give, and what is counted of it."""

import gzip
import io
import re
import tarfile

import numpy as np
import pytest

from malloc_bench.data import DataError, get_dataset, load_card
from malloc_bench.data.formats.policies import POLICIES, dropped

GOOD = b"1\t10\t5\t300\n2\t20\t3\t100\n1\t30\t4\t200\n2\t10\t1\t100\n"
SOURCES = [{"local": "u.data"}]

#: case -> (a line that has it, what is said of it)
ROWS = {
    "bad_row": (b"1\tx\t5\t300\n", "u.data: row 3: item_id is 'x', not a number"),
    "huge_id": (b"1\t9223372036854775808\t5\t300\n", "u.data: row 3: item_id is '9223372036854775808', beyond 63 bits"),
    "bad_time": (b"1\t30\t5\t-7\n", "u.data: row 3: timestamp is -7, not a time between 1970 and 2099"),
    "duplicates": (b"1\t10\t2\t300\n", "u.data: row 3: user 1 has the same item at the same time 300 twice"),
    "single_event_users": (b"9\t40\t5\t300\n", "u.data: row 3: user 9 has one event only"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def with_row(line):
    lines = GOOD.splitlines(keepends=True)
    return b"".join([*lines[:2], line, *lines[2:]])


@pytest.mark.parametrize("case, answer", [(case, answer) for case in ROWS for answer in POLICIES[case]])
def test_a_row_meets_its_policy(make_card, folder, case, answer):
    line, message = ROWS[case]
    (folder / "u.data").write_bytes(with_row(line))
    name = make_card(sources=SOURCES, on_bad={case: answer})
    if answer == "reject":
        with pytest.raises(DataError, match=re.escape(message)):
            get_dataset(name)
        return
    data = get_dataset(name)
    said = f"{case} ({'dropped' if answer == 'drop' else 'kept'})"
    assert data.notes == {said: 1} and get_dataset(name).notes == {said: 1}  # the second time prepared
    assert data.n_events == 4 + (answer == "keep") and dropped(data.notes) == (answer == "drop")
    assert data.item_ids.tolist() == [10, 20, 30] + [40] * (case == "single_event_users" and answer == "keep")
    if answer == "drop":
        (folder / "u.data").write_bytes(GOOD)
        assert get_dataset(make_card(sources=SOURCES)).hash == data.hash


@pytest.mark.parametrize("case", ROWS)
def test_the_first_answer_is_the_default(make_card, folder, case):
    (folder / "u.data").write_bytes(with_row(ROWS[case][0]))
    name = make_card(sources=SOURCES)
    if POLICIES[case][0] == "reject":
        with pytest.raises(DataError):
            get_dataset(name)
    else:
        assert get_dataset(name).notes == {f"{case} (kept)": 1}


def test_what_is_rejected_says_how_to_go_on(make_card, folder):
    (folder / "u.data").write_bytes(with_row(ROWS["bad_time"][0]))
    with pytest.raises(DataError, match=re.escape("(on_bad: {bad_time: drop or keep} in a card would go on)")):
        get_dataset(make_card(sources=SOURCES))


def test_several_cases_are_counted_apart_and_the_first_row_is_told(make_card, folder):
    text = GOOD + b"1\t2\n" + b"3\tx\t1\t1\n" + b"1\t99999999999999999999\t1\t1\n" + b"1\t1\t1\t99999999999\n"
    (folder / "u.data").write_bytes(text)
    drop = dict.fromkeys(("bad_row", "huge_id", "bad_time"), "drop")
    data = get_dataset(make_card(sources=SOURCES, on_bad=drop))
    assert data.notes == {"bad_row (dropped)": 2, "huge_id (dropped)": 1, "bad_time (dropped)": 1}
    assert data.n_events == 4
    with pytest.raises(DataError, match=r"row 7: item_id is '99999999999999999999'"):
        get_dataset(make_card(sources=SOURCES, on_bad={"bad_row": "drop"}))
    with pytest.raises(DataError, match=r"row 8: timestamp is 99999999999, not a time"):
        get_dataset(make_card(sources=SOURCES, on_bad={"bad_row": "drop", "huge_id": "drop"}))


def test_dropped_rows_count_towards_the_published_events(make_card, folder):
    (folder / "u.data").write_bytes(with_row(ROWS["bad_row"][0]))
    published = {"users": 2, "events": 5}
    assert get_dataset(make_card(sources=SOURCES, on_bad={"bad_row": "drop"}, published=published)).n_events == 4


def test_a_file_of_which_nothing_is_left(make_card, folder):
    (folder / "u.data").write_bytes(b"a\tb\tc\td\n")
    with pytest.raises(DataError, match=r"u\.data: no event is left of it"):
        get_dataset(make_card(sources=SOURCES, on_bad={"bad_row": "drop"}))


def test_ids_beyond_31_bits_are_kept_as_they_are(make_card, folder):
    big = [2**31 - 1, 2**31, 2**62, 2**63 - 1]
    (folder / "u.data").write_bytes("".join(f"{i}\t{i}\t1\t5\n" for i in big for _ in range(2)).encode())
    data = get_dataset(make_card(sources=SOURCES))
    assert data.user_ids.tolist() == big and data.item_ids.tolist() == big
    assert data.items.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["gz", "tar.gz"])
def test_an_archive_that_is_cut_in_the_middle(make_card, folder, kind, cut):
    text = b"".join(b"%d\t%d\t5\t300\n" % tuple(row) for row in np.random.default_rng(0).integers(0, 999, (2000, 2)))
    if kind == "gz":
        packed, source = gzip.compress(text), {"local": "u.data.gz"}
    else:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            info = tarfile.TarInfo("a/u.data")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        packed, source = buffer.getvalue(), {"local": "u.data.tar.gz", "member": "a/u.data"}
    path = folder / f"u.data.{kind}"
    path.write_bytes(packed)
    assert get_dataset(make_card(sources=[source])).n_events == 2000
    path.write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(DataError, match=r"cut in the middle, after row \d+|cannot be unpacked|cut"):
        get_dataset(make_card(sources=[source]))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "u.data: the file is empty"),
        (GOOD + "1\té\t3\t4\n".encode("latin-1"), "u.data: row 5: byte 0xe9 is no plain text"),
        (GOOD.decode().encode("utf-16"), "u.data: row 1: byte 0xff is no plain text"),
    ],
)
def test_what_is_always_rejected(make_card, folder, text, message):
    (folder / "u.data").write_bytes(text)
    with pytest.raises(DataError, match=re.escape(message)):
        get_dataset(make_card(sources=SOURCES))


@pytest.mark.parametrize(
    "on_bad, message",
    [
        ({"duplicate": "drop"}, "no policy is named 'duplicate'. Did you mean 'duplicates'?"),
        ({"bad_row": "keep"}, "bad_row can be answered with reject, drop, not 'keep'"),
        ({"empty_file": "drop"}, "empty_file can be answered with reject, not 'drop'"),
        ({"ties": 3}, "ties can be answered with shuffle, keep, by_item, not 3"),
        ({"ties": ["keep"]}, "ties can be answered with shuffle, keep, by_item, not ['keep']"),
        ({3: "drop"}, "no policy is named '3'. Valid: bad_row,"),
    ],
)
def test_a_card_with_a_wrong_policy(make_card, on_bad, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load_card(make_card(sources=SOURCES, on_bad=on_bad))
