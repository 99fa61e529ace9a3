"""Damaged data files of every layout: each is read or refused with one line; none may crash, hang or raise.

As a script: python tests/faults/test_fuzz_data.py --files 3000 --seed 0
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.categories import first_categories
from malloc_bench.data.formats.formats import LAYOUTS, Layout
from malloc_bench.data.formats.parse import Reader
from malloc_bench.data.formats.policies import Judge
from malloc_bench.data.formats.table import Table
from malloc_bench.data.prepare import prepare
from malloc_bench.data.sources.archive import open_parts

SECONDS = 10  # what takes longer hangs
DROP = dict.fromkeys(("bad_row", "huge_id", "bad_time", "duplicates", "single_event_users"), "drop")
TEXT = {"date": "2020-01-02", "utc_time": "Tue Apr 03 18:00:09 +0000 2012", "behavior": "cart", "item_history": "4^5"}


def lines(layout: Layout, rng: np.random.Generator, rows: int = 12) -> bytes:
    """A valid file of text in a publisher's layout."""
    separator = "\t" if layout.separator == "auto" else layout.separator
    if layout.lines == "history":
        return b"".join(b"%d %s\n" % (u, b" ".join(b"%d" % i for i in rng.integers(1, 99, 5))) for u in range(rows))
    names = list(layout.columns or [layout.user, "x", layout.item, layout.time or "y", *layout.feedback])
    if layout.columns is None:
        names += [name for name in (layout.history, layout.label, layout.category) if name]
    known = {layout.time: {"ms": 10**12, "date": 0}.get(layout.unit, 10**9)}

    def value(name: str) -> str:
        if name in TEXT:
            return TEXT[name]
        return str(known[name] + int(rng.integers(10**6))) if name in known else str(rng.integers(1, 6))

    if layout.lines == "json":
        return b"".join(json.dumps({name: int(value(name)) for name in names}).encode() + b"\n" for _ in range(rows))
    told = [separator.join(value(name) for name in names) for _ in range(rows)]
    head = [separator.join(names)] if layout.columns is None else []
    return "\n".join([*head, *told, ""]).encode()


def own(rng: np.random.Generator, rows: int = 12) -> pl.DataFrame:
    """A log as a user has it, with titles that need quotes."""
    return pl.DataFrame({
        "user": [f"u{i:03d}" for i in rng.integers(0, 4, rows)],
        "title": ['A, "B"\nC' if i else "plain" for i in rng.integers(0, 2, rows)],
        "item": rng.integers(0, 9, rows).astype(str),
        "when": rng.integers(1_500_000_000, 1_600_000_000, rows),
        "stars": rng.integers(1, 6, rows) / 2,
    })  # fmt: skip


@lru_cache
def seeds() -> dict[str, tuple[Layout, str, tuple[bytes, ...]]]:
    """name -> (layout, name of the file, its parts' bytes), small and valid."""
    rng = np.random.default_rng(7)
    found: dict[str, tuple[Layout, str, tuple[bytes, ...]]] = {}
    for name, layout in LAYOUTS.items():
        if layout.lines in {"table", "json"}:
            found[name] = layout, "f.csv", (lines(layout, rng),)
        elif layout.lines == "history":
            text = lines(layout, rng)
            found[name] = layout, "f.txt", (text, text) if layout.times_in else (text,)
    array, stream = io.BytesIO(), io.BytesIO()
    np.save(array, rng.integers(1, 999, (12, 3)).astype(np.int32))
    found["foursquare-npy"] = LAYOUTS["foursquare-npy"], "f.npy", (array.getvalue(),)
    columns = {name: rng.integers(0, 9, 12) for name in ("user_id", "item_id", "position")}
    pl.DataFrame(columns).write_parquet(stream)
    found["parquet-ordered"] = LAYOUTS["parquet-ordered"], "f.parquet", (stream.getvalue(),)
    log = own(rng)
    layout = Table(user="user", item="item", time="when", rating="stars").layout()
    texts = {",": log.write_csv().encode(), "\t": log.write_csv(separator="\t").encode()}
    files = {
        "csv": texts[","], "tsv": texts["\t"], "jsonl": log.write_ndjson().encode(),
        "csv.gz": gzip.compress(texts[","]), "bom.csv": b"\xef\xbb\xbf" + texts[","].replace(b"\n", b"\r\n"),
    }  # fmt: skip
    for suffix, write in {"parquet": log.write_parquet, "arrow": log.write_ipc, "stream": log.write_ipc_stream}.items():
        write(buffer := io.BytesIO())
        files[suffix] = buffer.getvalue()
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", texts[","])
    files["zip"] = buffer.getvalue()
    found |= {f"table {suffix}": (layout, f"f.{suffix}", (data,)) for suffix, data in files.items()}
    told = {"user": "user", "item": "item", "time": "when"}
    iso = log.with_columns(pl.from_epoch("when").dt.strftime("%Y-%m-%d %H:%M:%S"))
    found["table iso"] = Table(**told, unit="iso").layout(), "f.csv", (iso.write_csv().encode(),)
    wide = Table(**told, encoding="utf-16").layout()
    found["table utf-16"] = wide, "f.csv", (texts[","].decode().encode("utf-16"),)
    bare = Table(**told, columns=log.columns, separator="|", ids="number", unit="order").layout()
    numbers = log.with_columns(pl.col("user").str.slice(2)).write_csv(separator="|", include_header=False)
    found["table of numbers without a header"] = bare, "f.csv", (numbers.encode(),)
    found["table two parts"] = layout, "f.csv", (texts[","], files["parquet"])
    return found


def flip(data: bytearray, rng: np.random.Generator) -> bytes:
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[at] = rng.integers(256)
    return bytes(data)


def cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: rng.integers(len(data))] if rng.random() < 0.7 else data[rng.integers(len(data)) :])


def swap(data: bytearray, rng: np.random.Generator) -> bytes:
    a, b = rng.integers(0, len(data), 2)
    data[a], data[b] = data[b], data[a]
    return bytes(data)


def insert(data: bytearray, rng: np.random.Generator) -> bytes:
    """Odd words where a number, a sign or nothing stood."""
    at = int(rng.integers(len(data)))
    return bytes(data[:at] + rng.choice(np.array(WORDS, object)) + data[at + int(rng.integers(4)) :])


def replace(data: bytearray, rng: np.random.Generator) -> bytes:
    """A whole field by an odd word."""
    fields = data.split(b"," if data.count(b",") > data.count(b"\t") else b"\t")
    fields[rng.integers(len(fields))] = rng.choice(np.array(WORDS, object))
    return (b"," if data.count(b",") > data.count(b"\t") else b"\t").join(fields)


def repeat(data: bytearray, rng: np.random.Generator) -> bytes:
    rows = data.split(b"\n")
    return b"\n".join([*rows, *rows[rng.integers(len(rows)) :]] * int(rng.integers(1, 4)))


def encode(data: bytearray, rng: np.random.Generator) -> bytes:
    return data.decode("latin-1").encode(["utf-16", "utf-32", "utf-8-sig", "utf-8", "utf-7"][rng.integers(5)])


def pack(data: bytearray, rng: np.random.Generator) -> bytes:
    return [gzip.compress(data), gzip.compress(data)[:-9], b"\x1f\x8b" + data, b"PK\x03\x04" + data][rng.integers(4)]


def lengthen(data: bytearray, rng: np.random.Generator) -> bytes:
    """Numbers of four or eight bytes that are sizes in binary files, made huge."""
    at = int(rng.integers(max(len(data) - 8, 1)))
    size = [2**31 - 1, 2**63 - 1, 2**40, 2**64 - 1, 2**32 - 1][rng.integers(5)]
    data[at : at + 8] = size.to_bytes(8, "little")[: [4, 8][rng.integers(2)]]
    return bytes(data)


WORDS = [
    b"", b'"', b'""', b",", b"\t", b"\n", b"\r", b"\n\n\n", b"\0", b"nan", b"NaN", b"Infinity", b"-1", b"1e999",
    b"9" * 19, b"9" * 500, b"18446744073709551615", b"-9223372036854775808", b"007", b"+7", b"7.0", b"0x7", b"1_0",
    b"true", b"null", b"[" * 50, b'{"a":' * 50, b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", "\u202e".encode(), b"1^2",
    b"2024-02-30", b"\x1f", b"\x1e", b"\x1d", b"\\", b"'", b"::", b"x" * 200_000, b"," * 20_000, b'\n"' * 2000,
]  # fmt: skip
MUTATIONS = [flip, cut, swap, insert, replace, repeat, encode, pack, lengthen]


def damaged(seed: int) -> tuple[str, str, list[bytes]]:
    """(what was done, kind, the file's parts) by number."""
    rng = np.random.default_rng(seed)
    kind = list(seeds())[seed % len(seeds())]
    parts = list(seeds()[kind][2])
    which = int(rng.integers(len(parts)))
    done = []
    for mutation in rng.choice(np.array(MUTATIONS, object), int(rng.integers(1, 3))):
        parts[which] = mutation(bytearray(parts[which] or b"\n"), rng)
        done.append(mutation.__name__)
    return "+".join(done), kind, parts


def outcome(seed: int, folder: Path) -> str:
    """`read` or `refused`; raises whatever else comes of a damaged file, or where what is said of it is no line."""
    _, kind, parts = damaged(seed)
    layout, name, _ = seeds()[kind]
    files = [folder / (f"{i}{name}" if i else name) for i in range(len(parts))]
    for path, data in zip(files, parts):
        path.write_bytes(data)
    try:
        with open_parts(files) as opened:
            if layout.category:
                first_categories(opened, layout)
                return "read"
            reader = Reader(layout, Judge(DROP if seed % 3 == 0 else {}))
            prepare(reader.frames(opened), reader, folder)
    except DataError as error:
        told = str(error)
        assert told.isprintable() and len(told) < 2000, f"no line: {told[:3000]!r}"
        assert files[0].name in told or files[-1].name in told or layout.times_in, f"names no file: {told}"
        return "refused"
    return "read"


@pytest.mark.parametrize("kind", seeds())
def test_the_files_are_valid_before_they_are_damaged(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "damaged", lambda seed: ("", kind, list(seeds()[kind][2])))
    assert outcome(1, tmp_path) == "read"


@pytest.mark.parametrize("block", range(10))
def test_a_damaged_file_is_read_or_refused_with_one_line(block, tmp_path):
    for seed in range(block * 40, block * 40 + 40):
        start = time.perf_counter()
        outcome(seed, tmp_path)
        assert time.perf_counter() - start < SECONDS, f"seed {seed}"


@pytest.mark.slow
def test_three_thousand_damaged_files():
    counts = fuzz(3000, 10_000)
    assert counts["read"] + counts["refused"] == 3000, counts


def _serve(connection: multiprocessing.connection.Connection) -> None:
    while True:
        seed = connection.recv()
        with tempfile.TemporaryDirectory() as folder:
            try:
                connection.send((outcome(seed, Path(folder)), ""))
            except BaseException:
                connection.send(("traceback", traceback.format_exc(limit=-6)))


def fuzz(files: int, seed: int) -> Counter[str]:
    """How many damaged files were read, refused, gave a traceback, were slow, or crashed the process."""
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    worker = None
    for each in range(seed, seed + files):
        if worker is None:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            slack = 60.0  # to import
        ours.send(each)
        what, told = "slow", ""
        try:
            if ours.poll(SECONDS + slack):
                what, told = ours.recv()
        except (EOFError, ConnectionError):
            what = "crash"
        slack = 0.0
        counts[what] += 1
        if what in {"slow", "crash"}:
            worker.kill()
            worker = None
        if what not in {"read", "refused"}:
            print(f"seed {each}: {what}: {damaged(each)[:2]}\n{told}", flush=True)
    if worker is not None:
        worker.kill()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(dict(fuzz(asked.files, asked.seed)))
