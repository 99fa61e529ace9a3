"""A look at the beginning of any log: how it is written, its columns, and some of their values."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import IO, Any, cast

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats import times
from malloc_bench.data.sources.archive import DAMAGE, visible
from malloc_bench.files import for_polars

BYTES = 1 << 18  # looked at, of a text
ROWS = 1000
SEPARATORS = ("\t", "::", ";", "|", ",", " ")  # of equally good ones the first: commas and spaces stand in titles
ISO = re.compile(times.ISO)
_NAME = re.compile(r"[^\W\d][\w .:-]*")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


@dataclass
class Look:
    """What a file shows: `columns` maps each column's name to its first values, as text or as the file types them."""

    kind: str  # csv, jsonl, parquet or arrow
    columns: dict[str, list[Any]]
    member: str | None = None  # of a zip
    separator: str = ","
    header: bool = True
    encoding: str = "utf-8"
    doubts: list[str] = field(default_factory=list)  # what could not be told, a sentence each
    unclear: dict[str, list[int]] = field(default_factory=dict)  # names that stand twice, or none (""): which columns

    @property
    def rows(self) -> int:
        return max(map(len, self.columns.values()), default=0)


def look(path: Path) -> Look:
    """Raises DataError in one line where the file is none, is damaged, or holds no table that is known here."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: a folder or a device, not a file")
    try:
        with _opened(path) as (file, member, doubts):
            start = file.read(BYTES)
            if not start.strip():
                raise DataError(f"{path}: the file is empty")
            if start[:4] == b"PAR1" or start[:6] == b"ARROW1":
                found = _frame(path, "parquet" if start[:4] == b"PAR1" else "arrow", member)
            elif start[:6] == b"\x93NUMPY":
                raise DataError(f"{path}: arrays of numpy do not say what their columns are: write a csv or parquet")
            else:
                found = _text(path, start, whole=len(start) < BYTES)
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    found.member, found.doubts = member, doubts + found.doubts
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], str | None, list[str]]]:
    """The bytes of the file, unpacked; the member of a zip, and what is doubtful in that choice."""
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            if path.suffix.lower() != ".gz" or path.name.lower().endswith(".tar.gz"):
                raise DataError(f"{path}: packed by gzip; name a single file so by .gz, or unpack a tar")
            yield cast(IO[bytes], stack.enter_context(gzip.open(path))), None, []
        elif magic == b"PK\x03\x04":
            archive = stack.enter_context(zipfile.ZipFile(path))
            shown = visible(archive.namelist())
            members = [info for info in archive.infolist() if info.filename in shown and not info.flag_bits & 1]
            if not members:
                raise DataError(f"{path}: no plain file is in it")
            largest = max(members, key=lambda info: info.file_size)
            others = [info.filename for info in members if info is not largest]
            doubts = [f"of {len(members)} members the largest was taken; another is {others[0]}"] if others else []
            yield stack.enter_context(archive.open(largest)), largest.filename, doubts
        else:
            yield file, None, []


def _frame(path: Path, kind: str, member: str | None) -> Look:
    import polars as pl

    if member or path.suffix.lower() == ".gz":
        raise DataError(f"{path}: unpack it: {kind} is read from a plain file")
    try:
        frame = (pl.scan_parquet if kind == "parquet" else pl.scan_ipc)(for_polars(path)).head(ROWS).collect()
        flat = [name for name, kind in frame.schema.items() if not kind.is_nested()]
        return Look(kind, {name: frame[name].to_list() for name in flat})
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None


def _text(path: Path, start: bytes, whole: bool) -> Look:
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    cut = start if whole or encoding == "utf-16" else start[: start.rfind(b"\n") + 1] or start
    try:
        text = cut.decode(encoding) if whole or encoding != "utf-16" else cut.decode(encoding, "ignore")
    except UnicodeDecodeError:
        encoding, text = "latin-1", cut.decode("latin-1")
    if "\0" in text:
        raise DataError(f"{path}: neither text nor a table that is known here (csv, json lines, parquet, arrow)")
    lines = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()][: ROWS + 1]  # U+2028 ends none
    if not lines:
        raise DataError(f"{path}: the file is empty")
    made = _objects(path, lines) if lines[0].lstrip().startswith(("{", "[")) else _table(path, text, lines)
    made.encoding = "utf-8" if encoding == "utf-8-sig" else encoding
    if encoding == "latin-1":
        made.doubts.append("the text is not UTF-8; latin-1 was taken")
    return made


def _objects(path: Path, lines: list[str]) -> Look:
    try:
        objects = [json.loads(line) for line in lines]
        if not all(isinstance(each, dict) for each in objects):
            raise ValueError
    except (ValueError, RecursionError):
        raise DataError(f"{path}: expected a JSON object on every line") from None
    names = dict.fromkeys(
        name for each in objects for name, value in each.items() if not isinstance(value, dict | list)
    )
    return Look("jsonl", {name: [each.get(name) for each in objects] for name in names})


def _table(path: Path, text: str, lines: list[str]) -> Look:
    separator = max(SEPARATORS, key=lambda each: _fit(lines, each))  # of equal ones max keeps the first
    rows = [row for row in _split(text, lines, separator) if any(map(str.strip, row))]
    if not rows or not _fit(lines, separator)[0]:
        raise DataError(f"{path}: no separator of columns was found: one column, or rows of different lengths")
    first, near = rows[0], [len(row) for row in rows[1:10]]
    width = len(first) if len(first) in near or not near else max(near, key=near.count)
    rows = [first, *(row for row in rows[1:] if len(row) == width)]
    doubts: list[str] = []
    header = _looks_named(rows, doubts)
    values = rows[header : ROWS + header]
    names = [name.strip() for name in first] if header else [f"column_{i + 1}" for i in range(width)]
    if header and len(names) == width - 1 and not any(row[-1].strip() for row in values):
        names.append("")  # rows end with a separator that the header has not
    begins = re.split(r"[\r\n]", text, maxsplit=1)[0]  # may be blank, where `lines` have what is not
    if not begins.strip() or len(names if header else first) != width:
        raise DataError(f"{path}: row 1 is {_neither(begins, width)}: remove it, or mend it")
    if header and not values:
        doubts.append("there is no row below the names of the columns")
    places = {name: [i for i in range(width) if names[i] == name] for name in names}
    unclear = {name: [i + 1 for i in at] for name, at in places.items() if not name or len(at) > 1}
    nameless = [i for i in places.get("", []) if any(row[i].strip() for row in values)]
    doubts += [f"column {i + 1} has no name in row 1 and is not read" for i in nameless]
    columns = {name: [row[i] for row in values] for i, name in enumerate(names) if name not in unclear}
    return Look("csv", columns, separator=separator, header=header, doubts=doubts, unclear=unclear)


def _neither(line: str, width: int) -> str:
    said = repr(line if len(line) <= 40 else f"{line[:40]}...") if line.strip() else "blank"
    return f"{said}, neither the names of the {width} columns that the rows below have nor an event"


def _looks_named(rows: list[list[str]], doubts: list[str]) -> bool:
    """Whether the first row names the columns: numbers or dates stand only below it, or its words do not."""
    first, below = rows[0], rows[1:]
    if any(is_number(field) or ISO.fullmatch(field.strip()) for field in first):
        return False
    for i in range(min(map(len, rows))):
        if below and all(is_number(row[i]) or ISO.fullmatch(row[i].strip()) for row in below):
            return True
    named = all(_NAME.fullmatch(field.strip()) for field in first) and not any(
        field == stood for row in below for field, stood in zip(first, row)
    )
    doubts.append(f"whether the first line names the columns is a guess: {'yes' if named else 'no'}")
    return named


def _split(text: str, lines: list[str], separator: str) -> list[list[str]]:
    if len(separator) > 1:
        return [line.split(separator) for line in lines]
    try:
        return list(csv.reader(StringIO(text, newline=""), delimiter=separator))[: ROWS + 1]
    except csv.Error:  # a quote that is none
        return [line.split(separator) for line in lines]


def _fit(lines: list[str], separator: str) -> tuple[float, int]:
    """How well a separator does: the share of lines with as many columns as most, and how many; zeros for one.

    Blanks stand around separators and in dates too: any other that fits as many lines is better.
    """
    rows = _split("\n".join(lines[:200]), lines[:200], separator)
    widths = [len(row) for row in rows if row]
    common = max(set(widths), key=widths.count, default=1)
    share = round(widths.count(common) / len(widths), 2) if common > 1 else 0.0
    return share, common if share and separator != " " else 0


def is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            return not set(value) & set("_nN") and float(value) is not None
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool)
