"""Methods that hang, allocate, crash or leave: a failed row that says so, and nothing lost for the others."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from malloc_bench import registry
from malloc_bench.registry import load_part, register
from malloc_bench.results import Row, read_rows
from malloc_bench.run import runner
from malloc_bench.run.executors import page, shared
from malloc_bench.run.executors.page import SIZE, Notes, Page
from malloc_bench.run.executors.promises import broken_within
from malloc_bench.run.runner import run_suite
from malloc_bench.run.session import ALONE, TRAINING, Session
from malloc_bench.suite.cells import Part
from malloc_bench.suite.file import Limits

SUITE = """
name: limited
datasets: [synthetic]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, dim: 8, max_length: 30}
compressors: [full, %s]
budgets: [0.25]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""


@pytest.fixture
def suite(methods_file: Path, tmp_path: Path) -> Path:
    """Its compressors are to be filled in."""
    return tmp_path / "limited.yaml"


def without_times(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("created_at", "digest", "fit_seconds")}


def by_name(folder: Path) -> dict[str, Row]:
    return {row["compressor"]: row for row in read_rows(folder / "rows")}


def test_each_goes_too_far_in_its_own_way_and_the_others_go_on(suite: Path, tmp_path: Path, trusted) -> None:
    suite.write_text(SUITE % "sleeps, crashes, allocates, leaves, good, knorm" + "limits: {seconds: 8, memory: 1GB}")
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert (result.ok, result.failed, result.exit_code) == (3, 4, 1)
    rows = by_name(tmp_path / "run")
    assert rows["sleeps"]["reason"].startswith("it took 8 s, the limit is 8 s (chunk 1 of ")
    assert rows["allocates"]["reason"].startswith("its process had 1.")
    assert " of them before it began; the limit is 1.0 GB (chunk 1 of " in rows["allocates"]["reason"]
    assert rows["crashes"]["reason"].startswith("its process was killed by SIGSEGV (chunk 1 of ")
    assert rows["leaves"]["reason"].startswith("its process was ended with exit code 0 (chunk 1 of ")
    assert not (tmp_path / "run" / "partial").exists()
    suite.write_text(SUITE % "good, knorm")
    assert run_suite(suite, tmp_path / "plain", quiet=True).ok == 3  # in this process, with nobody beside
    plain = by_name(tmp_path / "plain")
    for name in ("full", "good", "knorm"):
        mine, other = without_times(rows[name]), without_times(plain[name])
        assert mine["hashes"]["files"] == other["hashes"]["files"] and mine["ndcg@10"] == other["ndcg@10"]
        assert mine == {**other, "suite": "limited"}


def test_a_method_that_ends_a_worker_costs_the_others_one_chunk(
    suite: Path, tmp_path: Path, trusted, monkeypatch
) -> None:
    monkeypatch.setenv("COUNTS", str(tmp_path / "counts"))
    suite.write_text(SUITE % "counted, late" + "limits: {seconds: 600}")
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert (result.ok, result.failed) == (2, 1)
    assert sorted((tmp_path / "counts").read_text().split()) == ["256", "44", "44"]


@pytest.mark.slow
def test_who_had_most_of_the_memory_from_others_tries_again_first(suite: Path, tmp_path: Path, trusted) -> None:
    suite.write_text(SUITE % "hoards, large" + "limits: {memory: 2GB}")  # 1.4 GB that it keeps, then 0.7 GB
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert {name: row["reason"] for name, row in by_name(tmp_path / "run").items()} == dict.fromkeys(
        ("full", "hoards", "large")
    )
    assert result.ok == 3


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_was_killed_from_outside_is_tried_again_once(suite, tmp_path, trusted, monkeypatch, caplog, times) -> None:
    monkeypatch.setenv("KILLS", str(tmp_path / "kills"))
    monkeypatch.setenv("TIMES", str(times))
    suite.write_text(SUITE % "is_killed" + "limits: {seconds: 600}")
    result = run_suite(suite, tmp_path / "run", quiet=True)
    said = "a worker was killed by SIGKILL; its group is run again: synthetic, sasrec(layers=1, dim=8, max_length=30)"
    assert caplog.text.count(said) == 1
    assert (result.ok, result.failed) == ((2, 0) if times == 1 else (1, 1))
    if times == 2:
        reason = by_name(tmp_path / "run")["is_killed"]["reason"]
        assert reason.startswith("its process was killed by SIGKILL (chunk 1 of ")


def test_a_method_that_another_process_cannot_import_is_said_at_once(suite: Path, tmp_path: Path) -> None:
    @register("here")
    @dataclass(frozen=True)
    class Here(type(registry.find("compressors", "good")())):  # type: ignore[misc]
        pass

    suite.write_text(SUITE % "here" + "limits: {seconds: 600}")
    with pytest.raises(ValueError, match="here cannot be imported by another process, which limits and workers need"):
        run_suite(suite, tmp_path / "run", quiet=True)


SCRIPT = """
import sys
from malloc_bench.cli.commands import main
from malloc_bench.registry import load_part
load_part(sys.argv[1] + ":Says")
sys.exit(main(["run", sys.argv[2], "--out", sys.argv[3], "--quiet"]))
"""


@pytest.mark.parametrize(
    ("asks", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGKILL, -9)],
    ids=["ctrl-C", "SIGKILL"],
)
def test_no_worker_outlives_its_run(suite, tmp_path, monkeypatch, wait_for, alive, asks, code) -> None:
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    suite.write_text(SUITE % "says" + "limits: {seconds: 6000}")
    words = [tmp_path / "methods.py", suite, tmp_path / "run"]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, words)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("said-*[0-9]")))
    (worker,) = (int(path.name.removeprefix("said-")) for path in tmp_path.glob("said-*[0-9]"))
    assert alive(worker) and worker != process.pid
    process.send_signal(asks)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said
    wait_for(lambda: not alive(worker), 30)


@pytest.mark.slow
def test_a_run_cut_under_limits_goes_on_behind_its_last_chunk(suite, tmp_path, trusted, wait_for, alive) -> None:
    def begun(users: int) -> list[int]:
        return [int(path.name.rsplit("-", 1)[1]) for path in (tmp_path / "waits").glob(f"0-{users}-*")]

    suite.write_text(SUITE % "waits" + "limits: {seconds: 600, memory: 8GB}")
    words = [tmp_path / "methods.py", suite, tmp_path / "run"]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.replace("Says", "Waits"), *map(str, words)])
    wait_for(lambda: begun(44))
    process.kill()
    process.wait()
    assert len(list((tmp_path / "run" / "partial").glob("*/*.npz"))) == 1
    wait_for(lambda: not any(map(alive, begun(44))))
    (tmp_path / "waits" / "go").touch()
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert (result.ok, result.failed) == (2, 0)
    assert (len(begun(256)), len(begun(44))) == (1, 2)  # the chunk that was cut, and no other
    assert not (tmp_path / "run" / "partial").exists()
    suite.write_text(SUITE % "waits")
    run_suite(suite, tmp_path / "plain", quiet=True)
    rows, plain = by_name(tmp_path / "run"), by_name(tmp_path / "plain")
    assert {name: without_times(rows[name]) for name in plain} == {k: without_times(v) for k, v in plain.items()}


def test_every_step_of_a_method_is_told(suite: Path, tmp_path: Path, monkeypatch) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(runner, "Session", partial(Session, begin=lambda what, cell: told.append((what, cell))))
    measure = "measure: {latency: true, flops: true, drift: [1], seconds: 0.01}"
    suite.write_text(
        (SUITE % "good, fit_constant, gqa")
        .replace("dim: 8", "dim: 8, heads: 4")
        .replace("measure: {latency: false, flops: false}", measure)
    )
    result = run_suite(suite, tmp_path / "run", quiet=True)
    named = {each.id: each.cell.compressor.name for each in result.plan}
    steps = {name: {what.split()[0] for what, cell in told if named.get(cell) == name} for name in named.values()}
    both = {"its", "read", "learning", "chunk", "drift,", "measuring"}
    assert steps == {"full": both, "fit_constant": both, "good": both, "gqa": both | {"training"}}
    assert told[-1] == ("", "")  # and nobody is at work in the end


def test_notes_add_up_what_a_cell_takes(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        notes, seen = Notes(Page(file.fileno())), Page(file.fileno())
    for what, cell, since, spent in (
        ("chunk 1 of 2", "a", 100.0, 0.0),
        ("chunk 1 of 2", "b", 101.0, 0.0),
        ("", "", math.inf, 0.0),
        ("chunk 2 of 2", "a", 103.0, 1.0),
        ("measuring", "a", 104.0, 0.0),  # each turn by itself
        (ALONE, "a", 405.0, 0.0),  # a process has to start
        (TRAINING, "a", math.inf, 0.0),
        ("drift, part 1 of 2", "a", 107.0, 2.0),
    ):
        notes.begin(what, cell)
        found = seen.read()
        assert found is not None and found[1:5] == (since, spent, cell, what) and found.memory > 1e7
        now[0] += 1.0


@pytest.mark.parametrize(("share", "given_back"), [(0.7, 0), (0.8, 1)])
def test_unused_memory_is_given_back_only_near_the_limit(monkeypatch, share: float, given_back: int) -> None:
    limit, calls = 1e9, []
    monkeypatch.setattr(page, "memory_of", lambda process: int(share * limit))
    monkeypatch.setattr(page, "give_back", lambda: calls.append(1))
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        notes = Notes(Page(file.fileno()), limit)
    notes.begin("chunk 1 of 2", "a")
    notes.begin("chunk 1 of 2", "b")  # it gave nothing back: not again
    assert len(calls) == given_back


def test_arrays_are_mapped_and_what_is_written_stays_private(tmp_path: Path) -> None:
    value = {"a": np.arange(1000), "b": [np.ones((3, 4), np.float32), "text"], "empty": np.zeros(0)}
    with (tmp_path / "file").open("wb") as file:
        shared.dump(value, file)
    with (tmp_path / "file").open("rb") as file:
        one, other = shared.load(file.fileno()), shared.load(file.fileno())
    for found in (one, other):
        np.testing.assert_array_equal(found["a"], value["a"])
        np.testing.assert_array_equal(found["b"][0], value["b"][0])
        assert found["b"][1] == "text" and len(found["empty"]) == 0 and found["a"].ctypes.data % 64 == 0
        assert not found["a"].flags.owndata
    one["a"][0] = 5
    assert other["a"][0] == 0


#: each goes wrong with any users; and one that breaks a promise only
BAD = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass
import torch
from malloc_bench import register
from malloc_bench.compressors import Eviction

@dataclass(frozen=True)
class Bad(Eviction):
    family = "eviction"

    def scores(self, prefill, layer):
        self.work()
        return (prefill.keys(layer) - prefill.keys(layer)[:1]).norm(dim=-1)

    def work(self): pass

class Naps(Bad):
    def work(self): time.sleep(3000)

class Eats(Bad):
    def work(self):
        held = [time.sleep(0.02) or torch.ones(1 << 24) for _ in range(100)]  # up to 6.4 GB

class Falls(Bad):
    def work(self): os.kill(os.getpid(), signal.SIGSEGV)

class Goes(Bad):
    def work(self): os._exit(0)

class Lingers(Bad):
    def scores(self, prefill, layer):
        process = subprocess.Popen(["sleep", "100"])
        open(f"{os.environ['SAYS']}-{process.pid}", "w").close()
        return prefill.values(layer).norm(dim=-1)

class Hangs(Bad):
    def work(self):
        if "elsewhere" in sys.argv[0]:
            open(f"{os.environ['SAYS']}-{os.getpid()}", "w").close()
            time.sleep(100)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Naps", "a first compression: it took 4 s, the limit is 4 s; nothing after it was tried"),
        ("Eats", "a first compression: its process had 1."),
        ("Falls", "a first compression: its process was killed by SIGSEGV; nothing after it was tried"),
        ("Goes", "a first compression: its process was ended with exit code 0; nothing after it was tried"),
        ("Bad", "tensors-ignores_the_batch: "),
    ],
)
def test_promises_are_tried_within_the_limits_of_cells(
    name: str, said: str, methods_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    part = Part(load_part(f"{tmp_path / 'bad.py'}:{name}"))
    (line, *_) = broken_within([part], Limits(seconds=4 if name == "Naps" else 600, memory=10**9))
    assert line.startswith(said)


@pytest.mark.slow
def test_compare_tries_its_promises_within_limits(suite: Path, tmp_path: Path, methods_file, trusted, caplog) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    suite.write_text(SUITE % "knorm" + "limits: {seconds: 600}")
    assert runner.compare(f"{tmp_path / 'bad.py'}:Goes", suite, out=tmp_path / "run").exit_code == 1
    assert "such as a first compression: its process was ended with exit code 0; nothing after" in caplog.text


def test_a_sound_method_breaks_no_promise_within_limits(methods_file: Path) -> None:
    assert broken_within([Part("good")], Limits(seconds=600)) == []


@pytest.mark.slow
def test_promises_wait_for_nothing_that_a_method_leaves_behind(methods_file, tmp_path, monkeypatch, alive) -> None:
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    (tmp_path / "bad.py").write_text(BAD)
    part, begin = Part(load_part(f"{tmp_path / 'bad.py'}:Lingers")), time.monotonic()
    assert broken_within([part], Limits(seconds=600)) == []
    assert time.monotonic() - begin < 90
    left = [int(path.name.removeprefix("said-")) for path in tmp_path.glob("said-*")]
    assert left and not any(map(alive, left))


READS = """
import sys
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.registry import load_part
from malloc_bench.testing.elsewhere import Case, read_elsewhere
case, blobs, _ = Case(get_compressor(load_part(sys.argv[1] + ":Hangs")), None, Budget(0.5)).written()
read_elsewhere([(case, blobs)])
"""


def test_a_fresh_process_ends_with_who_asked(tmp_path, monkeypatch, wait_for, alive) -> None:
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    (tmp_path / "bad.py").write_text(BAD)
    process = subprocess.Popen([sys.executable, "-c", READS, str(tmp_path / "bad.py")])
    wait_for(lambda: list(tmp_path.glob("said-*")))
    (fresh,) = (int(path.name.removeprefix("said-")) for path in tmp_path.glob("said-*"))
    process.kill()
    process.wait()
    wait_for(lambda: not alive(fresh), 30)
