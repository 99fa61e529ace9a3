"""Quoted fields as RFC 4180 has them: they may hold separators, line breaks, and quotes that are doubled.

A block with quotes is written anew without: what stood in quotes has other signs for separators and line breaks, which
stand nowhere else in it, so that whatever reads lines needs to know nothing of quotes. Blocks without a quote are
passed on as they are.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from malloc_bench.data.formats.batch import Rows

CUT = "\x1d"  # a separator of two signs
#: signs for what stands in quotes: control characters, which a byte is enough for, then those that mean nothing
CONTROLS = ["\x1f", "\x1e", "\x1c", *map(chr, (*range(1, 9), *range(14, 28)))]
PRIVATE = range(0xE000, 0xF900)
QUOTE, LINE, RETURN = 34, 10, 13
MOST_LINES = 100  # of one record, where quotes are not as they should be


@dataclass(frozen=True)
class Lines:
    """Whole records, one a line; `signs`: what stands for a separator and a line break within quotes, "" for none."""

    text: bytes
    rows: Rows
    count: int
    signs: str = ""

    def without_first(self) -> Lines:
        """All but the first record."""
        text = self.text.partition(b"\n")[2]
        rows = self.rows + 1 if isinstance(self.rows, int) else self.rows[1:]
        return Lines(text, rows, self.count - 1, self.signs)


def restored(text: str, separator: str, signs: str) -> str:
    """A field as it stood in its quotes."""
    for sign, stood in zip(signs, (separator, "\n")):
        text = text.replace(sign, stood)
    return text


def records(source: Iterator[tuple[bytes, int]], separator: str, most: int) -> Iterator[Lines]:
    """Blocks of lines as blocks of records, separated by the sign itself or, where it is two, by CUT.

    A quote that does not end within `most` bytes is taken for one that is none.
    """
    sign = separator if len(separator) == 1 else CUT
    row, held, kept = 1, b"", 0  # what began in a quote that the block does not end, and its lines
    for block, count in source:
        if len(separator) == 2:
            block = block.replace(separator.encode(), CUT.encode())
        if held:
            block, count, held = held + block, kept + count, b""
        if b'"' not in block:
            yield Lines(block, row, count)
            row += count
            continue
        signs = _unused(block, sign)
        found = _parsed(block, sign, signs)
        if found is None or (found[1] == 0 and len(block) > most):
            yield _leniently(block, row, sign, signs)
            row += count
            continue
        text, end, rows = found
        held = block[end:]
        kept = _lines(held) if held else 0
        if end:
            yield Lines(text, row if rows is None else row + rows, _lines(text), signs)
        row += count - kept
    if held:
        yield _leniently(held, row, sign, _unused(held, sign))


def _unused(block: bytes, sign: str) -> str:
    """Two characters that do not stand in the block."""
    free = (each for each in chain(CONTROLS, map(chr, PRIVATE)) if each != sign and each.encode() not in block)
    return "".join(islice(free, 2))


def _lines(text: bytes) -> int:
    return text.count(b"\n") + (not text.endswith(b"\n"))


def _parsed(block: bytes, sign: str, inside: str) -> tuple[bytes, int, np.ndarray | None] | None:
    """The whole records without their quotes, where they end in the block, and their rows from 0 (None: one by one).

    None where a quote stands elsewhere than at a field's ends, or single within it, or `inside` are more than bytes.
    """
    if not inside.isascii():
        return None
    signs = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(signs == QUOTE)
    end = len(block)
    if len(quotes) % 2:  # the last one's field goes on beyond the block: up to its record
        end = block.rfind(b"\n", 0, int(quotes[-1])) + 1
        while (cut := int(np.searchsorted(quotes, end))) % 2 and end:
            end = block.rfind(b"\n", 0, end - 1) + 1
        signs, quotes = signs[:end], quotes[:cut]
    padded = np.concatenate(([LINE], signs, [LINE]))
    before, after = padded[quotes[::2]], padded[quotes[1::2] + 2]
    edges = [ord(sign), LINE, QUOTE]
    if not (np.isin(before, edges).all() and np.isin(after, [*edges, RETURN]).all()):
        return None
    ends = np.flatnonzero((signs == ord(sign)) | (signs == LINE))
    inner = ends[np.searchsorted(quotes, ends) % 2 == 1]
    written = signs.copy()
    written[inner] = np.where(signs[inner] == LINE, ord(inside[1]), ord(inside[0]))
    left = np.ones(len(signs), bool)
    left[quotes] = False
    left[quotes[::2][before == QUOTE]] = True  # the second of a doubled quote is one
    breaks = np.flatnonzero(signs == LINE)
    rows = None
    if (signs[inner] == LINE).any():
        outer = np.flatnonzero(written[breaks] == LINE) + 1
        rows = np.concatenate(([0], outer))
        if not end or signs[-1] == LINE:
            rows = rows[:-1]
    return written[left].tobytes(), end, rows


def _leniently(block: bytes, row: int, sign: str, inside: str) -> Lines:
    """Record by record, for quotes that are not as they should be: what makes no sense as quoted is taken as it is."""
    lines = block.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    width, at = 0, 0
    told: list[str] = []
    rows: list[int] = []
    while at < len(lines):
        last = min(at + MOST_LINES, len(lines)) if lines[at].count('"') % 2 else at + 1
        reader = csv.reader((f"{line}\n" for line in lines[at:last]), delimiter=sign)
        alone = lines[at].removesuffix("\r").split(sign)
        try:
            fields, used = next(reader), reader.line_num
        except (csv.Error, StopIteration):
            fields, used = alone, 1
        if used > 1 and len(fields) != width:  # it would swallow other records
            fields, used = alone, 1
        width = width or len(fields)
        told.append(sign.join(field.replace(sign, inside[0]).replace("\n", inside[1]) for field in fields))
        rows.append(at)
        at += used
    text = "\n".join(told) + "\n"
    return Lines(text.encode("utf-8", "surrogateescape"), row + np.array(rows), len(told), inside)
