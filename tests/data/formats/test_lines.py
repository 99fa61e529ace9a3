"""Quoted fields, against Python's csv module, however the file is cut into blocks."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench.data.formats.lines import CONTROLS, CUT, PRIVATE, records, restored
from malloc_bench.data.sources.archive import Part, blocks


def fields(text: bytes, separator=",", size=1 << 20, most=1 << 20):
    """(rows of the file, fields of the records)."""
    found, rows = [], []
    sign = separator if len(separator) == 1 else CUT
    for lines in records(blocks(Part("f", lambda: io.BytesIO(text)), size), separator, most):
        told = lines.text.decode().removesuffix("\n").split("\n")
        assert len(told) == lines.count
        rows += [lines.rows + i if isinstance(lines.rows, int) else int(lines.rows[i]) for i in range(lines.count)]
        for line in told:
            each = line.removesuffix("\r").split(sign)
            found.append([restored(field, separator, lines.signs) for field in each])
    return rows, found


records_ = st.lists(st.lists(st.text('ab",;\n é\x1e\x1f', max_size=5), min_size=2, max_size=2), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(records_, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]), st.sampled_from([200, 300, 10**6]))
def test_well_formed_quotes_are_read_as_csv_reads_them(rows, separator, end, size):
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    text = stream.getvalue()
    numbers, found = fields(text.encode(), separator, size)
    assert found == rows
    starts = [1]
    for row in rows:
        starts.append(starts[-1] + 1 + sum(field.count("\n") for field in row))
    assert numbers == starts[:-1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('1,5" nail,2\n3,"a,b",4\n', [["1", '5" nail', "2"], ["3", "a,b", "4"]]),  # a quote within a field is itself
        ('1,"open,2\n3,x,4\n5,y,6\n', [["1", '"open', "2"], ["3", "x", "4"], ["5", "y", "6"]]),  # swallows no record
        ('1,x,2\n3,"a\nb",4\n5,7" x,6\n', [["1", "x", "2"], ["3", "a\nb", "4"], ["5", '7" x', "6"]]),
        ('1,"a"b,2\n', [["1", "ab", "2"]]),
        ('"1","a","2"', [["1", "a", "2"]]),
        ('1,"""",2\n1,"",2\n', [["1", '"', "2"], ["1", "", "2"]]),
    ],
)
def test_quotes_that_are_not_as_they_should_be(text, expected):
    assert fields(text.encode())[1] == expected


@pytest.mark.parametrize("taken", [CONTROLS, CONTROLS[:1], CONTROLS + [chr(c) for c in PRIVATE[:9]]])
@pytest.mark.parametrize("other", ['"c,\nd"', 'c" d'])
def test_whatever_signs_stand_in_a_block_are_themselves(taken, other):
    text = "".join(f"a{sign}b,1\n" for sign in taken) + '"a,b",2\n"a\nb",3\n' + f"{other},4\n"
    found = fields(text.encode())[1]
    assert [field for field, _ in found] == [f"a{sign}b" for sign in taken] + ["a,b", "a\nb", other.strip('"')]


def test_two_signs_separate():
    assert fields(b'1::"a::b"::2\n3::c::4\n', "::")[1] == [["1", "a::b", "2"], ["3", "c", "4"]]


def test_a_quote_that_never_ends_is_not_waited_for():
    text = b'1,"open,2\n' + b"3,x,4\n" * 1000
    rows, found = fields(text, size=500, most=1000)
    assert rows == list(range(1, 1002)) and found[1:] == [["3", "x", "4"]] * 1000
