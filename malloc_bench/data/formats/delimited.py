"""Tables as text: a record a line, its fields between separators, their names in the first line or in the layout."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.batch import Batch
from malloc_bench.data.formats.formats import Layout
from malloc_bench.data.formats.lines import CUT, Lines, records, restored
from malloc_bench.data.formats.table import MOST_COLUMNS
from malloc_bench.data.sources.archive import PACKED, Part, blocks

if TYPE_CHECKING:
    import polars as pl

CACHED = 1 << 17  # bytes looked at together, so that they stay in a cache
SEPARATORS = ("\t", ",", ";", "|", "::", " ")  # in the order in which they are tried


def table(part: Part, layout: Layout, types: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """Batches of the named columns as text, `size` bytes of the file at a time.

    Raises DataError where the header lacks one, has it twice, or is no text.
    """
    source = blocks(part, size, layout.encoding)
    first = next(source, None)
    if first is None:
        return
    head = text_of(first[0].partition(b"\n")[0], part.name, 1).rstrip("\r")
    separator = layout.separator if layout.separator != "auto" else _sniffed(head, layout, list(types), part.name)
    sign = separator if len(separator) == 1 else CUT
    names, width, places, empty = list(types), 0, {}, True
    for lines in records(chain([first], source), separator, 4 * size):
        if not width:
            fields = list(layout.columns or ())
            if layout.columns is None:
                told = text_of(lines.text.partition(b"\n")[0], part.name, 1).rstrip("\r")
                fields = [restored(field, separator, lines.signs) for field in told.split(sign)]
                lines = lines.without_first()
                fields += [""] * _ends_open(lines, sign, len(fields))
            places = dict(zip(names, _places(fields, names, part.name, layout)))
            width, told = len(fields), f"has not {len(fields)} columns: {_listed(fields)}"
        if lines.count:
            empty = False
            yield _batch(lines, part.name, types, places, width, sign, separator, told)
    if empty:
        raise DataError(f"{part.name}: the file is empty but for its header")


def _ends_open(lines: Lines, sign: str, width: int) -> bool:
    """Whether rows end with a separator that the header has not, as some exports write them: a column without name."""
    begun = [line.rstrip(b"\r") for line in lines.text.split(b"\n", 10)[:10] if line]
    return bool(begun) and all(line.endswith(sign.encode()) and line.count(sign.encode()) == width for line in begun)


def header(part: Part, layout: Layout, names: Sequence[str], size: int) -> list[str]:
    """The names in the first line of a file, of which `names` may be some; without the types of recbole."""
    for block, _ in blocks(part, size, layout.encoding):
        head = text_of(block.partition(b"\n")[0], part.name, 1)
        separator = layout.separator if layout.separator != "auto" else _sniffed(head, layout, names, part.name)
        return [field.strip(' "\r').partition(":")[0] for field in head.split(separator)]
    return []


def text_of(data: bytes, file: str, row: int) -> str:
    """Bytes as text; raises DataError with row and byte where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = row + data.count(b"\n", 0, error.start)
        what = f"byte 0x{data[error.start]:02x} is no plain text of utf-8"
        likely = "it begins as utf-16 does" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1, perhaps"
        mend = "name its encoding in a card of format table, or save it as utf-8"
        raise DataError(f"{file}: row {at}: {what} ({likely}): {mend}") from None


def _listed(fields: Sequence[str]) -> str:
    told = [field if len(field) <= 40 else f"{field[:40]}..." for field in fields[:30]]
    return ", ".join(told) + (" ..." if len(fields) > 30 else "")


def _places(fields: Sequence[str], names: Sequence[str], file: str, layout: Layout) -> list[int]:
    """Where the named columns stand among the fields; in the header of recbole, as `name:type`."""
    if len(fields) > MOST_COLUMNS:
        raise DataError(f"{file}: row 1: {len(fields)} columns are no table of events")
    told = [field.strip() for field in fields]
    if not all(name in told for name in names):
        told = [field.partition(":")[0] for field in told]
    for name in names:
        if name not in told:
            hint = " (keep in a card says which feedback is read)" if name in layout.feedback else ""
            hint = " (NUL between the letters: name its encoding, as utf-16-le)" if "\0" in "".join(told) else hint
            if len(told) == 1 < len(names) and any(sign in told[0] for sign in SEPARATORS):
                hint = " (one column only: is it separated by something else? separator: auto finds out)"
            raise DataError(f"{file}: row 1: no column '{name}' among {_listed(told)}{hint}")
        if told.count(name) > 1:
            raise DataError(f"{file}: row 1: column '{name}' stands there {told.count(name)} times")
    return [told.index(name) for name in names]


def _sniffed(head: str, layout: Layout, names: Sequence[str], file: str) -> str:
    """The separator with which the first line has all columns."""
    found = {}
    for separator in SEPARATORS:
        try:
            fields = head.split(separator) if len(separator) > 1 else next(csv.reader([head], delimiter=separator))
        except (csv.Error, StopIteration):
            continue
        told = [field.strip() for field in fields] + [field.strip().partition(":")[0] for field in fields]
        if all(name in told for name in names) if layout.columns is None else len(fields) == len(layout.columns):
            return separator
        found[separator] = sum(name in told for name in names), len(fields)
    if layout.columns is not None and len(layout.columns) > 1:
        what = f"no separator gives the {len(layout.columns)} columns {_listed(layout.columns)}"
        raise DataError(f"{file}: row 1: {what}: name it with separator")
    return max(found, key=lambda separator: found[separator], default=",")


def _batch(
    lines: Lines,
    file: str,
    types: Mapping[str, Any],
    places: dict[str, int],
    width: int,
    sign: str,
    separator: str,
    why: str,
) -> Batch:
    import polars as pl

    found = _read(lines, types, places, width, sign)
    broken, told = None, None
    if found is None:
        told = text_of(lines.text, file, lines.rows if isinstance(lines.rows, int) else int(lines.rows[0]))
        listed = pl.Series([told.removesuffix("\n")]).str.split("\n").explode().str.strip_suffix("\r")
        fields = listed.str.split_exact(sign, width).struct.unnest()  # one more: null unless a row is too long
        broken = (fields[f"field_{width}"].is_not_null() | fields[f"field_{width - 1}"].is_null()).to_numpy()
        found = {name: fields[f"field_{at}"] for name, at in places.items()}
    if lines.signs:
        texts = {name: raw for name, raw in found.items() if raw.dtype == pl.String}
        for sign_, stood in zip(lines.signs, (separator, "\n")):
            texts = {name: raw.str.replace_all(sign_, stood, literal=True) for name, raw in texts.items()}
        found |= texts

    def said(at: int) -> str:
        return f"{restored(listed[at], separator, lines.signs).replace(CUT, separator)[:80]!r} {why}"

    return Batch(file, lines.rows, found, broken, said)


def _read(
    lines: Lines, types: Mapping[str, Any], places: dict[str, int], width: int, sign: str
) -> dict[str, pl.Series] | None:
    """The columns at their places, as their types where every value is one, else as text.

    None where some line has more or fewer fields than it must, or is no text.
    """
    import polars as pl

    signs = np.frombuffer(lines.text, np.uint8)
    if np.count_nonzero(signs == ord(sign)) != lines.count * (width - 1) or lines.text.startswith(PACKED):
        return None  # polars takes a line that ends too soon for one with empty columns, and unpacks what is packed
    text = dict.fromkeys(types, pl.String)
    for asked in (text if _odd_numbers(signs, sign) else types, text):
        schema: dict[str, Any] = {str(i): pl.String for i in range(width)}
        schema |= {str(at): asked[name] for name, at in places.items()}
        frame = pl.scan_csv(
            lines.text, has_header=False, schema=schema, separator=sign, quote_char=None, empty_string_is_null=False
        )
        try:
            found = frame.select(str(at) for at in sorted(set(places.values()))).collect()
        except (pl.exceptions.PolarsError, OSError):
            continue
        if len(found) == lines.count and not sum(found.null_count().row(0)):
            return {name: found[str(at)] for name, at in places.items()}
    return None


def _odd_numbers(signs: np.ndarray, sign: str) -> bool:
    """Whether a field may be a number in an odd way (007, +7, -0): as text it is another id than 7."""
    signs = np.concatenate((np.frombuffer(b"\n", np.uint8), signs, np.zeros(1, np.uint8)))
    for at in range(0, len(signs), CACHED):
        before, first, second = (signs[at + i : at + CACHED + i] for i in range(3))
        before, first = before[: len(second)], first[: len(second)]
        odd = (first == ord("0")) & (second - ord("0") < 10) | (first == ord("-")) & (second == ord("0"))
        if ((odd | (first == ord("+"))) & ((before == ord(sign)) | (before == ord("\n")))).any():
            return True
    return False
