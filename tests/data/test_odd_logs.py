"""Logs as people have them: gaps, repeats that contradict one another, other units, columns of odd names."""

from itertools import permutations

import polars as pl
import pytest

from malloc_bench.data import DataError, get_dataset
from malloc_bench.data.draft import draft

AT = 1_387_670_400


@pytest.fixture
def log(tmp_path):
    """The data of a CSV with columns u, i, t, r; more: of its card."""

    def made(rows, more="", columns="rating: r", unit="s"):
        (tmp_path / "log.csv").write_text("u,i,t,r\n" + "".join(f"{row}\n" for row in rows))
        table = f"table: {{user: u, item: i, time: t, unit: {unit}, {columns}}}"
        (tmp_path / "own.yaml").write_text(f"format: table\nlocal: log.csv\n{table}\n{more}")
        return get_dataset(tmp_path / "own.yaml")

    return made


@pytest.mark.parametrize("more", ["", "on_bad: {duplicates: drop}\n", "on_bad: {ties: by_item}\n"])
def test_repeats_that_contradict_one_another_come_out_alike_in_any_order_of_rows(log, more):
    rows = [f"a,x,{AT},5", f"a,x,{AT},1", f"a,y,{AT},3", f"a,x,{AT + 1},2"]
    assert len({log(some, more).hash for some in permutations(rows)}) == 1


def test_times_too_far_to_be_told_apart_are_not_kept_as_one(log):
    rows = [f"a,{item},{(AT + n) * 10**6},1" for n, item in enumerate("hgf")]
    with pytest.raises(
        DataError, match=r"log.csv: row 2: t is 1\d+\.?\d*(e\+15)?, too far from 1970 to be kept: name the unit"
    ):
        log(rows, "on_bad: {bad_time: keep}\n")
    data = log(rows, unit="us")
    assert data.item_names[data.items - 1].to_list() == ["h", "g", "f"]


@pytest.mark.parametrize(("unit", "zero"), [("s", "0"), ("s", "0.0"), ("ms", "0"), ("iso", "1970-01-01")])
def test_a_zero_among_times_of_today_is_no_time(log, unit, zero):
    at = [f"2013-12-2{n}" if unit == "iso" else (AT + n) * (1000 if unit == "ms" else 1) for n in range(4)]
    rows = [f"a,{item},{at[n]},1" for n, item in enumerate("hgf")] + [f"a,e,{zero},1"]
    with pytest.raises(
        DataError, match=r"log.csv: row 5: t is .*, not a time between 1970 and 2099, of which 0 is none"
    ):
        log(rows, unit=unit)
    data = log(rows, "on_bad: {bad_time: drop}\n", unit=unit)
    assert data.item_names.to_list() == ["f", "g", "h"] and data.notes == {"bad_time (dropped)": 1}
    kept = log(rows, "on_bad: {bad_time: keep}\n", unit=unit)
    assert kept.times[0] == 0 and kept.item_names[int(kept.items[0]) - 1] == "e"


def test_times_that_count_from_their_own_beginning_may_be_zero(log):
    data = log(["a,h,0,1", "a,g,5,1", "a,f,9,1"])
    assert data.times.tolist() == [0, 5, 9] and not data.notes


def test_what_repeats_is_asked_of_an_order_too_and_not_where_there_is_none(log, tmp_path):
    rows, drop = ["a,x,1,5", "a,x,1,1", "a,y,2,3", "b,y,1,1", "b,x,2,1"], "on_bad: {duplicates: drop}\n"
    data = log(rows, drop, unit="order")
    assert data.n_events == 4 and data.notes == {"duplicates (dropped)": 1}
    with pytest.raises(DataError, match=r"log.csv: row 3: user a has the same item of the same order twice"):
        log(rows, "on_bad: {duplicates: reject}\n", unit="order")
    (tmp_path / "none.yaml").write_text(f"format: table\nlocal: log.csv\ntable: {{user: u, item: i}}\n{drop}")
    with pytest.raises(DataError, match=r"none.yaml: .*duplicates: drop needs a time, or a column of the order"):
        get_dataset(tmp_path / "none.yaml")


def test_feedback_may_be_called_a_name(tmp_path):
    (tmp_path / "log.csv").write_text(f"u,i,t,name\na,x,{AT},1\na,y,{AT + 1},0\n")
    (tmp_path / "own.yaml").write_text(
        "format: table\nlocal: log.csv\ntable: {user: u, item: i, time: t, feedback: [name]}\nlabel: {column: name}\n"
    )
    data = get_dataset(tmp_path / "own.yaml")
    assert data.labels().tolist() == [True, False] and data.original_user(slice(None)).to_list() == ["a"]


def test_numbers_with_a_gap_are_still_numbers():
    frame = pl.DataFrame({"u": [1.0, None, 2.0, 1.0], "i": [7.0, 8.0, 9.0, 9.0], "t": [AT, AT + 1, AT + 2, AT + 3]})
    names = {"user": "u", "item": "i", "time": "t"}
    with pytest.raises(DataError, match=r"row 2: u is missing"):
        get_dataset(frame, **names)
    data = get_dataset(frame, **names, on_bad={"bad_row": "drop"})
    assert data.user_ids.tolist() == [1, 2] and data.item_ids.tolist() == [7, 9] and data.n_events == 3
    for odd in (1.5, float("nan"), 2.0**53):
        with pytest.raises(
            DataError, match=r"row 2: u is (1.5|nan|9007199254740992.0), not a whole number below 2\^53"
        ):
            get_dataset(frame.with_columns(u=pl.Series([1.0, odd, 2.0, 1.0])), **names)
    with pytest.raises(DataError, match=r"row 1: u is missing"):
        get_dataset(frame.with_columns(u=pl.Series([None] * 4)), **names)


def test_an_id_of_blanks_is_none(log):
    with pytest.raises(DataError, match=r"row 3: u is ' ', empty"):
        log([f"a,x,{AT},1", f" ,x,{AT},1"], columns="ids: text")


@pytest.mark.parametrize(
    ("head", "row", "time", "doubt"),
    [
        ("event_time,event_type,product_id,category_id,user_id",
         "2019-10-01 00:00:0{n} UTC,view,4460016{n},2103807459595387724,54131214{n}", "event_time\n  unit: iso", None),
        ("user_id,product_id,order_id", "{n},2{n},123456789{n}", None, "no time was found"),
        ("user_id,product_id,seen", "{n},2{n},123456789{n}", "seen\n  unit: s", "the time is a guess: seen"),
    ],
)  # fmt: skip
def test_a_card_takes_no_id_for_a_time(head, row, time, doubt, tmp_path):
    (tmp_path / "log.csv").write_text("\n".join([head, *(row.format(n=n) for n in range(1, 6))]))
    path, doubts = draft(tmp_path / "log.csv", tmp_path / "own.yaml")
    assert (f"time: {time}" in path.read_text()) if time else ("time:" not in path.read_text())
    assert any(doubt in each for each in doubts) if doubt else not any("time" in each for each in doubts)
    assert get_dataset(path).n_events == 5


def test_times_beside_histories_may_be_floats_and_errors_name_their_file(tmp_path):
    (tmp_path / "own.yaml").write_text("format: user-items-times\nsources: [{local: [a.txt, b.txt]}]\n")
    (tmp_path / "a.txt").write_text("1 2 3\n2 3\n")
    (tmp_path / "b.txt").write_text(f"1 {AT} {AT + 1}.0\n2 {AT}\n")
    data = get_dataset(tmp_path / "own.yaml")
    assert data.times.tolist() == [AT, AT + 1, AT]
    odd = {
        "1 then 5\n2 5": "b.txt: row 1: '1 then 5' is not a user, a whole number, and its times",
        f"1 {AT} 5\n2": "b.txt: row 2: '2' is not a user, a whole number, and its times",
        f"1 {AT} 5\n2 3 4": "a.txt: row 2: '2 3' is not a user and its items .*, with as many times in b.txt",
    }
    for wrong, said in odd.items():
        (tmp_path / "b.txt").write_text(wrong + "\n")
        with pytest.raises(DataError, match=said):
            get_dataset(tmp_path / "own.yaml")
