"""Mutated cards and suites: each is read, or refused in one line; none is a traceback, a hang or a crash.

As a script it prints what became of N of them: python tests/faults/test_fuzz_suites.py 5000
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from malloc_bench.cli import commands as cli
from malloc_bench.data import DataError
from malloc_bench.data.sources import cards
from malloc_bench.paths import shipped
from malloc_bench.registry import UnknownName
from malloc_bench.run import runner
from malloc_bench.suite.suite import SuiteError, load_suite

SLOW = 25  # seconds; the 353,472 cells of full.yaml take about 10
OWN = """
format: table
local: [log.csv]
table: {user: who, item: what, time: when, unit: s, rating: stars, feedback: [click], separator: ",", header: true}
label: {column: rating, at_least: 4}
on_bad: {bad_row: drop}
published: {users: 3}
"""
TOKENS = [
    "[", "]", "{", "}", ":", "- ", "? ", "*a", "&a ", "!!python/object:os.x ", "!!binary ", "<<: ", "%", "|\n", ">\n",
    "'", '"', "\t", "\x1b[31m", "\x00", "\ufeff", "\u2028", "\ud800", "9" * 401, "9" * 9000, "-1", "0", "1e999", ".nan",
    "-.inf", "null", "~", "true", "2024-13-45", "1:1:1", "0x", "[" * 9000, "{a: " * 5000, "- " * 5000, "a" * 20_000,
    "../../etc/passwd", "\n", "#", "...\n", "---\n", "=", "é", "日本", "\U0001f600", "{name}", "{{}}", "%s", "$(id)",
]  # fmt: skip
VALUES: list[Any] = [
    None, [], {}, "", "x", "x" * 20_000, "\x1b[31m", 0, -1, 1, 10**6, 2**31, 2**62, 2**64, 10**400, 0.0, -0.5, 1e300,
    5e-324, float("nan"), float("inf"), True, False, [None], [[]], [{}], {"": None}, {1: 2}, {"a": {"b": {"c": []}}},
    ["x"] * 3000, "full", "kivi", "sasrec", "synthetic", "table", "./none.yaml", "/etc/passwd", "a\0b",
    ["a", 1, None, 2.5, True, {}],
]  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


VALUES += [_deep(20), _deep(200), {"slots": 2**62}, {"bytes": 10**30}, {"grid": {"bits": [8, 4, 2]}}, {"layers": 10**6}]


# ---- mutations


def by_bytes(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 10, 200)))
        what = rng.randrange(5)
        if what == 0:
            data[at:end] = rng.randbytes(end - at)
        elif what == 1:
            del data[at:end]
        elif what == 2:
            data[at:at] = data[at:end] * rng.choice((1, 3, 100))
        elif what == 3 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at:at] = rng.randbytes(rng.choice((1, 4)))
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))])


def by_tokens(rng: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        words = lines[at].split(" ")
        what = rng.randrange(4)
        if what == 0:
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
        elif what == 1:
            words.insert(rng.randrange(len(words) + 1), rng.choice(TOKENS))
        elif what == 2:
            lines[at:at] = [lines[rng.randrange(len(lines))]] * rng.choice((1, 1, 50))
            continue
        else:
            words.insert(0, " " * rng.randrange(4))
        lines[at] = " ".join(words)
    return "".join(lines).encode("utf-8", "surrogatepass")


def by_structure(rng: random.Random, text: str) -> bytes:
    content = yaml.safe_load(text)
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder, key = rng.choice(list(_nodes(content)))
        what = rng.randrange(6)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice([*holder, "grid", "training", "variants", 3, None, "x" * 5000])] = holder.pop(key)
        elif what == 2:
            holder[key] = [holder[key]]
        elif what == 3:
            holder[key] = {rng.choice(["x", "slots", "local", "kivi", "compose"]): holder[key]}
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not content:
            break
    return yaml.dump(content, Dumper=_Dumper, allow_unicode=rng.random() < 0.5, sort_keys=False).encode(
        "utf-8", "replace"
    )


class _Dumper(yaml.SafeDumper):
    """Without aliases, which would be all that is refused."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(content)) if isinstance(content, list) else list(content):
        yield content, key
        if isinstance(content[key], dict | list) and content[key]:
            yield from _nodes(content[key])


MUTATIONS: tuple[Callable[[random.Random, str], bytes], ...] = (by_bytes, by_tokens, by_structure, by_structure)


def cases(seed: int, count: int) -> Iterator[tuple[str, str, bytes]]:
    """(card or suite, the file's name, its bytes)."""
    files = [("card", path.name, path.read_text()) for path in sorted(shipped("datasets").glob("*.yaml"))]
    files += [("card", "own.yaml", OWN)] * 8
    files += [("suite", path.name, path.read_text()) for path in sorted(shipped("suites").glob("*.yaml"))] * 3
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        kind, name, text = rng.choice(files)
        if kind == "suite" and rng.random() < 0.7:  # data that are there, so that planning comes to its end
            content = yaml.safe_load(text)
            text = yaml.safe_dump({**content, "datasets": ["synthetic"]}, sort_keys=False)
        yield kind, name, rng.choice(MUTATIONS)(rng, text)


# ---- what becomes of one


def outcome(kind: str, name: str, data: bytes, folder: Path) -> str:
    """read, refused, or what is wrong: slow, two lines, or a traceback."""
    path = folder / ("suite" if kind == "suite" else "cards") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    began = time.monotonic()
    try:
        with _limit(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            found = _card(path) if kind == "card" else _suite(path, said)
    except (DataError, SuiteError, UnknownName) as error:
        found = _refused(str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = f"traceback: {''.join(traceback.format_exception(error)[-3:])}"
    finally:
        path.unlink()
    return found if time.monotonic() - began < SLOW else "slow"


def _card(path: Path) -> str:
    """By name, as a shipped card is, or by path, as a user's own."""
    if path.name == "own.yaml":
        cards.load_card(path)
        return "read"
    with mock.patch.object(cards, "shipped", lambda kind: path.parent):
        files = cards.card_files()
        for name in list(files)[:3]:
            cards.load_card(name, files)
    return "read"


def _suite(path: Path, said: io.StringIO) -> str:
    suite = load_suite(path)
    if len(suite.cells()) < 300:
        code = cli.main(["run", str(path), "--dry-run", "--offline", "--out", str(path.parent / "out")])
        if code:
            lines = said.getvalue().splitlines()
            return _refused(lines[-1]) if code == 2 else f"exit code {code}: {lines}"
    return "read"


def _refused(message: str) -> str:
    good = message and len(message.splitlines()) == 1 and len(message) < 2000
    return "refused" if good else f"two lines: {message[:300]!r}"


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    """A hang ends as a TimeoutError."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SLOW + 2)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(seed: int, count: int, folder: Path) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for kind, name, data in cases(seed, count):
        result = outcome(kind, name, data, folder)
        found[result] += 1
        if result not in ("read", "refused"):
            found[f"  {result[:9]}: {kind} {name} {data[:3000]!r}"] += 1
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MALLOC_BENCH_DATA", raising=False)
    monkeypatch.setattr(runner, "probed", lambda *plan: None)  # what a machine takes is no fault of a file
    return tmp_path


def _check(found: collections.Counter[str]) -> None:
    assert set(found) <= {"read", "refused"}, "\n".join(map(str, found.items()))
    assert found["read"] and found["refused"]


def test_what_was_not_touched_is_read(world: Path) -> None:
    for kind, name, text in (
        ("card", "own.yaml", OWN),
        ("suite", "smoke.yaml", (shipped("suites") / "smoke.yaml").read_text()),
    ):
        assert outcome(kind, name, text.encode(), world) == "read"


def test_a_few_hundred_mutated_cards_and_suites(world: Path) -> None:
    _check(fuzz(0, 250, world))


@pytest.mark.slow
def test_two_thousand_mutated_cards_and_suites(world: Path) -> None:
    _check(fuzz(1, 2000, world))


# ---- as a script


def _worker(seed: int, count: int, results: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MALLOC_BENCH_HOME"] = f"{folder}/home"
        os.environ.pop("MALLOC_BENCH_DATA", None)
        results.put(fuzz(seed, count, Path(folder)))


def main() -> None:
    count, total = int(sys.argv[1]) if len(sys.argv) > 1 else 5000, collections.Counter[str]()
    for seed in range(100, 100 + -(-count // 250)):  # each in a process of its own: a crash ends 250, and is counted
        results: Any = multiprocessing.Queue()
        process = multiprocessing.Process(target=_worker, args=(seed, 250, results))
        process.start()
        with contextlib.suppress(Exception):
            total += results.get(timeout=1000)
        process.join()
        total["crash"] += process.exitcode != 0
        print({key: n for key, n in total.items() if key in ("read", "refused", "crash")}, flush=True)
    for key, n in total.items():
        print(n, key)


if __name__ == "__main__":
    main()
