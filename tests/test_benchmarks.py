"""The benchmarks run from end to end at tiny sizes; their figures mean nothing here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from malloc_bench import kernels
from malloc_bench.registry import names

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


@pytest.fixture
def turbo(script, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("bench_turbo")
    monkeypatch.setattr(module, "tune_malloc", lambda: None)
    return module


@pytest.mark.slow
def test_turbo_serves_every_backbone_as_the_naive_way_does(turbo, capsys) -> None:
    turbo.report(lengths=[12, 30], candidates=[1, 5], more=[40], merged=[3], repeats=1)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    served, others = ([x for x in lines if len(x) == width and x[0] in names("backbones")] for width in (10, 7))
    assert len(others) == len(names("backbones")) * (2 * 3 + 1)  # limits of two lengths, and training
    assert [line[:4] for line in served] == [
        [name, n, m, m] for name in names("backbones") for n in ("12", "30") for m in ("1", "5")
    ]
    assert all(float(line[-1]) < 1e-5 for line in served)


def test_turbo_tells_when_a_read_is_not_the_plain_pass(turbo, monkeypatch) -> None:
    plain = turbo.naive
    monkeypatch.setattr(turbo, "naive", lambda *given: plain(*given) + 1e-3)
    with torch.inference_mode(), pytest.raises(AssertionError, match=r"sasrec: a read is 1.*e-03 away"):
        turbo.serving("sasrec", 12, 5, "cpu", 1)


def test_turbo_asks_each_row_at_the_moment_of_its_candidate(turbo) -> None:
    """Row by row in a loop: the history, then the candidate, times and next times alike."""
    history, tokens = turbo.ask(6, 3, "cpu")
    rows = turbo.rows(history, tokens, slice(1, 3))
    for row, m in enumerate((1, 2)):
        for past, token, got in zip(
            (history.items, history.times, history.next_times),
            (tokens.items, tokens.times, tokens.next_times),
            (rows.items, rows.times, rows.next_times),
        ):
            assert got[row].tolist() == [*past[0].tolist(), int(token[0, m])]
    assert rows.count.tolist() == [7, 7]


def test_the_stream_tells_what_stale_entries_cost(script, synthetic, monkeypatch) -> None:
    marm = script("bench_marm")
    monkeypatch.setattr(marm, "SIZE", {"layers": 2, "heads": 1, "dim": 8, "max_length": 30})
    monkeypatch.setattr(marm, "STEP", 2000)
    lines = marm.measure(synthetic, "none", 3)
    assert [line[1] for line in lines[:4]] == [
        "no history", "no memory: built on request", "today's parameters", "written every epoch",
    ]  # fmt: skip
    assert lines[1][2:6] == ["", "", "", ""] and lines[2][2:6] == ["100.0%", "0", "0.000", "1.000"]
    assert lines[1][6:] == lines[2][6:]  # the same state, another way round
    hits, age, error = ({line[1]: float(line[i].strip("%").replace(",", "")) for line in lines[3:]} for i in (2, 3, 4))
    assert hits["written never again"] == 100.0
    assert abs(hits["half of the entries lost"] - 50) < 2 and abs(hits["the log's last tenth not written"] - 90) < 2
    assert 0 < age["written every epoch"] < age["written never again"]
    assert 0 < error["half of the entries lost"] < error["written every epoch"] < error["written never again"]


@pytest.mark.slow
def test_what_fitted_slots_cost_is_told_of_two_backbones(script, capsys) -> None:
    script("bench_fitted").report(lengths=[20], slots=2, probes=4, users=2, seconds=0.0)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[0] in names("backbones")]
    made, read, held = rows[:2], rows[2:6], rows[6:]
    assert [row[:2] for row in made] == [["sasrec", "20"], ["hstu", "20"]]
    assert all(float(cell) > 0 for row in made for cell in row[2:])
    assert [row[:3] for row in read] == [[name, "20", str(m)] for name in ("sasrec", "hstu") for m in (1, 100)]
    assert all(row[-1].startswith("1/") for row in read)
    assert [row[:3] for row in held] == [
        [n, "20", share] for n in ("sasrec", "hstu") for share in ("1/32", "1/64", "1/256")
    ]
    assert all(int(row[3]) == sum(map(int, row[4:])) for row in held)


def test_stores_tell_what_is_theirs(script, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path))
    stores = script("bench_stores")
    stores.report(3e6, ["lmdb", "dict"], own=8, first=20)
    text = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    filled, slopes, own = ([x for x in lines if len(x) == n and x[0] in ("lmdb", "dict")] for n in (8, 5, 3))
    assert {(x[0], x[1]) for x in filled} == {(s, m) for s in ("lmdb", "dict") for m in stores.METHODS}
    assert all(float(x[6]) >= 1 and float(x[7].replace(",", "")) >= 0 for x in filled)
    assert len(slopes) == 6 and all(1 <= float(x[2]) < 4 for x in slopes) and len(own) == 2
    assert not list((tmp_path / "stores").iterdir())


def test_least_squares_and_its_standard_errors_by_hand(script) -> None:
    """y = 1 + 2 x and residuals of +-1: the slope's error is sqrt(s^2 / sum of (x - mean)^2), s^2 = 4 / 2."""
    found = script("bench_stores").fitted([2.0, 2.0, 4.0, 8.0], [0.0, 1.0, 2.0, 3.0], [1.0] * 4)
    (slope, error), (start, _) = found
    assert (slope, start) == pytest.approx((2.0, 1.0)) and error == pytest.approx((2 / 5) ** 0.5)


def test_a_slopes_error_is_that_of_a_line_with_an_intercept(script) -> None:
    """By the closed form, at sizes of gigabytes, where a'a is singular to float64."""
    x = np.array([1e3, 1e6, 1e8, 1e9, 4e9])
    y = 1.7 * x + 5e5 + np.array([3e5, -4e5, 2e6, -1e6, 1e6])
    (slope, error), (_, _) = script("bench_stores").fitted(y, x, np.ones(5))
    centred = x - x.mean()
    expected = (centred @ y) / (centred @ centred)
    rest = y - y.mean() - expected * centred
    assert slope == pytest.approx(expected) and error == pytest.approx((rest @ rest / 3 / (centred @ centred)) ** 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")
def test_packed_reads_beside_float32(script, monkeypatch, capsys) -> None:
    module = script("bench_kernels")
    monkeypatch.setattr(module, "tune_malloc", lambda: None)
    monkeypatch.setattr(module, "ASKED", ((1, 300), (9, 20)))
    module.report(users=1, seconds=0.0)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 9 |"))]
    assert len(rows) == 2 * len(module.packed(*(torch.zeros(1, 2, 4, 64) for _ in range(2))))


def test_codebooks_are_held_beside_the_same_search(script, monkeypatch, capsys) -> None:
    bench = script("bench_codebooks")
    monkeypatch.setattr(bench, "tune_malloc", lambda: None)
    bench.report(vectors=32, seconds=0.01)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [tuple(map(int, line[:3])) for line in lines[2:]] == list(bench.SHAPES)
