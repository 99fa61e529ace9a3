"""Any table of events: every way to write one gives the same events, and what is wrong is said with file and row."""

import gzip
import io
import zipfile
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pydantic import ValidationError

from malloc_bench.data import DataError
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.formats.table import Table
from malloc_bench.data.prepare import prepare
from malloc_bench.data.sources.archive import open_parts

LOG = pl.DataFrame({
    "uid": ["007", "7", "A,b", "7"],
    "title": ['x "y"', "a\nb", "é;|", "plain"],
    "sku": ["18446744073709551615", "0001388703", "2", "2"],
    "ts": [1_387_670_400, 1_387_670_401, 1_387_670_402, 1_387_670_403],
    "stars": [5.0, 4.5, 1.0, 3.0],
    "click": [True, False, True, True],
})  # fmt: skip
NAMES = {"user": "uid", "item": "sku"}


def read(folder, *files, on_bad=None, **table):
    """The frame of all events in files given as (name, bytes)."""
    paths = [folder / name for name, _ in files]
    for path, (_, data) in zip(paths, files):
        path.write_bytes(data)
    with open_parts(paths) as parts:
        return pl.concat(
            [
                frame.cast({"user": pl.String, "item": pl.String})
                for frame in Reader(Table(**{**NAMES, **table}).layout(), Judge(on_bad or {})).frames(parts)
            ]
        )


def written(kind, frame=LOG):
    stream = io.BytesIO()
    {"parquet": frame.write_parquet, "arrow": frame.write_ipc, "stream": frame.write_ipc_stream}[kind](stream)
    return stream.getvalue()


def csv(frame=LOG, **options):
    return frame.write_csv(**options).encode()


FILES = {
    "csv": csv(),
    "tab": csv(separator="\t"),
    "semicolon": csv(separator=";"),
    "bar": csv(separator="|"),
    "all quoted": csv(quote_style="always"),
    "crlf": csv(line_terminator="\r\n"),
    "bom": b"\xef\xbb\xbf" + csv(),
    "blank lines at the end": csv() + b"\n\r\n \n",
    "no line end": csv()[:-1],
    "jsonl": LOG.write_ndjson().encode(),
    "parquet": written("parquet"),
    "arrow": written("arrow"),
    "arrow stream": written("stream"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_way_to_write_a_log_gives_the_same(tmp_path, name):
    found = read(tmp_path, ("log", FILES[name]), time="ts", rating="stars", feedback="click")
    assert found["user"].to_list() == LOG["uid"].to_list()
    assert found["item"].to_list() == LOG["sku"].to_list()
    assert found["order"].to_list() == [10**6 * each for each in LOG["ts"]]
    assert found["rating"].to_list() == LOG["stars"].to_list()
    assert found["click"].to_list() == [1, 0, 1, 1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig", "utf-32"])
def test_encodings(tmp_path, encoding):
    found = read(tmp_path, ("log.csv", csv().decode().encode(encoding)), encoding=encoding)
    assert found["user"].to_list() == LOG["uid"].to_list()


def test_packed_files_and_several(tmp_path):
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("in/log.csv", csv())
        archive.writestr("__MACOSX/in/._log.csv", b"\0")
    files = [("a.csv.gz", gzip.compress(csv())), ("b.zip", stream.getvalue()), ("c.pq", written("parquet"))]
    found = read(tmp_path, *files, ("d.arrow.gz", gzip.compress(written("arrow"))))
    assert found["user"].to_list() == LOG["uid"].to_list() * 4
    assert found["order"].to_list() == list(range(16))  # without times the rows' order is the events'


def test_without_a_header(tmp_path):
    text = csv(include_header=False)
    for columns in (LOG.columns, ["uid", "x", "sku", "a", "b", "c"]):
        assert read(tmp_path, ("log", text), columns=columns)["item"].to_list() == LOG["sku"].to_list()
    with pytest.raises(DataError, match=r"log: row 1: no separator gives the 3 columns uid, sku, x: name it"):
        read(tmp_path, ("log", text), columns=["uid", "sku", "x"])


def test_rows_that_end_with_a_separator_and_a_header_that_does_not(tmp_path):
    text = b"uid,sku,ts\n1,2,5,\n1,3,6,x\n"
    with pytest.raises(DataError, match="row 2: '1,2,5,' has not 3 columns"):  # of some rows only: they are broken
        read(tmp_path, ("a.csv", text), time="ts")
    found = read(tmp_path, ("a.csv", text.replace(b"x", b"")), time="ts")
    assert found["item"].to_list() == ["2", "3"] and found["order"].to_list() == [5_000_000, 6_000_000]
    with pytest.raises(DataError, match="row 12: '1,3,6' has not 4 columns"):
        read(tmp_path, ("a.csv", b"uid,sku,ts\n" + b"1,2,5,\n" * 10 + b"1,3,6\n"), time="ts")


def test_ids_are_text_in_the_end(tmp_path):
    (tmp_path / "log").write_bytes(csv())
    names = []
    for ids in ("text", "number"):
        with open_parts([tmp_path / "log"]) as parts:
            reader = Reader(Table(**NAMES, ids=ids).layout(), Judge({"huge_id": "drop", "bad_row": "drop"}))
            prepare(reader.frames(parts), reader, tmp_path)
        users = pl.read_parquet(tmp_path / "users.parquet")
        names.append(users["name"].to_list() if "name" in users.columns else users["id"].to_list())
    assert names == [["007", "7", "A,b"], [7]]  # of numbers, 007 goes with its item beyond 63 bits


@pytest.mark.parametrize("unit, per_second", [("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)])
def test_units_and_the_wrong_ones(tmp_path, unit, per_second):
    for kind in ("csv", "parquet", "jsonl"):
        frame = LOG.with_columns(pl.col("ts") * per_second)
        data = {"csv": csv(frame), "parquet": written("parquet", frame), "jsonl": frame.write_ndjson().encode()}[kind]
        found = read(tmp_path, ("log", data), time="ts", unit=unit)["order"]
        ordered = Table(**NAMES, time="ts", unit=unit).layout().per_second
        assert (found // ordered).to_list() == LOG["ts"].to_list()
        for other in {"s", "ms", "us", "ns"} - {unit}:
            with pytest.raises(DataError, match=rf"^log: row \d: ts: \d+ as {other} is .* the unit must be {unit} "):
                read(tmp_path, ("log", data), time="ts", unit=other)


@pytest.mark.parametrize("first, last", [(100, 200), (19_000, 20_000), (20240101, 20241231)])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_near_1970_are_let_alone_but_not_without_a_word(tmp_path, caplog, first, last, unit):
    text = f"uid,sku,ts\n1,2,{first}\n1,3,{last}\n".encode()
    assert len(read(tmp_path, ("log", text), ("b", text), time="ts", unit=unit)) == 4
    [line] = caplog.messages
    assert line.startswith(f"log: ts: as {unit} all times lie in 1970: are they days")
    caplog.clear()
    late = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit] * 1_600_000_000
    read(tmp_path, ("log", text + f"1,4,{late}\n".encode() * 3), time="ts", unit=unit)  # some are early: so they are
    read(tmp_path, ("log", text), time="ts", unit="order")
    read(tmp_path, ("log", text), time="ts", unit=unit, on_bad={"bad_time": "keep"})
    assert not caplog.messages


ISO = {
    "2013-12-22": "2013-12-22T00:00:00",
    "2013-12-22 10:11": "2013-12-22T10:11:00",
    "2013-12-22T10:11:12": "2013-12-22T10:11:12",
    "2013-12-22 10:11:12.345678": "2013-12-22T10:11:12.345678",
    "2013-12-22 10:11:12,5": "2013-12-22T10:11:12.5",
    "2013-12-22T10:11:12Z": "2013-12-22T10:11:12",
    "2013-12-22 10:11:12 UTC": "2013-12-22T10:11:12",
    "2013-12-22T10:11:12+01:00": "2013-12-22T09:11:12",
    "2013-12-22T10:11:12.25-0530": "2013-12-22T15:41:12.25",
    "2013-12-22T10:11:12+02": "2013-12-22T08:11:12",
}


def test_iso_dates(tmp_path):
    text = "uid,sku,ts\n" + "".join(f'1,2,"{each}"\n' for each in ISO)
    found = read(tmp_path, ("log", text.encode()), time="ts", unit="iso")["order"].to_list()
    right = [datetime.fromisoformat(each).replace(tzinfo=UTC) for each in ISO.values()]
    assert found == [round(each.timestamp() * 10**6) for each in right]


@pytest.mark.parametrize("zone", ["+25:00", "-01:75"])
def test_no_zone_is_that_far(tmp_path, zone):
    with pytest.raises(DataError, match=r"row 2: ts is .* not a date like"):
        read(tmp_path, ("log", f"uid,sku,ts\n1,2,2020-01-01T00:00:00{zone}\n".encode()), time="ts", unit="iso")


@pytest.mark.parametrize("unit", ["s", "ms", "iso"])
def test_datetimes_of_parquet_say_their_unit_themselves(tmp_path, unit):
    moments = pl.from_epoch(LOG["ts"])
    for each in (moments, moments.cast(pl.Datetime("ns", "Asia/Tokyo"))):
        found = read(tmp_path, ("log", written("parquet", LOG.with_columns(ts=each))), time="ts", unit=unit)["order"]
        seconds = found // Table(**NAMES, time="ts", unit=unit).layout().per_second
        assert seconds.to_list() == LOG["ts"].to_list()


@pytest.mark.parametrize("unit", ["s", "us", "ns", "iso"])
def test_microseconds_are_an_order_in_every_unit(tmp_path, unit):
    moments = pl.Series(range(1_387_670_400_000_000, 1_387_670_400_001_000, 20))
    log = pl.DataFrame({"uid": 1, "sku": range(len(moments)), "ts": moments.cast(pl.Datetime("us"))})
    for each in (log, log.with_columns(pl.col("ts").cast(pl.Datetime("ns")))):
        found = read(tmp_path, ("log", written("parquet", each)), time="ts", unit=unit)["order"]
        assert found.diff().drop_nulls().n_unique() == 1 and found[1] > found[0]
    if unit == "s":
        text = "uid,sku,ts\n" + "".join(f"1,{i},{x / 1e6:.6f}\n" for i, x in enumerate(moments))
        assert read(tmp_path, ("log", text.encode()), time="ts")["order"].to_list() == moments.to_list()
    if unit == "ns":  # finer still
        log = log.with_columns(ts=pl.Series(range(10**18, 10**18 + len(moments))).cast(pl.Datetime("ns")))
        assert read(tmp_path, ("log", written("parquet", log)), time="ts", unit=unit)["order"].diff()[1] == 1


def test_times_with_a_fraction_and_large_numbers_of_nanoseconds(tmp_path):
    found = read(tmp_path, ("log", b"uid,sku,ts\n1,2,1387670400.0\n1,3,1.3876704005e9\n"), time="ts")["order"]
    assert found.to_list() == [1_387_670_400_000_000, 1_387_670_400_500_000]
    text = b"uid,sku,ts\n1,2,1387670400000000001\n1,3,1387670400000000002\n"
    assert read(tmp_path, ("log", text), time="ts", unit="ns")["order"].diff()[1] == 1
    with pytest.raises(DataError, match=r"log: row 3: ts is '1.5', not a number"):
        read(tmp_path, ("log", b"uid,sku,ts\n1,2,1.0\n1,3,1.5\n"), time="ts", unit="ms")


@pytest.mark.parametrize(
    "text, table, message",
    [
        (b"uid,sku\n1,2\n,3\n", {}, "log: row 3: uid is '', empty"),
        (b'uid,sku,t\n1,2,"a\n\nb"\n1\n', {}, "log: row 5: '1' has not 3 columns: uid, sku, t"),
        (b"uid,sku,ts\n1,2,2020-01-01\n", {"time": "ts"}, "log: row 2: ts is '2020-01-01', not a number: unit iso is"),
        (b"uid,sku,ts\n1,2,soon\n", {"time": "ts", "unit": "iso"}, "log: row 2: ts is 'soon', not a date like 2024-"),
        (b"uid,sku,ts\n1,2,2021-02-30\n", {"time": "ts", "unit": "iso"}, "log: row 2: ts is '2021-02-30', not a date"),
        (b"uid,sku,ts\n1,2,1960-02-01\n", {"time": "ts", "unit": "iso"}, "log: row 2: ts is 1960-02-01T00:00:00.0"),
        (b"uid,sku,uid\n1,2,3\n", {}, "log: row 1: column 'uid' stands there 2 times"),
        (b"uid,item\n1,2\n", {}, "log: row 1: no column 'sku' among uid, item"),
        (
            b"uid,sku\n1,2\n",
            {"separator": "tab"},
            "log: row 1: no column 'uid' among uid,sku (one column only: is it separated by something else?",
        ),
        (b"uid\tsku\titem\n", {}, "log: the file is empty but for its header"),
        (b"", {}, "log: the file is empty"),
        (b"a" + b",a" * 20_000 + b"\n", {}, "log: row 1: 20001 columns are no table of events"),
        (b"uid,sku\n1,2\n1,\xe9\n", {}, "log: row 3: byte 0xe9 is no plain text of utf-8 (latin-1, perhaps): name its"),
        (
            "uid,sku\n1,2\n".encode("utf-16-le"),
            {},
            r"log: row 1: no column 'uid' among u\x00i\x00d\x00, \x00s\x00k\x00u\x00 (NUL between the letters: name",
        ),
        (b"uid,sku\n1,2\n".decode().encode("utf-16"), {}, "log: row 1: byte 0xff is no plain text of utf-8 (it begins"),
        (b"uid,sku\n1,2\n1,\x81\n", {"encoding": "cp1252"}, "log: after row 0: is no text of cp1252: "),
        (b'{"uid": 1, "sku": 2}\n{"uid": 1, "sku": [2]}\n', {}, 'log: row 2: \'{"uid": 1, "sku": [2]}\' is no JSON'),
        (b'{"uid": 1, "sku": 2}\nNone\n', {}, "log: row 2: 'None' is no JSON object of uid, sku"),
        (b"PK\x03\x04uid,sku\n1,2\n", {}, "log: is a zip archive or a spreadsheet, not csv"),
        (gzip.compress(b"uid,sku\n1,2\n", mtime=0), {}, "log: is packed by gzip: name it .gz, not csv"),
        (b'[{"uid": 1, "sku": 2}]', {}, "log: is one JSON array, where a line is an object, not csv"),
        (b"PAR1uid,sku\n1,2\n", {}, "log: no readable parquet: after row 0: "),
        (b"ARROW1uid,sku\n1,2\n", {}, "log: no readable Arrow file: after row 0: "),
        (b"uid,sku\n7,2\nx,2\n", {"ids": "number"}, "log: row 3: uid is 'x', not a number"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_row(tmp_path, text, table, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, ("log", text), **table)
    assert str(caught.value).startswith(message)


def test_json_as_python_writes_it(tmp_path):
    text = b'{"uid": "007", "sku": 18446744073709551617, "x": NaN}\n{"uid": 7.0, "sku": true, "x": -Infinity}\n'
    found = read(tmp_path, ("log", text))
    assert found.select("user", "item").rows() == [("007", "18446744073709551617"), ("7", "true")]
    deep = b'{"uid": 1, "sku": 2, "x": ' + b"[" * 200_000 + b"\n"
    with pytest.raises(DataError, match=r"^log: row 3: '\{\"uid\": 1"):
        read(tmp_path, ("log", text + deep))


def test_lines_that_end_in_cr_alone(tmp_path):
    assert read(tmp_path, ("log", b"uid,sku\r7,a\r7,b\r"))["item"].to_list() == ["a", "b"]


def test_json_of_any_encoding_is_known_by_how_it_begins(tmp_path):
    text = '{"uid": "é", "sku": "2"}'
    assert read(tmp_path, ("log", text.encode("utf-16")), encoding="utf-16")["user"].to_list() == ["é"]
    for begins, encoding in (("[", "utf-16"), ("[\n  ", "utf-8")):
        with pytest.raises(DataError, match="one JSON array"):
            read(tmp_path, ("log", f"{begins}{text}]".encode(encoding)), encoding=encoding)


def test_half_a_surrogate_is_the_same_in_every_block(tmp_path):
    line = b'{"uid": "a\\ud800", "sku": "2"}\n'
    found = read(tmp_path, ("one", line), ("other", line + b'{"uid": "b", "sku": "2", "x": NaN}\n'))["user"]
    assert found[0] == found[1] and "\0" not in found[0]


def test_dates_beyond_all_times_meet_their_policy(tmp_path):
    days = pl.Series([2**31 - 1, 213_503], dtype=pl.Int32).cast(pl.Date)  # as ns the second would wrap to 1970
    far = [(days, "iso"), (days, "ns"), *((pl.Series([2**62] * 2).cast(pl.Datetime(u)), "s") for u in ("ms", "us"))]
    for i, (times, unit) in enumerate(far):
        frame = pl.DataFrame({"uid": ["a", "a"], "sku": ["1", "2"], "ts": times})
        for at in (0, 1):
            with pytest.raises(DataError, match=r"row 1: ts is .* not a time between 1970 and 2099"):
                read(tmp_path, (f"{i}-{at}", written("parquet", frame[at:])), time="ts", unit=unit)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_order_of_more_digits_than_floats_have(tmp_path, kind):
    order = [2**53 + 1, 2**53, 1_800_000_000_000_000_001, 1_800_000_000_000_000_000, 5]
    frame = pl.DataFrame({"uid": ["a"] * 5, "sku": ["1"] * 5, "ts": order})
    data = csv(frame) if kind == "csv" else written(kind, frame)
    found = read(tmp_path, ("log", data), time="ts", unit="order")["order"].to_list()
    assert np.argsort(found).tolist() == np.argsort(order).tolist() and len({*found}) == 5
    floats = b"uid,sku,ts\na,1,0.5\na,2,9007199254740992.0\n"
    half, large = read(tmp_path, ("log", floats), time="ts", unit="order")["order"]
    assert half < found[4] < large == found[1]
    with pytest.raises(DataError, match=r"row 2: ts is 1e\+300, not a number from 0 to 4e"):
        read(tmp_path, ("log", b"uid,sku,ts\na,1,1e300\n"), time="ts", unit="order")


def test_of_two_units_the_odd_time_is_named(tmp_path):
    with pytest.raises(DataError, match=r"row 3: ts is 1500000000000.* not a time between"):
        read(tmp_path, ("log", b"uid,sku,ts\na,1,1500000000\na,2,1500000000000\n"), time="ts")


@pytest.mark.parametrize(
    "column, message",
    [
        (pl.Series([[1]] * 4), "uid holds large_list"),
        (pl.Series([1.5] * 4), "row 1: uid is 1.5, not a whole number below 2^53"),
        (pl.Series(["a", None, "b", "c"]), "row 2: uid is missing"),
        (pl.Series([b"\xff"] * 4), "no readable parquet: after row 0: Invalid UTF8"),
    ],
)
def test_columns_of_parquet_that_are_no_ids(tmp_path, column, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, ("log", written("parquet", LOG.with_columns(uid=column))))
    assert str(caught.value).startswith(f"log: {message}")


@pytest.mark.parametrize("column", [LOG["uid"].cast(pl.Categorical), LOG["uid"].cast(pl.Binary)])
def test_other_columns_of_parquet_that_are_text(tmp_path, column):
    found = read(tmp_path, ("log", written("parquet", LOG.with_columns(uid=column))))
    assert found["user"].to_list() == LOG["uid"].to_list()


ARROW = {
    "whole decimals": (pa.array([Decimal(2**63), Decimal(7)], pa.decimal128(20, 0)), ["9223372036854775808", "7"]),
    "unsigned": (pa.array([2**64 - 1, 7], pa.uint64()), ["18446744073709551615", "7"]),
    "dictionary": (pa.array(["007", "7"]).dictionary_encode(), ["007", "7"]),
    "dictionary of numbers": (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
    "views": (pa.array(["007", "7"], pa.string_view()), ["007", "7"]),
    "wide decimals": (pa.array([Decimal(1), Decimal(2)], pa.decimal256(50, 0)), "uid holds decimal256(50, 0), not one"),
    "fractions": (pa.array([Decimal("1.5"), Decimal(2)], pa.decimal128(20, 2)), "uid holds Decimal(precision=20"),
    "maps": (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())), "uid holds map<string, int32>, not one"),
    "intervals": (pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval()), "no readable Arrow file: after row 0"),
    "nothing": (pa.nulls(2), "row 1: uid is missing"),
    "moments": (pa.array([1, 2], pa.timestamp("ns")), "uid holds Datetime(time_unit='ns'"),
}


@pytest.mark.parametrize("name", ARROW)
def test_types_of_arrow(tmp_path, name):
    column, expected = ARROW[name]
    log = pa.table({"uid": column, "sku": ["a", "b"]})
    with pa.ipc.new_file(stream := io.BytesIO(), log.schema) as file:
        file.write_table(log)
    if isinstance(expected, list):
        assert read(tmp_path, ("log", stream.getvalue()))["user"].to_list() == expected
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path, ("log", stream.getvalue()))
    assert str(caught.value).startswith(f"log: {expected}")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_a_column_twice_or_not_at_all(tmp_path, kind):
    with pytest.raises(DataError, match=r"log: no column 'nobody' among uid, title"):
        read(tmp_path, ("log", written(kind)), user="nobody")


def test_a_parquet_of_more_rows_than_people_make(tmp_path):
    frame = pl.DataFrame({"uid": np.zeros(3_000_000, np.int8), "sku": np.zeros(3_000_000, np.int8)})
    frame.write_parquet(stream := io.BytesIO(), compression="zstd")
    with pytest.raises(DataError, match=r"log: 3000000 rows from \d+ bytes: a bomb\?"):
        read(tmp_path, ("log", stream.getvalue()))


@pytest.mark.parametrize(
    "table, message",
    [
        ({"user": "a", "item": "a"}, "column 'a' is named for two things"),
        ({**NAMES, "unit": "ms"}, "unit: ms needs time"),
        ({**NAMES, "header": False}, "header: false needs columns"),
        ({**NAMES, "header": True, "columns": ["uid", "sku"]}, "columns are for files without a header"),
        ({**NAMES, "columns": ["uid"]}, "columns: 'sku' is not among them"),
        ({**NAMES, "columns": ["uid", "sku", "sku"]}, "columns: a name stands there twice"),
        ({**NAMES, "separator": "ab"}, "of two characters must be the same one twice"),
        ({**NAMES, "separator": '"'}, "must be auto, tab, space, comma, or one or two"),
        ({**NAMES, "encoding": "utf-9"}, "no text encoding is named 'utf-9'"),
        ({**NAMES, "encoding": "rot13"}, "no text encoding is named 'rot13'"),
        ({**NAMES, "rating": "x", "feedback": ["rating"]}, "feedback has a column 'rating'"),
        ({**NAMES, "feedback": ["user"]}, "'user' is a word of our own"),
        ({**NAMES, "stars": "x"}, "Extra inputs are not permitted"),
        ({"user": "uid"}, "Field required"),
    ],
)
def test_settings_that_make_no_sense(table, message):
    with pytest.raises(ValidationError, match=message):
        Table(**table)
