"""Shards handed in as an array of jobs: merged they are the run; what is wrong is said before anything is queued."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from malloc_bench.cli import main
from malloc_bench.results import read_rows
from malloc_bench.run.runner import run_suite
from malloc_bench.run.submit import Shard, submit

SUITE = """
name: handed-in
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, recent, knorm, none]
budgets: [0.25]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""
TIMES = ("created_at", "digest", "load", "train_seconds")


@pytest.fixture
def suite(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "handed-in.yaml").write_text(SUITE)
    return path


def by_id(folder: Path) -> dict[str, dict]:
    return {row["cell_id"]: {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "rows")}


def test_options_are_tried_before_they_are_handed_in(suite: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Each job would fail of them, and say so in its log alone."""
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))  # nothing of it is asked for
    (tmp_path / "plain.txt").write_text("")
    for words, line in (
        (["--", "--only", "backbone=zzz"], "--only backbone=zzz: no cell of the suite has it. Valid: sasrec"),
        (["--", "--nonsense"], "No such option: --nonsense"),
        (["--", "--workers", "x"], "Invalid value for '--workers': "),
        (["--", "--shard", "1/2"], "--shard 1/2 behind --: each job has its own; give --tasks before the --"),
        (["--tasks", "3", "--", "--only", "seed=0,compressor=knorm"], "--tasks 3: 1 cells have what --only asks for"),
        (["--out", "plain.txt"], "--out plain.txt: is a file; expected the name of a folder: choose another"),
    ):  # fmt: skip
        assert main(["submit", str(suite), "--cluster", "local", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"malloc-bench: {line}") and said.count("\n") == 1
    assert not list(tmp_path.glob("*of*")) and not list(tmp_path.glob("**/*-jobs"))


@pytest.mark.slow
def test_jobs_run_shards_that_merge_to_the_run(suite: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("submitit")
    words = ["submit", str(suite), "--tasks", "2", "--cluster", "local", "--set", "timeout_min=5"]
    assert main([*words, "--", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 jobs: ") and said[0].endswith("; what they say is in runs/handed-in-jobs")
    merging = "malloc-bench merge runs/handed-in-1of2 runs/handed-in-2of2 --out runs/handed-in"
    assert said[1] == f"when they are done: {merging}"
    end = time.monotonic() + 200
    while sum("ok, 0 skipped" in path.read_text() for path in tmp_path.glob("runs/handed-in-jobs/*.out")) < 2:
        assert time.monotonic() < end, [path.read_text() for path in tmp_path.glob("runs/handed-in-jobs/*")]
        time.sleep(0.2)
    assert main(shlex.split(merging)[1:]) == 0
    run_suite(suite, tmp_path / "one", quiet=True)
    assert by_id(tmp_path / "runs/handed-in") == by_id(tmp_path / "one") and len(by_id(tmp_path / "one")) == 4


def test_a_job_that_fails_says_so_and_what_is_queued_again_is_the_same_command(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (path := tmp_path / "fails.py").write_text("raise SystemExit(1)")
    shard = Shard((sys.executable, str(path)))
    with pytest.raises(Exception, match="non-zero exit status 1"):
        shard()
    again = shard.checkpoint()
    assert again.function == shard and (again.args, again.kwargs) == ((), {})


def test_what_is_wrong_is_said_before_anything_is_queued(suite: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["submit", str(tmp_path / "none.yaml")]) == 2 and "none.yaml" in capsys.readouterr().err
    assert main(["submit", str(suite)]) == 2
    said = "malloc-bench: submitit is not installed: pip install 'malloc-bench[slurm]'\n"
    assert capsys.readouterr().err == said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm here
    for words, line in (
        (["--tasks", "9"], "tasks 9: handed-in has 4 cells, expected from 1 to as many tasks"),
        (["--set", "timeout_min"], "--set timeout_min: expected KEY=VALUE, as in timeout_min=600"),
        (["--cluster", "local", "--set", "timeout=5"], "Parameter 'timeout' need to be prefixed by an executor name."),
        ([], "Could not detect \"srun\", are you indeed on a slurm cluster?"),
    ):  # fmt: skip
        assert main(["submit", str(suite), *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"malloc-bench: {line}") and said.count("\n") == 1
    with pytest.raises(ValueError, match="nothing"):
        submit("nothing", 1)
    assert not list(tmp_path.glob("runs/*of*"))
