"""Groups done by several processes: the rows of one, timed alone, and nothing lost where a worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from malloc_bench.cli import main
from malloc_bench.results import Row, read_rows
from malloc_bench.run.executors import local
from malloc_bench.run.runner import run_suite

SUITE = """
name: shared
datasets: [synthetic]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, dim: 8, heads: 4, max_length: 30}
compressors: [%s]
budgets: [0.25]
seeds: [%s]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""
TIMES = ("created_at", "digest", "train_seconds", "fit_seconds")


@pytest.fixture
def suite(methods_file: Path, tmp_path: Path) -> Path:
    """Its compressors and seeds are to be filled in."""
    return tmp_path / "shared.yaml"


def by_id(folder: Path) -> dict[str, Row]:
    return {row["cell_id"]: {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "rows")}


def test_no_more_workers_than_a_machine_bears(suite: Path, tmp_path: Path, capsys) -> None:
    suite.write_text(SUITE % ("full, none", "0"))
    for many in (500 * (os.cpu_count() or 1), 10**23):
        assert main(["run", str(suite), "--out", str(tmp_path / "x"), "--workers", str(many)]) == 2
        said = capsys.readouterr().err
        assert f"workers {many}: this machine has" in said and "expected at most" in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_two_workers_leave_the_rows_of_one_process(suite: Path, tmp_path: Path, monkeypatch) -> None:
    text = SUITE % ("full, none, knorm, int8, fit_constant, gqa", "0, 1")
    suite.write_text(text.replace("flops: false", "flops: false, drift: [1]"))
    results = []
    for name, workers in (("one", 1), ("two", 2)):
        monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / f"home-{name}"))  # each trains for itself
        results.append(run_suite(suite, tmp_path / name, workers=workers, quiet=True))
        assert not (tmp_path / name / "partial").exists()
    one, two = results
    assert (two.ok, two.failed, two.exit_code) == (one.ok, one.failed, one.exit_code) == (12, 0, 0)
    assert by_id(tmp_path / "two") == by_id(tmp_path / "one")
    assert run_suite(suite, tmp_path / "two", workers=2, quiet=True).reused == 12
    assert set(two.times) == set(one.times) and two.times["train"] > 0


@pytest.mark.slow
def test_what_is_timed_is_timed_by_one_process_when_all_else_is_done(suite, tmp_path, trusted, monkeypatch) -> None:
    monkeypatch.setenv("LOGS", str(tmp_path / "logs"))
    text = SUITE % ("full, logs", "0, 1")
    suite.write_text(text.replace("latency: false, flops: false", "flops: false, seconds: 0.01, users: 5"))
    result = run_suite(suite, tmp_path / "run", workers=2, quiet=True)
    assert (result.ok, result.failed) == (4, 0)
    calls = [tuple(map(int, line.split())) for line in (tmp_path / "logs").read_text().splitlines()]
    chunks = [place for place, (_, users) in enumerate(calls) if users in (256, 44)]
    timed = [place for place, (_, users) in enumerate(calls) if users == 5]
    assert len(chunks) == 4 and len({calls[place][0] for place in chunks}) == 2
    assert min(timed) > max(chunks) and len({calls[place][0] for place in timed}) == 1
    for row in read_rows(tmp_path / "run" / "rows"):
        assert row["read_ms_p50"] > 0 and row["measured_users"] == 5


def test_workers_share_the_chunks_where_there_are_fewer_groups(suite, tmp_path, trusted, monkeypatch) -> None:
    monkeypatch.setenv("LOGS", str(tmp_path / "logs"))
    suite.write_text(SUITE % ("full, logs", "0"))
    result = run_suite(suite, tmp_path / "run", workers=2, quiet=True)
    calls = [tuple(map(int, line.split())) for line in (tmp_path / "logs").read_text().splitlines()]
    chunks = {users: process for process, users in calls if users in (256, 44)}
    assert result.ok == 2 and len(chunks) == 2 and chunks[256] != chunks[44]
    assert sorted(users for _, users in calls if users in (256, 44)) == [44, 256]  # and each of them once
    run_suite(suite, tmp_path / "one", quiet=True)
    assert by_id(tmp_path / "run") == by_id(tmp_path / "one")


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_group_whose_worker_dies_is_run_again_once(suite, tmp_path, monkeypatch, caplog, times) -> None:
    given: list[local.Task] = []

    class Dying(local.Worker):
        def give(self, task, *what) -> None:
            super().give(task, *what)
            given.extend([task] * (task.cell.seed == 1))
            if task.cell.seed == 1 and len(given) <= times:
                os.kill(self.process.pid, signal.SIGKILL)  # before it is at any cell

    monkeypatch.setattr(local, "Worker", Dying)
    suite.write_text(SUITE % ("full, knorm", "0, 1"))
    result = run_suite(suite, tmp_path / "run", workers=2, quiet=True)
    assert caplog.text.count("a worker was killed by SIGKILL; its group is run again: synthetic, sasrec") == 1
    assert (result.ok, result.failed) == ((4, 0) if times == 1 else (2, 2))
    failed = [row for row in read_rows(tmp_path / "run" / "rows") if row["status"] == "failed"]
    reason = "its group was given up: two workers died of it, the last was killed by SIGKILL"
    assert [(row["seed"], row["reason"]) for row in failed] == [(1, reason)] * (0 if times == 1 else 2)


SCRIPT = """
import sys
from malloc_bench.cli.commands import main
from malloc_bench.registry import load_part
load_part(sys.argv[1] + ":Says")
sys.exit(main(["run", sys.argv[2], "--out", sys.argv[3], "--quiet", "--workers", "2"]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_all_workers_and_keeps_what_is_finished(suite, tmp_path, monkeypatch, wait_for, alive) -> None:
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    suite.write_text(SUITE % ("full, says", "0, 1"))
    run_suite(suite, tmp_path / "run", only={"compressor": "full"}, quiet=True)
    before = by_id(tmp_path / "run")
    words = [tmp_path / "methods.py", suite, tmp_path / "run"]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, words)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("said-*"))) == 2)
    workers = [int(path.name.removeprefix("said-")) for path in tmp_path.glob("said-*")]
    assert all(map(alive, workers))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "finished cells are kept" in said
    wait_for(lambda: not any(map(alive, workers)), 30)
    assert len(before) == 2 and by_id(tmp_path / "run") == before


def test_the_number_of_workers_is_checked(suite: Path, tmp_path: Path, capsys) -> None:
    suite.write_text(SUITE % ("full", "0"))
    with pytest.raises(ValueError, match="workers: expected at least 1, not 0"):
        run_suite(suite, tmp_path / "run", workers=0)
    assert main(["run", str(suite), "--out", str(tmp_path / "run"), "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err and not (tmp_path / "run").exists()
